"""Save and load a compiled model: safetensors with the pattern in the metadata."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .compiler import check_model, install
from .config import Config, Inner
from .errors import CheckpointError, ConfigError, PatternError
from .facts import Decision
from .pattern import Pattern
from .runtime import require_compiled

Model = TypeVar("Model", bound=nn.Module)

_KEY = "sparsedm"
_VERSION = 1


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a compiled model's state_dict (latent dense weights) and decisions to ``path``.

    The file is plain safetensors, readable without this package. It appears whole or not at all.
    Raises ConfigError if ``model`` was not compiled, CheckpointError if it cannot be written.
    """
    found = require_compiled(model)
    if len(found) > 1:
        raise ConfigError(f"{len(found)} compiled models are inside; save each: {[*dict(found)]}")
    forward = found[0][1]
    tensors, aliases = _without_aliases(forward.module.state_dict())
    config = forward.config
    meta = {
        "version": _VERSION,
        "class": type(forward.module).__name__,
        "pattern": str(config.pattern),
        "mode": config.mode,
        "policy": config.policy,
        "keep_dense": list(config.dense_globs),
        "overrides": {glob: str(pattern) for glob, pattern in config.overrides},
        "known": sorted(forward.known),
        "decisions": [_plain(decision) for decision in forward.decisions.values()],
        "aliases": aliases,
    }
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        save_file(tensors, part, {"format": "pt", _KEY: json.dumps(meta)})
        os.replace(part, target)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {target}: {error}") from error


def load(path: str | os.PathLike[str], model: Model, *, inner: Inner = "auto") -> Model:
    """A compiled copy of ``model`` with the weights, pattern and decisions saved at ``path``.

    ``model``: the plain dense model of the class that was saved. Raises CheckpointError if the
    file is missing, is no such file, or does not fit ``model``.
    """
    check_model(model)
    tensors, meta = _read(Path(path))
    try:
        config = Config.of(
            meta["pattern"],
            mode=meta["mode"],
            policy=meta["policy"],
            keep_dense=meta["keep_dense"],
            overrides=meta["overrides"],
            inner=inner,
        )
        decisions = {plain["weight"]: _decision(plain) for plain in meta["decisions"]}
        tensors.update({alias: tensors[name] for alias, name in meta["aliases"].items()})
    except (KeyError, TypeError, ConfigError, PatternError) as error:
        raise CheckpointError(f"{path}: its sparsedm metadata is damaged: {error!r}") from error
    student = copy.deepcopy(model)
    try:
        student.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} holds a {meta['class']} and does not fit this {type(model).__name__}: {error}"
        ) from error
    return install(student, config, decisions, frozenset(meta["known"]))


def _without_aliases(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to write, each storage once, and for tied ones the name they are under."""
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
            meta = (file.metadata() or {}).get(_KEY)
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
    if plain.get("version") != _VERSION:
        raise CheckpointError(
            f"{path} has format version {plain.get('version')!r}, this package reads {_VERSION}"
        )
    return tensors, plain


def _plain(decision: Decision) -> dict[str, Any]:
    return {
        "weight": decision.weight,
        "op": decision.op,
        "shape": list(decision.shape),
        "pattern": None if decision.pattern is None else str(decision.pattern),
        "refusal": decision.refusal,
    }


def _decision(plain: dict[str, Any]) -> Decision:
    pattern = None if plain["pattern"] is None else Pattern.parse(plain["pattern"])
    shape = tuple(plain["shape"])
    return Decision(plain["weight"], plain["op"], shape, pattern, plain["refusal"])
