"""Kernels from a table that is shipped for a card, and what happens where it says nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.autotune import kernel_table, select_kernel
from sparsedm_compiler.autotune.kernel_table import (
    KernelTable,
    TableRow,
    find_table,
    read_table,
    read_tables,
)
from sparsedm_compiler.backends.cpu.family import CpuFamily
from sparsedm_compiler.backends.kernel_family import MatmulProblem
from sparsedm_compiler.backends.registry import find_family
from sparsedm_compiler.patterns import Pattern
from tests.oracle import assert_same, oracle_of

BF16 = torch.bfloat16
CARD = ("made-up card", "1.0")
TILE = CpuFamily().list_candidates(Pattern.parse("2:4"), BF16)[0].tile


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1)).to(BF16)


def row(**values: Any) -> TableRow:
    sizes = {"tokens": 4, "cols": 16, "rows": 16, "act": "none", "dense_ms": 1.0, "ratio": 2.0}
    about = {"pattern": "2:4", "kernel": "cpu_free", "tile": TILE}
    return TableRow(**{**about, **sizes, **values})


def table(*rows: TableRow) -> KernelTable:
    return KernelTable(*CARD, "never", rows)


@contextmanager
def shipped(*rows: TableRow) -> Iterator[list[Any]]:
    """The CPU as a card that has this table; what was measured all the same."""
    measured: list[Any] = []
    measure = select_kernel.measure_kernels

    def note(trial: Any, *args: Any) -> Any:
        measured.append(trial.name)
        return measure(trial, *args)

    with (
        patch.object(CpuFamily, "identify_card", lambda self: CARD),
        patch.object(kernel_table, "read_tables", lambda: (table(*rows),)),
        patch.object(select_kernel, "measure_kernels", note),
    ):
        yield measured


def run(**options: Any) -> tuple[nn.Module, sdm.Choice]:
    settings = {"mode": "infer", "backend": "eager", "autotune": "table", **options}
    fast = sdm.compile(Net().to(BF16), "2:4", **settings)
    with torch.no_grad():
        assert_same(fast(X).float(), oracle_of(fast)(X).float(), tolerance=0.05)
    (choice,) = sdm.explain(fast).choices
    return fast, choice


def test_autotune_table_takes_the_kernel_of_the_table_and_measures_nothing() -> None:
    with shipped(row()) as measured:
        _, choice = run()
    assert (choice.kernel, measured) == ("cpu_free", [])
    said = "from the table shipped for made-up card: 2.00 times dense's speed"
    assert choice.reason == f"{said} (4 tokens, 16 to 16 channels)"
    assert choice.dense_ms is None


def test_autotune_table_runs_dense_where_dense_was_as_fast() -> None:
    with shipped(row(ratio=1.02)) as measured:
        _, choice = run()
    assert (choice.kernel, measured) == ("dense", [])
    assert choice.reason.startswith("from the table shipped for made-up card: 1.02 times")


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([], "the table for made-up card has no layer like it at 2:4"),
        ([row(tokens=9)], "the table for made-up card has no layer like it at 2:4"),
        ([row(pattern="1:4")], "the table for made-up card has no layer like it at 2:4"),
        ([row(tile=(1, 2, 3))], "cpu_free has not the setting of the table here"),
    ],
    ids=["empty", "other size", "other pattern", "other setting"],
)
def test_autotune_table_measures_where_the_table_says_nothing(
    rows: list[TableRow], why: str
) -> None:
    with shipped(*rows) as measured:
        _, choice = run()
    assert measured == ["middle.weight"]
    assert choice.reason.endswith(f"({why})")


def test_autotune_table_measures_where_the_kernel_gives_other_numbers() -> None:
    with (
        shipped(row()) as measured,
        patch.object(select_kernel, "reproduces_dense", lambda trial, kernel: False),
    ):
        _, choice = run()
    assert measured == ["middle.weight"]
    assert choice.reason.endswith("(cpu_free refused its size, or gave other numbers than dense)")


def test_autotune_table_does_not_take_an_excluded_kernel() -> None:
    with shipped(row()):
        _, choice = run(exclude_kernels="cpu_free")
    assert choice.kernel == "dense"
    assert choice.reason == "every kernel for it is in exclude_kernels= (cpu_free is excluded)"


def test_autotune_table_on_a_cpu_says_that_there_is_none() -> None:
    _, choice = run()
    assert choice.reason.endswith("(no table of kernels is shipped for cpu tensors)")


def test_autotune_of_unknown_kind_is_refused() -> None:
    with pytest.raises(sdm.ConfigError, match="autotune 'guess' is neither 'measure' nor 'table'"):
        sdm.compile(Net(), "2:4", autotune="guess")


def test_find_row_takes_the_nearest_size_of_the_same_pattern() -> None:
    near, far, act = row(tokens=6), row(tokens=8), row(act="gelu")
    problem = MatmulProblem((2, 3, 16), BF16)
    ours, pattern = table(far, near, act), Pattern.parse("2:4")
    assert ours.find_row(pattern, problem, (16, 16)) is near
    assert ours.find_row(pattern, MatmulProblem((5, 16), BF16, act="silu"), (16, 16)) is act
    assert ours.find_row(pattern, MatmulProblem((5, 16), torch.float32), (16, 16)) is None
    image = MatmulProblem((1, 16, 4, 4), BF16, kernel=(3, 3), stride=(1, 1))
    assert ours.find_row(pattern, image, (16, 16, 3, 3)) is None


def test_shipped_tables_name_kernels_that_run_their_patterns() -> None:
    assert read_tables()
    for ours in read_tables():
        assert find_table(ours.card, ours.capability) is ours
        assert find_table("another card", ours.capability) is not None
        assert ours.rows
        for line in ours.rows:
            family = find_family(line.kernel)
            assert family.device == "cuda"
            assert family.find_accepted(Pattern.parse(line.pattern)) is not None
            assert line.ratio > 0
    assert find_table("another card", "0.1") is None


def test_table_file_is_read_as_it_was_written() -> None:
    from benchmarks.gpu.kernel_table import format_table, make_table, name_file

    cell = {"ratio": [1.4, 1.5, 1.6], "kernel": "cuda_block/1/128/3/0/8", "gated": "sparse"}
    sizes = {"tokens": 4096, "cols": 1024, "rows": 4096, "act": "gelu", "dense_ms": 0.1}
    others = {"2:4": {"refused": {}}, "1:8x64": {**cell, "kernel": "gone/1"}}
    later = {**cell, "ratio": [1.6, 1.7, 1.8]}
    about = {"gpu": "NVIDIA X1", "capability": "9.9", "time": "2026-01-01 0:00", "torch": "2"}
    runs = [
        {"environment": {**about, "commit": commit}, "ops": [{**sizes, "patterns": patterns}]}
        for commit, patterns in (("a", {"1:2@64x16": cell, **others}), ("b", {"1:2@64x16": later}))
    ]
    values = make_table(runs)
    ours = read_table(format_table(values))
    assert (ours.card, ours.capability, len(ours.rows)) == ("NVIDIA X1", "9.9", 1)
    assert (ours.rows[0].tile, ours.rows[0].ratio) == ((128, 3, 0, 8), 1.7)
    assert "commit a" in ours.measured
    assert "commit b" in ours.measured
    assert name_file("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"
    with pytest.raises(sdm.ConfigError, match="rehearsal"):
        make_table([{**runs[0], "rehearsal": True}])
    other = {**runs[1], "environment": {**about, "commit": "b", "gpu": "NVIDIA X2"}}
    with pytest.raises(sdm.ConfigError, match="one card"):
        make_table([runs[0], other])
