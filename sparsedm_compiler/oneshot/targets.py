"""The weights to prune: those that ``compile`` would prune, with the biases beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..compiler.counting import decide_weights
from ..compiler.explanations import explain_nothing_pruned
from ..compiler.lookup import iterate_sparse_forwards, masked_parameters
from ..compiler.recompile import find_compiled
from ..config import CompileConfig
from ..errors import ConfigError, DataError, SparseDMError
from ..graph.capture import CapturedGraph, Names, map_parameter_names
from ..graph.names import strip_adapter_prefix
from ..meta_models import require_values
from ..passes import may_be_pruned
from ..patterns import Pattern
from ..reports import Decision
from .batches import CalibrationBatch

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True)
class Target:
    """A weight to prune: its name in the model, the parameter, and its pattern."""

    name: str
    weight: nn.Parameter
    pattern: Pattern


Candidates = Mapping[str, Sequence[Target]]
"""By weight, the weight at every pattern that may be chosen for it."""


def find_targets(
    model: nn.Module,
    config: CompileConfig | None,
    batch: CalibrationBatch,
    captured: CapturedGraph | None = None,
) -> list[Target]:
    """Finds the weights that ``compile`` prunes, in the order in which they are used.

    Args:
        model: A dense model, or a student in mode "train".
        config: The options of ``compile``; None for a student.
        batch: The inputs of a call.
        captured: The graph of that call of a dense model; None captures it.

    Raises:
        ConfigError: Nothing would be pruned, layers are left that no call reaches, or the model
            and the options do not go together.
        DataError: The model cannot be called with the batch.
    """
    require_values(model, "pruning it")
    batch = batch.to_model(model)
    compiled = find_compiled(model)
    if compiled is None and any(True for _ in iterate_sparse_forwards(model)):
        raise ConfigError(
            f"parts of {type(model).__name__} are compiled: prune those parts themselves, or the "
            "model before it is compiled"
        )
    if compiled is not None:
        return _find_in_student(model, config, batch)
    if config is None:
        raise ConfigError("pattern is missing: a model that is not compiled needs one, e.g. '2:4'")
    try:
        _, decisions = decide_weights(model, config, batch.args, dict(batch.kwargs), captured)
    except Exception as error:
        raise explain_call(model, batch, error) from error
    rows = {row.weight: row for row in decisions}
    names = {strip_adapter_prefix(n[0]): n[0] for n in map_parameter_names(model).values()}
    targets = [
        Target(names[row.weight], model.get_parameter(names[row.weight]), row.pattern)
        for row in decisions
        if row.pattern is not None
    ]
    if not targets:
        raise explain_nothing_pruned(model, config, rows)
    _require_called(model, config, rows)
    return targets


def _find_in_student(
    model: nn.Module, config: CompileConfig | None, batch: CalibrationBatch
) -> list[Target]:
    """Finds the weights of a compiled model, which is called first if it has not been yet."""
    forward = find_compiled(model)
    assert forward is not None
    if config is not None:
        raise ConfigError(
            f"this {type(model).__name__} is compiled to '{forward.config.pattern}' already: leave "
            "out the pattern, keep_dense, overrides and policy, which are those of the student"
        )
    if forward.config.mode != "train":
        raise ConfigError(
            f"{type(model).__name__} is folded for inference, its weights have lost what was "
            "pruned; prune the dense model, or the student in mode 'train'"
        )
    if not masked_parameters(model):
        try:
            with torch.no_grad():
                model(*batch.args, **batch.kwargs)
        except Exception as error:
            raise explain_call(model, batch, error) from error
    masked = masked_parameters(model)
    order = [*forward.decisions]
    ranked = sorted(masked, key=lambda name: order.index(strip_adapter_prefix(name)))
    return [Target(name, *masked[name]) for name in ranked]


def explain_call(model: nn.Module, batch: CalibrationBatch, error: Exception) -> Exception:
    """Returns the error for a model that cannot be called with a batch; ours as they are."""
    if isinstance(error, SparseDMError | torch.OutOfMemoryError | MemoryError):
        return error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason"]
    return DataError(
        f"{type(model).__name__} cannot be called with a calibration batch of {batch.describe()}: "
        f"{type(error).__name__}: {lines[0]}"
    )


def _require_called(
    model: nn.Module, config: CompileConfig, decisions: Mapping[str, Decision]
) -> None:
    """Raises ConfigError for layers that no product of the call used and that would be pruned."""
    config = config.bind(list(map_parameter_names(model).values()))
    known = {
        strip_adapter_prefix(n) for names in map_parameter_names(model).values() for n in names
    }
    unused = []
    names_by_id: Mapping[int, Names] = map_parameter_names(model)
    for module in model.modules():
        if not isinstance(module, LAYERS):
            continue
        names = tuple(map(strip_adapter_prefix, names_by_id.get(id(module.weight), ())))
        shape = tuple(module.weight.shape)
        if not names or any(name in decisions for name in names):
            continue
        if may_be_pruned(names, shape, config, known):
            unused.append(names[0].removesuffix(".weight"))
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        raise ConfigError(
            f"the calibration batches never call {', '.join(unused[:3])}{more}: give inputs that "
            f"reach them, or leave them alone by keep_dense=[{unused[0]!r}]"
        )
