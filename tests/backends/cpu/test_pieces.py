"""How calls are cut for many threads: every thread has work, and the cut changes no result."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.threads import timing_pieces
from sparsedm_compiler.backends.cpu.build import why_unavailable
from sparsedm_compiler.backends.cpu.format import read_layout
from sparsedm_compiler.backends.cpu.ops import nm_conv2d_op, nm_linear_op
from tests.backends.cpu.cases import case
from tests.oracle import assert_same

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason="needs a C++ compiler")
ONES = [1, 1]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("threads", [1, 2, 8, 16])
@pytest.mark.parametrize("text", ["2:4", "1:16x4"])
def test_linear_cut_for_many_threads_has_work_for_most_and_the_same_result(
    text: str, threads: int
) -> None:
    torch.manual_seed(0)
    held = case(text, 512 // int(text[2:].partition("x")[0]), 512, torch.float32)
    x = torch.randn(257, 512)
    one = nm_linear_op(x, held.packed, None, 512, "gelu", 6)
    loops: list[list[float]] = []
    with timing_pieces(threads, loops):
        assert_same(nm_linear_op(x, held.packed, None, 512, "gelu", 6), one)
    (pieces,) = loops
    assert len(pieces) >= 0.85 * threads
    assert all(seconds > 0 for seconds in pieces)


@pytest.mark.parametrize(("size", "planes"), [(15, [[4], [64]]), (16, [[], []])])
def test_conv_cut_for_many_threads_pads_its_planes_unless_rows_fill_vectors(
    size: int, planes: list[list[int]]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 64, size, size)
    outputs, counts = [], []
    for threads in (1, 16):
        torch.manual_seed(1)
        torch.set_num_threads(threads)
        held = case("2:4", 16, 64, torch.float32, (3, 3))
        geometry = ([3, 3], ONES, ONES, ONES)
        loops: list[list[float]] = []
        with timing_pieces(threads, loops):
            outputs.append(nm_conv2d_op(x, held.packed, None, 64, *geometry, "none", 6))
        counts.append([len(pieces) for pieces in loops])
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    assert [loops[:-1] for loops in counts] == planes
    assert counts[1][-1] >= 14


def test_pack_for_many_threads_cuts_few_rows_into_smaller_blocks() -> None:
    heights = {}
    for threads in (1, 16):
        torch.set_num_threads(threads)
        for rows in (256, 1024):
            layout = read_layout(case("2:4", 8, rows, torch.float32).packed)
            heights[threads, rows] = layout.row_block
    assert heights == {(1, 256): 256, (1, 1024): 256, (16, 256): 64, (16, 1024): 256}
