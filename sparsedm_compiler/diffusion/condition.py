"""What a model is told beside its input: class labels, text embeddings, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import DataError

Condition: TypeAlias = Tensor | Mapping[str, "Condition"]
"""Class labels [B], or keyword arguments of the model's forward, each a tensor [B, ...].

A mapping may hold a mapping, e.g. SDXL's ``added_cond_kwargs``.
"""


def read_condition(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file by name. Raises DataError."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read the condition {path}: {error}") from error
    if not found:
        raise DataError(f"{path} holds no tensors")
    return found


def map_condition(change: Callable[[Tensor], Tensor], given: Condition) -> Condition:
    """``given`` with every tensor changed. Raises DataError for anything that is no tensor.

    >>> map_condition(lambda x: x + 1, {"y": torch.tensor([1, 2])})
    {'y': tensor([2, 3])}
    """
    if isinstance(given, Tensor):
        return change(given)
    if not isinstance(given, Mapping):
        raise DataError(
            f"a condition of type {type(given).__name__} is neither a tensor [B, ...] nor a "
            "mapping from names of the model's forward to tensors"
        )
    return {name: map_condition(change, part) for name, part in given.items()}


def tensors(given: Condition, place: str = "the condition") -> dict[str, Tensor]:
    """Every tensor of ``given`` under the words that say where it is."""
    if isinstance(given, Tensor):
        return {place: given}
    map_condition(lambda part: part, given)
    found: dict[str, Tensor] = {}
    for name, part in given.items():
        found |= tensors(part, f"{place} {name!r}")
    return found


def check_count(given: Condition, count: int) -> None:
    """Raises DataError unless every tensor of ``given`` has ``count`` rows."""
    for place, part in tensors(given).items():
        if part.ndim == 0 or len(part) != count:
            raise DataError(f"{place} {list(part.shape)} has no row for each of {count} images")


def stack_conditions(first: Condition, second: Condition) -> Condition:
    """The rows of ``first``, then those of ``second``. Raises DataError where they do not fit."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.shape[1:] != second.shape[1:]:
            raise DataError(
                f"conditions {list(first.shape)} and {list(second.shape)} make no one batch: all "
                "but the first size must agree"
            )
        return torch.cat([first, second.to(first)])
    if isinstance(first, Tensor) or isinstance(second, Tensor) or {*first} != {*second}:
        raise DataError(
            f"conditions {describe_condition(first)} and {describe_condition(second)} make no one "
            "batch: give both the same names"
        )
    return {name: stack_conditions(part, second[name]) for name, part in first.items()}


def describe_condition(given: Condition) -> str:
    """``given`` in the words of an error, e.g. "a tensor [4]" or "{context}"."""
    if isinstance(given, Tensor):
        return f"a tensor {list(given.shape)}"
    return "{" + ", ".join(given) + "}"


def take_rows(given: Condition, at: Tensor | range | slice | int) -> Condition:
    """The rows ``at`` these places of every tensor of ``given``.

    >>> take_rows(torch.tensor([7, 8, 9]), range(1, 3))
    tensor([8, 9])
    >>> take_rows({"context": torch.eye(2)}, 1)
    {'context': tensor([0., 1.])}
    """
    index = slice(at.start, at.stop) if isinstance(at, range) else at
    return map_condition(lambda part: part[index], given)


def move_condition(given: Condition, like: Tensor) -> Condition:
    """``given`` on the device of ``like``, its floating-point numbers in the dtype of ``like``."""
    return map_condition(
        lambda part: part.to(like.device, like.dtype if part.is_floating_point() else part.dtype),
        given,
    )
