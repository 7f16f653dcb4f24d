"""The custom op ``sparsedm::block_train``: a product by blocks in training, x W^T + b.

W changes with every step, its blocks only where its mask does: so in every forward what it keeps is
gathered into the packed form of wgmma.cu, and into that of its transpose, by which the gradient of
x skips blocks as well. With a frozen mask the gradient of W is computed inside kept blocks alone;
the straight-through estimator wants all of it. On a CPU packed forms are unpacked, and products are
dense.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...patterns import BlockNM, Pattern
from ..cuda.device import find_device
from ..kernel_family import MatmulProblem
from .build import Tile, Use
from .format import choose_layout, pack, unpack
from .launch import launch_linear
from .launch_training import compute_weight_gradient, pack_transposed_weight, pack_weight
from .ops import align_rows, run_linear
from .transposed import (
    choose_transposed_layout,
    count_transposed_bytes,
    expand_blocks,
    find_blocks,
    pack_transposed,
    unpack_transposed,
    why_dense_gradient,
)

_TILES = (Tile(128, 3, raster=8), Tile(96, 3), Tile(64, 2))


@torch.library.custom_op("sparsedm::find_blocks", mutates_args=())
def _find_blocks(weight: Tensor, pattern: str) -> Tensor:
    return find_blocks(weight, parse_blocks(pattern))


@torch.library.custom_op("sparsedm::block_train", mutates_args=())
def _block_train(
    x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor, pattern: str, frozen: bool
) -> tuple[Tensor, Tensor]:
    """Returns x W^T + b, and the packed transpose of W; no bytes where that is not made."""
    parsed = parse_blocks(pattern)
    skips = why_dense_gradient(parsed) is None
    back = x.new_empty(0, dtype=torch.uint8)
    if not x.is_cuda:
        rows, cols = weight.shape
        packed = pack(weight.to(x.dtype), expand_blocks(blocks, parsed), parsed)
        if skips:
            back = pack_transposed(weight, blocks, parsed, x.dtype)
        dense = unpack(packed, rows, cols, parsed, x.dtype)
        return _multiply_exactly(x, dense.t(), bias), back
    weight = weight.contiguous()
    packed = pack_weight(weight, blocks, parsed, x.dtype)
    if skips:
        back = pack_transposed_weight(weight, blocks, parsed, x.dtype)
    rows = weight.shape[0]
    tile = choose_tile(x.shape[:-1].numel(), rows)
    setting = [tile.tokens, tile.groups, tile.slices, tile.raster]
    return run_linear(x, packed, bias, rows, "none", pattern, setting), back


@torch.library.custom_op("sparsedm::block_train_x_grad", mutates_args=())
def _compute_x_gradient(
    grad: Tensor, weight: Tensor, blocks: Tensor, back: Tensor, pattern: str, frozen: bool
) -> Tensor:
    """Returns the gradient of x: grad [..., rows] -> [..., cols]."""
    rows, cols = weight.shape
    if not back.numel():
        kept = weight
        if frozen:  # else it is masked; what a frozen mask prunes may have been written to
            kept = torch.where(expand_blocks(blocks, parse_blocks(pattern)), weight, 0)
        dense = kept.to(grad.dtype)
        return _multiply_exactly(grad, dense, None) if not grad.is_cuda else grad @ dense
    if not grad.is_cuda:
        return _multiply_exactly(grad, unpack_transposed(back, rows, cols, grad.dtype), None)
    out = grad.new_empty(*grad.shape[:-1], cols)
    if out.numel():
        flat = align_rows(grad.reshape(-1, rows))
        layout = choose_transposed_layout(rows, cols)
        tile = choose_tile(len(flat), cols)
        launch_linear(flat, back, None, out.view(-1, cols), layout, tile, "none")
    return out


@torch.library.custom_op("sparsedm::block_train_w_grad", mutates_args=())
def _compute_w_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, blocks: Tensor, pattern: str, frozen: bool
) -> Tensor:
    """Returns the gradient of the weight, zero in pruned blocks where the mask is frozen."""
    grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    if not frozen:
        dense = grad.t() @ x if grad.is_cuda else _multiply_exactly(grad.t(), x, None)
        return dense.to(weight.dtype)
    parsed = parse_blocks(pattern)
    if not grad.is_cuda:
        with torch.autocast("cpu", enabled=False):
            sums = grad.t().float() @ x.float()
        return torch.where(expand_blocks(blocks, parsed), sums, 0).to(weight.dtype)
    sums = compute_weight_gradient(align_rows(grad), align_rows(x), blocks, parsed)
    return sums.to(weight.dtype)


def _multiply_exactly(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Returns x matrix + b on a CPU: sums in float32, rounded once."""
    with torch.autocast("cpu", enabled=False):
        weight = matrix.t().float()
        sums = F.linear(x.float(), weight, None if bias is None else bias.float())
    return sums.to(x.dtype)


