"""Random packed weights of the gather kernels, beside their masked dense form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsedm_compiler import Pattern
from sparsedm_compiler.backends.gather.format import pack, require_layout
from sparsedm_compiler.backends.gather.ops import run_linear
from sparsedm_compiler.masks.nm_mask import apply_mask, nm_mask
from sparsedm_compiler.triton_support import is_interpreted
from tests.backends.cpu.cases import assert_rounded
from tests.backends.cuda.running import moved

SHARED = ("1:8x16", "2:4x16", "2:4x48", "3:5x32", "1:2x64", "1:4x128", "2:8x192", "7:8x16")
BLOCKS = ("1:2@32x16", "1:4@16x8", "2:3@48x24", "1:2@64x128", "1:4@192x12", "1:2@32x64+2:4")
PATTERNS = (*SHARED, *BLOCKS)
LEADS = ((1,), (7,), (257,), (2, 3), (), (0,), (2, 0, 5))


class Case:
    """A random weight of whole shares: the pattern, its masked form and its packed form."""

    def __init__(self, text: str, shares: int, groups: int, dtype: torch.dtype) -> None:
        self.pattern = Pattern.parse(text)
        self.layout = require_layout(self.pattern)
        groups = groups if self.layout.step == 1 else groups * 8 // self.layout.m
        groups = max(groups, -(-16 // self.layout.n))
        self.rows, self.cols = shares * self.pattern.height, groups * self.layout.m
        weight = torch.randn(self.rows, self.cols).to(dtype)
        mask = nm_mask(weight, self.pattern)
        self.masked = apply_mask(weight, mask)
        self.packed = pack(weight, mask, self.pattern)

    def check(self, out: Tensor, x: Tensor, bias: Tensor | None, act: str) -> None:
        """Against float64. The interpreter cuts bits off a bfloat16 where others round."""
        b = None if bias is None else bias.double()
        exact = F.linear(x.double(), self.masked.double(), b)
        sums = F.linear(
            x.double().abs(), self.masked.double().abs(), None if b is None else b.abs()
        )
        count = self.layout.count_kept(self.cols)
        cut = is_interpreted() and out.dtype == torch.bfloat16
        assert out.dtype == x.dtype
        assert_rounded(out.cpu(), exact, sums, count, act, cut=cut)

    def run(self, x: Tensor, bias: Tensor | None, act: str, tile: tuple[int, ...]) -> Tensor:
        b = None if bias is None else bias.to(moved(x).device)
        text = str(self.pattern)
        out = run_linear(moved(x), moved(self.packed), b, self.rows, act, text, tile)
        assert out.is_contiguous()
        assert out.shape == (*x.shape[:-1], self.rows)
        self.check(out, x, bias, act)
        return out
