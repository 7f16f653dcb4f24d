"""The custom op ``sparsedm::semi_train``: a 2:4 product in training, x W^T + b with W masked anew.

W changes with every step, so it is compressed in every forward, and, where its mask is transposable
(Hubara et al. 2021), its transpose in every backward, so that the gradient of x is a 2:4 product,
too. The gradient of W is dense, as the straight-through estimator wants it. On a CPU it is dense.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cuda.token_padding import align, apply_to_tokens
from ..custom_op import fake_linear
from .ops import DEFAULT, TOKENS, multiply


@torch.library.custom_op("sparsedm::semi_train", mutates_args=())
def _semi_train(x: Tensor, weight: Tensor, bias: Tensor | None, transposable: bool) -> Tensor:
    if not x.is_cuda:
        return F.linear(x, weight, bias)
    bias = None if bias is None else align(bias)
    return _multiply(x, weight, bias)


@torch.library.custom_op("sparsedm::semi_train_grad", mutates_args=())
def _compute_x_gradient(grad: Tensor, weight: Tensor, transposable: bool) -> Tensor:
    """Returns the gradient of x: grad [..., rows] -> [..., cols]."""
    if not grad.is_cuda or not transposable:
        return grad @ weight
    return _multiply(grad, weight.t(), None)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns x weight^T + bias; weight: [rows, cols], at most 2 of every 4 columns not zero."""
    packed = torch._cslt_compress(weight.contiguous())
    return apply_to_tokens(
        x, len(weight), TOKENS, lambda flat: multiply(packed, flat, bias, DEFAULT)
    )


@_semi_train.register_fake
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, transposable: bool) -> Tensor:
    return fake_linear(x, weight, bias, weight.shape[0])


@_compute_x_gradient.register_fake
def _fake_gradient(grad: Tensor, weight: Tensor, transposable: bool) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.transposable = inputs
    ctx.save_for_backward(x, weight)
    ctx.biased = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    x_grad = w_grad = b_grad = None
    rows = grad.reshape(-1, grad.shape[-1])
    if ctx.needs_input_grad[0]:
        x_grad = semi_train_grad_op(grad, weight, ctx.transposable)
    if ctx.needs_input_grad[1]:
        w_grad = rows.t() @ x.reshape(-1, x.shape[-1])
    if ctx.biased and ctx.needs_input_grad[2]:
        b_grad = rows.sum(0)
    return x_grad, w_grad, b_grad, None


_semi_train.register_autograd(_backward, setup_context=_save_for_backward)

semi_train_op = torch.ops.sparsedm.semi_train.default
semi_train_grad_op = torch.ops.sparsedm.semi_train_grad.default
