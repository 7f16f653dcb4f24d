"""``SparseQuantizer``: what diffusers calls while it loads and saves a model."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from ..compiler.api import compile, install
from ..compiler.frozen_masks import mask_frozen, read_frozen
from ..compiler.lookup import require_compiled
from ..compiler.model_record import describe_model, read_decisions
from ..compiler.recompile import find_compiled
from ..errors import ConfigError
from ..files.container import KEY
from ..graph.capture import map_parameter_names
from .config import SparseConfig
from .registration import METHOD, import_base

_Base: Any = import_base()


class SparseQuantizer(_Base):  # type: ignore[misc]
    """The quantizer of one model: it compiles what was loaded, and describes what is saved.

    Attributes:
        model: The loaded model; None before it is loaded. A copy of the model has its own.
    """

    use_keep_in_fp32_modules = True
    requires_calibration = False

    def __init__(self, quantization_config: SparseConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config.copy(), **kwargs)
        self.model: nn.Module | None = None

    def get_cuda_warm_up_factor(self) -> int:
        """Returns 2: the weights are as large as those of the dense model."""
        return 2

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        """Refuses a record of another model before anything is loaded."""
        read_decisions(self.quantization_config.decisions, model)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        """Compiles the loaded model in place."""
        config = self.quantization_config.config
        if self.pre_quantized and (config.pattern is not None or config.overrides):
            bound = config.bind(list(map_parameter_names(model).values()))
            decisions = read_decisions(self.quantization_config.decisions, model)
            held = dict(model.named_parameters(remove_duplicate=False))
            frozen = read_frozen(self.quantization_config.frozen, decisions, held)
            install(model, bound, decisions, frozen=frozen)
        else:
            compile_as(model, self.quantization_config)
        self.adopt(model)

    def adopt(self, model: Any) -> None:
        """Makes ``save_pretrained`` of a compiled model save it through this quantizer."""
        self.model = model
        model.hf_quantizer = self
        model.is_quantized = False  # its weights are plain floats: .to(dtype) is no harm
        model.register_to_config(quantization_config=self.quantization_config)
        self._record()

    def _record(self) -> None:
        """Brings the config of the model up to date with what it has decided since."""
        forward = None if self.model is None else find_compiled(self.model)
        if forward is not None:
            self.quantization_config.record(forward)

    @property
    def is_serializable(self) -> bool:
        """True; ``save_pretrained`` asks this before it writes the config, which is updated."""
        self._record()
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model trains: in mode "train"."""
        return bool(self.quantization_config.config.mode == "train")

    @property
    def is_compileable(self) -> bool:
        """True: torch.compile around the model is allowed."""
        return True

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the tensors, masked by frozen masks, and the record for the file's header."""
        if self.model is None:
            return state_dict, {}
        forward = require_compiled(self.model)[0][1]
        if forward.frozen.frozen_names:
            mask_frozen(forward.module, forward.frozen, state_dict)
        record = {**describe_model(forward), "packed": {}, "aliases": {}}
        return state_dict, {KEY: json.dumps(record)}

    def _dequantize(self, model: nn.Module) -> nn.Module:
        raise ConfigError(
            "a pruned model is not dequantized: load it without the plugin's config to have it "
            "dense, or sparsedm_compiler.apply_masks(model) to have its zeros in the parameters"
        )


def adopt_by_config(model: Any, *, new: bool = False) -> None:
    """Compiles a model in place as its config says, if that has one of this plugin's.

    ``new``: its weights are not those of the config, and so tell no frozen masks: none are frozen.
    """
    saved = model.config.get("quantization_config")
    if isinstance(saved, dict) and saved.get("quant_method") == METHOD:
        saved = SparseConfig.from_dict(saved)
    if not isinstance(saved, SparseConfig):
        return
    quantizer = SparseQuantizer(saved, pre_quantized=True)
    if new:
        quantizer.quantization_config.frozen = []
    quantizer._process_model_before_weight_loading(model)
    quantizer._process_model_after_weight_loading(model)


def compile_as(model: nn.Module, config: SparseConfig) -> None:
    """Compiles a model in place with the options of a SparseConfig."""
    options = config.config
    compile(
        model,
        options.pattern,
        mode=options.mode,
        keep_dense=options.keep_dense,
        overrides=dict(options.overrides),
        policy=options.policy,
        inplace=True,
        backend=options.backend,
        kernels=dict(options.kernels),
        exclude_kernels=options.exclude_kernels,
        autotune=options.autotune,
        autotune_seconds=options.autotune_seconds,
        finalize=options.finalize,
        regional=options.regional,
    )
