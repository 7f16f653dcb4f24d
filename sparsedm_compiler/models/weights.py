"""Weights from a file into a model, with every misfit named."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import CheckpointError
from ..fileio import explain_unpickling

Model = TypeVar("Model", bound=nn.Module)

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
SHOWN = 3
"""Number of names that an error lists before it only counts."""


def load_weights(model: Model, path: str | Path) -> Model:
    """Loads a file of weights into a model, in place; the names and shapes must match exactly.

    Tied weights may be in the file under one of their names. On the meta device only names and
    shapes are checked.

    Args:
        model: The model to load into.
        path: A safetensors file (also one that ``sparsedm_compiler.save`` wrote: its latent
            weights are loaded, not its pattern), or a state_dict in a .pt, .pth, .bin or .ckpt
            file.

    Returns:
        ``model`` itself.

    Raises:
        CheckpointError: The file cannot be read, or its tensors are missing, unknown or of another
            shape.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"weight": torch.ones(1, 2)}, f"{folder}/w.safetensors")
        ...     linear = nn.Linear(2, 1, bias=False)
        ...     load_weights(linear, f"{folder}/w.safetensors").weight.tolist()
        [[1.0, 1.0]]
    """
    tensors = read_weights(Path(path))
    held: dict[str, Tensor] = model.state_dict(keep_vars=True)
    loaded = {id(held[name]) for name in tensors if name in held}
    missing = [name for name, tensor in held.items() if id(tensor) not in loaded]
    unknown = [name for name in tensors if name not in held]
    shapes = [
        f"{name} is {list(tensor.shape)}, not {list(held[name].shape)}"
        for name, tensor in tensors.items()
        if name in held and tensor.shape != held[name].shape
    ]
    misfits = [("missing", missing), ("unknown", unknown), ("of another shape", shapes)]
    if wrong := [f"{kind}: {list_names(names)}" for kind, names in misfits if names]:
        raise CheckpointError(
            f"{path} does not fit this {type(model).__name__}; {'; '.join(wrong)}{_advise(unknown)}"
        )
    if not any(tensor.is_meta for tensor in held.values()):
        model.load_state_dict(tensors, strict=False)
    return model


def _advise(unknown: list[str]) -> str:
    """Returns how to go on, where the unknown names tell who wrote the file; else ""."""
    if any(mark in name for name in unknown for mark in _MASKS):
        return (
            ". It has masks of a pruning tool, which sparsedm convert FILE dense.safetensors "
            "--form dense multiplies in"
        )
    if unknown and all(name.endswith("attn.qkv.bias") for name in unknown):
        return ". SparseDM's own training adds these biases: build the model with qkv_bias=True"
    return ""


_MASKS = ("_mma_mask", "_weight_mask", "weight_orig", ".parametrizations.")


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """Reads the tensors of a file by name, to the CPU.

    Raises CheckpointError for a file that cannot be read or is no state_dict.
    """
    try:
        if path.suffix in PICKLES:
            tensors: Any = torch.load(path, map_location="cpu", weights_only=True)
        else:
            tensors = load_file(path)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        why = explain_unpickling(error)
        raise CheckpointError(f"cannot read weights from {path}: {why}") from error
    if not isinstance(tensors, dict):
        content = "no dict"
    elif not all(isinstance(value, Tensor) for value in tensors.values()):
        content = f"a dict of {list_names([*map(str, tensors)])}"
    else:
        return tensors
    raise CheckpointError(
        f"{path} holds {content}, not a state_dict: save the state_dict in it alone, "
        "torch.save(found['...'], path)"
    )


def list_names(names: list[str]) -> str:
    """Lists the first names and counts the others.

    >>> list_names(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
