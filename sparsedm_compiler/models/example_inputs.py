"""Inputs of one forward for every known diffusion model, at any size."""

from __future__ import annotations

from torch import nn

from ..errors import ConfigError
from .model_class import ExampleCall, InputRequest
from .model_classes import MODEL_CLASSES, find_model_class


def example_inputs(
    model: nn.Module,
    *,
    batch: int = 1,
    size: int | None = None,
    tokens: int | None = None,
    frames: int | None = None,
) -> ExampleCall:
    """Returns inputs of one forward of a known model, on its device and in its dtype.

    Random values come from torch's global generator; on the meta device there are none.

    Args:
        model: A U-ViT or a known model of diffusers, or of a class derived from one.
        batch: Number of samples.
        size: Side of the (latent) image in pixels; None as published. A U-ViT has one size.
        tokens: Length of the text; None as published.
        frames: Frames of a video; None as published.

    Returns:
        (args, kwargs) for ``model(*args, **kwargs)``.

    Raises:
        ConfigError: The model's class is not known, or its config has no size of its own and
            ``size`` is None.

    Example:
        >>> from sparsedm_compiler.models import UViT
        >>> args, kwargs = example_inputs(UViT(embed_dim=8, depth=0, num_classes=10), batch=2)
        >>> [list(x.shape) for x in args], kwargs["y"]
        ([[2, 3, 32, 32], [2]], tensor([0, 1]))
    """
    row = find_model_class(model)
    if row is None:
        raise ConfigError(
            f"how to call a {type(model).__name__} is not known; give its inputs yourself. "
            f"Known: {', '.join(MODEL_CLASSES)}"
        )
    weight = next(param for param in model.parameters() if param.is_floating_point())
    request = InputRequest(weight.device, weight.dtype, batch, size, tokens, frames)
    return row.make_inputs(model.config, request)
