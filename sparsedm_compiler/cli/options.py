"""Options that several commands share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    import torch

MODES = ("infer", "train")


def add_model(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Which model."""
    parser.add_argument(
        "--model",
        required=required,
        metavar="MODEL",
        help="the folder of a training run, a preset (sparsedm macs --list), a diffusers config or "
        "its folder, or a function package.module:function that returns the model",
    )
    add_model_options(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where to run."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (cuda where there is one)")


def add_backend(parser: argparse.ArgumentParser) -> None:
    """What compiles."""
    parser.add_argument(
        "--backend",
        default="auto",
        help="what runs the graph: inductor, eager or another torch.compile backend (auto: "
        "inductor where there is a C++ compiler)",
    )


def device_of(options: argparse.Namespace) -> torch.device:
    """The device that was asked for. Raises ConfigError where there is no such."""
    import torch

    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).partition("\n")[0]
        raise ConfigError(f"cannot run on --device {name}: {first}") from error
    return device


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Changes of the model's configuration."""
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a field of the model's configuration, e.g. depth=4; repeat for more",
    )


def model_options(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of the model's configuration that were given. Raises ConfigError."""
    found: dict[str, Any] = {}
    if options.option:
        from ..experiment.yaml_values import assign

        for assignment in options.option:
            assign(found, assignment)
    return found


def numbers_in(text: str, between: str, name: str, example: str) -> tuple[int, ...]:
    """The whole numbers in an option's value, none below 0. Raises ConfigError."""
    parts = [part.strip() for part in text.split(between)]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"{name} {text!r} are not whole numbers like {example}")
    return tuple(map(int, parts))
