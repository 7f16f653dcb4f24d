"""``SparseConfig``: how ``from_pretrained`` of diffusers is told to prune a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any

from ..compiler.guarded_forward import SparseForward
from ..compiler.held_masks import SoftMasks
from ..compiler.model_record import check_decisions, describe_decisions, list_decisions
from ..config import Backend, CompileConfig
from ..errors import CheckpointError, ConfigError
from ..files.container import VERSION
from ..patterns import Pattern
from .registration import METHOD

_PREDICATE = "(a predicate over parameter names)"


class QuantMethod(str, Enum):
    """The name of the plugin, in the form in which diffusers reads it."""

    SPARSEDM = METHOD


class SparseConfig:
    """The options of ``compile``, for the argument ``quantization_config`` of ``from_pretrained``.

    ``from_pretrained`` of a diffusers model then returns the compiled model, and of a pipeline
    (with ``PipelineQuantizationConfig(quant_mapping={"unet": SparseConfig("2:4")})``) one with
    compiled parts. ``save_pretrained`` writes options and decisions to config.json, and
    ``from_pretrained`` without the argument reads them, wherever this plugin is imported.

    Attributes:
        config: The options, checked.
        decisions: What a saved model had decided on its weights, {} for one that was not called.
        frozen: Names of the weights whose masks do not change while it trains on.
    """

    def __init__(
        self,
        pattern: str | Pattern | None = None,
        *,
        mode: str = "train",
        keep_dense: str | Iterable[str] | Callable[[str], bool] = (),
        overrides: Mapping[str, str | Pattern] | None = None,
        policy: str = "structural",
        backend: Backend = "auto",
        kernels: Mapping[str, str] | None = None,
        exclude_kernels: str | Iterable[str] = (),
        autotune: str = "measure",
        autotune_seconds: float = 60.0,
        finalize: bool = False,
        regional: bool = False,
    ) -> None:
        """Checks the options.

        Args:
            pattern: What weights are pruned to, as in ``compile``. None, in mode "infer" only:
                the pattern that the zeros of every loaded weight satisfy.
            mode: "train" or "infer".
            keep_dense: Names or globs of layers that stay dense, or a predicate over parameter
                names.
            overrides: {glob: pattern} for layers with another pattern; None: none.
            policy: "structural", "all" or "uvit", as in ``compile``.
            backend: What compiles the rewritten graph, as in ``compile``; it is not saved.
            kernels: {glob: kernel} pins kernels instead of measuring; None: none.
            exclude_kernels: Names of kernels that are not to be used.
            autotune: How kernels are chosen, as in ``compile``; not saved.
            autotune_seconds: The most seconds that measuring kernels may take; not saved.
            finalize: Whether to free the dense weights that a sparse kernel runs.
            regional: Whether repeated blocks are compiled once, as in ``compile``; not saved.

        Raises:
            PatternError: If a pattern is misspelled.
            ConfigError: If an option has an unknown value.

        Example:
            >>> from sparsedm_compiler.diffusers import SparseConfig
            >>> SparseConfig("2:4", keep_dense="mid_block").to_dict()["keep_dense"]
            ['mid_block']
        """
        options = {name: value for name, value in locals().items() if name not in _NO_OPTIONS}
        config = CompileConfig.create(pattern, **options)
        self._set(config, {})

    def _set(
        self, config: CompileConfig, decisions: Mapping[str, str], frozen: Iterable[str] = ()
    ) -> None:
        self.quant_method = QuantMethod.SPARSEDM
        self.config = config
        self.decisions = dict(decisions)
        self.frozen = list(frozen)

    @classmethod
    def from_compiled(cls, forward: SparseForward) -> SparseConfig:
        """Returns the config of a compiled model."""
        new = cls.__new__(cls)
        new.record(forward)
        return new

    def record(self, forward: SparseForward) -> None:
        """Takes over the state of a compiled model, to be saved with it.

        Raises ConfigError for soft thresholds, which config.json does not hold.
        """
        if isinstance(forward.frozen, SoftMasks):
            raise ConfigError(
                "config.json holds no soft thresholds: save this student by sparsedm_compiler.save"
            )
        decisions = describe_decisions(list_decisions(forward))
        self._set(forward.config, decisions, forward.frozen.frozen_names)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for config.json: all that concerns the model, not the machine."""
        bound = self.config.evaluate_predicate(())
        values = {"quant_method": METHOD, "version": VERSION, **bound.to_dict()}
        if callable(self.config.keep_dense):
            values["keep_dense"] = [_PREDICATE]  # which names no layer: it cannot be read back
        return {**values, "decisions": dict(self.decisions), "frozen": [*self.frozen]}

    to_diff_dict = to_dict

    def __repr__(self) -> str:
        return f"SparseConfig({self.to_dict()})"

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Returns the config that ``to_dict`` wrote, or one of the arguments of this class.

        Args:
            config_dict: The values, as in config.json.
            return_unused_kwargs: Whether to return ``(config, kwargs)``.
            **kwargs: What diffusers hands on; nothing of it is used.

        Returns:
            The config.

        Raises:
            CheckpointError: If the values are damaged or of another version.
        """
        values = {**_plain_defaults(), **config_dict}
        version, decisions = values.pop("version"), values.pop("decisions")
        frozen = values.pop("frozen")
        if version != VERSION or values.pop("quant_method") != METHOD:
            raise CheckpointError(
                f"the quantization_config of this model has version {version!r} of {METHOD!r}; "
                f"this package reads {VERSION}"
            )
        try:
            config = cls.__new__(cls)
            check_decisions(decisions)
            if not {*frozen} <= {*decisions}:
                raise ValueError("the mask of a weight is frozen that is not pruned")
            config._set(CompileConfig.from_dict(values), decisions, frozen)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"the quantization_config of this model is damaged: {error}"
            ) from error
        return (config, kwargs) if return_unused_kwargs else config

    def copy(self) -> SparseConfig:
        """Returns a config of its own for one model: two parts may be loaded with the same one."""
        return copy.copy(self)


_NO_OPTIONS = ("self", "pattern", "__class__")


def _plain_defaults() -> dict[str, Any]:
    """Returns what a handwritten dictionary may leave out."""
    return SparseConfig("2:4").to_dict()
