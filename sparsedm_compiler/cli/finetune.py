"""``sparsedm finetune``: prunes a model, trains it, and samples and scores the result."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..progress import format_duration
from .job import Job, check_writable
from .launcher import join_processes

if TYPE_CHECKING:
    from ..experiment.run_config import RunConfig

ABOUT = """\
prune a model and fine-tune it against its dense teacher

The configuration is read from a recipe of the paper (--recipe), then a YAML or JSON file
(--config), then single values (--set section.name=value); later values win. The run writes
checkpoints, a log, curves, samples and results into its folder. The same command resumes an
interrupted run; on Ctrl-C and SIGTERM a run saves a checkpoint first. Works under
"accelerate launch" and torchrun."""
EXAMPLE = """\
  sparsedm finetune --recipe cifar10-uvit --weights nnet_ema.pth --pattern 2:4 \\
      --data torchvision:CIFAR10:data --out runs/first
  sparsedm finetune --config run.yaml --set train.lr=1e-3 --set train.images=64000 --dry-run
  accelerate launch -m sparsedm_compiler finetune --config run.yaml"""
SHORTCUTS: Mapping[str, tuple[str, str]] = {
    "model": ("model.name", "the dense model: a preset, a diffusers folder, a function"),
    "weights": ("model.weights", "its weights: .safetensors, .pt or .pth"),
    "data": ("data.train", "images: a folder, an .npz, hf:FOLDER, torchvision:NAME:FOLDER, digits"),
    "held-out": ("data.held_out", "images to measure the held-out loss on, never trained on"),
    "pattern": ("prune.pattern", "n:m keeps n of m, e.g. 2:4 or 1:8"),
    "method": ("train.method", "sparsedm, ste, sr-ste, asp, progressive, transfer, dense ..."),
    "seed": ("train.seed", "seed of the training"),
    "out": ("out", "folder of the run"),
}
"""Options that set one value of the configuration: option -> (value, help)."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
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
        help="set a value of the configuration, e.g. train.lr=1e-3; may be repeated",
    )
    for name, (key, about) in SHORTCUTS.items():
        add(f"--{name}", metavar=name.upper().replace("-", "_"), help=f"{about} ({key})")


def prepare(options: argparse.Namespace) -> Job:
    """Reads the configuration; with --dry-run opens model and data too. Raises SparseDMError."""
    from ..experiment import run as experiment

    main = join_processes()
    config = build_config(options)
    folder = check_writable(config.out, folder=True)

    def run() -> None:
        values = experiment.run(config, progress=main)
        if main:
            print_results(folder, values)

    return Job(tuple(experiment.describe(config).splitlines()) if options.dry_run else (), run)


def build_config(options: argparse.Namespace) -> RunConfig:
    """Returns the configuration that all options together make. Raises ConfigError."""
    from ..experiment.run_config import RunConfig

    values = vars(options)
    shortcuts = [
        f"{key}={json.dumps(value) if key != 'train.seed' else value}"
        for name, (key, _) in SHORTCUTS.items()
        if (value := values[name.replace("-", "_")]) is not None
    ]
    below = {} if options.recipe is None else {"recipe": options.recipe}
    return RunConfig.read(options.config, [*shortcuts, *options.set], **below)


def print_results(folder: Path, values: Mapping[str, Any]) -> None:
    """Prints speed, losses and scores, and the command that compares runs."""
    from ..evaluate.score import Score

    steps, compiling = values["seconds"], values.get("compile_seconds", 0.0)
    print(
        f"{values['images_per_second']:.3g} images/s; {format_duration(steps)} in steps, "
        f"{format_duration(compiling)} compiling them"
    )
    if values["held_out"]:
        last = values["held_out"][-1]
        ema = "" if last["ema"] is None else f", of the EMA {last['ema']:.4f}"
        print(f"held-out loss {last['student']:.4f}{ema}")
    for score in [Score(**part) for part in values["scores"]]:
        print(f"{score.metric}-{score.network} {score.value:.4g}{score.warning}")
    print(f"wrote {folder}; compare runs with: sparsedm report {folder}")
