"""Options that several commands share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    import torch

MODES = ("infer", "train")


def add_model(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds the options that name a model."""
    parser.add_argument(
        "--model",
        required=required,
        metavar="MODEL",
        help="the folder of a training run, a preset (sparsedm macs --list), a diffusers config or "
        "its folder, or a function package.module:function that returns the model",
    )
    add_model_options(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds the option that names the device."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if available)")


def add_backend(parser: argparse.ArgumentParser) -> None:
    """Adds the option that names the compiler of the graph."""
    parser.add_argument(
        "--backend",
        default="auto",
        help="compiler of the graph: inductor, eager or another torch.compile backend (default "
        "auto: inductor where a C++ compiler is installed, else eager)",
    )


def select_device(options: argparse.Namespace) -> torch.device:
    """Returns the device of the options. Raises ConfigError where it does not exist."""
    import torch

    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # clocks and names are those of the current one
    except (RuntimeError, AssertionError) as error:
        first = str(error).partition("\n")[0]
        raise ConfigError(f"cannot run on --device {name}: {first}") from error
    return device


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the option that changes the model's configuration."""
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set a field of the model's configuration, e.g. depth=4; may be repeated",
    )


def read_model_options(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of the model's configuration to set. Raises ConfigError."""
    fields: dict[str, Any] = {}
    if options.option:
        from ..experiment.yaml_values import assign

        for assignment in options.option:
            assign(fields, assignment)
    return fields


def parse_integers(text: str, separator: str, name: str, example: str) -> tuple[int, ...]:
    """Parses the value of the option ``name`` as integers >= 0. Raises ConfigError."""
    parts = [part.strip() for part in text.split(separator)]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"{name} {text!r} are not whole numbers like {example}")
    return tuple(map(int, parts))
