"""N:M sparsity for diffusion models, as a torch.fx compiler.

>>> import sparsedm_compiler as sdm
>>> sdm.Pattern.parse("2:4").density
Fraction(1, 2)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .compiler.api import compile, explain, pattern_of, repattern
from .compiler.counting import count_macs, topology
from .compiler.guarded_forward import masked_parameters
from .compiler.serialization import load, save
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
from .models.model_classes import register_time_scales
from .patterns import Pattern
from .reports import Choice, Decision, Explanation, MacRow, MacsReport, Topology

if TYPE_CHECKING:
    from .train import FinetuneConfig as FinetuneConfig
    from .train import FinetuneResult as FinetuneResult
    from .train import finetune as finetune
    from .train import held_out_loss as held_out_loss
    from .train.sr_ste import sr_ste as sr_ste

__version__ = "0.1.0"

register_time_scales()

_TRAIN = ("FinetuneConfig", "FinetuneResult", "finetune", "held_out_loss", "sr_ste")


def __getattr__(name: str) -> Any:
    """The harness, imported on first use: it needs the extra "train"."""
    if name in _TRAIN:
        return getattr(import_module(".train", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CaptureError",
    "CheckpointError",
    "Choice",
    "ConfigError",
    "DataError",
    "Decision",
    "DenseRunError",
    "Explanation",
    "GraphError",
    "KernelError",
    "MacRow",
    "MacsReport",
    "MaskError",
    "PackError",
    "Pattern",
    "PatternError",
    "SparseDMError",
    "StoppedError",
    "Topology",
    "compile",
    "count_macs",
    "explain",
    "load",
    "masked_parameters",
    "pattern_of",
    "repattern",
    "save",
    "topology",
]
