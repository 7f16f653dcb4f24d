"""Runs of a model in which the inputs of some of its layers are seen, without hooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from ..compiler.lookup import analyse_layers
from ..graph.capture import copy_forward
from ..graph.eager_watch import EagerProduct, watch_eager
from .batches import CalibrationBatch
from .targets import Target, explain_call


@dataclass(slots=True)
class Uses:
    """How the weights of a model are used in one call.

    Attributes:
        counts: How many products each weight is a factor of, by name.
        hidden: The ops whose inputs cannot be seen, by the weight's name.
        biases: The names of the biases added to the products by each weight, None for no bias.
        sliced: The weights of which some product uses only a part.
    """

    counts: Counter[str] = field(default_factory=Counter)
    hidden: dict[str, str] = field(default_factory=dict)
    biases: dict[str, set[str | None]] = field(default_factory=dict)
    sliced: set[str] = field(default_factory=set)

    def find_bias(self, name: str) -> str | None:
        """Returns the bias that is added after this weight alone, None where there is none."""
        biases = self.biases.get(name, set())
        if len(biases) != 1 or name in self.sliced or name in self.hidden:
            return None
        (bias,) = biases
        others = [n for n, added in self.biases.items() if n != name and bias in added]
        return None if others else bias


class InputSums(Protocol):
    """Sums over the inputs of one weight."""

    def add(self, values: Mapping[str, Any], op: str, weight: float) -> None:
        """Adds the inputs of one product, each ``weight`` times."""


class _Done(BaseException):
    """Ends a run after the last product that is wanted."""


def watch_uses(model: nn.Module, batch: CalibrationBatch, targets: list[Target]) -> Uses:
    """Runs a model once and returns how it uses its weights.

    Raises:
        DataError: The model cannot be called with the batch.
    """
    uses, wanted = Uses(), {target.name: target for target in targets}

    def report(product: EagerProduct) -> None:
        for argument, names in product.names.items():
            if argument == "bias" or names[0] not in wanted:
                continue
            name = names[0]
            uses.counts[name] += 1
            if find_inputs(product, argument) is None:
                uses.hidden[name] = product.entry.name
            bias = product.names.get("bias")
            none = product.values.get("bias") is None
            uses.biases.setdefault(name, set()).add(
                None if bias is None and none else bias[0] if bias else ""
            )
            if product.values[argument].shape[0] != wanted[name].weight.shape[0]:
                uses.sliced.add(name)

    run(model, batch, report)
    return uses


def find_inputs(product: EagerProduct, argument: str) -> tuple[str, Mapping[str, Any]] | None:
    """Returns (op, arguments) of a product in the form of ``iterate_rows``, None if it has none.

    Args:
        product: A call of an op.
        argument: The argument that is the weight.
    """
    name, values = product.entry.name, product.values
    if argument == "weight" and (name == "linear" or name in ("conv1d", "conv2d", "conv3d")):
        return name, values
    if argument == "other" and name in ("matmul", "mm", "addmm") and values["other"].dim() == 2:
        return "linear", {"input": values["input"]}
    return None


def collect_statistics(
    model: nn.Module,
    batches: list[CalibrationBatch],
    statistics: Mapping[str, InputSums],
    uses: Uses,
    advance: Callable[[], Any],
) -> None:
    """Adds the inputs of some weights over all batches; a run ends after the last of them.

    Args:
        model: The model, in eval mode.
        batches: The inputs of its calls.
        statistics: By the name of the weight.
        uses: How often a call uses each of them.
        advance: Called after each batch.

    Raises:
        DataError: The model cannot be called with a batch, or inputs hold NaN or Inf.
    """
    device = next(model.parameters()).device
    for batch in batches:
        left = Counter({name: uses.counts[name] for name in statistics})

        def report(
            product: EagerProduct, left: Counter[str] = left, share: float = batch.weight
        ) -> None:
            for argument, names in product.names.items():
                if argument == "bias" or names[0] not in statistics:
                    continue
                inputs = find_inputs(product, argument)
                if inputs is not None:
                    statistics[names[0]].add(inputs[1], inputs[0], share)
                left[names[0]] -= 1
            if not any(count > 0 for count in left.values()):
                raise _Done

        run(model, batch.to(device), report)
        advance()


def run(model: nn.Module, batch: CalibrationBatch, report: Callable[[EagerProduct], None]) -> None:
    """Runs a model's own forward on a batch, eagerly and undone, and reports its products.

    Raises:
        DataError: The model cannot be called with the batch.
    """
    moved = batch.to_model(model)
    try:
        with analyse_layers(model):
            watch_eager(model, copy_forward(model), report, moved.args, moved.kwargs)
    except _Done:
        return
    except Exception as error:
        raise explain_call(model, batch, error) from error
