"""A new kind of pattern is one class: nothing in the package knows the two of this file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.patterns import NM, Pattern, register_pattern, unregister_pattern
from tests.oracle import OPTIONS, assert_same
from tests.patterns.tile_pattern import TileTopN

TILE_TEXT, DIAGONAL_TEXT = "1:4u", "d1:4"


@pytest.fixture(autouse=True)
def tile_kind() -> Iterator[type[Pattern]]:
    """Registers "n:mu" for one test; it says of no other pattern that its masks satisfy it."""
    register_pattern(TileTopN)
    yield TileTopN
    unregister_pattern(TileTopN)


@pytest.fixture(autouse=True)
def diagonal_kind() -> Iterator[type[Pattern]]:
    """Registers "dk:m" for one test; its masks are those of the per-row pattern 1:m."""

    @register_pattern
    @final
    @dataclass(frozen=True, slots=True)
    class Diagonal(Pattern):
        """The k-th cyclic diagonal of every m x m tile is kept."""

        k: int

        SPELLING: ClassVar[re.Pattern[str]] = re.compile(r"d(\d+):(\d+)")
        EXPLANATION: ClassVar[str] = "'d1:4' keeps a diagonal"

        @classmethod
        def from_match(cls, match: re.Match[str]) -> Diagonal:
            return Diagonal(1, int(match[2]), int(match[1]))

        @property
        def height(self) -> int:
            return self.m

        @property
        def most_n(self) -> int:
            return self.n

        def implied(self) -> tuple[Pattern, ...]:
            return (NM(1, self.m),)

        def compute_mask(self, weight: Tensor) -> Tensor:
            rows, columns = (torch.arange(size, device=weight.device) for size in weight.shape[:2])
            kept = (columns - rows.unsqueeze(1)) % self.m == self.k
            return kept.view(*kept.shape, *[1] * (weight.dim() - 2)).expand(weight.shape).clone()

        def __str__(self) -> str:
            return f"d{self.k}:{self.m}"

    yield Diagonal
    unregister_pattern(Diagonal)


def tile_mask(weight: Tensor, n: int = 1, m: int = 4) -> Tensor:
    """The mask of "n:mu" of [out, in], one tile after the other, in plain Python."""
    values, mask = weight.tolist(), torch.zeros(weight.shape)
    for top in range(0, weight.shape[0], m):
        for left in range(0, weight.shape[1], m):
            cells = [(top + i, left + j) for i in range(m) for j in range(m)]
            for row, column in sorted(cells, key=lambda cell: -abs(values[cell[0]][cell[1]]))[
                : n * m
            ]:
                mask[row, column] = 1
    return mask


def diagonal_mask(weight: Tensor, k: int = 1, m: int = 4) -> Tensor:
    """The mask of "dk:m" of [out, in], one weight after the other."""
    return torch.tensor(
        [
            [float((column - row) % m == k) for column in range(weight.shape[1])]
            for row in range(weight.shape[0])
        ]
    )


MASKS = {TILE_TEXT: tile_mask, DIAGONAL_TEXT: diagonal_mask}
every_text = pytest.mark.parametrize("text", MASKS)


class Net(nn.Module):
    """Three layers, of which the policy prunes the middle one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


def run_by_hand(net: Net, x: Tensor, text: str) -> Tensor:
    """The output of ``net`` with its middle weight masked by hand."""
    weight = net.middle.weight
    masked = weight * MASKS[text](weight.detach())
    return net.last(F.linear(net.first(x), masked, net.middle.bias))


X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


@every_text
def test_a_toy_pattern_is_read_and_printed(text: str) -> None:
    pattern = Pattern.parse(text)
    assert str(pattern) == text
    assert Pattern.parse(f" {text} ") == pattern
    assert pattern.density == 0.25
    assert sdm.Pattern.parse("2:4") == NM(2, 4)


def test_relaxations_of_a_toy_pattern_are_of_its_kind() -> None:
    assert [*map(str, Pattern.parse("1:8u").relaxations())] == ["4:8u", "2:8u"]
    assert Pattern.parse(DIAGONAL_TEXT).relaxations() == ()


