"""The error that every candidate would give every layer, each pruned alone in a dense model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...progress import ProgressBar, show_progress_bar
from ..batches import CalibrationBatch
from ..collect import Uses, watch_uses
from ..job import Job, explain_unused
from ..options import OneShotOptions
from ..outputs import require_finite, run_once
from ..solve_layer import PrunedLayer, solve_layer, solve_unseen
from ..statistics import LayerStatistics
from ..targets import Candidates, Target
from .taylor import measure_taylor

WORST = 1e12
"""The error where a pruned layer makes the outputs of the model NaN or Inf."""


@dataclass(slots=True)
class ErrorMeter:
    """Measures the errors of layers.

    Attributes:
        model: The dense model, in eval mode.
        batches: The inputs of its calls.
        options: How layers are pruned.
        score: "layer": the relative error of the layer's own output; "output": the change of the
            model's output, E|f' - f|^2 / E|f|^2, over ``tried``.
        tried: The batches that "output" is measured on.
        uses: How the weights are used.
        expected: The outputs of the dense model on those.
    """

    model: nn.Module
    batches: list[CalibrationBatch]
    options: OneShotOptions
    score: str
    tried: int
    uses: Uses
    expected: list[list[Tensor]] = field(default_factory=list)

    def measure(self, candidates: Candidates, progress: bool) -> dict[str, dict[str, float]]:
        """Returns errors by weight and candidate."""
        targets = [own[0] for own in candidates.values()]
        job = Job(self.model, targets, self.batches, self.options, self.uses)
        plan, count = job.plan_passes(), sum(map(len, candidates.values()))
        if self.score == "output":
            self.expected = [run_once(self.model, batch) for batch in self.batches[: self.tried]]
            for expected in self.expected:
                require_finite(self.model, expected)
        errors: dict[str, dict[str, float]] = {}
        total = count + len(plan) * len(self.batches)
        with show_progress_bar(total, unit="step", name="choose patterns", shown=progress) as bar:
            for group in plan:
                statistics = job.collect(group, bar)
                for target in group:
                    choices = candidates[target.name]
                    seen = statistics.pop(target.name, None)
                    errors[target.name] = self.measure_weight(choices, seen, bar)
                    del seen  # freed before the moments of the next pass
        return errors

    def measure_weight(
        self, choices: Sequence[Target], statistics: LayerStatistics | None, bar: ProgressBar
    ) -> dict[str, float]:
        """Returns the error of one weight at every candidate."""
        errors = {}
        for target in choices:
            layer = self.prune(target, statistics)
            errors[str(target.pattern)] = (
                self.measure_output(target, layer)
                if self.score == "output"
                else 1 - layer.kept_energy
                if layer.error is None
                else layer.error
            )
            bar.update()
        return errors

    def prune(self, target: Target, statistics: LayerStatistics | None) -> PrunedLayer:
        """Returns a weight as one-shot pruning would leave it, alone."""
        if statistics is None:
            return solve_unseen(target.weight, target.pattern, self.uses.hidden[target.name])
        if not statistics.count:
            raise explain_unused(target.name)
        return solve_layer(
            target.weight,
            target.pattern,
            statistics,
            method=self.options.method,
            damping=self.options.damping,
            shifted=self.find_bias(target) is not None,
        )

    def find_bias(self, target: Target) -> nn.Parameter | None:
        """Returns the bias that may take up the mean error, None for none."""
        name = self.uses.find_bias(target.name) if self.options.shifts_biases else None
        return None if name is None else self.model.get_parameter(name)

    def measure_output(self, target: Target, layer: PrunedLayer) -> float:
        """Returns how much the outputs of the model move where one layer is pruned."""
        bias, values = self.find_bias(target), {target.weight: layer.weight}
        if bias is not None and layer.shift is not None:
            values[bias] = (bias.detach().double() + layer.shift).to(bias.dtype)
        change, size = 0.0, 0.0
        with replacing(values):
            for batch, expected in zip(self.batches, self.expected, strict=False):
                for new, old in zip(run_once(self.model, batch), expected, strict=True):
                    change += batch.weight * float((new.double() - old.double()).square().sum())
                    size += batch.weight * float(old.double().square().sum())
        if not change < math.inf:  # it overflows, e.g. in float16
            return WORST
        return change / size if size > 0 else change


@contextmanager
def replacing(values: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Gives parameters other values within the block."""
    before = {parameter: parameter.detach().clone() for parameter in values}
    try:
        with torch.no_grad():
            for parameter, value in values.items():
                parameter.copy_(value)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before.items():
                parameter.copy_(value)


def measure_errors(
    model: nn.Module,
    batches: list[CalibrationBatch],
    candidates: Candidates,
    options: OneShotOptions,
    *,
    score: str,
    tried: int,
    progress: bool,
) -> dict[str, dict[str, float]]:
    """Returns errors by weight and by the text of a pattern; 0 for a dense one."""
    sparse = {
        name: [target for target in own if not target.pattern.is_dense]
        for name, own in candidates.items()
    }
    if score == "taylor":
        errors = measure_taylor(model, batches, sparse, progress)
    else:
        uses = watch_uses(model, batches[0], [own[0] for own in sparse.values()])
        meter = ErrorMeter(model, batches, options, score, tried, uses)
        errors = meter.measure(sparse, progress)
    for name, own in candidates.items():
        errors[name] |= {str(t.pattern): 0.0 for t in own if t.pattern.is_dense}
    return errors
