"""``attach``: makes a compiled model of diffusers save its config."""

from __future__ import annotations

from torch import nn

from ..compiler.recompile import find_compiled
from ..errors import ConfigError
from .config import SparseConfig
from .registration import import_private


def attach(model: nn.Module) -> None:
    """Makes ``save_pretrained`` of a compiled diffusers model write what ``from_pretrained`` reads.

    Models that ``from_pretrained`` compiled have this already. Without it, ``save_pretrained`` of
    a model that ``sparsedm_compiler.compile`` made saves the weights alone.

    Args:
        model: A diffusers model that was compiled.

    Raises:
        ConfigError: If ``model`` was not compiled, or does not come from diffusers.

    Example:
        >>> import sparsedm_compiler as sdm
        >>> from sparsedm_compiler.diffusers import attach
        >>> from diffusers import UNet2DModel
        >>> options = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
        >>> unet = UNet2DModel(8, block_out_channels=[8], norm_num_groups=4, **options)
        >>> student = sdm.compile(unet, "2:4")
        >>> attach(student)
        >>> str(student.config.quantization_config.config.pattern)
        '2:4'
    """
    forward = find_compiled(model)
    if forward is None or not isinstance(
        model, import_private("diffusers.models.modeling_utils", "ModelMixin")
    ):
        raise ConfigError(
            f"{type(model).__name__} is not a compiled model of diffusers; for others there is "
            "sparsedm_compiler.save"
        )
    from .quantizer import SparseQuantizer  # here, since it needs diffusers

    config = SparseConfig.from_compiled(forward)
    SparseQuantizer(config, pre_quantized=True).adopt(model)
