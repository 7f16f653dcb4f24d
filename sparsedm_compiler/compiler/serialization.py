"""Saves and loads compiled models: safetensors with the pattern in the metadata."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from ..backends.kernel_family import KernelConfig, WeightFormat
from ..backends.packing import PackedWeight
from ..backends.registry import find_family
from ..config import Backend, CompileConfig
from ..errors import CheckpointError, ConfigError, KernelError
from ..files.check_file import satisfies
from ..files.compact import find_kept
from ..files.container import (
    DENSE,
    FORMS,
    STATE,
    StoredFile,
    check_provenance,
    read_file,
    split_compact,
    write_file,
)
from ..graph.names import strip_adapter_prefix
from ..meta_models import require_values
from ..packed_tensors import copy_for_file, fill_packed, take_apart
from ..patterns import Pattern
from .api import check_model, install
from .frozen_masks import FrozenMasks, mask_frozen, read_frozen, write_frozen
from .guarded_forward import SparseForward
from .held_masks import SoftMasks, read_soft
from .hollow_parameter import hollow_out
from .lookup import require_compiled
from .masked_state import read_masked_state
from .model_record import describe_model, read_decisions
from .recompile import copy_model
from .state_hooks import map_patterns, mask_state_dict

Model = TypeVar("Model", bound=nn.Module)

_PACKED = ".sparsedm_packed"


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    form: str = STATE,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Writes a compiled model's weights and decisions to a file.

    The file is safetensors with the pattern of every weight in its header, and appears whole or
    not at all; ``docs/reference/format.md`` describes it.

    Args:
        model: A compiled model.
        path: The file to write; its folder must exist.
        form: "state" holds the state_dict: latent (dense) weights in mode "train" (masked ones
            where masks are frozen; held masks are not kept), masked ones in mode "infer", packed
            ones where they are finalized. "dense" holds masked weights with their zeros, in any
            mode, which any reader of safetensors loads. "compact" holds the kept values and their
            places: at 2:4 in bfloat16, 0.542 of the size of dense.
        provenance: Where the weights are from: any of base_model (str), method (str), images
            (int), loss (float) and note (str). None: nothing.

    Raises:
        ConfigError: If ``model`` was not compiled, is on the meta device, or several compiled
            models are inside; for an unknown form or field of the provenance; and where "dense"
            or "compact" is wanted of a model that has not been called and so has chosen nothing.
        CheckpointError: If the file cannot be written.
    """
    forwards = require_compiled(model)
    if len(forwards) > 1:
        raise ConfigError(
            f"{len(forwards)} compiled models are inside; save each: {[*dict(forwards)]}"
        )
    if form not in FORMS:
        raise ConfigError(f"form {form!r} is none of {', '.join(FORMS)}")
    forward = forwards[0][1]
    require_values(forward.module, "saving it")
    if form != STATE and not forward.decisions:
        raise ConfigError(
            f"{type(forward.module).__name__} has not been called since compile, so no weight is "
            f"chosen yet and none could be saved {form}; call it once first"
        )
    record = {
        **describe_model(forward),
        "form": form,
        "provenance": check_provenance(provenance or {}),
    }
    tensors, parts = _read_state(forward) if form == STATE else _read_masked(forward, form)
    write_file(path, tensors, {**record, **parts})


def _read_state(forward: SparseForward) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors of the form "state", and the record's part about them."""
    state = forward.weights.state_dict_without_finalized(forward.module)
    if forward.config.mode == "infer":
        mask_state_dict(forward.module, forward.decisions, state)
    frozen = forward.frozen if forward.frozen.frozen_names else FrozenMasks()
    mask_frozen(forward.module, frozen, state)
    tensors, aliases = _without_aliases(state)
    tensors.update(write_frozen(frozen, forward.decisions, tensors))
    packed = forward.weights.packed
    tensors.update({name + _PACKED: weight.to_portable().data for name, weight in packed.items()})
    described = {name: _describe_packed(weight) for name, weight in packed.items()}
    soft = forward.frozen.scales if isinstance(forward.frozen, SoftMasks) else {}
    return tensors, {"packed": described, "aliases": aliases, "soft": soft}


