"""The entry in diffusers' tables of quantizers, and all of its private API that is used.

diffusers has no function that registers a quantizer: two dictionaries map the ``quant_method`` of
a config to its classes, and whoever adds to them is called. Tested with 0.40, 0.41 and 0.42. Two
more of transformers are asked for the name that ``quant_backend=`` of a pipeline gives.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from contextvars import ContextVar
from functools import wraps
from importlib import import_module
from typing import Any

from torch import nn

from ..errors import ConfigError
from ..optional_deps import import_diffusers, is_installed, read_version

METHOD = "sparsedm"
"""The ``quant_method`` of the plugin, in config.json and in the tables of diffusers."""

TESTED = "0.40 to 0.42"
"""The versions of diffusers that the plugin is tested with."""

_loading: ContextVar[bool] = ContextVar("loading", default=False)
"""Whether ``from_single_file`` runs, whose model is compiled with the weights that it loads."""

_TABLES = ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING")


def import_private(module: str, name: str) -> Any:
    """Returns a name of diffusers that is not public.

    Raises:
        ConfigError: If diffusers is not installed, or this version has no such name.
    """
    import_diffusers(reason="sparsedm_compiler.diffusers is a plugin for diffusers")
    try:
        return import_module(module).__dict__[name]
    except (ModuleNotFoundError, KeyError) as error:
        raise explain_version(f"has no {module}.{name}") from error


def explain_version(lack: str) -> ConfigError:
    """Returns the error for a diffusers that the plugin does not run with: what it lacks."""
    return ConfigError(
        f"diffusers {read_version('diffusers')} {lack}, which the plugin needs: it is made for "
        f"diffusers {TESTED}; sparsedm_compiler.compile(model) works with any version"
    )


def import_base() -> Any:
    """Returns the class that quantizers of diffusers derive from.

    Raises:
        ConfigError: If diffusers is not installed, or so old (before 0.39) that it saves a model
            without asking its quantizer, so that frozen masks would be lost.
    """
    base = import_private("diffusers.quantizers.base", "DiffusersQuantizer")
    if not hasattr(base, "get_state_dict_and_metadata"):
        raise explain_version("does not ask a quantizer what to save")
    return base


def register(config: type, quantizer: type) -> None:
    """Makes ``from_pretrained`` build ``quantizer`` for a ``config``, or for a saved one."""
    for table, value in zip(list_tables(), (quantizer, config), strict=True):
        table[METHOD] = value


class TextEncoderRefusal:
    """What transformers makes where a pipeline would prune a text encoder: an error."""

    def __init__(self, quantization_config: object, **_: object) -> None:
        raise ConfigError(
            "sparsedm prunes networks of diffusers, not text encoders of transformers: name the "
            "network, PipelineQuantizationConfig(…, components_to_quantize=['transformer'])"
        )


def register_backend(config: type) -> None:
    """Makes ``PipelineQuantizationConfig(quant_backend="sparsedm")`` pass diffusers' checks.

    It asks transformers for the same name and the same options. Does nothing without transformers.
    """
    if not is_installed("transformers"):
        return
    tables = import_module("transformers.quantizers.auto").__dict__
    for name, value in zip(_TABLES, (TextEncoderRefusal, config), strict=True):
        if isinstance(tables.get(name), MutableMapping):
            tables[name][METHOD] = value


def follow_single_files(adopt: Callable[[Any], None]) -> None:
    """Makes ``from_single_file`` prune a model whose config says that it is pruned.

    ``from_pretrained`` asks the config; ``from_single_file`` ignores it, and the model would run
    dense. ``adopt``: compiles such a model in place, and leaves others alone.
    """
    mixin = import_private("diffusers.loaders.single_file_model", "FromOriginalModelMixin")
    load = mixin.from_single_file.__func__

    @wraps(load)
    def from_single_file(cls: type, *args: Any, **kwargs: Any) -> Any:
        token = _loading.set(True)
        try:
            model = load(cls, *args, **kwargs)
        finally:
            _loading.reset(token)
        adopt(model)
        return model

    mixin.from_single_file = classmethod(from_single_file)


def follow_configs(adopt: Callable[[Any], None]) -> None:
    """Makes ``from_config`` prune a new model whose config says that it is pruned.

    Else it would run dense, and be saved as pruned. ``from_pretrained`` makes its model so, too,
    but without values yet: it is compiled once it is loaded.
    """
    mixin = import_private("diffusers.configuration_utils", "ConfigMixin")  # of schedulers, too
    make = mixin.from_config.__func__

    @wraps(make)
    def from_config(cls: type, *args: Any, **kwargs: Any) -> Any:
        made = make(cls, *args, **kwargs)
        model = made[0] if isinstance(made, tuple) else made
        if _loading.get() or not isinstance(model, nn.Module):
            return made
        if not any(parameter.is_meta for parameter in model.parameters()):
            adopt(model)
        return made

    mixin.from_config = classmethod(from_config)


def list_tables() -> tuple[MutableMapping[str, type], MutableMapping[str, type]]:
    """Returns diffusers' tables {quant_method: quantizer} and {quant_method: config}."""
    tables = [import_private("diffusers.quantizers.auto", name) for name in _TABLES]
    for name, table in zip(_TABLES, tables, strict=True):
        if not isinstance(table, MutableMapping):
            raise ConfigError(
                f"{name} of diffusers {read_version('diffusers')} is a {type(table).__name__}, "
                f"not a dictionary: the plugin is made for diffusers {TESTED}"
            )
    return tables[0], tables[1]
