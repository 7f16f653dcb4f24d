"""Numbers below a base, packed into bytes: as many to a word as fit (mixed radix)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..errors import PackError

MOST = (1 << 63) - 1
"""The largest word and the largest base: they are computed in signed 64 bits."""


@lru_cache(maxsize=256)
def choose_word(base: int) -> tuple[int, int]:
    """Returns (digits, bytes) of a word: those, of 1 to 8 bytes, that waste the least.

    Of equally good words the shortest is taken. ``base``: 2 to ``MOST``.
    """
    words = []
    for size in range(1, 9):
        limit, digits = min(256**size, MOST + 1), 0
        while base ** (digits + 1) <= limit:
            digits += 1
        if digits:
            words.append((size / digits, size, digits))
    _, size, digits = min(words)
    return digits, size


def count_bytes(count: int, base: int) -> int:
    """Returns the size of ``count`` packed digits; a base of 1 needs none."""
    if base == 1:
        return 0
    digits, size = choose_word(base)
    return -(-count // digits) * size


def pack_digits(numbers: Tensor, base: int) -> Tensor:
    """Returns int64 ``numbers`` [count], all below ``base``, as bytes: uint8.

    A word is the sum of its i-th digit times base^i, least significant byte first. The last word is
    filled up with zeros.
    """
    if base == 1 or not len(numbers):
        return torch.zeros(0, dtype=torch.uint8, device="cpu")
    digits, size = choose_word(base)
    words = -(-len(numbers) // digits)
    padded = torch.zeros(words * digits, dtype=torch.int64, device="cpu")
    padded[: len(numbers)] = numbers
    weights = torch.tensor([base**i for i in range(digits)], device="cpu")
    word = (padded.view(words, digits) * weights).sum(1)
    shifts = torch.arange(0, 8 * size, 8, device="cpu")
    return ((word.unsqueeze(1) >> shifts) & 0xFF).to(torch.uint8).flatten()


def unpack_digits(data: Tensor, count: int, base: int) -> Tensor:
    """Returns ``count`` numbers from the bytes that ``pack_digits`` made.

    Raises:
        PackError: If there are more or fewer bytes, or a word or the padding is out of range.
    """
    if data.numel() != count_bytes(count, base):
        raise PackError(f"{data.numel()} bytes of indices, not {count_bytes(count, base)}")
    if base == 1 or not count:
        return torch.zeros(count, dtype=torch.int64, device="cpu")
    digits, size = choose_word(base)
    shifts = torch.arange(0, 8 * size, 8, device="cpu")
    word = (data.view(-1, size).to(torch.int64) << shifts).sum(1)
    numbers = torch.empty(len(word), digits, dtype=torch.int64, device="cpu")
    for i in range(digits):
        numbers[:, i] = word % base
        word = word.div(base, rounding_mode="floor")
    flat = numbers.flatten()
    if word.any() or flat[count:].any():  # a negative word leaves a negative rest
        raise PackError(f"an index is out of range: a group has {base} masks")
    return flat[:count]
