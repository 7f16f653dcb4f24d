"""``describe_compiled``: what ``explain`` returns of a compiled model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from ..backends.processor import lacks_bfloat16
from ..patterns import Pattern
from ..reports import Explanation
from .inner_backend import resolve_backend
from .lookup import masked_parameters, require_compiled
from .phase_clock import PHASES

SLOW_BFLOAT16 = (
    "this CPU has no bfloat16 instructions: torch multiplies bfloat16 many times slower than "
    "float32 here, the sparse kernels do not; compare the whole model in float32 (model.float())"
)


def describe_compiled(model: nn.Module) -> Explanation:
    """Returns the decisions, the kernels and the times of all compiled models inside ``model``."""
    forwards = require_compiled(model)
    rows = [
        decision.prefixed(prefix)
        for prefix, forward in forwards
        for decision in forward.decisions.values()
    ]
    choices = [
        choice.prefixed(prefix)
        for prefix, forward in forwards
        for choice in forward.choices.values()
    ]
    masked = masked_parameters(model)
    config = forwards[0][1].config
    backend = config.backend
    return Explanation(
        rows=tuple(rows),
        choices=tuple(choices),
        masked=tuple(masked),
        mode=config.mode,
        backend=resolve_backend(backend) if isinstance(backend, str) else backend.__name__,
        broken=next((forward.broken for _, forward in forwards if forward.broken), None),
        eager=tuple(prefix + name for prefix, forward in forwards for name in forward.eager),
        frozen=tuple(
            prefix + name for prefix, forward in forwards for name in forward.frozen.frozen_names
        ),
        regions=tuple(dict.fromkeys(text for _, own in forwards for text in own.clock.regions)),
        notes=tuple(_list_notes(masked, config.mode)),
        timings={
            phase: sum(forward.clock.seconds[phase] for _, forward in forwards) for phase in PHASES
        },
    )


def _list_notes(masked: Mapping[str, tuple[nn.Parameter, Pattern]], mode: str) -> Iterator[str]:
    """Yields what a user should know of the machine, as sentences."""
    kinds = {(weight.device.type, weight.dtype) for weight, _ in masked.values()}
    if mode == "infer" and ("cpu", torch.bfloat16) in kinds and lacks_bfloat16():
        yield SLOW_BFLOAT16
