"""The whole story: capture -> analyse -> rewrite -> lower -> run.

``compile`` only installs the guarded forward. At the first call, and again for every new shape or
setting, TorchDynamo captures the module's own forward and hands each graph to
``SparseForward._backend``:

    captured        the graph, its placeholders named after parameters     capture.py
    find_sites      every product in it, with the parameter behind         passes/find_sites.py
    mark_prunable   a Decision per weight                                  passes/mark_prunable.py

In mode "train":

    run_rewrites    linear(x, w) -> linear(x, mask_ste(w)), then verify    pipeline.py
    lower           the inner compiler                                     lowering.py

In mode "infer", ``lowering.fold``:

    find_uses       every use of a weight, as a kernel would run it        passes/find_uses.py
    choose          dense or a kernel, as measured                         choose.py
    lower_sparse    linear(x, w) -> nm_linear(x, packed w)                 passes/lower_sparse.py
    pad_tokens      rows of zeros where a kernel wants more tokens         passes/pad_tokens.py
    lower           the inner compiler, given the folded weights           folding.py

and every call proves that the graph has run                               runtime.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn

from ..config import Backend, CompileConfig
from ..errors import ConfigError
from ..graph.capture import capture, find_own_forward, map_parameter_names, record_eager_products
from ..masks.detect import detect_patterns
from ..passes import count_macs as count
from ..passes import find_eager_sites, find_sites, mark_eager, mark_prunable
from ..passes import trace_topology as wire
from ..patterns import Pattern
from ..reports import Decision, Explanation, MacsReport, Topology
from .folded_weights import PackedWeight
from .guarded_forward import SparseForward, masked_parameters, require_compiled
from .lower import resolve_backend

Model = TypeVar("Model", bound=nn.Module)
KeepDense = str | Iterable[str] | Callable[[str], bool]
Overrides = Mapping[str, str | Pattern]


def compile(
    model: Model,
    pattern: str | Pattern | None = None,
    *,
    mode: str = "train",
    keep_dense: KeepDense = (),
    overrides: Overrides | None = None,
    policy: str = "structural",
    inplace: bool = False,
    backend: Backend = "auto",
    kernels: Mapping[str, str] | None = None,
    exclude_kernels: str | Iterable[str] = (),
    autotune_seconds: float = 60.0,
    finalize: bool = False,
) -> Model:
    """A copy of ``model`` that runs its Conv and Linear weights masked to an N:M pattern.

    The copy has the same class, config and state_dict keys; its parameters stay dense ("latent")
    and are masked afresh in every forward, with a straight-through gradient (``mode="train"``), or
    masked once (``mode="infer"``). ``pattern``: "n:m" keeps n of m, "2:4t" does so in W and its
    transpose, "1:8x16" shares masks among rows, "64:2:8" is V:n:m; left out in mode "infer",
    weights that already satisfy an N:M pattern run by it and all others dense. ``keep_dense``:
    names or globs of layers, or a predicate over parameter names. ``overrides``: {glob: pattern},
    the first match wins. ``policy``: "structural" keeps the first and last op dense, "all" does
    not, "uvit" prunes what the paper prunes. ``inplace``: change ``model`` itself. ``backend``:
    what compiles the rewritten graph, any torch.compile backend ("auto": Inductor where there is
    a C++ compiler, else "eager").

    In mode "infer" every folded weight is run by the fastest of dense and the sparse kernels, as
    measured here at the first call (kept on disk; at most ``autotune_seconds`` per model, what is
    not measured stays dense). ``kernels``: {glob: "dense", "sparse" or a kernel's name} pins them,
    ``exclude_kernels`` rules kernels out. ``explain`` shows each choice with its times.
    ``finalize`` frees the dense weights that a sparse kernel runs, at the first call: only the
    packed ones are left, and state_dict() gives the masked dense weights they stand for. In mode
    "train" ``kernels`` may name "cuda_semi": 2:4 products on a GPU's sparse tensor cores,
    compressed anew in every step.

    The graph is captured at the first call. A model returned from here runs its masks or raises
    DenseRunError. Raises PatternError or ConfigError for options that fit nothing.

    >>> import torch, sparsedm_compiler as sdm
    >>> net = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])
    >>> student = sdm.compile(net, pattern="2:4", backend="eager")
    >>> _ = student(torch.randn(1, 8))
    >>> sdm.explain(student).masked
    ('1.weight',)
    """
    check_model(model)
    config = CompileConfig.create(
        pattern,
        mode=mode,
        keep_dense=keep_dense,
        overrides=overrides,
        policy=policy,
        backend=backend,
        kernels=kernels,
        exclude_kernels=exclude_kernels,
        autotune_seconds=autotune_seconds,
        finalize=finalize,
    )
    if isinstance(backend, str):
        resolve_backend(backend)
    student = model if inplace else copy.deepcopy(model)
    if config.pattern is None:
        config = replace(config, overrides=detect_patterns(student.named_parameters()))
        if not config.overrides:
            raise ConfigError(
                f"no weight of {type(model).__name__} satisfies an N:M pattern; give the one to "
                "prune to, e.g. pattern='2:4'"
            )
    config = config.resolved(list(map_parameter_names(student).values()))
    return install(student, config)


def check_model(model: nn.Module) -> None:
    """Raise ConfigError for what cannot be compiled: wrappers, scripts, no module at all."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"compile takes an nn.Module, not a {type(model).__name__}")
    wrappers = (torch._dynamo.OptimizedModule, nn.DataParallel)
    if isinstance(model, (*wrappers, nn.parallel.DistributedDataParallel, torch.jit.ScriptModule)):
        raise ConfigError(
            f"{type(model).__name__} wraps the model; compile the model itself and wrap the result"
        )


