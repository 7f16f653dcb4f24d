"""The CUDA families on CPU tensors: their references run what a card would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.backends.cusparselt.family import CuSparseLtFamily
from sparsedm_compiler.backends.cusparselt.quantized import QuantizedFamily
from sparsedm_compiler.backends.kernel_family import KernelFamily
from sparsedm_compiler.backends.registry import list_families
from sparsedm_compiler.masks.nm_mask import apply_mask, nm_mask

ROUNDING = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Absolute and relative: a few layers, each rounded once to 8 or 11 bits."""


def on_cpu(patch: pytest.MonkeyPatch, kinds: Any = KernelFamily, **attributes: Any) -> None:
    """Let the CUDA families of some kinds, and no other, run the weights of CPU models."""
    families = [family for family in list_families() if family.device == "cuda"]
    chosen = {type(family) for family in families if isinstance(family, kinds)}
    for family in list_families():
        patch.setattr(type(family), "device", "cpu" if type(family) in chosen else "elsewhere")
    for name, value in {"why_unavailable": lambda self: None, **attributes}.items():
        for kind in chosen:
            patch.setattr(kind, name, value)


def semi_on_cpu(patch: pytest.MonkeyPatch, **attributes: Any) -> None:
    """Let the families of cuSPARSELt, and no other, run the weights of CPU models."""
    on_cpu(patch, (CuSparseLtFamily, QuantizedFamily), **attributes)


def pruned(shape: tuple[int, ...], pattern: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(masked weight, mask), small enough that sums over it keep their digits."""
    torch.manual_seed(sum(shape))
    weight = (torch.randn(shape) / 8).to(dtype)
    mask = nm_mask(weight, pattern)
    return apply_mask(weight, mask), mask


def kernels_of(model: nn.Module) -> dict[str, str]:
    """The kernel of every folded weight."""
    return {choice.weight: choice.kernel for choice in sdm.explain(model).choices}
