"""``sparsedm finetune``: from a dense model to a trained, sampled and scored sparse one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .job import Job, writable
from .launcher import join

if TYPE_CHECKING:
    from ..experiment.run_config import RunConfig

ABOUT = """\
prune a model and fine-tune it against its dense teacher

Everything is one configuration: a YAML or JSON file (--config), a recipe of the paper (--recipe),
and single values (--set section.name=value) on top. The run writes checkpoints, a log, curves,
samples and results into its folder. The same command resumes a run that was interrupted; Ctrl-C
and SIGTERM save it first. Works under "accelerate launch" and torchrun."""
EXAMPLE = """\
  sparsedm finetune --recipe cifar10-uvit --weights nnet_ema.pth --pattern 2:4 \\
      --data torchvision:CIFAR10:data --out runs/first
  sparsedm finetune --config run.yaml --set train.lr=1e-3 --set train.images=64000 --dry-run
  accelerate launch -m sparsedm_compiler finetune --config run.yaml"""
SHORT: Mapping[str, tuple[str, str]] = {
    "model": ("model.name", "the dense model: a preset, a diffusers folder, a function"),
    "weights": ("model.weights", "its weights: .safetensors, .pt or .pth"),
    "data": ("data.train", "images: a folder, an .npz, hf:FOLDER, torchvision:NAME:FOLDER, digits"),
    "held-out": ("data.held_out", "images to measure on, never trained on"),
    "pattern": ("prune.pattern", "n:m keeps n of m, e.g. 2:4 or 1:8"),
    "method": ("train.method", "sparsedm, ste, sr-ste, asp, progressive, transfer, dense ..."),
    "seed": ("train.seed", "seed of everything random in the training"),
    "out": ("out", "folder of the run"),
}
"""Options that stand for a value of the configuration."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--config", metavar="FILE", help="the configuration, YAML or JSON")
    add(
        "--recipe", help="start from a recipe of the paper, e.g. cifar10-uvit or cifar10-uvit+short"
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.NAME=VALUE",
        help="one value of the configuration, e.g. train.lr=1e-3; repeat for more",
    )
    for name, (place, about) in SHORT.items():
        add(f"--{name}", metavar=name.upper().replace("-", "_"), help=f"{about} ({place})")


def prepare(options: argparse.Namespace) -> Job:
    """Read the configuration; with --dry-run open all it names. Raises SparseDMError."""
    from ..experiment import run as runs

    main = join()
    config = config_of(options)
    folder = writable(config.out, folder=True)

    def run() -> None:
        values = runs.run(config, progress=main)
        if main:
            show(folder, values)

    return Job(tuple(runs.describe(config).splitlines()) if options.dry_run else (), run)


def config_of(options: argparse.Namespace) -> RunConfig:
    """The configuration of all options together. Raises ConfigError."""
    from ..experiment.run_config import RunConfig

    given = vars(options)
    short = [
        f"{place}={json.dumps(value) if place != 'train.seed' else value}"
        for name, (place, _) in SHORT.items()
        if (value := given[name.replace("-", "_")]) is not None
    ]
    below = {} if options.recipe is None else {"recipe": options.recipe}
    return RunConfig.read(options.config, [*short, *options.set], **below)


def show(folder: Path, values: Mapping[str, Any]) -> None:
    """Print what came out, and what to do with it."""
    if values["held_out"]:
        last = values["held_out"][-1]
        average = "" if last["ema"] is None else f", of the average {last['ema']:.4f}"
        print(f"held-out loss {last['student']:.4f}{average}")
    for score in values["scores"]:
        print(f"{score['metric']}-{score['network']} {score['value']:.4g}")
    print(f"wrote {folder}; compare runs with: sparsedm report {folder}")
