"""Dense models with as many MACs as a masked one: Diff-Pruning of the teacher, or a narrow U-ViT.

MACs are those of convolutions and linear layers, as ``count_macs`` has them, attention apart. A
size is the nearest there is to the MACs of the pattern: the kept share of channels for
"diff-pruning" (see structural.py), a width that is a multiple of the heads for "narrow" and
"narrow-long" (at a quarter of the MACs, half the teacher's). A narrow model starts from random
weights: "narrow" sees a student's images, "narrow-long" the teacher's as well, by its recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.models import UViT

from .plan import Study
from .setting import Setting
from .structural import STEPS, compute_gradients, prune_channels


def make_smaller_model(study: Study, setting: Setting, teacher: UViT) -> UViT:
    """Returns the dense model that a setting of ``SMALLER`` trains."""
    inputs = study.make_inputs()
    target = sdm.count_macs(teacher, *inputs, pattern=setting.pattern).sparse
    if setting.method != "diff-pruning":
        heads = teacher.config.num_heads
        widths = range(heads, teacher.config.embed_dim + 1, heads)
        width = find_nearest(
            lambda width: count_macs(study.make_model(width), inputs), widths, target
        )
        torch.manual_seed(setting.seed)
        return study.make_model(width)
    gradients, _ = compute_gradients(teacher, study.open_training_data(), setting.seed)
    kept = find_nearest(
        lambda kept: count_macs(prune_channels(teacher, gradients, kept, inputs), inputs),
        range(STEPS // teacher.config.num_heads, STEPS + 1),
        target,
    )
    return prune_channels(teacher, gradients, kept, inputs)


def count_macs(model: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Returns the MACs of the linear layers and convolutions of a model, as they are called."""
    total = 0

    def add(layer: nn.Module, _: tuple[Any, ...], out: Tensor) -> None:
        nonlocal total
        total += layer.weight.numel() * out.numel() // layer.weight.shape[0]

    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    handles = [layer.register_forward_hook(add) for layer in layers]
    with torch.no_grad():
        model(*inputs)
    for handle in handles:
        handle.remove()
    return total


def find_nearest(count: Callable[[int], int], sizes: Sequence[int], target: int) -> int:
    """Returns the size whose count is nearest to ``target``; counts must not fall with the size.

    >>> find_nearest(lambda size: size * size, range(1, 100), 40)
    6
    """
    low, high = 0, len(sizes) - 1
    while low < high:
        middle = (low + high) // 2
        if count(sizes[middle]) < target:
            low = middle + 1
        else:
            high = middle
    near = sizes[max(0, low - 1) : low + 1]
    return min(near, key=lambda size: abs(count(size) - target))
