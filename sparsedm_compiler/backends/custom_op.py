"""Registers sparse ops with torch: kernels by device, a fake, and a gradient for x."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl

from ..errors import KernelError

ACTS = ("none", "gelu", "gelu_tanh", "silu")
"""Activations a kernel can end with; their index is their code in act.h and vnm.cu."""

Op = Callable[..., Any]

_lib = torch.library.Library("sparsedm", "FRAGMENT")  # type: ignore[no-untyped-call]
_TAGS = (torch.Tag.needs_exact_strides,)


def register(
    name: str, arguments: str, runs: Mapping[str, Op], *, fake: Op, reference: Op
) -> Callable[..., Tensor]:
    """Registers the op ``sparsedm::name(Tensor x, Tensor packed, Tensor? bias, int rows, ...)``.

    Args:
        name: Name of the op in the namespace "sparsedm".
        arguments: Schema of the arguments behind ``rows``, such as "str act, int tile". None of
            them has a default, so that every function below gets all of them.
        runs: The functions that run it, by dispatch key ("CPU", "CUDA").
        fake: Returns an empty output of the right shape, strides and dtype.
        reference: The same product in ops that torch can differentiate. The gradient of x, which
            guidance needs, is that of it; a folded weight has none.

    Returns:
        The op, for calls and for FX graphs.
    """
    full = f"Tensor x, Tensor packed, Tensor? bias, int rows, {arguments}"

    def compute_x_gradient(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (x_grad,) = torch.autograd.grad(reference(x, *rest), x, grad)
        return lay_out_as(fake_gradient(grad, x), x_grad)

    def fake_gradient(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
        return torch.empty_like(x)

    op = register_without_gradient(name, full, runs, fake=fake)
    grad_op = register_without_gradient(
        f"{name}_grad",
        f"Tensor grad, {full}",
        {"CompositeExplicitAutograd": compute_x_gradient},
        fake=fake_gradient,
    )

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x_grad = grad_op(grad, *ctx.saved_tensors, *ctx.options)
        return (x_grad, *[None] * (2 + len(ctx.options)))

    overload: Any = op
    differentiate = make_autograd_impl(overload, Info(backward, _save_for_backward))

    def choose(keyset: torch.DispatchKeySet, x: Tensor, *rest: Any) -> Tensor:
        if type(x) is Tensor and not torch.is_grad_enabled() and _is_plain():
            run = runs.get(x.device.type.upper())
            if run is not None:  # what the dispatcher would call, at half the cost
                return run(x, *rest)  # type: ignore[no-any-return]
        return differentiate(keyset, x, *rest)  # type: ignore[no-any-return]

    _lib.impl(name, choose, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]
    return op


def register_without_gradient(
    name: str, schema: str, runs: Mapping[str, Op], *, fake: Op
) -> Callable[..., Tensor]:
    """Registers the op ``sparsedm::name`` for graphs that were captured without gradients.

    Args:
        name: Name of the op in the namespace "sparsedm".
        schema: Schema of all its arguments.
        runs: The functions that run it, by dispatch key.
        fake: Returns an empty output of the right shape, strides and dtype.

    Returns:
        The op, for calls and for FX graphs.
    """
    _lib.define(f"{name}({schema}) -> Tensor", tags=_TAGS)  # type: ignore[no-untyped-call]
    for key, run in runs.items():
        _lib.impl(name, run, key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"sparsedm::{name}", fake, lib=_lib)
    overload: Callable[..., Tensor] = getattr(torch.ops.sparsedm, name).default
    return overload


def lay_out_as(told: Tensor, out: Tensor) -> Tensor:
    """Returns ``out`` laid out as ``told``, an empty output of the fake: Inductor reads it so."""
    return out if out.stride() == told.stride() else told.copy_(out)


def _is_plain() -> bool:
    """Returns whether no mode or transform waits below the autograd key."""
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
    )


def fake_linear(x: Tensor, packed: Tensor, bias: Any, rows: int, *arguments: Any) -> Tensor:
    """Returns an empty output of a linear op: [..., rows], row-major."""
    return x.new_empty(*x.shape[:-1], rows)


def compute_conv_shape(x: Tensor, rows: int, *geometry: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of a conv2d's output; geometry: kernel, stride, padding, dilation."""
    sizes = zip(x.shape[2:], *geometry, strict=True)
    return (
        x.shape[0],
        rows,
        *((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes),
    )


def fake_conv2d(
    x: Tensor,
    packed: Tensor,
    bias: Any,
    rows: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *arguments: Any,
) -> Tensor:
    """Returns an empty output of a conv op: [N, rows, H', W'], channels_last if x is."""
    out = x.new_empty(compute_conv_shape(x, rows, kernel, stride, padding, dilation))
    return out.to(memory_format=torch.channels_last) if is_channels_last(x) else out


def apply_activation(x: Tensor, act: str) -> Tensor:
    """Returns the activation of that name (one of ACTS) of x."""
    if act == "none":
        return x
    if act == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")


def is_channels_last(x: Tensor) -> bool:
    """Returns whether x lies channels_last in memory, and not also row-major."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def check_bias(bias: Tensor | None, rows: int, dtype: torch.dtype) -> None:
    """Raises KernelError unless a bias is one value for each row, in that dtype or float32."""
    if bias is not None and (bias.shape != (rows,) or bias.dtype not in (dtype, torch.float32)):
        raise KernelError(
            f"a bias of {list(bias.shape)} in {bias.dtype} is not one value for each of "
            f"{rows} rows in {dtype} or float32"
        )


def cast_bias(x: Tensor, bias: Tensor | None) -> Tensor | None:
    """Returns the bias in the dtype of x."""
    return None if bias is None else bias.to(x.dtype)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]
