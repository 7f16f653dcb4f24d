"""Rules of ops for labels: elementwise ops, statistics over some dimensions, and products."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .channel_log import ChannelLog, index_varying, join_shapes, mix, number_elements, varies


@dataclass(frozen=True, slots=True)
class Operand:
    """The labels of an operand, and what it is, as a phrase for reasons."""

    labels: Tensor
    origin: str


def combine(
    log: ChannelLog, tag: str, operands: Sequence[Operand], *, inplace: bool = False
) -> Tensor:
    """Applies an op to elements of the same index, after broadcasting; returns its labels.

    Elements that meet are one channel. Where one of them is fixed, atoms are alike only if they
    meet the same fixed elements.

    Args:
        log: Where it is noted.
        tag: Names the node.
        operands: The tensors, in order.
        inplace: Whether the first is written to, and keeps its labels.
    """
    if len(operands) == 1:
        log.record(operands[0].labels, tag)
        return operands[0].labels
    shape = join_shapes(o.labels.shape for o in operands)
    wide = [_spread(log, k, operands, shape) for k in range(len(operands))]
    index = index_varying(wide)
    small = [w[index] for w in wide]
    keys = torch.zeros((1,) * len(shape), dtype=torch.int64, device="cpu")
    for operand, own in zip(operands, small, strict=True):
        fixed = own == 0
        if bool(fixed.any()):
            numbers = _number_along(operand.labels.shape, shape, index)
            part = torch.where(fixed, numbers, -1)
            hashed = mix(keys.numpy().view(np.uint64) * np.uint64(3) + part.numpy().view(np.uint64))
            keys = torch.from_numpy(hashed.view(np.int64))
            _pin_one_to_one(log, small, part, operand.origin)
    for k, own in enumerate(small):
        log.record(own, f"{tag}/{k}", keys)
        for other in small[k + 1 :]:
            both = (own > 0) & (other > 0)
            log.join(torch.where(both, own, 0), torch.where(both, other, 0), "")
    if inplace:
        for other in small[1:]:
            log.pin(torch.where(small[0] > 0, 0, other), "it is written into a tensor in place")
        return operands[0].labels
    return _choose(small).expand(shape)


def _spread(log: ChannelLog, k: int, operands: Sequence[Operand], shape: torch.Size) -> Tensor:
    """Returns the labels of an operand as broadcast; zeros where it meets many channels at once.

    That is a single value beside a whole vector. A vector that meets one at every token makes one
    channel of all that it meets.
    """
    own = operands[k].labels
    fixed = torch.zeros(1, dtype=torch.int64, device="cpu").expand(shape)
    if not bool((own > 0).any()):
        return fixed
    wide = own.expand(shape)
    for other in (operand for operand in operands if operand is not operands[k]):
        theirs = other.labels.expand(shape)
        along = [d for d in range(len(shape)) if varies(theirs, d)]
        spread = [d for d in along if wide.stride(d) == 0]
        if spread and not any(varies(wide, d) for d in along):
            log.pin(own, f"one value of it meets all channels of {other.origin}")
            return fixed
    return wide


def _number_along(own: torch.Size, shape: torch.Size, index: tuple[slice, ...]) -> Tensor:
    """Returns a number for every element of an operand that is met, in the trimmed shape."""
    narrow = (1,) * (len(shape) - len(own)) + tuple(own)
    numbers = torch.zeros((1,) * len(shape), dtype=torch.int64, device="cpu")
    for d, size in enumerate(narrow):
        length = shape[d] if index[d] == slice(None) else 1
        steps = (
            torch.arange(length, device="cpu")
            if size > 1
            else torch.zeros(length, dtype=torch.int64, device="cpu")
        )
        view = [1] * len(shape)
        view[d] = length
        numbers = numbers * max(size, 1) + steps.view(view)
    return numbers


def _pin_one_to_one(log: ChannelLog, small: Sequence[Tensor], part: Tensor, origin: str) -> None:
    """Makes atoms stay of which every one meets another fixed element."""
    for labels in small:
        met = (labels > 0) & (part >= 0)
        atoms = np.unique(torch.where(met, labels, 0).numpy())
        numbers = np.unique(torch.where(met, part, -1).numpy())
        count = int((atoms > 0).sum())
        if 1 < count == int((numbers >= 0).sum()):
            log.pin(torch.where(met, labels, 0), f"they meet {origin}, one value each")


def _choose(small: Sequence[Tensor]) -> Tensor:
    """Returns labels of the result: of one operand where it has all, else of the first that has."""
    whole = [labels for labels in small if bool((labels > 0).all())]
    if whole:
        return whole[-1]
    result = small[0]
    for labels in small[1:]:
        result = torch.where(result > 0, result, labels)
    return result


def reduce(
    log: ChannelLog, tag: str, labels: Tensor, dims: Collection[int], *, keep: bool
) -> Tensor:
    """Sums over dimensions, or takes another statistic that knows no order; returns the labels."""
    dims = {d % max(labels.dim(), 1) for d in dims} or {*range(labels.dim())}
    left = [d for d in range(labels.dim()) if d not in dims]
    if any(varies(labels, d) for d in dims):
        within_slices(log, tag, labels, left)
        labels = torch.zeros(1, dtype=torch.int64, device="cpu").expand(labels.shape)
    else:
        log.record(labels, tag)
    for d in sorted(dims, reverse=True):
        labels = labels.narrow(d, 0, 1) if keep else labels.select(d, 0)
    return labels


def within_slices(log: ChannelLog, tag: str, labels: Tensor, across: Collection[int]) -> None:
    """Notes that atoms may only be mixed within slices: those of one index of ``across``."""
    shape = [labels.shape[d] if d in across else 1 for d in range(labels.dim())]
    log.record(labels, tag, number_elements(tuple(shape)))


def contract(
    log: ChannelLog, tag: str, labels: Tensor, dim: int, columns: Tensor, origin: str
) -> None:
    """Multiplies by a matrix whose columns meet one dimension of the input."""
    moved = labels.movedim(dim, -1)
    first = moved[(0,) * (moved.dim() - 1)]
    log.join(moved, first, f"they meet {origin}, some of which is fixed")
    log.join(first, columns, f"they meet {origin}")
    log.record(first, tag)
    log.record(columns, f"{tag}/columns")


def multiply(log: ChannelLog, tag: str, a: Operand, b: Operand) -> Tensor:
    """Multiplies two activations [..., i, k] and [..., k, j]; returns the labels of [..., i, j]."""
    lead = join_shapes([a.labels.shape[:-2], b.labels.shape[:-2]])
    left = a.labels.expand(*lead, *a.labels.shape[-2:])
    right = b.labels.expand(*lead, *b.labels.shape[-2:])
    summed = _sum_over(log, f"{tag}/0", left, -1), _sum_over(log, f"{tag}/1", right, -2)
    none = torch.zeros((1,) * (len(lead) + 1), dtype=torch.int64, device="cpu")
    if summed[0] is not None or summed[1] is not None:
        first, second = (none if vector is None else vector for vector in summed)
        log.join(first, second, f"{a.origin} and {b.origin} meet along them")
    shape = (*lead, left.shape[-2], right.shape[-1])
    rows = left[..., :1] if summed[0] is None else none.unsqueeze(-1)
    columns = right[..., :1, :] if summed[1] is None else none.unsqueeze(-1)
    rows, columns = rows.expand(shape), columns.expand(shape)
    if bool((rows > 0).any()) and bool((columns > 0).any()):
        log.pin(rows, f"they meet {b.origin} in a product")
        log.pin(columns, f"they meet {a.origin} in a product")
        return torch.zeros(1, dtype=torch.int64, device="cpu").expand(shape)
    return rows if bool((rows > 0).any()) else columns


def _sum_over(log: ChannelLog, tag: str, labels: Tensor, dim: int) -> Tensor | None:
    """Returns the labels along the dimension that is summed over; None where they do not differ."""
    within_slices(log, tag, labels, range(labels.dim() - 2))
    if not varies(labels, dim):
        return None
    other = -3 - dim
    log.join(labels, labels.narrow(other, 0, 1), "they differ along a product")
    return labels.select(other, 0)


def attend(log: ChannelLog, tag: str, query: Operand, key: Operand, value: Operand) -> Tensor:
    """Applies attention of [..., L, E], [..., S, E], [..., S, D]; returns labels of [..., L, D]."""
    turned = Operand(key.labels.transpose(-2, -1), key.origin)
    multiply(log, f"{tag}/scores", query, turned)
    shape = (*query.labels.shape[:-1], key.labels.shape[-2])
    scores = Operand(
        torch.zeros(1, dtype=torch.int64, device="cpu").expand(shape), "attention scores"
    )
    first = value.labels[..., :1, :]
    log.join(value.labels, first, "they differ from token to token of attention")
    mixed = Operand(first.expand(value.labels.shape), value.origin)
    return multiply(log, f"{tag}/values", scores, mixed)
