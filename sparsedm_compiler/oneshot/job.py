"""One run of one-shot pruning: its passes, and the layers that each of them finishes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..progress import ProgressBar, show_progress_bar
from .batches import CalibrationBatch
from .collect import Uses, collect_statistics
from .folder import BIAS, WEIGHT, OneShotFolder
from .layer_matrix import count_columns
from .options import OneShotOptions
from .report import LayerReport
from .solve_layer import PrunedLayer, solve_layer, solve_unseen
from .statistics import LayerStatistics, cut_columns
from .targets import Target


@dataclass(slots=True)
class Job:
    """One run: a model, what to prune, and the original values of what has been pruned."""

    model: nn.Module
    targets: list[Target]
    batches: list[CalibrationBatch]
    options: OneShotOptions
    uses: Uses
    folder: OneShotFolder | None = None
    originals: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @contextmanager
    def restoring_on_failure(self) -> Iterator[None]:
        """Gives the model its own values back where the block raises."""
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for parameter, values in reversed(self.originals):
                    parameter.copy_(values)
            raise

    def plan_passes(self) -> list[list[Target]]:
        """Returns the layers of every pass, in order: equally many, as far as the memory allows."""
        most = math.ceil(len(self.targets) / self.options.passes)
        plan: list[list[Target]] = []
        used = 0
        for target in self.targets:
            parts = self.cut(target)
            size = sum(4 * len(part) ** 2 for part in parts)
            if not plan or len(plan[-1]) == most or used + size > self.options.memory:
                plan.append([])
                used = 0
            plan[-1].append(target)
            used += size
        return plan

    def cut(self, target: Target) -> tuple[range, ...]:
        """Returns the parts of a target's columns."""
        columns = count_columns(tuple(target.weight.shape))
        return cut_columns(columns, target.pattern, self.options.most_columns)

    def run(self, progress: bool) -> Iterator[LayerReport]:
        """Prunes all layers, pass after pass; yields their reports."""
        plan = self.plan_passes()
        total = len(self.targets) + len(plan) * len(self.batches)
        name = f"prune {self.options.method}"
        first = 0
        with show_progress_bar(total, unit="step", name=name, shown=progress) as bar:
            for group in plan:
                results = [self.load(first + k) for k in range(len(group))]
                todo = [t for t, result in zip(group, results, strict=True) if result is None]
                statistics = self.collect(todo, bar)
                for k, target in enumerate(group):
                    result = results[k]
                    if result is None:  # its moments are freed, for those of the next pass
                        result = self.prune(first + k, target, statistics.pop(target.name, None))
                    results[k] = result
                    bar.update()
                for target, result in zip(group, results, strict=True):
                    assert result is not None
                    self.write(target, result[0])
                    yield result[1]
                first += len(group)

    def load(self, number: int) -> tuple[dict[str, Tensor], LayerReport] | None:
        """Reads a layer that an earlier call finished."""
        return None if self.folder is None else self.folder.load(number)

    def collect(self, targets: list[Target], bar: ProgressBar) -> dict[str, LayerStatistics]:
        """Returns the moments of the inputs of some layers; nothing is run where there are none."""
        statistics = {
            target.name: LayerStatistics(target.name, self.cut(target), target.weight.device)
            for target in targets
            if target.name not in self.uses.hidden
        }
        if statistics:
            collect_statistics(self.model, self.batches, statistics, self.uses, bar.update)
        else:
            bar.update(len(self.batches))
        return statistics

    def prune(
        self, number: int, target: Target, statistics: LayerStatistics | None
    ) -> tuple[dict[str, Tensor], LayerReport]:
        """Returns the new tensors of a layer, and their report; keeps them in the folder."""
        name = self.uses.find_bias(target.name) if self.options.shifts_biases else None
        bias = None if name is None else self.model.get_parameter(name)
        if statistics is None:
            layer = solve_unseen(target.weight, target.pattern, self.uses.hidden[target.name])
        else:
            if not statistics.count:
                raise explain_unused(target.name)
            layer = solve_layer(
                target.weight,
                target.pattern,
                statistics,
                method=self.options.method,
                damping=self.options.damping,
                shifted=bias is not None,
            )
        tensors = {WEIGHT: layer.weight}
        if bias is not None and layer.shift is not None:
            tensors[BIAS] = (bias.detach().to(torch.float64) + layer.shift).to(bias.dtype)
        row = make_row(target, layer, len(self.cut(target)), bias=BIAS in tensors)
        if self.folder is not None:
            self.folder.save(number, tensors, row)
        return tensors, row

    @torch.no_grad()
    def write(self, target: Target, tensors: Mapping[str, Tensor]) -> None:
        """Writes a layer's new tensors into the model, and remembers the old ones."""
        name = self.uses.find_bias(target.name)
        owners = {WEIGHT: target.weight}
        if name is not None and BIAS in tensors:
            owners[BIAS] = self.model.get_parameter(name)
        for kind, parameter in owners.items():
            self.originals.append((parameter, parameter.detach().cpu().clone()))
            parameter.copy_(tensors[kind])


def explain_unused(name: str) -> DataError:
    """Returns the error for a weight that no call of the batches multiplies by."""
    layer = name.removesuffix(".weight")
    return DataError(
        f"the calibration batches never call {layer}: give inputs that reach it, or keep it dense "
        f"by keep_dense=[{layer!r}]"
    )


def make_row(target: Target, layer: PrunedLayer, parts: int, *, bias: bool) -> LayerReport:
    """Returns the row of the report about a pruned weight."""
    return LayerReport(
        weight=target.name,
        pattern=str(target.pattern),
        shape=tuple(target.weight.shape),
        method=layer.method,
        reason=layer.reason,
        damping=layer.damping,
        error=layer.error,
        magnitude_error=layer.magnitude_error,
        kept_energy=layer.kept_energy,
        parts=parts,
        bias=bias,
    )
