"""State_dicts in pickled files (.pt, .pth, .bin, .ckpt): tensors alone, no code is run."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from ..errors import CheckpointError
from ..fileio import explain_unpickling

PICKLES = (".pt", ".pth", ".bin", ".ckpt")

MODELOPT = "model_state_dict"
"""The state_dict in a file that ModelOpt's ``mto.save`` wrote, beside its ``modelopt_state``."""


def _make_dict(_: object = None) -> dict[Any, Any]:
    """Returns an empty dictionary, for a defaultdict, which torch's unpickler cannot fill."""
    return {}


_ALLOWED: list[Any] = [
    *((_make_dict, "collections.defaultdict"), dict),  # in the state of torch.ao.pruning
    *(SparseSemiStructuredTensorCUTLASS, SparseSemiStructuredTensorCUSPARSELT),
]
"""What a file may hold beside plain tensors and containers; making one runs no code of the file."""


def read_pickle(path: Path) -> dict[str, Any]:
    """Reads the dictionary in a pickled file, to the CPU.

    Raises CheckpointError for a file that cannot be read, needs code to be run, or holds no
    dictionary.
    """
    try:
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor")
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"cannot read weights from {path}, which holds more than tensors: save "
            f"model.state_dict() alone ({explain_unpickling(error)})"
        ) from error
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        raise CheckpointError(f"cannot read weights from {path}: {error!r}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state_dict")
    return {str(name): value for name, value in content.items()}


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Reads the state_dict in a pickled file. Raises CheckpointError as ``read_pickle`` does."""
    return take_state_dict(read_pickle(path), str(path))


def take_state_dict(content: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """Returns a copy of a dictionary of tensors, or of the one in what ``mto.save`` wrote.

    Raises CheckpointError for any other, and calls it ``source``.
    """
    inner = content.get(MODELOPT)
    items = (inner if isinstance(inner, Mapping) else content).items()
    tensors = {str(name): value for name, value in items}
    others = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(
            f"{source} is no state_dict: it holds {', '.join(map(str, others[:_SHOWN]))}; take "
            "the state_dict out of it, and save that alone"
        )
    return tensors


_SHOWN = 3
