"""``load_weights``: a file of weights into a model, with every misfit named."""

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

Model = TypeVar("Model", bound=nn.Module)

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
SHOWN = 3
"""How many names an error lists before it only counts."""


def load_weights(model: Model, path: str | Path) -> Model:
    """``model`` itself with the weights at ``path``, which must be all of its own and no others.

    ``path``: safetensors (what ``sparsedm_compiler.save`` writes included: its latent weights are
    loaded, not its pattern), or a state_dict in a .pt, .pth, .bin or .ckpt file. Tied weights may
    be there under one of their names. On the meta device only names and shapes are checked.
    Raises CheckpointError for a file that cannot be read or does not fit.
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
    found = [("missing", missing), ("unknown", unknown), ("of another shape", shapes)]
    if wrong := [f"{what}: {listed(names)}" for what, names in found if names]:
        raise CheckpointError(
            f"{path} does not fit this {type(model).__name__}; {'; '.join(wrong)}"
        )
    if not any(tensor.is_meta for tensor in held.values()):
        model.load_state_dict(tensors, strict=False)
    return model


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """The tensors in a file, by name, on the CPU. Raises CheckpointError."""
    try:
        if path.suffix in PICKLES:
            found: Any = torch.load(path, map_location="cpu", weights_only=True)
        else:
            found = load_file(path)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        first = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"cannot read weights from {path}: {first}") from error
    if not isinstance(found, dict) or not all(isinstance(each, Tensor) for each in found.values()):
        what = f"a dict of {listed([*map(str, found)])}" if isinstance(found, dict) else "no dict"
        raise CheckpointError(
            f"{path} holds {what}, not a state_dict: save the state_dict in it alone, "
            "torch.save(found['...'], path)"
        )
    return found


def listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
