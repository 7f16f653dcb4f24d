"""How a sparse op is made known to torch: kernels by device, a fake, and a gradient for x."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ACTS = ("none", "gelu", "gelu_tanh", "silu")
"""Activations a kernel can end with; their place is their code in act.h and vnm.cu."""

Op = Callable[..., Any]

_lib = torch.library.Library("sparsedm", "FRAGMENT")  # type: ignore[no-untyped-call]
_TAGS = (torch.Tag.needs_exact_strides,)


def register(
    name: str, arguments: str, runs: Mapping[str, Op], *, fake: Op, reference: Op
) -> Callable[..., Tensor]:
    """The op ``sparsedm::name(Tensor x, Tensor packed, Tensor? bias, int rows, arguments)``.

    ``runs``: what runs it, by dispatch key ("CPU", "CUDA"). ``reference``: the same in ops that
    torch can differentiate; the gradient of x, which guidance asks for, is that of it. A folded
    weight has none.
    """
    full = f"Tensor x, Tensor packed, Tensor? bias, int rows, {arguments}"
    _lib.define(f"{name}({full}) -> Tensor", tags=_TAGS)  # type: ignore[no-untyped-call]
    _lib.define(f"{name}_grad(Tensor grad, {full}) -> Tensor", tags=_TAGS)  # type: ignore[no-untyped-call]
    for key, run in runs.items():
        _lib.impl(name, run, key)  # type: ignore[no-untyped-call]

    def x_gradient(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (found,) = torch.autograd.grad(reference(x, *rest), x, grad)
        return found

    _lib.impl(f"{name}_grad", x_gradient, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"sparsedm::{name}", fake, lib=_lib)
    torch.library.register_fake(
        f"sparsedm::{name}_grad", lambda grad, x, *_: torch.empty_like(x), lib=_lib
    )
    grad_op = getattr(torch.ops.sparsedm, f"{name}_grad").default

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        found = grad_op(grad, *ctx.saved_tensors, *ctx.options)
        return (found, *[None] * (2 + len(ctx.options)))

    torch.library.register_autograd(f"sparsedm::{name}", backward, setup_context=_setup, lib=_lib)
    op: Callable[..., Tensor] = getattr(torch.ops.sparsedm, name).default
    return op


def fake_linear(x: Tensor, packed: Tensor, bias: Any, rows: int, *how: Any) -> Tensor:
    """The shape of a linear op's output: [..., rows], row-major."""
    return x.new_empty(*x.shape[:-1], rows)


def conv_shape(x: Tensor, rows: int, *geometry: Sequence[int]) -> tuple[int, ...]:
    """The shape of a conv2d's output; ``geometry``: kernel, stride, padding, dilation."""
    sizes = zip(x.shape[2:], *geometry, strict=True)
    return (
        x.shape[0],
        rows,
        *((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes),
    )


def fake_conv2d(x: Tensor, packed: Tensor, bias: Any, rows: int, *how: Any) -> Tensor:
    """The shape of a conv op's output: [N, rows, H', W'], channels_last if x is."""
    out = x.new_empty(conv_shape(x, rows, *how[:4]))
    return out.to(memory_format=torch.channels_last) if is_channels_last(x) else out


def activate(x: Tensor, act: str) -> Tensor:
    """The activation of that name (ACTS)."""
    if act == "none":
        return x
    if act == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")


def is_channels_last(x: Tensor) -> bool:
    """Whether x lies channels_last in memory, and not also as usual."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def like(x: Tensor, bias: Tensor | None) -> Tensor | None:
    """The bias in the dtype of x."""
    return None if bias is None else bias.to(x.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]
