"""The guarded forward: it runs its masks or raises.

``compile`` keeps a ``SparseForward`` in ``module.__dict__["forward"]``. The class, its config and
its state_dict stay what they are; calling the module runs the class's own forward through
TorchDynamo with our backend, and every call proves that the masked graph has run.
"""

from __future__ import annotations

import inspect
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.eval_frame import skip_code
from torch._dynamo.exc import FailOnRecompileLimitHit

from ..autotune.measure import AutotuneBudget
from ..backends.packing import PackedWeight
from ..config import CompileConfig
from ..errors import ConfigError, DenseRunError
from ..graph.capture import (
    GRAPH_BREAK_ERRORS,
    OwnForward,
    apply_dynamo_settings,
    bind_parameters,
    copy_forward,
    unwrap_errors,
)
from ..graph.diagnostics import describe_graph_break, find_user_line
from ..graph.eager_watch import EagerProduct, EagerWatch, record_eager_products
from ..graph.names import strip_adapter_prefix
from ..passes import (
    Plan,
    Status,
    decide_weight,
    find_eager_sites,
    find_sites,
    mark_eager,
    mark_prunable,
)
from ..patterns import Pattern
from ..reports import Choice, Decision
from .folded_weights import FoldedWeights
from .lower import lower, plan_weights

KEY = "_sparsedm"
"""Where a compiled module keeps its SparseForward, beside ``forward``, in its ``__dict__``."""

_NO_FRAMES = "found no compiled frames"
"""How newer torch words that a call ran uncompiled; the run counter says it for all."""


