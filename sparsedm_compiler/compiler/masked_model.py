"""What the methods of a compiled model need of the forward that holds their common state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, fx, nn

from ..config import CompileConfig
from ..graph.capture import Names
from ..graph.eager_watch import EagerProduct
from ..graph.recorded_run import RecordedRun
from ..reports import Decision
from .call_state import CallState
from .folded_weights import FoldedWeights
from .frozen_masks import FrozenMasks
from .read_guard import ReadGuard


class MaskedModel(Protocol):
    """A compiled module with the decisions on its weights; ``SparseForward`` is the one."""

    module: nn.Module
    config: CompileConfig
    decisions: dict[str, Decision]
    weights: FoldedWeights
    frozen: FrozenMasks
    guard: ReadGuard
    calls: CallState

    def run(self, entry: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls one of the module's methods, masked."""

    def prepare(self) -> None:
        """Sets the guard up in a copy, or in a model from a file, before its first call."""

    def require_weights(self) -> None:
        """Raises DenseRunError if a weight to be pruned has left the model, or has another name."""

    def is_pruned(self, names: Names, shape: tuple[int, ...]) -> bool:
        """Returns whether a parameter is pruned, or would be if no graph has shown it yet."""

    def mask_eagerly(self, weight: Tensor, names: Names, product: EagerProduct | None) -> Tensor:
        """Returns a weight as Python that no graph holds shall use it: masked, if it is pruned."""

    def decide_eagerly(self, run: RecordedRun) -> None:
        """Decides on the weights of an eager run."""

    def lower(
        self, gm: fx.GraphModule, example_inputs: list[Any], *, whole: bool
    ) -> Callable[..., Any]:
        """Plans, rewrites and compiles one graph of the module."""
