"""The record of a compiled model: its options and decisions as JSON, as every file holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import CheckpointError
from ..files.container import VERSION
from ..graph.names import strip_adapter_prefix
from ..passes import ADDED
from ..patterns import Pattern
from ..reports import Decision
from .guarded_forward import SparseForward

_DENSE = "dense: "


def describe_model(forward: SparseForward) -> dict[str, Any]:
    """Returns all of a compiled model but its tensors, as plain values for JSON."""
    return {
        "version": VERSION,
        "class": type(forward.module).__name__,
        "options": forward.config.to_dict(),
        "known": sorted(forward.known),
        "frozen": [*forward.frozen.frozen_names],
        "decisions": describe_decisions(list_decisions(forward)),
    }


def list_decisions(forward: SparseForward) -> dict[str, Decision]:
    """Returns the decisions on the parameters that a model has: not of adapters that are gone."""
    names = forward.module.named_parameters(remove_duplicate=False)
    present = {strip_adapter_prefix(name) for name, _ in names}
    return {name: row for name, row in forward.decisions.items() if name in present}


def describe_decisions(decisions: Mapping[str, Decision]) -> dict[str, str]:
    """Returns {weight: op and pattern, or op and why it stays dense}, for JSON."""
    return {
        name: f"{decision.op} {decision.pattern or _DENSE + str(decision.refusal)}"
        for name, decision in decisions.items()
    }


def check_decisions(texts: Mapping[str, str]) -> None:
    """Raises ValueError (PatternError for a pattern) for texts that are no decisions."""
    for name, text in texts.items():
        _read_decision(name, text, ())


def read_decisions(texts: Mapping[str, str], model: nn.Module) -> dict[str, Decision]:
    """Returns the decisions that ``describe_decisions`` wrote, for the parameters of ``model``.

    Raises:
        CheckpointError: If ``model`` has no parameter of a decision's name.
        ValueError: If a text is no decision; PatternError for a misspelled pattern.
    """
    shapes = {
        strip_adapter_prefix(name): tuple(weight.shape)
        for name, weight in model.named_parameters(remove_duplicate=False)
    }
    absent = [name for name in texts if name not in shapes]
    if absent:
        adapted = any(texts[name].endswith(ADDED) for name in absent)
        hint = ": add the adapters that it was saved with, or save it without any" * adapted
        raise CheckpointError(
            f"the record does not fit this {type(model).__name__}, which does not have "
            f"{absent[0]!r} and {len(absent) - 1} more weights that it decides on" + hint
        )
    return {name: _read_decision(name, text, shapes[name]) for name, text in texts.items()}


def _read_decision(weight: str, text: str, shape: tuple[int, ...]) -> Decision:
    op, _, rest = text.partition(" ") if isinstance(text, str) else ("", "", "")
    if not op or not rest:
        raise ValueError(f"{text!r} is no decision about {weight!r}")
    if rest.startswith(_DENSE):
        return Decision(weight, op, shape, refusal=rest.removeprefix(_DENSE))
    return Decision(weight, op, shape, Pattern.parse(rest))
