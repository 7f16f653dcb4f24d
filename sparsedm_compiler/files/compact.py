"""``CompactWeight``: the kept values of a pruned weight, and where they are."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..errors import PackError, PatternError
from ..patterns import Pattern
from .mask_code import complete_mask, count_kept, count_mask_bytes, decode_mask, encode_mask

VALUES, INDICES = ".sparsedm_values", ".sparsedm_indices"
"""What the names of the two tensors of a compact weight end with."""

MOST_EXPANSION = 1 << 20
"""A weight may be so much larger than its kept values; no file needs more, a broken one claims it.
"""


@dataclass(frozen=True, slots=True)
class CompactWeight:
    """A pruned weight as a compact file holds it.

    Attributes:
        pattern: The pattern of its mask.
        shape: [out, in, *kernel] of the weight.
        values: The kept values [kept], row by row of [out, *kernel, in].
        indices: The mask as bytes [size], uint8.
    """

    pattern: Pattern
    shape: tuple[int, ...]
    values: Tensor
    indices: Tensor

    @staticmethod
    def pack(weight: Tensor, pattern: Pattern, name: str = "the weight") -> CompactWeight:
        """Returns the compact form of a weight whose zeros satisfy a pattern.

        Args:
            weight: [out, in, *kernel] on any device, in any dtype. A negative zero among the pruned
                weights becomes a positive one.
            pattern: The pattern.
            name: The name of the weight, for the messages of errors.

        Returns:
            Its compact form, on the CPU.

        Raises:
            PatternError: If the pattern does not fit the shape, or the zeros do not satisfy it.
        """
        shape = tuple(weight.shape)
        _require_fit(pattern, shape, name)
        weight = weight.detach().cpu()
        try:
            mask = complete_mask(find_kept(weight), pattern)
        except PackError as error:
            raise PatternError(f"{name}: {error}") from error
        values = weight.movedim(1, -1)[mask.movedim(1, -1)].contiguous()
        return CompactWeight(pattern, shape, values, encode_mask(mask, pattern))

    def unpack(self) -> Tensor:
        """Returns the weight, zeros in their places.

        Raises:
            PackError: If numbers or sizes do not fit each other.
        """
        self.check_sizes()
        mask = decode_mask(self.indices, self.pattern, self.shape)
        out, width, *kernel = self.shape
        rows = torch.zeros(out, *kernel, width, dtype=self.values.dtype, device="cpu")
        rows[mask.movedim(1, -1)] = self.values
        return rows.movedim(-1, 1).contiguous()

    def check_sizes(self) -> None:
        """Raises PackError unless the sizes of all parts fit; nothing large is made for that."""
        if any(type(size) is not int or size < 1 for size in self.shape) or len(self.shape) < 2:
            raise PackError(f"{list(self.shape)} is not the shape of a weight")
        try:
            _require_fit(self.pattern, self.shape, "it")
        except PatternError as error:
            raise PackError(str(error)) from error
        kept = count_kept(self.pattern, self.shape)
        if self.values.dim() != 1 or self.values.numel() != kept:
            raise PackError(f"{list(self.values.shape)} values, not the {kept} of '{self.pattern}'")
        if prod(self.shape) > MOST_EXPANSION * kept:
            raise PackError(f"'{self.pattern}' keeps less than 1 of {MOST_EXPANSION} weights")
        size = count_mask_bytes(self.pattern, self.shape)
        if self.indices.dtype != torch.uint8 or tuple(self.indices.shape) != (size,):
            raise PackError(
                f"{list(self.indices.shape)} indices of {self.indices.dtype}, not [{size}] bytes"
            )

    def describe(self) -> dict[str, Any]:
        """Returns pattern and shape as plain values for JSON."""
        return {"pattern": str(self.pattern), "shape": list(self.shape)}


def count_compact_bytes(pattern: str | Pattern, shape: tuple[int, ...], itemsize: int) -> int:
    """Returns the exact size of a weight in a compact file, without the header.

    Args:
        pattern: A pattern or its text.
        shape: [out, in] or [out, in, *kernel] of the weight.
        itemsize: Bytes of one value, e.g. 2 for bfloat16.

    Returns:
        Bytes of values and indices.

    Raises:
        PatternError: If the pattern is misspelled or does not fit the shape.

    Example:
        >>> dense = 64 * 64 * 2
        >>> [count_compact_bytes(text, (64, 64), 2) / dense for text in ("2:4", "1:8", "1:2@32x16")]
        [0.541748046875, 0.1484375, 0.5001220703125]
    """
    pattern = Pattern.parse(pattern)
    _require_fit(pattern, shape, "the weight")
    return count_kept(pattern, shape) * itemsize + count_mask_bytes(pattern, shape)


def find_kept(weight: Tensor) -> Tensor:
    """Returns True where a weight is not zero; 8-bit floats, too."""
    return (weight.float() if weight.itemsize == 1 else weight) != 0


def _require_fit(pattern: Pattern, shape: tuple[int, ...], name: str) -> None:
    reason = pattern.misfit(shape[0], shape[1]) if len(shape) >= 2 else "it has one dimension"
    if reason is not None:
        raise PatternError(f"'{pattern}' does not fit {name} of {list(shape)}: {reason}")
