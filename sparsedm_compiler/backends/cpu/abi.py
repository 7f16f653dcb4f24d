"""The arguments of a call of the kernel library."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int32, c_int64, c_void_p

ROWS, PLANES, NHWC, MIXED = range(4)
"""How x and y lie in memory; MIXED: x as the planes of a 1x1 conv, y as rows."""


# Mirrored by tiles.h: change them together.
class KernelArguments(ctypes.Structure):
    """Arguments of ``sdm_run``; ``cache``: bytes of the second-level cache, 0 for this CPU's.

    From ``offset`` on they describe a GroupNorm in front of a convolution; ``groups``: 0 for none.
    """

    _fields_ = (
        *((name, c_void_p) for name in ("weight", "x", "out", "bias")),
        *((name, c_int32) for name in ("x_type", "bias_type", "act", "form")),
        *((name, c_int64) for name in ("tokens", "x_stride", "out_stride")),
        *((name, c_int64) for name in ("images", "channels", "height", "width")),
        *((name, c_int64) for name in ("out_height", "out_width", "kernel_h", "kernel_w")),
        *((name, c_int64) for name in ("stride_h", "stride_w", "pad_h", "pad_w")),
        *((name, c_int64) for name in ("dil_h", "dil_w")),
        *((name, c_int32) for name in ("tile", "threads", "isa")),
        ("cache", c_int64),
        *((name, c_void_p) for name in ("offset", "norm_weight", "norm_bias")),
        *((name, c_int64) for name in ("groups", "offset_stride")),
        ("epsilon", c_double),
        ("pre_act", c_int32),
    )