def install(
    student: Model,
    config: CompileConfig,
    decisions: Mapping[str, Decision] | None = None,
    known: frozenset[str] | None = None,
    packed: Mapping[str, PackedWeight] | None = None,
) -> Model:
    """Put the guarded forward into ``student``; ``known``: the parameters that may be pruned."""
    if config.mode == "infer":
        student.requires_grad_(False)
    if known is None:
        known = frozenset(chain.from_iterable(map_parameter_names(student).values()))
    override = find_own_forward(student)
    SparseForward(student, config, known, decisions or {}, override, packed).install()
    return student


def pattern_of(model: nn.Module) -> Pattern | None:
    """The pattern a model was compiled with, None where it was recognised weight by weight.

    Raises ConfigError if it was not compiled.
    """
    return require_compiled(model)[0][1].config.pattern


def repattern(model: nn.Module, pattern: str | Pattern) -> None:
    """Prune a compiled ``model`` to another pattern from its next call on, in place.

    Parameters, optimizers built on them, and all other options (keep_dense, overrides, policy)
    stay. Raises ConfigError if it was not compiled for training, PatternError.
    """
    parsed = Pattern.parse(pattern)
    for _, forward in require_compiled(model):
        if forward.config.mode != "train":
            raise ConfigError(
                f"{type(forward.module).__name__} is folded for inference, its weights have lost "
                "what was pruned; repattern the student in mode 'train'"
            )
        install(forward.module, replace(forward.config, pattern=parsed), known=forward.known)


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """What became of every weight of a compiled model, with the reason where it stays dense.

    With inputs the model is called once first (without gradients). Looks through wrappers (DDP,
    torch.compile). Raises ConfigError if ``model`` was not compiled.
    """
    found = require_compiled(model)
    if args or kwargs:
        with torch.no_grad():
            model(*args, **kwargs)
    rows = [d.prefixed(prefix) for prefix, forward in found for d in forward.decisions.values()]
    first = found[0][1]
    backend = first.config.backend
    return Explanation(
        rows=tuple(rows),
        choices=tuple(c.prefixed(prefix) for prefix, f in found for c in f.choices.values()),
        masked=tuple(masked_parameters(model)),
        mode=first.config.mode,
        backend=resolve_backend(backend) if isinstance(backend, str) else backend.__name__,
        broken=next((forward.broken for _, forward in found if forward.broken), None),
    )


def count_macs(
    model: nn.Module,
    *args: Any,
    pattern: str | Pattern = "2:4",
    keep_dense: KeepDense = (),
    overrides: Overrides | None = None,
    policy: str = "structural",
    **kwargs: Any,
) -> MacsReport:
    """Exact MACs of one forward of ``model(*args, **kwargs)``, dense and as pruned to ``pattern``.

    conv+linear in ``.dense`` and ``.sparse``, attention apart in ``.attention``, one row per call
    node in ``.rows``; ``str()`` is a table. Nothing is computed, so that models and inputs on the
    meta device work. Raises PatternError or ConfigError for options that fit nothing.

    >>> import torch, sparsedm_compiler as sdm
    >>> net = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])
    >>> report = sdm.count_macs(net, torch.randn(1, 8), pattern="2:4")
    >>> report.dense, report.sparse
    (192, 160)
    """
    config = CompileConfig.create(
        pattern, keep_dense=keep_dense, overrides=overrides, policy=policy
    )
    config = config.resolved(list(map_parameter_names(model).values()))
    with torch.no_grad():
        graph = capture(model, *args, **kwargs)
        if graph is not None:
            sites = find_sites(graph)
            return count(sites.sites, mark_prunable(sites, config))
        seen = find_eager_sites(record_eager_products(model, *args, **kwargs))
    return count(seen, mark_eager(seen, config))


def topology(model: nn.Module, *args: Any, **kwargs: Any) -> Topology:
    """How the prunable ops of ``model(*args, **kwargs)`` are wired.

    First and last layers, skip connections and the path with the most MACs. Raises ConfigError
    for a model that no single graph holds.
    """
    with torch.no_grad():
        graph = capture(model, *args, **kwargs)
    if graph is None:
        raise ConfigError(
            f"{type(model).__name__} takes several graphs (its forward asks tensors for Python "
            "values), so it has no topology; torch.compile(model, fullgraph=True) shows the line"
        )
    return wire(find_sites(graph))
