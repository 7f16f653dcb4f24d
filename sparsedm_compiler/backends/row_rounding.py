"""``RowRounding``: how a linear op that rounds its input to 8 bits falls into two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowRounding:
    """The two functions that a linear op consists of, where it rounds the rows of x to 8 bits.

    Attributes:
        round_rows: Called as ``round_rows(x, kind, **prologue)``, with the norm or the activation
            in front of it as ``prologue``: (numbers, factors).
        multiply: Called as ``multiply(x, numbers, factors, packed, bias, rows, **arguments)``, with
            the keyword arguments of the op, "kind" and "act" among them; of x, or of what came
            before a norm, it uses leading shape and dtype.
    """

    round_rows: Callable[..., tuple[Tensor, Tensor]]
    multiply: Callable[..., Tensor]