class SparseForward(OwnForward):
    """The forward of one compiled module.

    ``decisions``: by weight name, fixed by the first capture that meets the weight, so that train
    and eval, every resolution, a copy and a reloaded file all prune the same weights.
    ``choices``: what runs every pruned weight, by its name and the shapes it multiplies.
    ``weights``: the folded weights. ``budget``: the seconds left to measure kernels.
    ``known``: the parameters the module had when it was compiled. ``broken``: why the model runs
    as several graphs, None while one holds it all.
    """

    def __init__(
        self,
        module: nn.Module,
        config: CompileConfig,
        known: frozenset[str],
        decisions: Mapping[str, Decision],
        override: Callable[..., Any] | None,
        packed: Mapping[str, PackedWeight] | None = None,
    ) -> None:
        self.module = module
        self.config = config
        self.known = known
        self.decisions = dict(decisions)
        self.override = override
        self.broken: str | None = None
        self.choices: dict[tuple[str, tuple[tuple[int, ...], ...]], Choice] = {}
        self.weights = FoldedWeights(packed)
        self.budget = AutotuneBudget(config.autotune_seconds)
        self.__signature__ = inspect.signature(
            override or types.MethodType(type(module).forward, module)
        )
        self._compiled: Callable[..., Any] | None = None
        self._thread = threading.local()

    def install(self) -> None:
        """Becomes the forward of the module."""
        self.module.__dict__["forward"] = self
        self.module.__dict__[KEY] = self
        if self.config.finalize:
            self.module.register_state_dict_post_hook(_fill_state_dict)  # type: ignore[no-untyped-call]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    @torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
        reason="a sparsedm model compiles itself; leave out fullgraph=True"
    )
    def _run(self, *args: Any, **kwargs: Any) -> Any:
        before = self._runs
        if self.weights.packed:
            self.weights.settle(self.module)
        with apply_dynamo_settings(), unwrap_errors():
            try:
                out = self._call(*args, **kwargs)
            except FailOnRecompileLimitHit as limit:
                raise DenseRunError(
                    f"{self._name} has been compiled for more shapes and settings than it may: "
                    f"pad its inputs to fewer shapes ({limit})"
                ) from limit
            except RuntimeError as error:
                if _NO_FRAMES not in str(error):
                    raise
        if self._runs == before:
            raise DenseRunError(
                f"{self._name} ran without its masks, so its output was dropped: TorchDynamo did "
                "not compile the call. Unset TORCHDYNAMO_DISABLE, leave the force_eager stance, "
                "and call it outside of dispatch modes such as FlopCounterMode"
            )
        self.weights.finalize_pending()
        return out

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if self._compiled is None:
            self._compiled = self._compile(fullgraph=True)
        if self.broken is None:
            try:
                return self._compiled(self.module, *args, **kwargs)
            except GRAPH_BREAK_ERRORS as unsupported:
                self._go_partial(describe_graph_break(unsupported), *args, **kwargs)
        with EagerWatch(self.module, self._refuse_eager):
            return self._compiled(self.module, *args, **kwargs)

    def _compile(self, *, fullgraph: bool) -> Callable[..., Any]:
        forward = copy_forward(self.module)
        run: Callable[..., Any] = torch.compile(forward, backend=self._backend, fullgraph=fullgraph)
        return run

    def _go_partial(self, reason: str, *args: Any, **kwargs: Any) -> None:
        """Runs as several graphs from now on, decided by an eager run, since none holds it all."""
        seen = find_eager_sites(record_eager_products(self.module, *args, **kwargs))
        self._adopt(mark_eager(seen, self.config, self.known))
        self.broken = reason
        self._compiled = self._compile(fullgraph=False)

    def _refuse_eager(self, seen: EagerProduct) -> None:
        """Raises DenseRunError for a pruned weight that Python between the graphs multiplies."""
        for site in find_eager_sites((seen,)):
            if not site.names:
                continue
            weight = strip_adapter_prefix(site.label)
            decision = self.decisions.get(weight)
            if decision is None:
                decision = decide_weight(site, site.refusal, self.config, self.known)
            if decision.accepted:
                raise DenseRunError(
                    f"{weight!r} would run dense: its {site.op_name} lies in Python that cannot "
                    f"be captured, at {find_user_line()}. Keep it dense with "
                    f"keep_dense=[{weight!r}], or make that code capturable: {self.broken}"
                )

    def _adopt(self, decisions: tuple[Decision, ...]) -> None:
        for decision in decisions:
            self.decisions.setdefault(decision.weight, decision)

    def _backend(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graph = bind_parameters(gm, example_inputs, self.module)
        whole = self.broken is None
        self._adopt(mark_prunable(find_sites(graph), self.config, self.known, whole=whole))
        config, weights = self.config, self.weights
        plan = plan_weights(graph, example_inputs, self.decisions, config, weights, self.budget)
        if whole and not plan:
            raise ConfigError(explain_nothing_pruned(self._name, config, self.decisions))
        run, rows = lower(graph, example_inputs, plan, config, weights)
        self._remember(rows)

        def counted(*inputs: Any) -> Any:
            out = run(*inputs)
            self._thread.runs = self._runs + 1
            return out

        return counted

    def _remember(self, plan: Plan) -> None:
        """Keeps what ``explain`` shows; a measured row stays when its weight is finalized."""
        for row in plan:
            key = (row.name, row.inputs)
            measured = row.status is Status.FINALIZED and key in self.choices
            if row.status is not Status.MASKED and not measured:
                self.choices[key] = row.to_choice()

    @property
    def _runs(self) -> int:
        runs: int = self._thread.__dict__.get("runs", 0)
        return runs

    @property
    def _name(self) -> str:
        return type(self.module).__name__

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles and copies all but the graphs, which the copy captures anew."""
        packed = self.weights.packed
        state = (self.module, self.config, self.known, self.decisions, self.override, packed)
        return SparseForward, state


# An outer torch.compile of the module would else compile this frame too, until its limit is hit.
skip_code(SparseForward.__call__.__code__)


def explain_nothing_pruned(
    name: str, config: CompileConfig, decisions: Mapping[str, Decision]
) -> str:
    """Returns the sentence for a model of which every weight stays dense."""
    reasons = "; ".join(f"{d.weight}: {d.refusal}" for d in list(decisions.values())[:3])
    return (
        f"no weight of {name} is pruned to {config.pattern} ({reasons or 'it multiplies by none'});"
        " choose a smaller m, or policy='all' to prune the first and last layer too"
    )


def iterate_sparse_forwards(model: nn.Module) -> Iterator[tuple[str, SparseForward]]:
    """Yields (prefix of parameter names, SparseForward) of every compiled module inside."""
    for name, module in model.named_modules():
        forward = module.__dict__.get(KEY)
        if isinstance(forward, SparseForward) and forward.module is module:
            yield (f"{name}." if name else ""), forward


def require_compiled(model: nn.Module) -> list[tuple[str, SparseForward]]:
    """Returns (prefix, SparseForward) of all inside ``model``. Raises ConfigError for none."""
    forwards = list(iterate_sparse_forwards(model))
    if not forwards:
        raise ConfigError(
            f"{type(model).__name__} was not compiled; first: model = "
            "sparsedm_compiler.compile(model, pattern='2:4')"
        )
    return forwards


def masked_parameters(model: nn.Module) -> dict[str, tuple[nn.Parameter, Pattern]]:
    """Returns the parameters that run masked, each with its pattern.

    Args:
        model: A compiled model, or a wrapper around one (DDP, an outer torch.compile).

    Returns:
        {parameter name in ``model``: (parameter, pattern)}; empty before the first call of the
        model, which captures it.

    Raises:
        ConfigError: If no module inside ``model`` was compiled.
    """
    masked = {}
    for prefix, forward in require_compiled(model):
        for name, parameter in forward.module.named_parameters():
            decision = forward.decisions.get(strip_adapter_prefix(name))
            if decision is not None and decision.pattern is not None:
                masked[prefix + name] = (parameter, decision.pattern)
    return masked


def _fill_state_dict(
    module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    """A state_dict hook: a finalized weight is saved as the masked dense weight."""
    forward: SparseForward = module.__dict__[KEY]
    forward.weights.fill_state_dict(module, state, prefix)
