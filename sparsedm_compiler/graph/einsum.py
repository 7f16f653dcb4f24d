"""The products of ``einsum``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .op_entry import Arguments, OpEntry, Product


def _parse_einsum(equation: str, operands: tuple[Any, ...]) -> tuple[dict[str, int], str]:
    """Returns the size of each letter, and the letters of the output."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for term, operand in zip(inputs.split(","), operands, strict=True):
        head, _, tail = term.partition("...")
        sizes.update(zip(head, operand.shape, strict=False))
        sizes.update(zip(reversed(tail), reversed(operand.shape), strict=False))
    if "->" not in equation:
        letters = inputs.replace(",", "").replace("...", "")
        output = "".join(c for c in sorted(set(letters)) if letters.count(c) == 1)
    return sizes, output


_OPERANDS = ("input", "other", *(f"operand_{number}" for number in range(2, 26)))


class _EinsumEntry(OpEntry):
    """``einsum``, whose operands are given one by one or as a list."""

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the equation and the operands by name."""
        equation, *operands = args
        if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
            operands = list(operands[0])
        return {"equation": equation, **dict(zip(_OPERANDS, operands, strict=False)), **kwargs}


def _describe_einsum(a: Arguments, out: Any) -> tuple[Product, ...]:
    names = tuple(name for name in _OPERANDS if name in a)
    if len(names) < 2 or not isinstance(a["equation"], str):
        return ()
    sizes, output = _parse_einsum(a["equation"], tuple(a[name] for name in names))
    if all(letter in output for letter in sizes):
        return ()  # an outer product accumulates nothing
    macs = lambda: _count_einsum_macs(a["equation"], sizes, output, out)  # noqa: E731
    if len(names) == 2:
        return (Product(("other", "input"), macs, "attention", fixed=False),)
    refusal = "a factor of an einsum of more than two operands"
    return (Product(names, macs, "attention", fixed=False, refusal=refusal),)


def _count_einsum_macs(equation: str, sizes: Mapping[str, int], output: str, out: Any) -> int:
    """Returns the MACs of contracting the operands from left to right, as torch does."""
    first, *terms = equation.replace(" ", "").partition("->")[0].split(",")
    if len(terms) == 1:
        summed = (size for letter, size in sizes.items() if letter not in output)
        return int(out.numel() * math.prod(summed))
    total, held = 0, set(first.replace("...", ""))
    for index, term in enumerate(terms):
        held |= set(term.replace("...", ""))
        kept = held & set(output).union(*terms[index + 1 :])
        if kept != held:
            total += math.prod(sizes[letter] for letter in held)
        held = kept
    letters = math.prod(sizes[letter] for letter in output.replace("...", ""))
    return int(total * (out.numel() // max(letters, 1)))  # by what "..." stands for


EINSUM = _EinsumEntry("einsum", ("equation", *_OPERANDS), _describe_einsum)
"""The entry of ``torch.einsum``."""