@_find_blocks.register_fake
def _fake_blocks(weight: Tensor, pattern: str) -> Tensor:
    parsed, (rows, cols) = parse_blocks(pattern), weight.shape
    shape = rows // parsed.rows, cols // parsed.width, parsed.n
    return weight.new_empty(shape, dtype=torch.int32)


@_block_train.register_fake
def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor, pattern: str, frozen: bool
) -> tuple[Tensor, Tensor]:
    rows, cols = weight.shape
    skips = why_dense_gradient(parse_blocks(pattern)) is None
    size = count_transposed_bytes(rows, cols) if skips else 0
    return x.new_empty(*x.shape[:-1], rows), x.new_empty(size, dtype=torch.uint8)


@_compute_x_gradient.register_fake
def _fake_x_gradient(
    grad: Tensor, weight: Tensor, blocks: Tensor, back: Tensor, pattern: str, frozen: bool
) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


@_compute_w_gradient.register_fake
def _fake_w_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, blocks: Tensor, pattern: str, frozen: bool
) -> Tensor:
    return weight.new_empty(weight.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, blocks, ctx.pattern, ctx.frozen = inputs
    ctx.save_for_backward(x, weight, blocks, output[1])
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, weight, blocks, back = ctx.saved_tensors
    x_grad = w_grad = b_grad = None
    if ctx.needs_input_grad[0]:
        x_grad = block_train_x_grad_op(grad, weight, blocks, back, ctx.pattern, ctx.frozen)
    if ctx.needs_input_grad[1]:
        w_grad = block_train_w_grad_op(grad, x, weight, blocks, ctx.pattern, ctx.frozen)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        sums = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32)
        b_grad = sums.to(ctx.bias_dtype)
    return x_grad, w_grad, b_grad, None, None, None


_block_train.register_autograd(_backward, setup_context=_save_for_backward)

find_blocks_op = torch.ops.sparsedm.find_blocks.default
block_train_op = torch.ops.sparsedm.block_train.default
block_train_x_grad_op = torch.ops.sparsedm.block_train_x_grad.default
block_train_w_grad_op = torch.ops.sparsedm.block_train_w_grad.default


def multiply_blocks(
    x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor, pattern: str, frozen: bool
) -> Tensor:
    """Returns x W^T + b by the blocks that W keeps, with its gradients.

    Args:
        x: [..., cols] in half precision.
        weight: [rows, cols] in any float dtype; masked, unless ``frozen``.
        bias: [rows], or None.
        blocks: What ``find_blocks_op`` gives.
        pattern: The pattern as text.
        frozen: Whether the weight's gradient is wanted in kept blocks alone.
    """
    out: Tensor = block_train_op(x, weight, bias, blocks, pattern, frozen)[0]
    return out


def parse_blocks(text: str) -> BlockNM:
    """Returns the block pattern of a text."""
    pattern = Pattern.parse(text)
    assert isinstance(pattern, BlockNM)
    return pattern


def list_builds(pattern: Pattern, problem: MatmulProblem, shape: tuple[int, int]) -> list[Use]:
    """Returns the kernels that a product by a weight [rows, cols] needs, and its gradient of x."""
    assert isinstance(pattern, BlockNM)
    (rows, cols), tokens = shape, prod(problem.inputs[:-1])
    layout, tile = choose_layout(pattern, rows, cols), choose_tile(tokens, rows)
    builds = [(layout, tile, problem.dtype, "none")]
    if why_dense_gradient(pattern) is None:
        layout, tile = choose_transposed_layout(rows, cols), choose_tile(tokens, cols)
        builds.append((layout, tile, problem.dtype, "none"))
    return builds


@lru_cache(maxsize=1024)
def choose_tile(tokens: int, rows: int) -> Tile:
    """Returns the tile that leaves a device's multiprocessors idle least, the largest first."""
    device = find_device()
    multiprocessors = 132 if device is None else device.multiprocessors

    def count_work(tile: Tile) -> float:
        tiles = ceil(tokens / tile.tokens) * ceil(rows / tile.rows)
        return ceil(tiles / multiprocessors) * tile.tokens * (tile.groups + 0.2)

    return min(_TILES, key=count_work)
