"""The whole story: capture -> analyse -> plan -> rewrite -> fold -> run.

``compile`` only installs the guarded forward. At the first call, and again for every new shape or
setting, TorchDynamo captures the module's own forward and hands each graph to
``SparseForward._backend``, which does in order:

    bind_parameters   names the placeholders after the model's parameters   graph/capture.py
    find_sites        finds every product, with the parameter behind it     passes/analysis/
    mark_prunable     decides on every weight: a pattern, or a refusal      passes/analysis/
    plan_weights      plans what runs every pruned weight                   compiler/lower.py
      find_uses         its products as a kernel sees them                  passes/analysis/
      select_kernel     dense or a kernel, as measured                      autotune/
    lower             turns graph and plan into what runs                   compiler/lower.py
      run_passes        the rewrites passes.TRAIN or passes.INFER, verify   passes/pipeline.py
      fold              masks and packs the weights (mode "infer")          folded_weights.py
      compile_graph     the inner compiler                                  inner_backend.py

and every call proves that the graph has run (compiler/guarded_forward.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn

from ..backends.packing import PackedWeight
from ..config import Backend, CompileConfig
from ..errors import ConfigError
from ..graph.capture import find_own_forward, map_parameter_names, wraps_forward
from ..graph.names import list_adapter_parameters, strip_adapter_prefix
from ..masks.detect import detect_patterns
from ..meta_models import require_values
from ..patterns import Pattern
from ..reports import Decision, Explanation
from .describe_compiled import describe_compiled
from .frozen_masks import FrozenMasks, write_frozen_masks
from .guarded_forward import SparseForward
from .inner_backend import resolve_backend
from .lookup import require_compiled
from .recompile import copy_model, find_compiled, inherit_choice, warn_of_changes

Model = TypeVar("Model", bound=nn.Module)


def compile(
    model: Model,
    pattern: str | Pattern | None = None,
    *,
    mode: str = "train",
    keep_dense: str | Iterable[str] | Callable[[str], bool] | None = None,
    overrides: Mapping[str, str | Pattern] | None = None,
    policy: str | None = None,
    inplace: bool = False,
    backend: Backend = "auto",
    kernels: Mapping[str, str] | None = None,
    exclude_kernels: str | Iterable[str] = (),
    autotune: str = "measure",
    autotune_seconds: float = 60.0,
    finalize: bool = False,
    regional: bool = False,
) -> Model:
    """Returns a copy of a model that runs its Conv and Linear weights masked to an N:M pattern.

    The copy has the same class, config and state_dict keys. In mode "train" its parameters stay
    dense (latent weights) and are masked in every forward, with a straight-through gradient. In
    mode "infer" they are masked once, and each runs by the fastest of dense and the sparse
    kernels, as measured at the first call. The graph is captured at the first call; from then on
    the model runs its masks or raises DenseRunError.

    Public methods other than forward (a VAE's encode and decode) run masked, too; a layer that is
    called in any other way raises (see ``allow_dense``). A model that was compiled before is
    compiled again with the same weights pruned, unless one of the four options that choose them
    is given and differs; then a warning tells what changes.

    Args:
        model: Any nn.Module; wrap it (DDP, torch.compile) afterwards, not before.
        pattern: "n:m" keeps n of every m weights along the input channels. "1:8x16" shares each
            mask among 16 output rows, "1:2@64x16" keeps whole blocks, "64:2:8" is V:n:m, "2:4t" is
            transposable; ``Pattern.parse`` lists them. None: that of the student; for a model that
            is not compiled yet, in mode "infer" only, every weight runs by the pattern that its
            zeros already satisfy.
        mode: "train" or "infer".
        keep_dense: Names or globs of layers that stay dense, or a predicate over parameter names.
            None: those of the student, else no others.
        overrides: {glob: pattern} for layers with another pattern; the first match wins. None:
            those of the student, else none.
        policy: "structural" keeps the first and last op of the graph dense, "all" does not,
            "uvit" prunes the layers that the SparseDM paper prunes. None: that of the student,
            else "structural".
        inplace: Whether to change ``model`` itself instead of a copy.
        backend: What compiles the rewritten graph: a torch.compile backend's name or function,
            "inductor-graphs" (Inductor with CUDA graphs), or "auto": Inductor where there is a
            C++ compiler, else "eager".
        kernels: {glob: "dense", "sparse" or a kernel's name} pins kernels instead of measuring. In
            mode "train" only "cuda_semi" (2:4 products on a GPU's sparse tensor cores) and
            "cuda_block" (block patterns on Hopper; see ``freeze_masks``) can be pinned.
        exclude_kernels: Names of kernels that are not to be used.
        autotune: "measure" times dense and every kernel at the first call; "table" takes what the
            table shipped for this card names, once it has given dense's numbers, and measures where
            that has no such layer. For mode "infer".
        autotune_seconds: The most seconds that measuring kernels may take, for the whole model;
            a weight that was not measured stays dense. Results are kept on disk.
        finalize: Whether to free the dense weights that a sparse kernel runs, after the first
            call; ``state_dict()`` then gives the masked dense values. Mode "infer" only.
        regional: Whether Inductor compiles modules that are repeated (the blocks of a transformer)
            once for all of them: the first call is faster, and nothing is fused across blocks.

    Returns:
        The sparse model, of the class of ``model``.

    Raises:
        PatternError: If a pattern is misspelled.
        ConfigError: If an option has an unknown value, a glob names no parameter, or ``model`` is
            a wrapper or cannot be copied.

    Example:
        >>> import torch, sparsedm_compiler as sdm
        >>> net = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])
        >>> student = sdm.compile(net, pattern="2:4", backend="eager")
        >>> _ = student(torch.randn(1, 8))
        >>> sdm.explain(student).masked
        ('1.weight',)
    """
    check_model(model)
    before = find_compiled(model)
    config = CompileConfig.create(
        pattern if pattern is not None or before is None else before.config.pattern,
        mode=mode,
        keep_dense=keep_dense if keep_dense is not None else (),
        overrides=overrides,
        policy=policy if policy is not None else "structural",
        backend=backend,
        kernels=kernels,
        exclude_kernels=exclude_kernels,
        autotune=autotune,
        autotune_seconds=autotune_seconds,
        finalize=finalize,
        regional=regional,
    )
    if isinstance(backend, str):
        resolve_backend(backend)
    student = model if inplace else copy_model(model)
    if before is not None and inplace:
        before.weights.unpack_finalized(model)
    if before is not None:
        config = inherit_choice(before.config, config, (keep_dense, overrides, policy))
    elif config.pattern is None:
        require_values(student, "detecting its pattern")
        config = replace(config, overrides=detect_patterns(student.named_parameters()))
        if not config.overrides:
            raise ConfigError(
                f"no weight of {type(model).__name__} satisfies an N:M pattern; give the one to "
                "prune to, e.g. pattern='2:4'"
            )
    config = config.bind(list(map_parameter_names(student).values()))
    if before is None:
        return install(student, config)
    if not warn_of_changes(before.config, config):
        return install(student, config, {}, before.known)
    again = find_compiled(student)
    frozen = before.frozen if again is None else again.frozen  # a copy holds masks of its own
    if mode != "train":
        write_frozen_masks(student, frozen)
        frozen = FrozenMasks()
    return install(student, config, before.decisions, before.known, frozen=frozen)


def check_model(model: nn.Module) -> None:
    """Raises ConfigError for what cannot be compiled: wrappers, scripts, no module at all."""
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
    frozen: FrozenMasks | None = None,
) -> Model:
    """Puts the guarded forward into ``student``; ``known``: the parameters that may be pruned."""
    if config.mode == "infer":
        student.requires_grad_(False)
    if known is None:
        names = set(chain.from_iterable(map_parameter_names(student).values()))
        known = frozenset(map(strip_adapter_prefix, names - list_adapter_parameters(student)))
    state = (student, config, known, decisions or {}, find_own_forward(student), packed, frozen)
    before = find_compiled(student)
    if before is not None and wraps_forward(student, before):  # in the place where it is wrapped
        before.__init__(*state)  # type: ignore[misc]
        before.install(wrapped=student.__dict__["forward"] is not before)
    else:
        # Of accelerate: what it had wrapped. The wrapper is our override now, and goes with us.
        student.__dict__.pop("_original_forward", None)
        SparseForward(*state).install()
    return student


def pattern_of(model: nn.Module) -> Pattern | None:
    """Returns the pattern that a model was compiled with.

    Args:
        model: A compiled model, or a wrapper around one.

    Returns:
        The pattern; None where it was detected weight by weight.

    Raises:
        ConfigError: If ``model`` was not compiled.
    """
    return require_compiled(model)[0][1].config.pattern


def repattern(model: nn.Module, pattern: str | Pattern) -> None:
    """Prunes a compiled model to another pattern from its next call on, in place.

    Parameters, optimizers built on them, and all other options (keep_dense, overrides, policy)
    stay.

    Args:
        model: A model compiled in mode "train", or a wrapper around one.
        pattern: The pattern from now on, as in ``compile``.

    Raises:
        PatternError: If the pattern is misspelled.
        ConfigError: If ``model`` was not compiled for training.
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
    """Reports what became of every weight of a compiled model, and why some stay dense.

    Args:
        model: A compiled model, or a wrapper around one (DDP, torch.compile).
        *args: With inputs, the model is called once first, without gradients.
        **kwargs: Keyword inputs of that call.

    Returns:
        The decision about every weight, and in mode "infer" its kernel with the measured times;
        ``str()`` is a table.

    Raises:
        ConfigError: If ``model`` was not compiled.
    """
    require_compiled(model)
    if args or kwargs:
        with torch.no_grad():
            model(*args, **kwargs)
    return describe_compiled(model)
