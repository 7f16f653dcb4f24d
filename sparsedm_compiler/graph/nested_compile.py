"""Pieces that a model's own code has compiled, in runs whose ops are seen one by one.

A graph of ``torch.compile`` that is called between ours would hold weights without their masks, and
no mode sees what it computes. While an eager mode is on, such pieces run as they were written.
TorchDynamo's own stance "force_eager" would do so in all threads, and to our graphs.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

from torch._dynamo import eval_frame

OURS = "_sparsedm_graphs"
"""The attribute of callbacks of TorchDynamo that mask what they compile."""

_OF_TORCH = ("torch.nn.attention.", "torch._higher_order_ops.")
"""Modules of torch that compile parts of themselves (flex_attention), which hold no weights."""


class _Nested(threading.local):
    """``depth``: how many eager modes are on in this thread; others' pieces run eagerly then."""

    depth = 0


NESTED = _Nested()


def _choose_callback(callback: Any) -> Any:
    """Returns what TorchDynamo calls for new frames: for a piece of others' nothing at times."""
    chosen = _CHOOSE(callback)
    if not NESTED.depth or chosen in (None, False) or hasattr(callback, OURS):
        return chosen
    piece = sys._getframe(1).f_locals.get("fn")
    if getattr(piece, "__module__", "").startswith(_OF_TORCH):
        return chosen
    if (count := _set_count(1)) < 0:  # else fullgraph=True asks that something was compiled
        _set_count(count)
    return None


_CHOOSE = eval_frame._callback_from_stance
_set_count: Any = getattr(eval_frame, "set_fullgraph_compiled_frame_count", lambda count: -1)
eval_frame._callback_from_stance = _choose_callback
