"""What the op table says of a call target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Arguments = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Product:
    """One multiplication inside a call.

    Attributes:
        factors: Names of the arguments that may hold a weight.
        macs: Computes the exact number of multiply-accumulates on demand, since shapes may be
            symbolic.
        kind: "linear", "conv" or "attention".
        fixed: True if the first factor is the weight by the op's definition. Otherwise the product
            is of two activations ("attention") unless a factor is a parameter.
        refusal: Why this op's weight is never pruned, as a sentence; None if it may be.
    """

    factors: tuple[str, ...]
    macs: Callable[[], int]
    kind: str = "linear"
    fixed: bool = True
    refusal: str | None = None


@dataclass(frozen=True, slots=True)
class OpEntry:
    """A known op.

    Attributes:
        name: Its name in reports.
        arguments: Names of its arguments, in order.
        products: Returns its products from the arguments by name and the result.
    """

    name: str
    arguments: tuple[str, ...]
    products: Callable[[Arguments, Any], tuple[Product, ...]]

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the arguments by name, without positional ones beyond the known names."""
        return {**dict(zip(self.arguments, args, strict=False)), **kwargs}
