"""Diffusion models by the name of a preset or class, a diffusers config, or a function."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from ..errors import CheckpointError, ConfigError, SparseDMError
from .example_inputs import example_inputs
from .factories import CALL, call_factory, choose_inputs
from .model_classes import MODEL_CLASSES
from .presets import PRESETS, Preset, find_preset
from .uvit import UViT
from .weights import load_weights

ModelWithInputs: TypeAlias = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""A model with the args and kwargs of one forward."""

FUNCTION_HINT = f"write a function that returns {CALL} and pass --model package.module:function"
PLUGIN = "sparsedm"
"""The ``quant_method`` of models that our plugin for diffusers has saved: their weights are plain.
"""
OWN_WEIGHTS = "diffusion_pytorch_model*"
"""The weights in a diffusers directory, whole or in shards."""


def open_model(
    spec: str,
    *,
    options: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Opens a model by the name of a preset or class, its config file, or a function.

    Its weights are random unless it brings its own.

    Args:
        spec: A preset; "UViT" or a known diffusers class, then all options have their defaults; a
            diffusers config (the JSON file, or its directory, whose weights are loaded where there
            are any); or "package.module:function", which returns the model or a tuple that starts
            with it.
        options: Fields of the config to replace, or the function's keyword arguments.
        weights: A file as in ``load_weights``; on the meta device it is only checked. None loads
            none.
        device: Device of the model.

    Returns:
        The model, in train mode unless its weights came from diffusers.

    Raises:
        ConfigError: ``spec`` describes no model, or an option does not exist.
        CheckpointError: A file of weights cannot be read or does not fit.

    Example:
        >>> tiny = {"img_size": 8, "embed_dim": 16, "depth": 0, "num_heads": 2}
        >>> open_model("UViT", options=tiny).config.patches
        16
    """
    if is_function(spec):
        model, _ = call_factory(spec, options or {}, device)
    else:
        model = build_model(resolve_spec(spec), options or {}, device)
        known = {*PRESETS, *MODEL_CLASSES}
        if weights is None and spec not in known and any(Path(spec).glob(OWN_WEIGHTS)):
            model = load_own_weights(model, Path(spec), options or {})
    return model if weights is None else load_weights(model, weights)


def open_with_inputs(
    spec: str,
    *,
    options: Mapping[str, Any] | None = None,
    batch: int | None = None,
    inputs: str | None = None,
    device: str | torch.device | None = None,
) -> ModelWithInputs:
    """Opens a model as ``open_model`` does, together with the inputs of one forward.

    No file of weights is read.

    Args:
        spec: As for ``open_model``.
        options: As for ``open_model``.
        batch: Number of samples; None is 1. A function decides that by itself.
        inputs: Shapes like "1x3x32x32,1:int64", for a function that returns only a model.
        device: Device of model and inputs. None is meta, but leaves a function's model and inputs
            on their own device.

    Returns:
        (model, args, kwargs), for ``model(*args, **kwargs)``.

    Raises:
        ConfigError: ``spec`` describes no model, its inputs are not known, or an option does not
            exist.

    Example:
        >>> model, args, kwargs = open_with_inputs("uvit-cifar10-small", batch=2)
        >>> [list(x.shape) for x in args], kwargs
        ([[2, 3, 32, 32], [2]], {})
    """
    if batch is not None and batch < 1:
        raise ConfigError(f"--batch {batch} is not >= 1")
    if is_function(spec):
        if batch is not None:
            raise ConfigError(f"--batch is not for factories: {spec} and --inputs decide it")
        model, call = call_factory(spec, options or {}, device)
        return model, *choose_inputs(spec, model, call, inputs)
    if inputs is not None:
        raise ConfigError(f"--inputs is for factories (package.module:function); {spec} is not one")
    entry = resolve_spec(spec)
    if entry.class_name not in MODEL_CLASSES:
        raise ConfigError(
            f"how to call a {entry.class_name} ({entry.about}) is not known, only "
            f"{', '.join(MODEL_CLASSES)}; {FUNCTION_HINT}"
        )
    model = build_model(entry, options or {}, device or "meta")
    return model, *example_inputs(model, batch=batch or 1)


def is_function(spec: str) -> bool:
    """Returns whether ``spec`` is "package.module:function" and no file."""
    return ":" in spec and not Path(spec).exists()


def may_have_weights(spec: str) -> bool:
    """Returns whether ``spec`` may bring weights: a function, or a directory with weights in it."""
    return is_function(spec) or any(Path(spec).glob(OWN_WEIGHTS))


def resolve_spec(spec: str) -> Preset:
    """Returns the class and config that ``spec`` describes, if it is no function.

    Raises ConfigError where it describes none.
    """
    path = Path(spec)
    if spec in MODEL_CLASSES:
        return Preset(f"{spec} with its defaults", spec, {})
    if spec not in PRESETS and (path.exists() or path.suffix == ".json" or "/" in spec):
        return read_config(path)
    return find_preset(spec)


def read_config(path: Path) -> Preset:
    """Reads a diffusers config file, or config.json in a directory.

    Raises ConfigError for a file that cannot be read or is no such config.
    """
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
    class_name = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(class_name, str):
        raise ConfigError(f"{file} is not a diffusers config: it has no _class_name")
    fields = {key: value for key, value in config.items() if not key.startswith("_")}
    return Preset(str(file), class_name, fields)


def build_model(entry: Preset, options: Mapping[str, Any], device: str | torch.device) -> nn.Module:
    """Builds a fresh model of ``entry`` with ``options`` on top, on ``device``.

    Raises ConfigError for an unknown option, or where the class refuses its config.
    """
    try:
        with torch.device(device):
            model = replace(entry, config={**entry.config, **options}).build()
    except SparseDMError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{entry.about} does not make a {entry.class_name}: {type(error).__name__}: {error}"
        ) from error
    known = inspect.signature(type(model).__init__).parameters
    if entry.class_name != "UViT":  # which refuses by itself what diffusers only warns about
        for name in options:
            if name not in known:
                names = ", ".join([*known][1:])
                raise ConfigError(f"{entry.class_name} has no option {name!r}; it has {names}")
    return model


def read_quantization(folder: Path) -> str | None:
    """Returns the ``quant_method`` in a diffusers directory; None for plain weights."""
    config = read_config(folder).config.get("quantization_config")
    return None if config is None else str(config.get("quant_method"))


def load_own_weights(model: nn.Module, folder: Path, options: Mapping[str, Any]) -> nn.Module:
    """Returns a model like ``model`` with the weights in its diffusers directory.

    On the meta device it is ``model`` itself. Raises CheckpointError where they do not fit.
    """
    device = next(model.parameters()).device
    kind: Any = type(model)
    if device.type == "meta":
        return model
    if isinstance(model, UViT):
        return load_weights(model, next(folder.glob(OWN_WEIGHTS)))
    method = read_quantization(folder)
    if method == PLUGIN and (file := folder / "diffusion_pytorch_model.safetensors").exists():
        return load_weights(model, file)
    if method is not None:
        raise CheckpointError(
            f"the weights in {folder} are quantized by {method} or lie in shards, which only "
            "from_pretrained loads; give a folder of plain weights"
        )
    loaded, info = kind.from_pretrained(
        folder, local_files_only=True, output_loading_info=True, low_cpu_mem_usage=False, **options
    )
    if wrong := {key: info[key] for key in ("missing_keys", "mismatched_keys") if info[key]}:
        raise CheckpointError(f"the weights in {folder} do not fit its {kind.__name__}: {wrong}")
    moved: nn.Module = loaded.to(device)
    return moved
