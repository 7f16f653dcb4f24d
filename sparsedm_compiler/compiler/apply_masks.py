"""``apply_masks``: writes the masks of a compiled model into its parameters, for good."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import ConfigError
from ..masks.nm_mask import apply_mask, nm_mask
from .freeze_masks import install_masks
from .frozen_masks import FrozenMasks, write_frozen_masks
from .lookup import masked_parameters, require_compiled


def apply_masks(model: nn.Module) -> tuple[str, ...]:
    """Sets the pruned weights of a compiled model to their masked values, in place and for good.

    A compiled model masks its weights in every call; in mode "train" its parameters and state_dict
    keep the dense (latent) ones. After this, what reads the parameters themselves gets the sparse
    model: ``torch.export``, quantization, ``save_pretrained`` for others. The output of the model
    stays what it was; what training kept of the pruned weights is lost.

    Args:
        model: A compiled model that has been called, or a wrapper around one.

    Returns:
        The names of the parameters that are masked now.

    Raises:
        ConfigError: If ``model`` was not compiled, has not been called yet, or is finalized.
        MaskError: If a weight holds NaN or Inf.

    Example:
        >>> import torch, sparsedm_compiler as sdm
        >>> net = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])
        >>> student = sdm.compile(net, pattern="2:4", backend="eager")
        >>> _ = student(torch.randn(1, 8))
        >>> sdm.apply_masks(student)
        ('1.weight',)
    """
    masked = masked_parameters(model)
    forwards = [forward for _, forward in require_compiled(model)]
    if not masked or any(forward.weights.packed for forward in forwards):
        state = "is finalized" if masked else "has chosen no weights yet: call it once first"
        raise ConfigError(f"{type(model).__name__} {state}")
    with torch.no_grad():
        for forward in forwards:
            write_frozen_masks(forward.module, forward.frozen)
            if forward.frozen.are_temporary:
                install_masks(forward, FrozenMasks())
        for name, (weight, pattern) in masked.items():
            weight.copy_(apply_mask(weight, nm_mask(weight, pattern, name=name)))
            for forward in forwards:
                forward.applied.add(weight)
    return tuple(masked)
