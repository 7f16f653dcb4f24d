"""How a diffusion model of any make is called: one prediction, one seed per position."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError
from .condition import Condition

TIME_NAMES = ("timestep", "timesteps", "t")
"""What forwards call the time."""
UNIT_TIME = {"FluxTransformer2DModel", "AuraFlowTransformer2DModel"}
"""Classes of diffusers whose forward counts the time from 0 to 1, as their pipelines do."""


@dataclass(frozen=True, slots=True)
class Signature:
    """How a model takes its time and its condition.

    ``time``: the keyword of the time, None where it is the second positional argument. ``names``:
    what a mapping may name, None for anything. ``scale``: the time of noise level 1.
    """

    time: str | None = None
    names: frozenset[str] | None = None
    scale: float = 1.0


def predict(model: nn.Module, x: Tensor, t: Tensor, y: Condition | None = None) -> Tensor:
    """What ``model`` predicts for ``x`` [B, C, ...] at the noise levels ``t`` [B], shaped like it.

    The call is ``model(x, t)`` or ``model(x, t, y)``, and ``model(x, t, **y)`` for a mapping ``y``;
    the time goes by its name where forward does not take it second (SD3, Flux). ``t`` counts to
    1000; it is divided by 1000 for the models that count to 1 (``UNIT_TIME``). The model may return
    a tensor, a tuple or list that starts with one, or an object with ``.sample`` (diffusers). Of
    2C channels the first C count: the others are a learned variance (DiT). Raises DataError where
    the prediction is not shaped like ``x``, or a mapping names what forward does not take.
    """
    args, kwargs = arguments(model, x, t, y)
    return shaped_like(x, model(*args, **kwargs), type(model).__name__)


def arguments(
    model: nn.Module, x: Tensor, t: Tensor, y: Condition | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The (args, kwargs) of the call that ``predict`` makes. Raises DataError."""
    signature = signature_of(model)
    time = t if signature.scale == 1 else t * signature.scale
    positional: list[Any] = [x] if signature.time else [x, time]
    keywords: dict[str, Any] = {signature.time: time} if signature.time else {}
    if isinstance(y, Tensor):
        positional.append(y)
    elif y is not None:
        check_names(type(model).__name__, {*y}, signature, {*keywords})
        keywords |= y
    return tuple(positional), keywords


def shaped_like(x: Tensor, out: Any, name: str) -> Tensor:
    """The prediction for ``x`` in what the model ``name`` returned, without a learned variance."""
    if isinstance(out, tuple | list) and out:
        out = out[0]
    if not isinstance(out, Tensor):
        try:
            out = out.sample
        except AttributeError:
            raise DataError(
                f"{name} returned a {type(out).__name__}: a prediction is a tensor, a tuple that "
                "starts with one, or an object with .sample"
            ) from None
    found: Tensor = out
    if x.ndim > 1 and found.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:]):
        found = found[:, : x.shape[1]]
    if found.shape != x.shape:
        raise DataError(
            f"{name} predicted {list(found.shape)} for inputs {list(x.shape)}: "
            "the noise prediction must be shaped like its input"
        )
    return found


def check_names(model: str, given: set[str], signature: Signature, taken: set[str]) -> None:
    """Raises DataError unless the forward of ``model`` takes every name ``given``."""
    free = None if signature.names is None else signature.names - taken
    if wrong := sorted(given & taken if free is None else given - free):
        known = "" if free is None else f"; its forward takes {', '.join(sorted(free)) or 'none'}"
        raise DataError(f"the condition names {', '.join(wrong)}, not for {model}{known}")


def signature_of(model: nn.Module) -> Signature:
    """How ``model`` is called; a wrapper that passes ``*args`` on is called like what it wraps."""
    while (found := forward_signature(type(model).forward)) is None:
        inside = list(model.children())
        if len(inside) != 1:
            return Signature()
        model = inside[0]
    units = any(base.__name__ in UNIT_TIME for base in type(model).__mro__)
    return replace(found, scale=1e-3) if units else found


@cache
def forward_signature(forward: Callable[..., Any]) -> Signature | None:
    """How a class with this forward is called, None where it names no more than its input."""
    given = [*inspect.signature(forward).parameters.values()][1:]
    anything = any(part.kind is part.VAR_KEYWORD for part in given)
    named = [p.name for p in given if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if len(named) < 2:
        return None
    late = None if named[1] in TIME_NAMES else next((n for n in TIME_NAMES if n in named), None)
    return Signature(late, None if anything else frozenset(named[1 if late else 2 :]))


def seed_at(*position: int | str) -> int:
    """A 63-bit seed that depends on the whole position, e.g. (seed, "noise", images seen).

    >>> seed_at(0, "noise", 64) == seed_at(0, "noise", 64) != seed_at(0, "noise", 128)
    True
    """
    return random.Random("/".join(map(str, position))).getrandbits(63)


def generator_at(*position: int | str) -> torch.Generator:
    """A CPU generator seeded by ``seed_at``: the same numbers whatever the device and the batch."""
    return torch.Generator().manual_seed(seed_at(*position))
