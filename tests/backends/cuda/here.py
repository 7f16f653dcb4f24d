"""The CUDA families on CPU tensors: their references run what a card would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.autotune import measure as measuring
from sparsedm_compiler.autotune import select_kernel as choose
from sparsedm_compiler.backends import packing as folding
from sparsedm_compiler.backends.cusparselt.family import SemiFamily
from sparsedm_compiler.backends.cusparselt.quantized import QuantizedFamily
from sparsedm_compiler.backends.kernel_family import KernelFamily
from sparsedm_compiler.backends.registry import FAMILIES
from sparsedm_compiler.masks.nm_mask import apply_mask, nm_mask

ROUNDING = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Absolute and relative: a few layers, each rounded once to 8 or 11 bits."""


def on_cpu(patch: pytest.MonkeyPatch, kinds: Any = KernelFamily, **attributes: Any) -> None:
    """Let the CUDA families of some kinds, and no other, run the weights of CPU models."""
    families = tuple(each for each in FAMILIES if each.device == "cuda" and isinstance(each, kinds))
    for module in (choose, measuring, folding):
        patch.setattr(module, "find_families", lambda device: families if device == "cpu" else ())
    for name, value in {"unavailable": lambda self: None, **attributes}.items():
        for each in {type(family) for family in families}:
            patch.setattr(each, name, value)


def semi_on_cpu(patch: pytest.MonkeyPatch, **attributes: Any) -> None:
    """Let the families of cuSPARSELt, and no other, run the weights of CPU models."""
    on_cpu(patch, (SemiFamily, QuantizedFamily), **attributes)


def pruned(shape: tuple[int, ...], pattern: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(masked weight, mask), small enough that sums over it keep their digits."""
    torch.manual_seed(sum(shape))
    weight = (torch.randn(shape) / 8).to(dtype)
    mask = nm_mask(weight, pattern)
    return apply_mask(weight, mask), mask


def kernels_of(model: nn.Module) -> dict[str, str]:
    """The kernel of every folded weight."""
    return {choice.weight: choice.kernel for choice in sdm.explain(model).choices}
