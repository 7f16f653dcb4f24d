"""``sparsedm sample``: images of a model, pruned or dense, as a folder of PNGs or as one grid."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DataError
from .job import Job, writable
from .launcher import join, wait
from .open_student import add_source, add_weights, source_of
from .sampling_options import Drawing, add_drawing, drawing_of

if TYPE_CHECKING:
    from torch import nn

ABOUT = """\
draw images from a model

MODEL with --weights, or the folder of a training run, whose settings are then taken. OUT is a
folder (000000.png ...) or a file OUT.png, a grid. Image i depends on (seed, i) alone, so the same
command under "accelerate launch" or torchrun draws the same images on any number of processes.
Images that are in the folder already are not drawn again: the same command goes on."""
EXAMPLE = """\
  sparsedm sample --model runs/first --out samples.png --count 40
  sparsedm sample --model uvit-cifar10-small --weights student.safetensors --out images --count 5000
  accelerate launch -m sparsedm_compiler sample --model runs/first --out images --count 50000"""
NOTES = "samples.json"
COLUMNS = 10


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_source(parser)
    add_weights(parser)
    parser.add_argument("--out", required=True, help="folder for PNGs, or a .png for one grid")
    parser.add_argument("--count", type=int, default=40, help="images to draw (40)")
    parser.add_argument(
        "--columns", type=int, default=COLUMNS, help=f"images in a row of the grid ({COLUMNS})"
    )
    add_drawing(parser)


def prepare(options: argparse.Namespace) -> Job:
    """Check model, weights, condition and folder. Raises SparseDMError."""
    main = join()
    source = source_of(options)
    drawing = drawing_of(options, source, options.count)
    grid = Path(options.out).suffix == ".png"
    out = writable(options.out, folder=not grid)
    if options.columns < 1:
        raise ConfigError(f"--columns {options.columns} is not >= 1")
    notes = notes_of(drawing)
    if not grid:
        refuse_others(out, notes)

    def run() -> None:
        model = source.open()
        if grid:
            draw_grid(drawing, model, out, options.columns, main)
        else:
            draw_folder(drawing, model, out, notes, main)
        if main:
            print(f"drew {options.count} images by {drawing.sampler} into {out}")

    what = f"{options.count} images {list(drawing.plan.shape[1:])} by {drawing.sampler}"
    return Job((f"model   {source}", f"sample  {what}, seed {options.seed}", f"out     {out}"), run)


def draw_folder(
    drawing: Drawing, model: nn.Module, out: Path, notes: dict[str, Any], main: bool
) -> None:
    """Write every image that is not there yet, and what all of them were drawn by."""
    from functools import partial

    from ..reporting import save_images, saved

    if main:
        out.mkdir(parents=True, exist_ok=True)
        (out / NOTES).write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")
    wait()
    for numbers, images in drawing.batches(model, skip=partial(saved, out), progress=main):
        save_images(out, numbers, images, resume=True)
    wait()


def draw_grid(drawing: Drawing, model: nn.Module, out: Path, columns: int, main: bool) -> None:
    """Write all images as one picture."""
    import torch

    from ..evaluate.process_group import gathered
    from ..train import SampleGrids

    parts = dict(drawing.batches(model, progress=main))
    whole = {numbers: images for part in gathered(parts) for numbers, images in part.items()}
    images = torch.cat([whole[numbers] for numbers in sorted(whole, key=lambda part: part.start)])
    if main:
        columns = min(columns, len(images))
        SampleGrids(tuple(images.shape[1:]), columns=columns).save(out, images)


def notes_of(drawing: Drawing) -> dict[str, Any]:
    """What the images depend on, for those who find them."""
    from ..evaluate.inception import digest_of

    source, plan = drawing.source, drawing.plan
    return {
        "model": Path(source.name).name,
        "options": dict(source.options),
        "weights_sha256": None if source.weights is None else digest_of(source.weights),
        "pattern": source.pattern,
        "sampler": drawing.sampler,
        "objective": drawing.objective,
        "seed": plan.seed,
        "shape": list(plan.shape[1:]),
    }


def refuse_others(out: Path, notes: dict[str, Any]) -> None:
    """Raise ConfigError where the folder holds images that were drawn otherwise."""
    if not (out / NOTES).exists():
        return
    try:
        found = json.loads((out / NOTES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {out / NOTES}: {error}; remove that folder") from error
    if wrong := [name for name in notes if found.get(name) != notes[name]]:
        name = wrong[0]
        raise ConfigError(
            f"{out} holds images of {name} {found.get(name)!r}, not {notes[name]!r}: choose "
            "another folder, or remove that one"
        )
