"""The hand-masked oracle: the plain eager model with its chosen weights masked by brute force."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler import Pattern
from sparsedm_compiler.patterns import VNM, TransposableNM
from tests.masks.mask_cases import brute_tiles
from tests.zoo import sample_of

OPTIONS: dict[str, dict[str, Any]] = {
    "train": {"mode": "train"},
    "infer": {"mode": "infer", "kernels": {"*": "dense"}},
    "sparse": {"mode": "infer", "kernels": {"*": "sparse"}},
}
"""Options of compile by the name of a way to run: measured choices would differ from day to day."""

ROUNDING = {"train": 0.0, "infer": 0.0, "sparse": 2e-5}
"""Tolerance by way to run: sparse kernels add the same products in another order."""


def brute_mask(weight: Tensor, pattern: str | Pattern) -> Tensor:
    """The mask of any pattern by stable sorts of every group; shares no code with the package.

    Of a transposable pattern: by trying all masks of every tile.
    """
    parsed = Pattern.parse(pattern)
    if isinstance(parsed, TransposableNM):
        return brute_tiles(weight, parsed.n)
    scores = weight.detach().abs()
    if parsed.height == 1:
        return _largest(scores, parsed.n, parsed.m)
    energy = scores.float().square().unflatten(0, (-1, parsed.height)).sum(1)
    chosen = _largest(energy, 4 if isinstance(parsed, VNM) else parsed.n, parsed.m)
    shared = chosen.repeat_interleave(parsed.height, 0)
    if not isinstance(parsed, VNM):
        return shared
    return _largest(scores.masked_fill(~shared, -1), parsed.n, parsed.m)


def _largest(scores: Tensor, n: int, m: int) -> Tensor:
    """True for the n largest of every m along dim 1, the first of equal ones."""
    last = scores.movedim(1, -1)
    groups = last.reshape(-1, m)
    order = groups.sort(dim=-1, descending=True, stable=True).indices
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, :n], True)
    return mask.reshape(last.shape).movedim(-1, 1)


def hand_masked(model: nn.Module, patterns: Mapping[str, str | Pattern]) -> nn.Module:
    """A plain dense copy of ``model`` whose named weights are multiplied by their masks."""
    oracle = copy.deepcopy(model)
    for key in ("forward", "_sparsedm"):
        oracle.__dict__.pop(key, None)
    with torch.no_grad():
        for name, pattern in patterns.items():
            weight = oracle.get_parameter(name)
            weight.mul_(brute_mask(weight, pattern))
    return oracle


def masked_patterns(student: nn.Module) -> dict[str, Pattern]:
    """The patterns of the weights the student masks; there must be some."""
    patterns = {name: pattern for name, (_, pattern) in sdm.masked_parameters(student).items()}
    assert patterns
    return patterns


def oracle_of(student: nn.Module) -> nn.Module:
    """The oracle of a student that has been called at least once."""
    return hand_masked(student, masked_patterns(student))


def assert_same(a: Tensor, b: Tensor, *, tolerance: float = 0.0) -> None:
    """Equal to the bit, unless a tolerance (absolute and relative) is earned by the caller."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def gradients(
    model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]], seed: int = 0
) -> dict[str, Tensor]:
    """Gradients of a fixed scalar of the output, by parameter name; random draws are seeded."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    out = sample_of(model(*call[0], **call[1]))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    (out * weights.to(out.dtype)).sum().backward()
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
    """Every parameter has a gradient, and it is the oracle's (straight-through: unmasked)."""
    theirs, ours = gradients(oracle, call), gradients(student, call)
    missing = {name for name, _ in student.named_parameters()} - ours.keys()
    assert missing <= set(unread), f"no gradient: {missing}"
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert gradient.any() or name in unread, f"gradient of {name} is zero"
        assert_same(gradient, theirs[name], tolerance=tolerance)
