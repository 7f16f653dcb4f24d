"""Saves and loads compiled models: safetensors with the pattern in the metadata."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..backends.kernel_family import KernelConfig, WeightFormat
from ..backends.packing import PackedWeight
from ..backends.registry import find_family
from ..config import Backend, CompileConfig
from ..errors import CheckpointError, ConfigError, KernelError
from ..fileio import replace_atomically
from ..graph.names import strip_adapter_prefix
from ..meta_models import require_values
from ..patterns import Pattern
from .api import check_model, install
from .folded_weights import hollow_out
from .lookup import require_compiled
from .model_record import KEY, VERSION, describe_model, read_decisions
from .state_hooks import mask_state_dict

Model = TypeVar("Model", bound=nn.Module)

_READS = (VERSION,)
_PACKED = ".sparsedm_packed"


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a compiled model's weights and decisions to a file.

    The weights are latent (dense) ones in mode "train", and masked ones in mode "infer".

    The file is plain safetensors, readable without this package, but for finalized weights, which
    are written packed. It appears whole or not at all.

    Args:
        model: A compiled model.
        path: The file to write; its folder must exist.

    Raises:
        ConfigError: If ``model`` was not compiled, is on the meta device, or several compiled
            models are inside.
        CheckpointError: If the file cannot be written.
    """
    forwards = require_compiled(model)
    if len(forwards) > 1:
        raise ConfigError(
            f"{len(forwards)} compiled models are inside; save each: {[*dict(forwards)]}"
        )
    forward = forwards[0][1]
    require_values(forward.module, "saving it")
    state = forward.weights.state_dict_without_finalized(forward.module)
    if forward.config.mode == "infer":
        mask_state_dict(forward.module, forward.decisions, state)
    tensors, aliases = _without_aliases(state)
    packed = forward.weights.packed
    tensors.update({name + _PACKED: weight.to_portable().data for name, weight in packed.items()})
    meta = {
        **describe_model(forward),
        "packed": {name: _describe_packed(weight) for name, weight in packed.items()},
        "aliases": aliases,
    }
    target = Path(path)
    if not target.parent.is_dir():
        raise CheckpointError(f"cannot write {target}: there is no folder {target.parent}")
    try:
        with replace_atomically(target) as part:
            save_file(tensors, part, {"format": "pt", KEY: json.dumps(meta)})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {target}: {error}") from error


def load(path: str | os.PathLike[str], model: Model, *, backend: Backend = "auto") -> Model:
    """Returns a compiled copy of a model with the weights, pattern and decisions of a file.

    Args:
        path: A file that ``save`` wrote.
        model: A plain dense model of the class that was saved; its weights are replaced.
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
    tensors, meta = _read(Path(path))
    try:
        config = CompileConfig.from_dict(meta["options"], backend=backend)
        packed = {name: _read_packed(name, p, tensors) for name, p in meta["packed"].items()}
        for name in [name for name, weight in packed.items() if weight.family.opaque]:
            tensors[name] = packed.pop(name).unpack()  # packed anew at the first call
        decisions = read_decisions(meta["decisions"], model)
        tensors.update({alias: tensors[name] for alias, name in meta["aliases"].items()})
    except CheckpointError as error:
        raise CheckpointError(f"{path} holds a {meta.get('class')}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, KernelError) as error:
        raise CheckpointError(f"{path}: its sparsedm metadata is damaged: {error!r}") from error
    student = copy.deepcopy(model)
    try:
        _hollow_out(student, packed)
        missing, unknown = student.load_state_dict(tensors, strict=False)
        absent = {name for name in missing if strip_adapter_prefix(name) not in packed}
        if absent or unknown:
            raise RuntimeError(f"missing {sorted(absent)}, unknown {sorted(unknown)}")
    except (RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} holds a {meta['class']} and does not fit this {type(model).__name__}: {error}"
        ) from error
    return install(student, config, decisions, frozenset(meta["known"]), packed)


def _hollow_out(student: nn.Module, packed: Mapping[str, PackedWeight]) -> None:
    """Frees the weights that the file holds packed. Raises RuntimeError where shapes differ."""
    for name, form in packed.items():
        weight = student.get_parameter(name)
        if tuple(weight.shape) != form.shape:
            raise RuntimeError(f"{name} is {list(weight.shape)}, packed {list(form.shape)}")
        hollow_out(weight)  # in the model's dtype, which the first call casts the file's to


def _without_aliases(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors to write, tied ones once, and {name: name it is written under}."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        where = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and where in seen:
            aliases[name] = seen[where]
        else:
            seen[where] = name
            tensors[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return tensors, aliases


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            meta = (file.metadata() or {}).get(KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path} as safetensors: {error}") from error
    if meta is None:
        raise CheckpointError(
            f"{path} holds no sparsedm pattern: load it into the model as usual, then "
            "sparsedm_compiler.compile(model, pattern='2:4')"
        )
    try:
        plain: dict[str, Any] = json.loads(meta)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: its sparsedm metadata is damaged: {error}") from error
    if plain.get("version") not in _READS:
        raise CheckpointError(
            f"{path} has format version {plain.get('version')!r}, this package reads {_READS}"
        )
    return tensors, plain


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
