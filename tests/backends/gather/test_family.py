"""Which kernel runs which pattern, in which tiles, on which card."""

from __future__ import annotations

import pytest
import torch

from sparsedm_compiler.backends.cuda.device import CudaDevice
from sparsedm_compiler.backends.gather import family as gather_family
from sparsedm_compiler.backends.gather.family import GatherFamily
from sparsedm_compiler.backends.gather.ops import Tile
from sparsedm_compiler.patterns import Pattern

CARDS = {
    "A100": CudaDevice("A100", (8, 0), shared_bytes=163 << 10),
    "RTX 3090": CudaDevice("RTX 3090", (8, 6), shared_bytes=99 << 10),
    "H100": CudaDevice("H100", (9, 0), shared_bytes=227 << 10),
}


@pytest.mark.parametrize(
    ("text", "kernel"),
    [
        ("1:8x64", "cuda_gather"),
        ("1:2@64x4", "cuda_gather"),
        ("1:2@64x12", "cuda_gather"),
        ("1:2@64x8", "triton_block"),
        ("1:4@128x16", "triton_block"),
        ("1:2@128x32+2:4", "triton_block"),
    ],
)
def test_list_candidates_names_the_kernel_by_the_columns_side_by_side(
    text: str, kernel: str
) -> None:
    candidates = GatherFamily().list_candidates(Pattern.parse(text), torch.bfloat16)
    assert {candidate.name for candidate in candidates} == {kernel}


@pytest.mark.parametrize("card", list(CARDS))
@pytest.mark.parametrize("text", ["1:2@64x16", "1:4@128x16", "1:2@32x64"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_list_candidates_fit_the_card(
    text: str, card: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather_family, "find_device", lambda: CARDS[card])
    candidates = GatherFamily().list_candidates(Pattern.parse(text), dtype)
    tiles = [Tile(*candidate.tile) for candidate in candidates]
    assert len(tiles) >= 3
    assert all(tile.shared_bytes(dtype) <= CARDS[card].shared_bytes for tile in tiles)
    swapped = any(tile.swapped for tile in tiles)
    assert swapped == (card == "H100" and dtype is torch.bfloat16 and text != "1:2@32x64")