def test_a_toy_pattern_is_named_in_errors_until_it_is_unregistered(
    tile_kind: type[Pattern],
) -> None:
    with pytest.raises(sdm.PatternError, match="'1:4u' keeps 4 of the 16 of a tile"):
        Pattern.parse("1:4z")
    with pytest.raises(sdm.PatternError, match="'5:4u' is not 'n:m'"):
        Pattern.parse("5:4u")
    unregister_pattern(tile_kind)
    with pytest.raises(sdm.PatternError, match="pattern '1:4u' is not 'n:m'"):
        Pattern.parse(TILE_TEXT)
    register_pattern(tile_kind)


@every_text
def test_a_toy_pattern_in_mode_train_masks_forward_and_passes_the_gradient(text: str) -> None:
    student, oracle = sdm.compile(Net(), text, mode="train", backend="eager"), Net()
    out, expected = student(X), run_by_hand(oracle, X, text)
    assert_same(out, expected)
    assert {*sdm.masked_parameters(student)} == {"middle.weight"}
    out.square().sum().backward()
    hidden = oracle.first(X).detach()
    by_output = 2 * expected.detach() @ oracle.last.weight.detach()
    assert student.middle.weight.grad is not None
    torch.testing.assert_close(student.middle.weight.grad, by_output.T @ hidden)


@every_text
def test_a_toy_pattern_in_mode_infer_runs_dense_with_zeros_and_says_so(text: str) -> None:
    fast = sdm.compile(Net(), text, backend="eager", **OPTIONS["infer"])
    with torch.no_grad():
        assert_same(fast(X), run_by_hand(Net(), X, text))
    (choice,) = sdm.explain(fast).choices
    assert (choice.weight, choice.kernel) == ("middle.weight", "dense")
    assert choice.reason
    assert choice.reason in str(sdm.explain(fast))


def test_a_pattern_that_implies_no_other_runs_by_no_sparse_kernel() -> None:
    fast = sdm.compile(Net(), TILE_TEXT, backend="eager", **OPTIONS["sparse"])
    with torch.no_grad():
        assert_same(fast(X), run_by_hand(Net(), X, TILE_TEXT))
    (choice,) = sdm.explain(fast).choices
    assert choice.kernel == "dense"
    assert TILE_TEXT in choice.reason


def test_a_pattern_that_implies_a_per_row_one_runs_by_its_kernel() -> None:
    fast = sdm.compile(Net(), DIAGONAL_TEXT, backend="eager", **OPTIONS["sparse"])
    with torch.no_grad():
        assert_same(fast(X), run_by_hand(Net(), X, DIAGONAL_TEXT), tolerance=1e-5)
    (choice,) = sdm.explain(fast).choices
    assert choice.kernel == "cpu_free"


@every_text
def test_a_toy_pattern_comes_back_from_a_file(text: str, tmp_path: Path) -> None:
    student = sdm.compile(Net(), text, backend="eager")
    out = student(X)
    sdm.save(student, tmp_path / "student")
    loaded = sdm.load(tmp_path / "student", Net(), backend="eager")
    assert_same(loaded(X), out)
    assert str(sdm.pattern_of(loaded)) == text


def test_packed_weights_of_a_toy_pattern_come_back_from_a_file(tmp_path: Path) -> None:
    options = {**OPTIONS["sparse"], "finalize": True}
    fast = sdm.compile(Net(), DIAGONAL_TEXT, backend="eager", **options)
    with torch.no_grad():
        fast(X)
        out = fast(X)
        sdm.save(fast, tmp_path / "fast")
        assert_same(sdm.load(tmp_path / "fast", Net(), backend="eager")(X), out)


def test_a_weight_that_a_toy_pattern_does_not_fit_stays_dense() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 8))
    student = sdm.compile(net, TILE_TEXT, policy="all", backend="eager")
    student(torch.randn(2, 8))
    assert {row.weight: row.refusal for row in sdm.explain(student).rows} == {
        "0.weight": None,
        "1.weight": "output width 6 is not a multiple of 4",
        "2.weight": "input width 6 is not a multiple of 4",
        "3.weight": None,
    }
