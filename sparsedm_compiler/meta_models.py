"""Models on the meta device, which have shapes and no values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import ConfigError

if TYPE_CHECKING:
    from torch import nn


def require_values(model: nn.Module, use: str) -> None:
    """Raises ConfigError where a parameter or a buffer of ``model`` has no values.

    ``use``: what they are needed for, as the error calls it, e.g. "saving it".
    """
    tensors = (*model.named_parameters(), *model.named_buffers())
    empty = [name for name, tensor in tensors if tensor.is_meta]
    if empty:
        others = f" and {len(empty) - 1} other tensors" if len(empty) > 1 else ""
        raise ConfigError(
            f"{type(model).__name__} has no values for {empty[0]!r}{others}, which are on the meta "
            f"device, and {use} needs them: open the model on cpu or cuda, with its weights"
        )
