"""The ops as torch sees them: schema, fake, gradient, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparsedm_compiler.backends.cpu.ops import nm_conv2d_op, nm_linear_op
from tests.backends.cpu.cases import case
from tests.oracle import assert_same

FORMS = (torch.contiguous_format, torch.channels_last)
GEOMETRY = ([3, 3], [2, 1], [1, 0], [1, 2])


def linear_arguments(act: str = "gelu") -> tuple[object, ...]:
    held = case("2:4", 8, 20, torch.float32)
    x = torch.randn(3, 5, 32, requires_grad=True)
    return x, held.packed, torch.randn(20), 20, act, 4


def conv_arguments(form: torch.memory_format, act: str = "silu") -> tuple[object, ...]:
    held = case("2:4", 2, 12, torch.float32, (3, 3))
    x = torch.randn(2, 8, 9, 11).to(memory_format=form).requires_grad_()
    return x, held.packed, None, 12, *GEOMETRY, act, 4


def test_opcheck_of_linear() -> None:
    torch.library.opcheck(nm_linear_op, linear_arguments())


@pytest.mark.parametrize("form", FORMS)
def test_opcheck_of_conv2d(form: torch.memory_format) -> None:
    torch.library.opcheck(nm_conv2d_op, conv_arguments(form))


def test_gradient_of_x_is_that_of_the_dense_op() -> None:
    torch.manual_seed(0)
    held, x = case("1:4", 8, 20, torch.float32), torch.randn(3, 5, 32, requires_grad=True)
    bias = torch.randn(20)
    out = nm_linear_op(x, held.packed, bias, 20, "gelu_tanh", 4)
    expected = F.gelu(F.linear(x, held.masked, bias), approximate="tanh")
    weights = torch.randn_like(out)
    (ours,) = torch.autograd.grad(out, x, weights)
    (theirs,) = torch.autograd.grad(expected, x, weights)
    assert_same(ours, theirs)
    held = case("1:4", 2, 12, torch.float32, (3, 3))
    image = torch.randn(2, 8, 9, 11, requires_grad=True)
    out = nm_conv2d_op(image, held.packed, None, 12, *GEOMETRY, "none", 4)
    expected = F.conv2d(image, held.masked, None, *GEOMETRY[1:])
    weights = torch.randn_like(out)
    (ours,) = torch.autograd.grad(out, image, weights)
    (theirs,) = torch.autograd.grad(expected, image, weights)
    assert_same(ours, theirs, tolerance=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_ops_under_a_compiler_give_the_same(backend: str) -> None:
    first = case("2:4", 8, 32, torch.float32)
    second = case("2:4", 8, 16, torch.float32, (3, 3))

    def run(x: Tensor) -> Tensor:
        y = nm_linear_op(x.transpose(-1, -2) * 2, first.packed, None, 32, "silu", 4)
        y = y.transpose(-1, -2).reshape(2, 32, 4, 4)
        ones = [1, 1]
        return nm_conv2d_op(y, second.packed, None, 16, [3, 3], ones, ones, ones, "none", 4) + 1

    compiled = torch.compile(run, backend=backend, fullgraph=True)
    x, weights = torch.randn(2, 32, 16), torch.randn(2, 16, 4, 4)
    with torch.no_grad():
        assert_same(compiled(x), run(x), tolerance=1e-6)
    x.requires_grad_()
    ours, theirs = (torch.autograd.grad(f(x), x, weights) for f in (compiled, run))
    assert_same(*ours, *theirs, tolerance=1e-6)


def test_op_when_a_mode_or_a_transform_waits_goes_through_the_dispatcher() -> None:
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    x, *rest = linear_arguments()
    with torch.no_grad():
        plain = nm_linear_op(x, *rest)
        with Recorder():
            recorded = nm_linear_op(x, *rest)
        assert seen == [nm_linear_op]
        assert_same(recorded, plain)
        assert_same(torch.vmap(lambda row: nm_linear_op(row, *rest))(x), plain)
    x.requires_grad_(False)
    assert_same(nm_linear_op(x, *rest), plain)


def test_linear_when_x_is_no_solid_block_is_that_of_its_copy() -> None:
    _, *rest = linear_arguments()
    wide = torch.randn(5, 3, 40)
    with torch.no_grad():
        for x in (
            wide[..., :32],
            wide.transpose(0, 1)[..., :32],
            wide[::2, :, 4:36],
            wide[:0, :, :32],
        ):
            assert_same(nm_linear_op(x, *rest), nm_linear_op(x.contiguous(), *rest))
        turned = torch.randn(32, 6).t()
        assert_same(nm_linear_op(turned, *rest), nm_linear_op(turned.contiguous(), *rest))
        assert nm_linear_op(torch.randn(32), *rest).shape == (20,)
