"""Diff-Pruning (Fang et al. 2023) of a U-ViT: whole channels go, by Taylor importance over time.

A weight counts ``|w * sum of dL_t/dw over the timesteps t with L_t > 0.05 max L|``: the paper's
first-order expansion, with its threshold on the relative loss, which leaves out the late, nearly
solved steps. The sum over all weights of a channel, over all layers that share it, ranks the
channels of a group, and the same share of every group is kept. torch-pruning (optional) finds the
groups: the token width of each of the three residual streams that ``skip_linear`` cuts, the hidden
width of every MLP, and the width of the heads of every attention, the same positions in query, key
and value; the number of heads stays. Logits keep their scale.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsedm_compiler.data import ImageData
from sparsedm_compiler.diffusion import generator_at
from sparsedm_compiler.diffusion.objective import make_objective
from sparsedm_compiler.errors import ConfigError
from sparsedm_compiler.models import UViT
from sparsedm_compiler.models.uvit import Block

THRESHOLD = 0.05
LEVELS, IMAGES = 50, 64
"""Timesteps, spread evenly over the 1000, and the images that every one of them sees."""
STEPS = 384
"""The kept share of every group is one of so many parts."""

Gradients = Mapping[str, Tensor]


class SplitBlock(nn.Module):
    """A block whose ``skip_linear`` is two layers, one for each half of the concatenation.

    torch-pruning follows a channel through a concatenation once, but the channels of a stream come
    to this one twice, as the block's input and as its skip.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        assert block.skip_linear is not None
        self.block = block
        weights = block.skip_linear.weight.chunk(2, dim=1)
        self.straight, self.skip = (make_linear(weight) for weight in weights)
        self.straight.bias = block.skip_linear.bias
        block.skip_linear = None

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        out: Tensor = self.block(self.straight(x) + self.skip(skip))
        return out

    def join(self) -> Block:
        """Returns the block, with one layer again."""
        self.block.skip_linear = make_linear(
            torch.cat([self.straight.weight, self.skip.weight], dim=1)
        )
        self.block.skip_linear.bias = self.straight.bias
        return self.block


def make_linear(weight: Tensor) -> nn.Linear:
    """Returns a layer of that weight [out, in] without a bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.detach().clone())
    return layer


def compute_gradients(model: UViT, data: ImageData, seed: int) -> tuple[dict[str, Tensor], int]:
    """Returns the sum of the gradients over the timesteps above the threshold, and their number."""
    x0, labels = data.fetch(range(min(IMAGES, len(data))))
    noise = torch.randn(x0.shape, generator=generator_at(seed, "diff-pruning"))
    device = model.pos_embed.device
    x0, labels, noise = x0.to(device), labels.to(device), noise.to(device)
    prepare = make_objective("eps").prepare

    def compute_loss(level: int) -> Tensor:
        u = torch.full((len(x0),), level / LEVELS, dtype=torch.float64, device=device)
        x, t, target = prepare(x0, noise, u)
        return F.mse_loss(model(x, t.float(), labels), target)

    with torch.no_grad():
        losses = [compute_loss(level).item() for level in range(LEVELS)]
    kept = [level for level in range(LEVELS) if losses[level] > THRESHOLD * max(losses)]
    model.zero_grad()
    for level in kept:
        compute_loss(level).backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    return gradients, len(kept)


def prune_channels(model: UViT, gradients: Gradients, kept: int, inputs: tuple[Any, ...]) -> UViT:
    """Returns a copy that keeps ``kept`` of every ``STEPS`` channels.

    ``inputs``: of one forward. Raises ConfigError where torch-pruning is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own imports
            import torch_pruning
    except ModuleNotFoundError as error:
        raise ConfigError(
            'Diff-Pruning needs torch-pruning: pip install "sparsedm-compiler[structural]"'
        ) from error
    pruned = copy.deepcopy(model)
    for name, gradient in gradients.items():
        pruned.get_parameter(name).grad = gradient.clone()
    split = split_skips(pruned)
    blocks = list_blocks(pruned)
    before = [block.attn.qkv.out_features for block in blocks]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensors that are no layer's, which are named below
        pruner = torch_pruning.pruner.BasePruner(
            pruned,
            inputs,
            importance=torch_pruning.importance.GroupTaylorImportance(),
            pruning_ratio=1 - kept / STEPS,
            num_heads={block.attn.qkv: block.attn.num_heads for block in blocks},
            ignored_layers=[
                pruned.decoder_pred,
                *([pruned.final_layer] if pruned.final_layer else []),
            ],
            unwrapped_parameters=[(pruned.pos_embed, 2)],
        )
        pruner.step()
    for index, block in split.items():
        pruned.out_blocks[index] = block.join()
    for block, width in zip(blocks, before, strict=True):
        keep_scale(block, width)
    pruned.zero_grad()
    return pruned


def split_skips(model: UViT) -> dict[int, SplitBlock]:
    """Puts a SplitBlock in the place of every block with a skip; returns them by number."""
    split = {}
    for index, block in enumerate(model.out_blocks):
        if block.skip_linear is not None:
            gradient = block.skip_linear.weight.grad
            split[index] = SplitBlock(block)
            if gradient is not None:
                halves = gradient.chunk(2, dim=1)
                split[index].straight.weight.grad, split[index].skip.weight.grad = halves
            model.out_blocks[index] = split[index]
    return split


def list_blocks(model: UViT) -> list[Block]:
    """Returns all blocks of a model, split or not."""
    return [module for module in model.modules() if isinstance(module, Block)]


@torch.no_grad()
def keep_scale(block: Block, width: int) -> None:
    """Scales the queries so that logits are divided by the root of the former width of a head.

    ``width``: of ``qkv`` before it was pruned.
    """
    qkv = block.attn.qkv
    factor = math.sqrt(qkv.out_features / width)
    rows = qkv.out_features // 3
    for tensor in (qkv.weight, qkv.bias):
        if tensor is not None:
            tensor[:rows] *= factor
