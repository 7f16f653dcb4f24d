"""Folded weights: masked once, in the form a kernel reads, and again when the weight changes."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backends.cpu.pack import pack
from .errors import DenseRunError
from .masks import kept, nm_mask
from .pattern import Pattern

_SAMPLES = 64


@dataclass(frozen=True, slots=True)
class Form:
    """What a graph reads in the place of a weight.

    ``dtype``: None for the weight's own. ``width``: columns of a block of the packed weight, None
    for the dense masked weight.
    """

    pattern: Pattern
    dtype: torch.dtype | None = None
    width: int | None = None


@dataclass(slots=True)
class _Fold:
    weight: weakref.ref[Tensor]
    state: tuple[int, int]
    samples: Tensor
    folded: Tensor


class Folds:
    """The folded weights of one model; all its graphs share them.

    A change of the weight is seen by its version counter, its storage, and, for edits through
    ``.data`` that move neither, by 64 of its values spread evenly.
    """

    def __init__(self) -> None:
        self._folds: dict[tuple[int, Form], _Fold] = {}

    def get(self, weight: Tensor, form: Form, name: str) -> Tensor:
        """The weight in that form. Raises DenseRunError where a gradient is asked for."""
        if weight.requires_grad and torch.is_grad_enabled():
            raise DenseRunError(
                f"{name!r} asks for a gradient, but mode='infer' has folded its mask; "
                "train with mode='train', or call under torch.no_grad()"
            )
        state = (0 if weight.is_inference() else weight._version, weight.data_ptr())
        fold = self._folds.get((id(weight), form))
        known = fold is not None and fold.weight() is weight and fold.state == state
        if fold is not None and known and torch.equal(fold.samples, _samples(weight)):
            return fold.folded
        with torch.no_grad():
            folded = fold_weight(weight.detach(), form, name)
            samples = _samples(weight).clone()
        self._folds[id(weight), form] = _Fold(weakref.ref(weight), state, samples, folded)
        return folded


def fold_weight(weight: Tensor, form: Form, name: str) -> Tensor:
    """The masked weight, dense or packed. Raises MaskError for NaN and Inf."""
    mask = nm_mask(weight, form.pattern, name=name)
    masked = kept(weight, mask)
    if form.dtype is not None:
        masked = masked.to(form.dtype)
    if form.width is None:
        return masked
    return pack(masked, mask, form.pattern, width=form.width)


def _samples(weight: Tensor) -> Tensor:
    """Up to 64 values of a weight, without a copy where its memory has no gaps."""
    weight = weight.detach()
    # Any order will do, so that channels_last weights need no copy either.
    flat = weight.as_strided((weight.numel(),), (1,)) if _gapless(weight) else weight.flatten()
    samples: Tensor = flat[:: max(1, flat.numel() // _SAMPLES)]
    return samples


def _gapless(weight: Tensor) -> bool:
    return weight.numel() == 1 + sum(
        (size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True)
    )


class Folded:
    """Runs a graph with the weights at ``places`` in their folded form."""

    def __init__(
        self, run: Any, folds: Folds, forms: Mapping[int, Form], names: Mapping[int, str]
    ) -> None:
        self.run = run
        self.folds = folds
        self.forms = forms
        self.names = names

    def __call__(self, *inputs: Any) -> Any:
        given = list(inputs)
        for place, form in self.forms.items():
            given[place] = self.folds.get(given[place], form, self.names[place])
        return self.run(*given)