def _read_masked(forward: SparseForward, form: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors of the form "dense" or "compact", and the record's part about them."""
    module = forward.module
    state = read_masked_state(forward)
    tensors, aliases = _without_aliases(state)
    frozen = forward.frozen if forward.frozen.frozen_names else FrozenMasks()
    masks = write_frozen(frozen, forward.decisions, tensors)
    if form == DENSE:
        return tensors | masks, {"aliases": aliases}
    tensors, compact = split_compact(tensors, map_patterns(module, forward.decisions))
    return tensors | masks, {"compact": compact, "aliases": aliases}


def load(path: str | os.PathLike[str], model: Model, *, backend: Backend = "auto") -> Model:
    """Returns a compiled copy of a model with the weights, pattern and decisions of a file.

    Args:
        path: A file that ``save`` wrote.
        model: A plain dense model of the class that was saved; its weights are replaced. Weights
            that a library had packed or quantized must be so in it, too.
        backend: What compiles the rewritten graph, as in ``compile``.

    Returns:
        The compiled model, in the mode in which it was saved.

    Raises:
        CheckpointError: If the file is missing, damaged, of another version, or does not fit
            ``model``.
        ConfigError: If ``model`` is a wrapper, or on the meta device.
    """
    check_model(model)
    require_values(model, "loading into it")
    stored = read_file(path)
    if stored.record is None:
        raise CheckpointError(
            f"{path} holds no sparsedm pattern: load it into the model as usual, then "
            "sparsedm_compiler.compile(model, pattern='2:4')"
        )
    meta = stored.record
    _require_shapes(stored, model)
    tensors = stored.expand()
    try:
        config = CompileConfig.from_dict(meta["options"], backend=backend)
        packed = {name: _read_packed(name, p, tensors) for name, p in meta["packed"].items()}
        for name in [name for name, weight in packed.items() if weight.family.opaque]:
            tensors[name] = packed.pop(name).unpack()  # packed anew at the first call
        decisions = read_decisions(meta["decisions"], model)
        patterns = {name: decision.pattern for name, decision in decisions.items()}
        frozen = read_soft(meta.get("soft", {}), patterns)
        frozen = frozen or read_frozen(meta["frozen"], decisions, tensors)
        known, source = frozenset(map(str, meta["known"])), meta["class"]
        if meta.get("form") == DENSE:
            _require_zeros(tensors, patterns)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, KernelError) as error:
        raise CheckpointError(f"{path}: its sparsedm metadata is damaged: {error!r}") from error
    student = copy_model(model)
    try:
        _hollow_out(student, packed)
        filled = fill_packed(student.state_dict(), tensors)
        missing, unknown = student.load_state_dict(tensors, strict=False)
        absent = {*missing} - _list_names(student, packed) - filled
        if absent or unknown:
            raise RuntimeError(f"missing {sorted(absent)}, unknown {sorted(unknown)}")
    except (RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} holds a {source} and does not fit this {type(model).__name__}: {error}"
        ) from error
    return install(student, config, decisions, known, packed, frozen)


def _hollow_out(student: nn.Module, packed: Mapping[str, PackedWeight]) -> None:
    """Frees the weights that the file holds packed. Raises RuntimeError where shapes differ."""
    for name, form in packed.items():
        weight = student.get_parameter(name)
        if tuple(weight.shape) != form.shape:
            raise RuntimeError(f"{name} is {list(weight.shape)}, packed {list(form.shape)}")
        hollow_out(weight)  # in the model's dtype, which the first call casts the file's to


def _list_names(student: nn.Module, packed: Mapping[str, PackedWeight]) -> set[str]:
    """Returns all names of the parameters that the file holds packed."""
    names = dict(student.named_parameters(remove_duplicate=False))
    weights = {id(w) for name, w in names.items() if strip_adapter_prefix(name) in packed}
    return {name for name, weight in names.items() if id(weight) in weights}


def _without_aliases(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors to write, tied ones once, and {name: name it is written under}."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in take_apart(state).items():
        where = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and where in seen:
            aliases[name] = seen[where]
        else:
            seen[where] = name
            tensors[name] = copy_for_file(tensor)
    return tensors, aliases


def _require_zeros(tensors: Mapping[str, Tensor], patterns: Mapping[str, Pattern | None]) -> None:
    """Raises CheckpointError where a weight of the form "dense" is not of its own pattern."""
    for name, pattern in patterns.items():
        if pattern is None or name not in tensors:
            continue
        weight = tensors[name]
        if weight.dim() > 1 and not satisfies(find_kept(weight), pattern):
            raise CheckpointError(
                f"{name!r} is declared to be {pattern} and has other zeros: somebody has changed "
                "the file; sparsedm check shows which pattern it satisfies"
            )


def _require_shapes(stored: StoredFile, model: nn.Module) -> None:
    """Raises CheckpointError unless compact weights have the shapes of the model's parameters."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, weight in stored.compact.items():
        if shapes.get(name) != weight.shape:
            raise CheckpointError(
                f"{stored.path} does not fit this {type(model).__name__}: {name!r} is "
                f"{list(weight.shape)} in the file, {shapes.get(name)} in the model"
            )


def _describe_packed(packed: PackedWeight) -> dict[str, Any]:
    return {
        "pattern": str(packed.weight_format.pattern),
        "kernel": packed.kernel.name,
        "layout": packed.kernel.layout,
        "tile": packed.kernel.tile,
        "shape": list(packed.shape),
    }


def _read_packed(name: str, plain: dict[str, Any], tensors: dict[str, Tensor]) -> PackedWeight:
    """Reads a packed weight, which may be trusted only after its family's ``check``."""
    # A copy: aligned, and unlike the mapped file nobody else's to change after the check.
    data, shape = tensors.pop(name + _PACKED).clone(), tuple(plain["shape"])
    kernel = KernelConfig(plain["kernel"], tuple(plain["layout"]), tuple(plain["tile"]))
    weight_format = WeightFormat(Pattern.parse(plain["pattern"]), None, kernel.untiled)
    dtype = find_family(kernel.name).check(data, shape, weight_format)
    return PackedWeight(weight_format, kernel, shape, dtype, data)
