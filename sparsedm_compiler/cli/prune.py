"""``sparsedm prune``: prunes a trained model in one shot, without training."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .job import Job, check_writable
from .open_student import add_weights, resolve_source
from .options import add_backend, add_device, add_model
from .prune_run import PruneRun, get_memory

if TYPE_CHECKING:
    from ..data import ImageData
    from ..diffusion.objective import NoiseScheduler
    from .open_student import ModelSource

ABOUT = """\
prune a trained model in one shot, from the inputs that its layers see, without training

Images are noised as in training, the layers are pruned one after the other, and the kept weights
adapt (OBS, as SparseGPT). The folder gets student.safetensors, which the other commands and "train"
start from, and report.json with the error of every layer. The same command resumes an
interrupted run."""
EXAMPLE = """\
  sparsedm prune --model uvit-cifar10-small --weights nnet_ema.pth --pattern 2:4 \\
      --data torchvision:CIFAR10:data --out runs/one_shot
  sparsedm prune --model path/to/unet --pattern 1:4 --data images --size 64 --method wanda \\
      --out runs/wanda
  sparsedm prune --model uvit-cifar10-small --weights nnet_ema.pth --pattern 1:4 \\
      --mixed 2:4,1:4,1:8,1:16 --permute --data torchvision:CIFAR10:data --out runs/mixed"""
BUDGETS = ("macs", "time")
CHOSEN_IN_FILE: Mapping[str, Any] = {
    "pattern": None,
    "policy": "structural",
    "keep_dense": [],
    "override": [],
    "budget": "macs",
}
"""Options that the file of a choice decides, with their defaults."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    add = parser.add_argument
    add_model(parser)
    add_weights(parser)
    add("--pattern", help="n:m keeps n of m, e.g. 2:4 or 1:8 (left out with --mixed FILE.json)")
    add("--data", required=True, help="images to calibrate with, as sparsedm finetune takes them")
    add("--size", type=int, help="side in pixels to which images are resized")
    add("--no-labels", action="store_true", help="leave labels and texts of the data out")
    add("--held-out", help="images to measure the loss on, before and after")
    add("--method", default="obs", help="obs, wanda or magnitude (default: obs)")
    add("--policy", default="structural", help="which layers stay dense: structural, uvit or all")
    add("--keep-dense", action="append", default=[], metavar="GLOB", help="layers to leave alone")
    add(
        "--override",
        action="append",
        default=[],
        metavar="GLOB=PATTERN",
        help="another pattern for some layers; the first match wins",
    )
    add("--permute", action="store_true", help="permute channels first, so that more is kept")
    add(
        "--mixed",
        metavar="PATTERNS",
        help="choose the pattern of every layer from a list, e.g. 2:4,1:4,1:8, at the cost of "
        "--pattern in all of them; or the patterns.json of an earlier choice",
    )
    add("--budget", default="macs", help="what --mixed keeps to: macs, or time as measured here")
    add("--images", type=int, default=512, help="images to calibrate with (512)")
    add("--batch-size", type=int, default=32, help="images per call (32)")
    add("--objective", help="what the model predicts: eps, v, x0 or flow (default: as its folder)")
    add("--timestep-weights", default="uniform", help="uniform, or logarithmic as in OBS-Diff")
    add("--damping", type=float, help="share of the Hessian's mean diagonal added to it")
    add("--passes", type=int, default=16, help="most passes over the images (16)")
    add("--memory", type=float, default=4.0, metavar="GIB", help="GiB for Hessians (4)")
    add("--seed", type=int, default=0, help="seed of noise and noise levels")
    add("--out", required=True, help="folder of the result")
    add_backend(parser)
    add_device(parser)
    parser.set_defaults(mode="train")


def prepare(options: argparse.Namespace) -> Job:
    """Checks model, data and options without writing. Raises SparseDMError."""
    source = resolve_source(options)
    if source.pruned is not None:
        raise ConfigError(f"{source.weights} is pruned already: give dense weights")
    pattern, choice = read_choice(options)
    check_options(options, pattern, choice)
    folder = check_writable(options.out, folder=True)
    data = open_images(options.data, options)
    held_out = None if options.held_out is None else open_images(options.held_out, options)
    objective, scheduler = find_objective(source, options)
    run = PruneRun(options, source, pattern, choice, folder, data, held_out, objective, scheduler)
    text = (
        f"would prune {source} to {options.pattern or options.mixed} by {options.method}, "
        f"calibrated with {min(options.images, len(data))} images of {options.data}, and write "
        f"{folder}"
    )
    return Job((text,), run.run)


