"""One call for every diffusion model: its prediction at a noise level, and seeds by position."""

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
"""Names of the time argument in a model's forward."""
TIME_SCALES = {"AuraFlowTransformer2DModel": 1e-3, "FluxTransformer2DModel": 1e-3}
"""Class name -> factor from the noise level, 0..1000, to the time its forward takes.

Classes that count to 1000 are not listed.
"""


@dataclass(frozen=True, slots=True)
class CallSignature:
    """The way a model takes its time and its condition.

    ``time``: the keyword of the time, None where it is the second positional argument. ``names``:
    the keywords that a condition may use, None for any. ``scale``: the factor from the noise level
    to the time.
    """

    time: str | None = None
    names: frozenset[str] | None = None
    scale: float = 1.0


def predict(model: nn.Module, x: Tensor, t: Tensor, y: Condition | None = None) -> Tensor:
    """Returns the prediction of any diffusion model for noisy inputs at given noise levels.

    The call is ``model(x, t)``, ``model(x, t, y)`` for a tensor ``y`` or ``model(x, t, **y)`` for a
    mapping. The time goes by keyword where forward does not take it second (SD3, Flux). The model
    may return a tensor, a tuple or list that starts with one, or an object with ``.sample``
    (diffusers). Of 2C predicted channels the first C are returned; the others are a learned
    variance (DiT).

    Args:
        model: The diffusion model, or a wrapper that passes its arguments on.
        x: Noisy inputs [B, C, ...].
        t: Noise levels [B] in 0..1000. They are divided by 1000 for the classes that take a time
            in 0..1 (Flux, AuraFlow).
        y: Class labels [B], named tensors, or None.

    Returns:
        The prediction, shaped like ``x``.

    Raises:
        DataError: The prediction is not shaped like ``x``, or a mapping uses a name that forward
            does not take.

    Example:
        >>> class Half(nn.Module):
        ...     def forward(self, x, t):
        ...         return x / 2
        >>> predict(Half(), torch.ones(1, 2), torch.zeros(1))
        tensor([[0.5000, 0.5000]])
    """
    args, kwargs = build_arguments(model, x, t, y)
    return extract_prediction(x, model(*args, **kwargs), type(model).__name__)


def build_arguments(
    model: nn.Module, x: Tensor, t: Tensor, y: Condition | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the (args, kwargs) of the call that ``predict`` makes.

    Raises DataError for a mapping ``y`` with a name that forward does not take.
    """
    signature = read_signature(model)
    time = t if signature.scale == 1 else t * signature.scale
    positional: list[Any] = [x] if signature.time else [x, time]
    keywords: dict[str, Any] = {signature.time: time} if signature.time else {}
    if isinstance(y, Tensor):
        positional.append(y)
    elif y is not None:
        check_names(type(model).__name__, {*y}, signature, {*keywords})
        keywords |= y
    return tuple(positional), keywords


def extract_prediction(x: Tensor, output: Any, name: str) -> Tensor:
    """Takes the prediction for ``x`` from the output of the model ``name``, without a variance.

    Raises DataError for an output that holds no tensor shaped like ``x``.
    """
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        try:
            output = output.sample
        except AttributeError:
            raise DataError(
                f"{name} returned a {type(output).__name__}: a prediction is a tensor, a tuple "
                "that starts with one, or an object with .sample"
            ) from None
    prediction: Tensor = output
    if x.ndim > 1 and prediction.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:]):
        prediction = prediction[:, : x.shape[1]]
    if prediction.shape != x.shape:
        raise DataError(
            f"{name} predicted {list(prediction.shape)} for inputs {list(x.shape)}: "
            "the noise prediction must be shaped like its input"
        )
    return prediction


def check_names(model: str, names: set[str], signature: CallSignature, taken: set[str]) -> None:
    """Raises DataError unless the forward of ``model`` takes every one of ``names``.

    ``taken``: the keywords that the call uses already.
    """
    free = None if signature.names is None else signature.names - taken
    if wrong := sorted(names & taken if free is None else names - free):
        known = "" if free is None else f"; its forward takes {', '.join(sorted(free)) or 'none'}"
        raise DataError(f"the condition names {', '.join(wrong)}, not for {model}{known}")


def read_signature(model: nn.Module) -> CallSignature:
    """Returns the call signature of ``model``, or of the model inside a wrapper.

    A wrapper is a module with one child and a forward that names no time of its own.
    """
    while (signature := read_forward_signature(type(model).forward)) is None:
        inside = list(model.children())
        if len(inside) != 1:
            return CallSignature()
        model = inside[0]
    names = [base.__name__ for base in type(model).__mro__]
    scale = next((TIME_SCALES[name] for name in names if name in TIME_SCALES), 1.0)
    return replace(signature, scale=scale)


@cache
def read_forward_signature(forward: Callable[..., Any]) -> CallSignature | None:
    """Reads the call signature of a class from its forward.

    Returns None where forward names no argument beside its input.
    """
    parameters = [*inspect.signature(forward).parameters.values()][1:]
    anything = any(part.kind is part.VAR_KEYWORD for part in parameters)
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if len(named) < 2:
        return None
    late = None if named[1] in TIME_NAMES else next((n for n in TIME_NAMES if n in named), None)
    return CallSignature(late, None if anything else frozenset(named[1 if late else 2 :]))


def seed_at(*position: int | str) -> int:
    """Returns a 63-bit seed that depends on the whole position.

    Args:
        *position: Numbers and words that say what is drawn, e.g. seed, "noise", images seen.

    Returns:
        The seed, the same in every process and on every machine.

    Example:
        >>> seed_at(0, "noise", 64) == seed_at(0, "noise", 64) != seed_at(0, "noise", 128)
        True
    """
    return random.Random("/".join(map(str, position))).getrandbits(63)


def generator_at(*position: int | str) -> torch.Generator:
    """Returns a CPU generator seeded by ``seed_at``.

    Its numbers depend on the position alone, not on the device or the batch size.

    Args:
        *position: As for ``seed_at``.

    Returns:
        A new generator.

    Example:
        >>> draws = [torch.rand(1, generator=generator_at(0, "noise", 64)) for _ in range(2)]
        >>> bool(draws[0] == draws[1])
        True
    """
    return torch.Generator().manual_seed(seed_at(*position))
