"""``sparsedm sample``: samples images from a model, as a folder of PNGs or as one grid."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DataError
from .job import Job, check_writable
from .launcher import join_processes, wait_for_processes
from .open_student import add_source_options, add_weights, resolve_source
from .sampling_options import SamplingRequest, add_sampling_options, make_sampling_request

if TYPE_CHECKING:
    from torch import nn

    from ..diffusion import Condition

ABOUT = """\
sample images from a model, pruned or dense

The model is MODEL with --weights, or that of the training run whose folder MODEL is; the run's own
settings are then the defaults. OUT is a folder (000000.png ...) or a file OUT.png, which becomes
one grid. Image i depends on (seed, i) alone, so the same command under "accelerate launch" or
torchrun makes the same images on any number of processes. Images that are already in the folder
are kept: the same command resumes an interrupted one."""
EXAMPLE = """\
  sparsedm sample --model runs/first --out samples.png --count 40
  sparsedm sample --model uvit-cifar10-small --weights student.safetensors --out images --count 5000
  accelerate launch -m sparsedm_compiler sample --model runs/first --out images --count 50000"""
PROVENANCE = "samples.json"
"""The file beside the images that says how they were made."""
COLUMNS = 10
HASHED = 64
"""The first images, whose conditions go into ``PROVENANCE``."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    add_source_options(parser)
    add_weights(parser)
    parser.add_argument("--out", required=True, help="folder for PNGs, or a .png for one grid")
    parser.add_argument("--count", type=int, default=40, help="images to sample (40)")
    parser.add_argument(
        "--columns", type=int, default=COLUMNS, help=f"images in a row of the grid ({COLUMNS})"
    )
    add_sampling_options(parser)


def prepare(options: argparse.Namespace) -> Job:
    """Checks model, weights, condition and folder. Raises SparseDMError."""
    main = join_processes()
    source = resolve_source(options)
    request = make_sampling_request(options, source, options.count)
    grid = Path(options.out).suffix == ".png"
    out = check_writable(options.out, folder=not grid)
    if options.columns < 1:
        raise ConfigError(f"--columns {options.columns} is not >= 1")
    provenance = describe_provenance(request)
    if not grid:
        check_provenance(out, provenance)

    def run() -> None:
        model = source.open()
        if grid:
            sample_grid(request, model, out, options.columns, main)
        else:
            sample_folder(request, model, out, provenance, main)
        if main:
            print(f"drew {options.count} images by {request.sampler} into {out}")

    images = f"{options.count} images {list(request.plan.shape[1:])} by {request.sampler}"
    lines = f"model   {source}", f"sample  {images}, seed {options.seed}", f"out     {out}"
    return Job(lines, run)


def sample_folder(
    request: SamplingRequest, model: nn.Module, out: Path, provenance: dict[str, Any], main: bool
) -> None:
    """Writes every image that is missing in the folder, and how all of them were made."""
    from functools import partial

    from ..reporting import has_images, save_images

    if main:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(provenance, indent=2) + "\n"
        (out / PROVENANCE).write_text(text, encoding="utf-8")
    wait_for_processes()
    for numbers, images in request.sample(model, skip=partial(has_images, out), progress=main):
        save_images(out, numbers, images, resume=True)
    wait_for_processes()


def sample_grid(
    request: SamplingRequest, model: nn.Module, out: Path, columns: int, main: bool
) -> None:
    """Writes all images as one grid, on the first process."""
    import torch

    from ..evaluate.process_group import gather_objects
    from ..train import SampleGrids

    own = dict(request.sample(model, progress=main))
    parts = {numbers: images for part in gather_objects(own) for numbers, images in part.items()}
    images = torch.cat([parts[numbers] for numbers in sorted(parts, key=lambda part: part.start)])
    if main:
        columns = min(columns, len(images))
        SampleGrids(tuple(images.shape[1:]), columns=columns).save(out, images)


def describe_provenance(request: SamplingRequest) -> dict[str, Any]:
    """Returns everything that the images depend on."""
    from ..evaluate.inception import hash_file

    source, plan = request.source, request.plan
    condition = plan.condition(range(HASHED)) if callable(plan.condition) else plan.condition
    null = None if plan.guidance is None else plan.guidance.null
    return {
        "model": Path(source.name).name,
        "options": dict(source.options),
        "weights_sha256": None if source.weights is None else hash_file(source.weights),
        "pattern": source.pattern,
        "sampler": request.sampler,
        "objective": request.objective,
        "betas": request.betas,
        "condition": None if condition is None else hash_condition(condition),
        "null": hash_condition(null) if isinstance(null, Mapping) else null,
        "vae": request.vae,
        "seed": plan.seed,
        "shape": list(plan.shape[1:]),
    }


def hash_condition(condition: Condition) -> str:
    """Returns a short hash of the tensors of a condition."""
    from ..train.fingerprints import fingerprint_condition

    return fingerprint_condition(condition).sha256[:16]


def check_provenance(out: Path, provenance: dict[str, Any]) -> None:
    """Raises ConfigError where the folder holds images that were made in another way."""
    if not (out / PROVENANCE).exists():
        return
    try:
        before = json.loads((out / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {out / PROVENANCE}: {error}; remove that folder") from error
    different = [name for name in provenance if before.get(name) != provenance[name]]
    if different:
        name = different[0]
        raise ConfigError(
            f"{out} holds images of {name} {before.get(name)!r}, not {provenance[name]!r}: choose "
            "another folder, or remove that one"
        )
