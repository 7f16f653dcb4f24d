"""``open_model``: any diffusion model by one word, a preset, a diffusers config or a function."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, ConfigError, SparseDMError
from .example_inputs import FEEDS, example_inputs
from .factories import CALL, inputs_of, made_by
from .presets import PRESETS, Preset, find
from .uvit import UViT
from .weights import load_weights

Called = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""A model with the args and kwargs of one forward."""

FUNCTION_HINT = f"write a function that returns {CALL} and pass --model package.module:function"
OWN_WEIGHTS = "diffusion_pytorch_model*"
"""The weights in a diffusers directory, whole or in shards."""


def open_model(
    spec: str,
    *,
    options: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """The model that ``spec`` names, on ``device``, with random weights unless it brings its own.

    ``spec``: a preset; "UViT" or a known diffusers class, then all options have their defaults; a
    diffusers config (the JSON file, or its directory, whose weights are loaded where there are
    any); or "package.module:function", which returns the model or a tuple that starts with it.
    ``options``: replace fields of the config, or are the function's keyword arguments.
    ``weights``: as in ``load_weights``; on the meta device they are only checked.
    Raises ConfigError and CheckpointError.

    >>> tiny = {"img_size": 8, "embed_dim": 16, "depth": 0, "num_heads": 2}
    >>> open_model("UViT", options=tiny).config.patches
    16
    """
    if is_function(spec):
        model, _ = made_by(spec, options or {}, device)
    else:
        model = built(entry_of(spec), options or {}, device)
        folder = Path(spec)
        if weights is None and spec not in {*PRESETS, *FEEDS} and any(folder.glob(OWN_WEIGHTS)):
            model = with_own_weights(model, folder, options or {})
    return model if weights is None else load_weights(model, weights)


def open_called(
    spec: str,
    *,
    options: Mapping[str, Any] | None = None,
    batch: int | None = None,
    inputs: str | None = None,
    device: str | torch.device | None = None,
) -> Called:
    """The model that ``spec`` names, as in ``open_model``, and the inputs of one forward.

    ``device``: meta by default, but a function's model and inputs stay where it made them.
    ``batch``: samples (1); a function decides that by itself, or ``inputs`` do, shapes like
    "1x3x32x32,1:int64", where it returns only a model. No file of weights is read.
    """
    if batch is not None and batch < 1:
        raise ConfigError(f"--batch {batch} is not >= 1")
    if is_function(spec):
        if batch is not None:
            raise ConfigError(f"--batch is not for factories: {spec} and --inputs decide it")
        model, call = made_by(spec, options or {}, device)
        return model, *inputs_of(spec, model, call, inputs)
    if inputs is not None:
        raise ConfigError(f"--inputs is for factories (package.module:function); {spec} is not one")
    entry = entry_of(spec)
    if entry.family not in FEEDS:
        raise ConfigError(
            f"how to call a {entry.family} ({entry.about}) is not known, only "
            f"{', '.join(FEEDS)}; {FUNCTION_HINT}"
        )
    model = built(entry, options or {}, device or "meta")
    return model, *example_inputs(model, batch=batch or 1)


def is_function(spec: str) -> bool:
    """Whether ``spec`` is "package.module:function" and no file."""
    return ":" in spec and not Path(spec).exists()


def may_be_trained(spec: str) -> bool:
    """Whether ``spec`` may bring weights of its own: a function or a directory."""
    return is_function(spec) or Path(spec).is_dir()


def entry_of(spec: str) -> Preset:
    """The class and config that ``spec`` names, if it is no function. Raises ConfigError."""
    path = Path(spec)
    if spec in FEEDS:
        return Preset(f"{spec} with its defaults", spec, {})
    if spec not in PRESETS and (path.exists() or path.suffix == ".json" or "/" in spec):
        return from_config(path)
    return find(spec)


def from_config(path: Path) -> Preset:
    """What a diffusers config file describes, or the directory that holds config.json."""
    if (path / "model_index.json").exists():
        raise ConfigError(
            f"{path} is a whole pipeline; name its network's folder, e.g. {path / 'unet'} or "
            f"{path / 'transformer'}"
        )
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    family = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(family, str):
        raise ConfigError(f"{file} is not a diffusers config: it has no _class_name")
    fields = {key: value for key, value in config.items() if not key.startswith("_")}
    return Preset(str(file), family, fields)


def built(entry: Preset, options: Mapping[str, Any], device: str | torch.device) -> nn.Module:
    """A fresh model; what its class finds wrong with the config becomes a ConfigError."""
    try:
        with torch.device(device):
            model = replace(entry, config={**entry.config, **options}).build()
    except SparseDMError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{entry.about} does not make a {entry.family}: {type(error).__name__}: {error}"
        ) from error
    known = inspect.signature(type(model).__init__).parameters
    if entry.family != "UViT":  # which refuses by itself what diffusers only warns about
        for name in options:
            if name not in known:
                has = ", ".join([*known][1:])
                raise ConfigError(f"{entry.family} has no option {name!r}; it has {has}")
    return model


def with_own_weights(model: nn.Module, folder: Path, options: Mapping[str, Any]) -> nn.Module:
    """A model like ``model`` with the weights that lie in its diffusers directory."""
    device = next(model.parameters()).device
    kind: Any = type(model)
    if device.type == "meta":
        return model
    if isinstance(model, UViT):
        return load_weights(model, next(folder.glob(OWN_WEIGHTS)))
    loaded, info = kind.from_pretrained(
        folder, local_files_only=True, output_loading_info=True, low_cpu_mem_usage=False, **options
    )
    if wrong := {key: info[key] for key in ("missing_keys", "mismatched_keys") if info[key]}:
        raise CheckpointError(f"the weights in {folder} do not fit its {kind.__name__}: {wrong}")
    found: nn.Module = loaded.to(device)
    return found