def check_options(options: argparse.Namespace, pattern: str, choice: dict[str, Any]) -> None:
    """Raises SparseDMError for options that are out of range or do not go together."""
    from .. import OneShotOptions
    from ..config import CompileConfig
    from ..train import calibration

    CompileConfig.create(pattern, **choice)
    memory = get_memory(options)
    OneShotOptions(options.method, options.damping, passes=options.passes, memory=memory)
    calibration.check_options(options.images, options.batch_size, options.timestep_weights)
    check_mixed(options)


def check_mixed(options: argparse.Namespace) -> None:
    """Raises SparseDMError for options of --mixed that do not go together."""
    from ..patterns import Pattern

    if options.budget not in BUDGETS:
        raise ConfigError(f"--budget {options.budget} is none of {', '.join(BUDGETS)}")
    if options.mixed is None:
        if options.budget != BUDGETS[0]:
            raise ConfigError(f"--budget {options.budget} is for --mixed: give its patterns too")
        return
    if names_choice(options.mixed):
        return
    patterns = [Pattern.parse(text) for text in options.mixed.split(",")]
    if all(pattern.is_dense for pattern in patterns):
        raise ConfigError(f"--mixed {options.mixed} prunes nothing: give patterns, e.g. 2:4,1:4")
    if options.override:
        raise ConfigError("--override and --mixed both choose patterns: give one of them")


def names_choice(mixed: str | None) -> bool:
    """Returns whether --mixed names the file of a choice, rather than patterns to choose from."""
    return mixed is not None and mixed.endswith(".json")


def read_choice(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Returns the pattern, and the options that choose the weights, as ``compile`` takes them."""
    from .. import PatternChoice

    if names_choice(options.mixed):
        for name, default in CHOSEN_IN_FILE.items():
            if vars(options)[name] != default:
                option = "--" + name.replace("_", "-")
                raise ConfigError(f"{option} is chosen in --mixed {options.mixed}: leave it out")
        read = PatternChoice.load(options.mixed)
        return read.pattern, read.options
    if options.pattern is None:
        raise ConfigError("--pattern is missing: give one, e.g. 2:4, or --mixed patterns.json")
    overrides = {}
    for text in options.override:
        glob, equals, pattern = text.rpartition("=")
        if not equals:
            raise ConfigError(f"--override {text!r} is not GLOB=PATTERN, e.g. '*.attn*=1:4'")
        overrides[glob] = pattern
    choice = {"keep_dense": options.keep_dense, "overrides": overrides, "policy": options.policy}
    return options.pattern, choice


def open_images(spec: str, options: argparse.Namespace) -> ImageData:
    """Opens the images of an option. Raises DataError."""
    from ..data import open_data

    return open_data(spec, size=options.size, labels=not options.no_labels)


def find_objective(
    source: ModelSource, options: argparse.Namespace
) -> tuple[str, NoiseScheduler | None]:
    """Returns what the model predicts, and the schedule of its noise; None for the default one.

    Raises ConfigError where the option contradicts the model's own folder.
    """
    from ..diffusion.schedulers import PREDICTIONS, make_scheduler
    from ..models.schedules import read_schedule

    schedule = read_schedule(source.name)
    if schedule is None:
        objective = options.objective or "eps"
        if objective not in PREDICTIONS:
            raise ConfigError(f"--objective {objective} is none of {', '.join(PREDICTIONS)}")
        return objective, None
    if options.objective not in (None, schedule.objective):
        raise ConfigError(
            f"{schedule.source} says that the model predicts {schedule.objective!r}, not "
            f"--objective {options.objective}"
        )
    if schedule.betas is None:
        return schedule.objective, None
    return schedule.objective, make_scheduler("ddpm", schedule.objective, betas=schedule.betas)
