"""N:M sparsity for diffusion models, as a torch.fx compiler.

>>> import sparsedm_compiler as sdm
>>> sdm.Pattern.parse("2:4").density
Fraction(1, 2)
"""

from .compiler import compile, count_macs, explain, topology
from .errors import (
    CaptureError,
    CheckpointError,
    ConfigError,
    DataError,
    DenseRunError,
    GraphError,
    MaskError,
    PatternError,
    SparseDMError,
)
from .facts import Decision, MacRow, MacsReport, Topology
from .pattern import Pattern
from .report import Explanation
from .runtime import masked_parameters
from .storage import load, save

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Decision",
    "DenseRunError",
    "Explanation",
    "GraphError",
    "MacRow",
    "MacsReport",
    "MaskError",
    "Pattern",
    "PatternError",
    "SparseDMError",
    "Topology",
    "compile",
    "count_macs",
    "explain",
    "load",
    "masked_parameters",
    "save",
    "topology",
]
