"""The hand-masked oracle: the plain eager model with its chosen weights masked by brute force."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from itertools import combinations, product
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler import Pattern
from sparsedm_compiler.patterns import NM, VNM, BlockNM, NestedNM, SharedNM, TransposableNM
from tests.zoo import sample_of

OPTIONS: dict[str, dict[str, Any]] = {
    "train": {"mode": "train"},
    "infer": {"mode": "infer", "kernels": {"*": "dense"}},
    "sparse": {"mode": "infer", "kernels": {"*": "sparse"}},
}
"""Options of compile by the name of a way to run: measured choices would differ from day to day."""

ROUNDING = {"train": 0.0, "infer": 0.0, "sparse": 2e-5}
"""Tolerance by way to run: sparse kernels add the same products in another order."""

Tile = tuple[tuple[int, ...], ...]
"""The columns that each of the 4 rows of a tile keeps."""


_MASKS: dict[tuple[object, ...], Tensor] = {}
"""Masks by pattern and bits of the weight: a battery needs most of them many times."""


def brute_mask(weight: Tensor, pattern: str | Pattern) -> Tensor:
    """Returns the mask of a weight, one group after the other, in plain Python.

    It shares no code with the package, which it takes nothing but the parsed pattern from. Sums of
    squares are in double precision. A mask of equal bytes is computed once.
    """
    parsed = Pattern.parse(pattern)
    whole = weight.detach().cpu().clone(memory_format=torch.contiguous_format)
    content = whole.view(torch.uint8).numpy().tobytes()
    key = (parsed, weight.dtype, tuple(weight.shape), hashlib.sha256(content).digest())
    if key not in _MASKS:
        _MASKS[key] = compute_brute_mask(weight, parsed).cpu()
    return _MASKS[key].to(weight.device, copy=True)


def compute_brute_mask(weight: Tensor, parsed: Pattern) -> Tensor:
    """Returns the mask of ``brute_mask``, computed anew."""
    if isinstance(parsed, TransposableNM):
        return brute_tiles(weight, parsed.n)
    if isinstance(parsed, (BlockNM, NestedNM)):
        inner = parsed.inner if isinstance(parsed, NestedNM) else None
        return brute_blocks(weight, (parsed.n, parsed.m, parsed.rows, parsed.columns), inner)
    assert isinstance(parsed, (NM, SharedNM, VNM)), f"no brute force for {parsed}"
    n, m, height = parsed.n, parsed.m, parsed.height
    scores = weight.detach().double().abs().movedim(1, -1)
    out, *kernel, width = scores.shape
    rows = scores.reshape(out, prod(kernel), width).tolist()  # [out][position][in]
    mask = [[[False] * width for _ in range(prod(kernel))] for _ in range(out)]
    tops, starts = range(0, out, height), range(0, width, m)
    for top, position, start in product(tops, range(prod(kernel)), starts):
        block = range(top, top + height)
        columns: Sequence[int] = range(start, start + m)
        if not isinstance(parsed, NM):
            energy = {c: sum(rows[r][position][c] ** 2 for r in block) for c in columns}
            columns = pick_largest(columns, energy, 4 if isinstance(parsed, VNM) else n)
        for r in block:
            for c in pick_largest(columns, rows[r][position], n):
                mask[r][position][c] = True
    marks = torch.tensor(mask, dtype=torch.bool, device=weight.device)
    return marks.reshape(scores.shape).movedim(-1, 1)


def brute_blocks(weight: Tensor, numbers: tuple[int, int, int, int], inner: NM | None) -> Tensor:
    """Returns the mask that keeps n of every m blocks of rows x columns, one group after the other.

    Within a kept block ``inner`` holds; weights that it prunes have no part in a block's energy.
    """
    n, m, height, width = numbers
    allowed = torch.ones(weight.shape).bool() if inner is None else brute_mask(weight, inner)
    squares = (weight.detach().double() ** 2).cpu() * allowed.cpu()
    marks = torch.zeros(weight.shape, dtype=torch.bool)
    tops, lefts = range(0, weight.shape[0], height), range(0, weight.shape[1], m * width)
    for top, left, *position in product(tops, lefts, *map(range, weight.shape[2:])):
        starts = [left + block * width for block in range(m)]
        cut = {
            start: (slice(top, top + height), slice(start, start + width), *position)
            for start in starts
        }
        energy = {start: sum(squares[cut[start]].flatten().tolist()) for start in starts}
        for start in pick_largest(starts, energy, n):
            marks[cut[start]] = allowed[cut[start]]
    return marks.to(weight.device)


def pick_largest(
    columns: Sequence[int], scores: Mapping[int, float] | Sequence[float], n: int
) -> list[int]:
    """Returns the n columns of largest score, ascending; the lowest of equal ones wins."""
    return sorted(sorted(columns, key=scores.__getitem__, reverse=True)[:n])


def brute_tiles(weight: Tensor, n: int) -> Tensor:
    """Returns the transposable mask, by trying all masks of every tile.

    Sums of magnitudes are in double precision.
    """
    scores = weight.detach().double().abs()
    marks = torch.zeros(weight.shape, dtype=torch.bool)
    tops, lefts = range(0, weight.shape[0], 4), range(0, weight.shape[1], 4)
    for top, left, *position in product(tops, lefts, *map(range, weight.shape[2:])):
        tile = scores[(slice(top, top + 4), slice(left, left + 4), *position)].tolist()
        best = max(
            list_legal_tiles(n), key=lambda kept: sum(tile[r][c] for r in range(4) for c in kept[r])
        )
        for row, columns in enumerate(best):
            for column in columns:
                marks[(top + row, left + column, *position)] = True
    return marks.to(weight.device)


@cache
def list_legal_tiles(n: int) -> list[Tile]:
    """Returns all masks with n in each row and column; the first of equally good ones wins."""
    rows = list(combinations(range(4), n))
    tiles = [
        tile
        for tile in product(rows, repeat=4)
        if all(sum(column in row for row in tile) == n for column in range(4))
    ]
    return sorted(tiles, key=lambda tile: (sorted(tile[:2]), sorted(tile[2:]), tile))


def hand_masked(model: nn.Module, patterns: Mapping[str, str | Pattern]) -> nn.Module:
    """Returns a plain dense copy of ``model`` with the named weights multiplied by their masks."""
    oracle = copy.deepcopy(model)
    for key in ("forward", "_sparsedm"):
        oracle.__dict__.pop(key, None)
    with torch.no_grad():
        for name, pattern in patterns.items():
            weight = oracle.get_parameter(name)
            weight.mul_(brute_mask(weight, pattern))
    return oracle


def masked_patterns(student: nn.Module) -> dict[str, Pattern]:
    """Returns the patterns of the weights that the student masks; there must be some."""
    patterns = {name: pattern for name, (_, pattern) in sdm.masked_parameters(student).items()}
    assert patterns
    return patterns


def oracle_of(student: nn.Module) -> nn.Module:
    """Returns the oracle of a student that has been called at least once."""
    return hand_masked(student, masked_patterns(student))


def assert_same(a: Tensor, b: Tensor, *, tolerance: float = 0.0) -> None:
    """Asserts equality to the bit, or within an absolute and relative tolerance."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def align(model: nn.Module) -> None:
    """Moves parameters to addresses such as torch gives them; those of a file lie anywhere.

    Before the first call. Under AVX2 a product is rounded by where its operands lie.
    """
    for parameter in model.parameters():
        if parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


def gradients(
    model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]], seed: int = 0
) -> dict[str, Tensor]:
    """Returns gradients of a fixed scalar of the output by parameter name, with seeded draws."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    out = sample_of(model(*call[0], **call[1]))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    (out * weights.to(out)).sum().backward()
    named = model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_gradients(
    student: nn.Module,
    oracle: nn.Module,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    unread: Collection[str] = (),
    *,
    tolerance: float = 0.0,
) -> None:
    """Asserts that every parameter has the oracle's gradient (straight-through: unmasked)."""
    theirs, ours = gradients(oracle, call), gradients(student, call)
    missing = {name for name, _ in student.named_parameters()} - ours.keys()
    assert missing <= set(unread), f"no gradient: {missing}"
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert gradient.any() or name in unread, f"gradient of {name} is zero"
        assert_same(gradient, theirs[name], tolerance=tolerance)
