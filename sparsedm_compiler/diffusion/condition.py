"""Conditions of a diffusion model: class labels, named tensors such as text embeddings, or none."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import DataError

Condition: TypeAlias = Tensor | Mapping[str, "Condition"]
"""Class labels [B], or keyword arguments of the model's forward, every tensor of shape [B, ...].

A mapping may hold a mapping, e.g. SDXL's ``added_cond_kwargs``.
"""


def read_condition(path: str | Path) -> dict[str, Tensor]:
    """Reads the tensors of a .safetensors file by name.

    Raises DataError for a file that cannot be read or is empty.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read the condition {path}: {error}") from error
    if not tensors:
        raise DataError(f"{path} holds no tensors")
    return tensors


def map_condition(function: Callable[[Tensor], Tensor], condition: Condition) -> Condition:
    """Applies ``function`` to every tensor of ``condition``.

    Raises DataError for a condition that is neither a tensor nor a mapping.

    >>> map_condition(lambda x: x + 1, {"y": torch.tensor([1, 2])})
    {'y': tensor([2, 3])}
    """
    if isinstance(condition, Tensor):
        return function(condition)
    if not isinstance(condition, Mapping):
        raise DataError(
            f"a condition of type {type(condition).__name__} is neither a tensor [B, ...] nor a "
            "mapping from names of the model's forward to tensors"
        )
    return {name: map_condition(function, part) for name, part in condition.items()}


def list_tensors(condition: Condition, label: str = "the condition") -> dict[str, Tensor]:
    """Lists every tensor of ``condition`` under a label for error messages.

    >>> list_tensors({"text": torch.zeros(2)})
    {"the condition 'text'": tensor([0., 0.])}
    """
    if isinstance(condition, Tensor):
        return {label: condition}
    map_condition(lambda part: part, condition)
    tensors: dict[str, Tensor] = {}
    for name, part in condition.items():
        tensors |= list_tensors(part, f"{label} {name!r}")
    return tensors


def check_count(condition: Condition, count: int) -> None:
    """Raises DataError unless every tensor of ``condition`` has ``count`` rows."""
    for label, tensor in list_tensors(condition).items():
        if tensor.ndim == 0 or len(tensor) != count:
            raise DataError(f"{label} {list(tensor.shape)} has no row for each of {count} images")


def stack_conditions(first: Condition, second: Condition) -> Condition:
    """Concatenates the rows of two conditions, those of ``first`` in front.

    Raises DataError where names or shapes differ.
    """
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


def describe_condition(condition: Condition) -> str:
    """Describes ``condition`` for an error message, e.g. "a tensor [4]" or "{context}"."""
    if isinstance(condition, Tensor):
        return f"a tensor {list(condition.shape)}"
    return "{" + ", ".join(condition) + "}"


def take_rows(condition: Condition, rows: Tensor | range | slice | int) -> Condition:
    """Returns the given rows of every tensor of a condition.

    Args:
        condition: Class labels [B], or named tensors, each [B, ...].
        rows: Row numbers [b], a range or slice of them, or one number, which drops the batch
            dimension. A range must count up by one.

    Returns:
        A condition of the same form with only those rows.

    Raises:
        DataError: The condition is neither a tensor nor a mapping of tensors.

    Example:
        >>> take_rows(torch.tensor([7, 8, 9]), range(1, 3))
        tensor([8, 9])
        >>> take_rows({"context": torch.eye(2)}, 1)
        {'context': tensor([0., 1.])}
    """
    index = slice(rows.start, rows.stop) if isinstance(rows, range) else rows
    return map_condition(lambda part: part[index], condition)


def move_condition(condition: Condition, like: Tensor) -> Condition:
    """Moves ``condition`` to the device of ``like``, floating-point tensors also to its dtype."""
    return map_condition(
        lambda part: move(part, like.device).to(
            like.dtype if part.is_floating_point() else part.dtype
        ),
        condition,
    )


def check_labels(model: nn.Module, labels: Tensor) -> None:
    """Raises DataError for class labels beyond the embedding that a model has for them.

    Looked up on a GPU, one would end every later call of the process, too.
    """
    sizes = [
        module.num_embeddings
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and _LABELS.search(name)
    ]
    if not sizes or not labels.numel() or labels.is_floating_point():
        return
    largest = int(labels.max())
    if largest >= max(sizes):
        raise DataError(
            f"label {largest} is none of the {max(sizes)} classes of {type(model).__name__}"
        )


_LABELS = re.compile(r"(class|label)_emb\w*$|embedding_table$")
"""The names of embeddings of class labels, in models of diffusers, DiT and U-ViT."""


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Moves a tensor to a device: to CUDA by pinned memory, or the copy would wait for its work."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)  # expanded ones, too
