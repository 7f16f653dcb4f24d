"""The guarded forward: it runs its masks or raises.

``compile`` keeps a ``SparseForward`` in ``module.__dict__["forward"]``, and a ``SparseMethod`` in
the place of every other public method that reaches a layer. Class, config and state_dict stay what
they are; a call runs the class's own method through TorchDynamo with our backend, and proves that
the masked graph has run. ``ReadGuard`` stands where a layer is called in any other way.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.eval_frame import skip_code

from ..autotune.measure import AutotuneBudget
from ..backends.kernel_family import WeightFormat
from ..backends.packing import PackedWeight
from ..config import CompileConfig
from ..errors import CaptureError
from ..graph.added_inputs import copy_graph
from ..graph.capture import KEY, Names, OwnForward, bind_parameters
from ..graph.eager_watch import EagerProduct, leave_eager_modes
from ..graph.module_guards import pin_modules
from ..graph.names import strip_adapter_prefix
from ..graph.recorded_run import RecordedRun
from ..passes import (
    Plan,
    Status,
    decide_weight,
    find_product_sites,
    find_recorded_sites,
    find_sites,
    mark_prunable,
    may_be_pruned,
)
from ..reports import Choice, Decision
from ..selection.top_n import KEYS
from .applied_masks import AppliedMasks
from .call_state import CallState
from .entry_point import EntryPoint
from .explanations import (
    explain_late_decision,
    explain_nothing_pruned,
    explain_outside_call,
    explain_unexported,
)
from .folded_weights import FoldedWeights
from .frozen_masks import FrozenMasks
from .lower import lower, plan_weights
from .own_apply import install_apply
from .own_copies import install_own_copies
from .phase_clock import PhaseClock
from .read_guard import ReadGuard
from .replaced_weights import OriginalWeights, require_decisions, require_read_weights
from .sparse_method import install_methods, list_methods
from .state_hooks import install_state_hooks


class SparseForward(OwnForward):
    """The forward of one compiled module, and the state that all its methods share.

    ``decisions``: by weight name, fixed by the first capture that meets the weight, so that train
    and eval, every resolution, a copy and a reloaded file all prune the same weights.
    ``choices``: what runs every pruned weight, by its name and the shapes it multiplies.
    ``weights``: the folded weights. ``frozen``: masks that are not computed anew. ``budget``: the
    seconds left to measure kernels. ``clock``: the seconds spent.
    ``known``: the parameters it had then. ``eager``: weights masked in Python that no graph holds.
    ``guard``: raises for layers called in any other way.
    """

    # Not a __dict__: functools.wraps would copy it into every wrapper, and copies of those fail.
    __slots__ = (
        "__signature__", "__weakref__", "_watched", "applied", "budget", "calls", "choices",
        "clock", "config", "decisions", "eager", "entry", "exportable", "frozen", "guard", "known",
        "module", "originals", "override", "weights",
    )  # fmt: skip

    def __init__(
        self,
        module: nn.Module,
        config: CompileConfig,
        known: frozenset[str],
        decisions: Mapping[str, Decision],
        override: Callable[..., Any] | None,
        packed: Mapping[str, PackedWeight] | None = None,
        frozen: FrozenMasks | None = None,
    ) -> None:
        self.module = module
        self.config = config
        self.known = known
        self.decisions = dict(decisions)
        self.override = override
        self.choices: dict[tuple[str, tuple[tuple[int, ...], ...]], Choice] = {}
        self.eager: dict[str, None] = {}
        self.weights = FoldedWeights(packed)
        self.frozen = frozen or FrozenMasks()
        self.applied = AppliedMasks()
        self.exportable = False
        self.budget = AutotuneBudget(config.autotune_seconds)
        self.clock = PhaseClock()
        self.entry = EntryPoint(self, "forward", override)
        self.guard = ReadGuard()
        own = override or types.MethodType(type(module).forward, module)
        self.__signature__ = inspect.signature(own)
        self._watched: int | None = None  # how many decisions the guard's choice rests on
        self.calls = CallState()

    def install(self, *, wrapped: bool = False) -> None:
        """Becomes the forward of the module, unless a wrapper that calls it is that already."""
        if not wrapped:
            self.module.__dict__["forward"] = self
        self.module.__dict__[KEY] = self
        install_methods(self.module)
        if self.config.mode == "infer":
            install_apply(self.module)
        install_own_copies(self.module)
        self._watch()

    @property
    def __code__(self) -> types.CodeType:
        """The own forward's code, which torch.export asks for while parameters are still real."""
        self.exportable = self.applied.cover(self.module, self.decisions)
        code: types.CodeType = self.entry.copy().__code__
        return code

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler._is_exporting_flag:  # Dynamo 2.11 takes is_exporting() for true
            return self._export(*args, **kwargs)
        return self.run(self.entry, *args, **kwargs)

    def _export(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the own forward for torch.export, on parameters that are masked themselves."""
        if not self.exportable:
            raise explain_unexported(self.module)
        self.prepare()
        with self.guard:
            return self.entry.copy()(self.module, *args, **kwargs)

    @torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
        reason="a sparsedm model compiles itself; leave out fullgraph=True"
    )
    def run(self, entry: EntryPoint, *args: Any, **kwargs: Any) -> Any:
        """Calls one of the module's methods, masked."""
        if torch._C._get_tracing_state() is not None:
            raise CaptureError(
                f"torch.jit.trace cannot trace {type(self.module).__name__}; use torch.export"
            )
        if self.calls.refusal is not None:
            raise self.calls.refusal
        self.prepare()
        with self.guard, leave_eager_modes():
            if self.weights.packed:
                self.weights.settle(self.module)
            try:
                out = entry.run(*args, **kwargs)
            finally:
                if self._watched != len(self.decisions):
                    self._watch()
            self.weights.finalize_pending(self.module)
            if len(self.guard.hollow) != len(self.weights.packed):
                self.guard.hollow = self.weights.list_hollow(self.module)
        return out

    def prepare(self) -> None:
        """Sets the guard up in a copy, or in a model from a file, before its first call."""
        if self._watched is None:
            self._watch()

    @property
    def broken(self) -> str | None:
        """Why the model runs as several graphs; None while one holds it all."""
        entries = [self.entry, *(method.entry for method in list_methods(self.module))]
        return next((entry.broken for entry in entries if entry.broken is not None), None)

    def require_weights(self) -> None:
        """Raises DenseRunError if a weight to be pruned has left the model, or has another name."""
        self.originals.require_in_place(self.module, self.decisions, self.is_pruned)

    def _watch(self) -> None:
        """Makes the guard watch the weights that are pruned, or not decided on yet."""
        if self._watched is None:
            self.originals = OriginalWeights(self.module, self.known)
            if self.config.mode == "infer":
                install_state_hooks(self.module)
        self.guard.watch(self.module, self.is_pruned)
        self._watched = len(self.decisions)
        for method in list_methods(self.module):
            method.guard = self.guard

    def is_pruned(self, names: Names, shape: tuple[int, ...]) -> bool:
        """Returns whether a parameter is pruned, or would be if no graph has shown it yet."""
        names = tuple(strip_adapter_prefix(name) for name in names)
        if (decision := self.decisions.get(names[0])) is None:
            return may_be_pruned(names, shape, self.config, self.known)
        return decision.accepted

    def refuse_outside_call(self, owner: nn.Module) -> None:
        """Raises DenseRunError: a module that holds a pruned weight was called on its own."""
        raise explain_outside_call(self.module, self, owner)

    def mask_eagerly(self, weight: Tensor, names: Names, product: EagerProduct | None) -> Tensor:
        """Returns a weight as Python that no graph holds shall use it: masked, if it is pruned.

        Raises:
            DenseRunError: If a cast or view of a pruned weight was taken before it was decided on.
        """
        name = strip_adapter_prefix(names[0])
        if name not in self.decisions and product is not None:
            self._decide_product(product, names)
        decision = self.decisions.get(name)
        if decision is None or decision.pattern is None:
            return weight
        if product is None and weight.dtype not in KEYS:  # stored in float8: masked once cast
            return weight
        if weight.shape != decision.shape or not isinstance(weight, nn.Parameter):
            raise explain_late_decision(name, self.broken)
        self.eager.setdefault(name)
        self.calls.runs += 1
        if self.config.mode == "train":
            return self.frozen.mask_weight(weight, name, decision.pattern)
        return self.weights.get(weight, WeightFormat(decision.pattern), name)

    def _decide_product(self, product: EagerProduct, names: Names) -> None:
        sites = (site for site in find_product_sites(product) if site.names == names)
        self._adopt(tuple(decide_weight(s, s.refusal, self.config, self.known) for s in sites))

    def decide_eagerly(self, run: RecordedRun) -> None:
        """Decides on the weights of an eager run as on those of a graph that holds it all."""
        self.require_weights()
        self._adopt(mark_prunable(find_recorded_sites(run), self.config, self.known))
        if not any(decision.accepted for decision in self.decisions.values()):
            raise explain_nothing_pruned(self.module, self.config, self.decisions)

    def _adopt(self, decisions: tuple[Decision, ...]) -> None:
        for decision in decisions:
            self.decisions.setdefault(decision.weight, decision)

    def lower(
        self, gm: fx.GraphModule, example_inputs: list[Any], *, whole: bool
    ) -> Callable[..., Any]:
        """Plans, rewrites and compiles one graph of the module.

        Args:
            gm: The graph, as Dynamo captured it.
            example_inputs: Its inputs, the weights among them.
            whole: Whether it holds all that the call computes.
        """
        graph = bind_parameters(copy_graph(gm) if self.frozen else gm, example_inputs, self.module)
        self.require_weights()
        if whole:
            require_read_weights(graph, self.module, self.is_pruned, self.known)
        else:
            pin_modules(gm)
        self._adopt(mark_prunable(find_sites(graph), self.config, self.known, whole=whole))
        require_decisions(graph, self.module, self.decisions, self.is_pruned)
        state = self.decisions, self.config, self.weights, self.budget, self.frozen
        with self.clock.measure("search"):
            plan = plan_weights(graph, example_inputs, *state)
        if whole and not plan:
            raise explain_nothing_pruned(self.module, self.config, self.decisions)
        run, rows = lower(graph, example_inputs, plan, self.config, self.weights, self.clock)
        self._remember(rows)

        def counted(*inputs: Any) -> Any:
            with leave_eager_modes():  # which would see the graph's own ops
                out = run(*inputs)
            self.calls.runs += 1
            return out

        return counted

    def _remember(self, plan: Plan) -> None:
        """Keeps what ``explain`` shows; a measured row stays when its weight is finalized."""
        for row in plan:
            measured = row.status is Status.FINALIZED and (row.name, row.inputs) in self.choices
            if row.status is not Status.MASKED and not measured:
                self.choices[row.name, row.inputs] = row.to_choice()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles and copies all but the graphs, which the copy captures anew."""
        state = (self.module, self.config, self.known, self.decisions, self.override)
        return SparseForward, (*state, self.weights.packed, self.frozen)


# An outer torch.compile of the module would else compile this frame too, until its limit is hit.
skip_code(SparseForward.__call__.__code__)
