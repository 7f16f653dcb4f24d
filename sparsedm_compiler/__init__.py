"""N:M sparsity for diffusion models, as a torch.fx compiler.

>>> import sparsedm_compiler as sdm
>>> sdm.Pattern.parse("2:4").density
Fraction(1, 2)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    CaptureError,
    CheckpointError,
    ConfigError,
    DataError,
    DenseRunError,
    GraphError,
    KernelError,
    MaskError,
    PackError,
    PatternError,
    SparseDMError,
    StoppedError,
)

if TYPE_CHECKING:
    from .compiler.api import compile, explain, pattern_of, repattern
    from .compiler.apply_masks import apply_masks
    from .compiler.counting import count_macs, topology
    from .compiler.freeze_masks import freeze_masks, unfreeze_masks
    from .compiler.hold_masks import get_masks, hold_masks, soften_masks
    from .compiler.lookup import masked_parameters
    from .compiler.merge_lora import MergedWeight, MergeReport, merge_lora
    from .compiler.read_guard import allow_dense
    from .compiler.serialization import load, save
    from .diffusers import SparseConfig
    from .export import (
        OnnxReport,
        OnnxWeight,
        check_onnx,
        export_onnx,
        export_package,
        load_package,
    )
    from .masks.mask_ste import zero_kept
    from .oneshot import (
        CalibrationBatch,
        LayerChoice,
        LayerReport,
        OneShotOptions,
        OneShotReport,
        PatternChoice,
        PermutationReport,
        PermutedChannels,
        WeightEnergy,
        choose_patterns,
        permute_channels,
        prune_one_shot,
    )
    from .patterns import Pattern
    from .reports import Choice, Decision, Explanation, MacRow, MacsReport, Topology
    from .train import (
        FinetuneConfig,
        FinetuneResult,
        finetune,
        held_out_loss,
        make_calibration_batches,
    )
    from .train.sr_ste import sr_ste

__version__ = "0.1.0"

__all__ = [
    "CalibrationBatch",
    "CaptureError",
    "CheckpointError",
    "Choice",
    "ConfigError",
    "DataError",
    "Decision",
    "DenseRunError",
    "Explanation",
    "FinetuneConfig",
    "FinetuneResult",
    "GraphError",
    "KernelError",
    "LayerChoice",
    "LayerReport",
    "MacRow",
    "MacsReport",
    "MaskError",
    "MergeReport",
    "MergedWeight",
    "OneShotOptions",
    "OneShotReport",
    "OnnxReport",
    "OnnxWeight",
    "PackError",
    "Pattern",
    "PatternChoice",
    "PatternError",
    "PermutationReport",
    "PermutedChannels",
    "SparseConfig",
    "SparseDMError",
    "StoppedError",
    "Topology",
    "WeightEnergy",
    "allow_dense",
    "apply_masks",
    "check_onnx",
    "choose_patterns",
    "compile",
    "count_macs",
    "explain",
    "export_onnx",
    "export_package",
    "finetune",
    "freeze_masks",
    "get_masks",
    "held_out_loss",
    "hold_masks",
    "load",
    "load_package",
    "make_calibration_batches",
    "masked_parameters",
    "merge_lora",
    "pattern_of",
    "permute_channels",
    "prune_one_shot",
    "repattern",
    "save",
    "soften_masks",
    "sr_ste",
    "topology",
    "unfreeze_masks",
    "zero_kept",
]


MODULES = {
    ".compiler.api": ("compile", "explain", "pattern_of", "repattern"),
    ".compiler.apply_masks": ("apply_masks",),
    ".compiler.counting": ("count_macs", "topology"),
    ".compiler.freeze_masks": ("freeze_masks", "unfreeze_masks"),
    ".compiler.hold_masks": ("get_masks", "hold_masks", "soften_masks"),
    ".compiler.lookup": ("masked_parameters",),
    ".compiler.merge_lora": ("MergeReport", "MergedWeight", "merge_lora"),
    ".compiler.read_guard": ("allow_dense",),
    ".compiler.serialization": ("load", "save"),
    ".diffusers": ("SparseConfig",),
    ".export": (
        "OnnxReport",
        "OnnxWeight",
        "check_onnx",
        "export_onnx",
        "export_package",
        "load_package",
    ),
    ".masks.mask_ste": ("zero_kept",),
    ".oneshot": (
        "CalibrationBatch",
        "LayerChoice",
        "LayerReport",
        "OneShotOptions",
        "OneShotReport",
        "PatternChoice",
        "PermutationReport",
        "PermutedChannels",
        "WeightEnergy",
        "choose_patterns",
        "permute_channels",
        "prune_one_shot",
    ),
    ".patterns": ("Pattern",),
    ".reports": ("Choice", "Decision", "Explanation", "MacRow", "MacsReport", "Topology"),
    ".train": (
        "FinetuneConfig",
        "FinetuneResult",
        "finetune",
        "held_out_loss",
        "make_calibration_batches",
        "sr_ste",
    ),
}
"""The public names that are imported at their first use, so that help texts need no torch."""


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use."""
    for module, names in MODULES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(module, __name__), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
