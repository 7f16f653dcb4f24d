"""What an op returns lies in memory as its fake says: Inductor reads it by those strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparsedm_compiler.backends.cpu import norm_conv
from sparsedm_compiler.backends.cpu import ops as cpu_ops
from sparsedm_compiler.backends.kernel_family import KernelFamily
from sparsedm_compiler.backends.kernel_values import MatmulProblem, WeightFormat
from sparsedm_compiler.backends.registry import find_family, list_families
from sparsedm_compiler.errors import PackError
from sparsedm_compiler.masks.held_mask import hold_mask_op, soft_threshold_op
from sparsedm_compiler.masks.mask_ste import mask_ste_op
from sparsedm_compiler.masks.nm_mask import nm_mask
from sparsedm_compiler.patterns import Pattern
from tests.backends.cpu.cases import case

ROWS = COLS = 128
PATTERNS = ("1:4", "2:4", "1:8x16", "64:2:8", "1:2@64x16", "1:2@128x64+2:4")
Layout = Callable[[Tensor], Tensor]
TOKENS: dict[str, Layout] = {
    "rows": lambda x: x,
    "planes": lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1),
    "features first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "tokens first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "cut": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "expanded": lambda x: x[:1].expand_as(x),
}
IMAGES: dict[str, Layout] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "turned": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "cut": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
}


def strides_of(op: Any, *args: Any) -> tuple[tuple[int, ...], ...]:
    out = op(*args)
    parts = out if isinstance(out, tuple) else (out,)
    return tuple(
        tuple(s for size, s in zip(part.shape, part.stride(), strict=True) if size > 1)
        for part in parts
    )


def assert_lies_as_its_fake(op: Any, *args: Any) -> None:
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args]
    with mode:
        told = strides_of(op, *fakes)
    assert strides_of(op, *args) == told, op


class Recorder(TorchDispatchMode):
    """A mode that keeps the calls of our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "sparsedm":
            self.calls.append((func, args, out))
        return out


@pytest.mark.parametrize("size", [(), (1, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("family", list_families(), ids=lambda family: family.names[0])
def test_output_and_gradient_of_every_family_lie_as_their_fakes(
    family: KernelFamily, size: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    device = "cpu" if family.why_unavailable() is not None else family.device
    checked = 0
    for text in PATTERNS:
        pattern = family.find_accepted(Pattern.parse(text))
        for dtype in (torch.float32, torch.bfloat16):
            weight = torch.randn(ROWS, COLS, *size).to(device, dtype)
            matrix = ROWS, COLS * weight[0, 0].numel()
            if pattern is None or family.why_refused(pattern, *matrix, dtype) is not None:
                continue
            images = torch.randn(2, COLS, 4, 6).to(device, dtype)
            x = images if size else images.flatten(2).mT.contiguous()
            for name, layout in (IMAGES if size else TOKENS).items():
                laid = layout(x)
                geometry = [size, (1, 1), (0, 0), (1, 1)] if size else []
                last = name == "channels_last"
                problem = MatmulProblem(tuple(x.shape), dtype, last, *geometry)
                checked += check_family(family, problem, pattern, weight, laid)
    if size == ():
        assert checked
    if family.device == "cpu":
        assert checked > 20


def check_family(
    family: KernelFamily, problem: MatmulProblem, pattern: Pattern, weight: Tensor, x: Tensor
) -> int:
    """The number of gradients checked."""
    mask = nm_mask(weight, pattern)
    checked = 0
    for kernel in family.list_candidates(pattern, problem.dtype)[:2]:
        try:
            packed = family.pack(weight, mask, pattern, kernel)
        except PackError:
            continue
        weight_format = WeightFormat(pattern, kernel.layout)
        op, arguments = family.call(problem, weight_format, kernel.tile)
        with Recorder() as recorder:
            op(x, packed, torch.randn(ROWS).to(x), ROWS, **arguments)
        for called, args, out in recorder.calls:
            assert_lies_as_its_fake(called, *args)
            gradient = getattr(torch.ops.sparsedm, called._schema.name[10:] + "_grad", None)
            if gradient is not None:
                assert_lies_as_its_fake(gradient.default, torch.ones_like(out), *args)
                checked += 1
    return checked


@pytest.mark.parametrize("size", [(), (1, 1), (3, 3)], ids=str)
def test_output_where_no_kernel_can_be_built_lies_as_its_fake(
    size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a file from elsewhere runs there."""
    for module in (cpu_ops, norm_conv):
        monkeypatch.setattr(module, "why_unavailable", lambda: "there is no compiler")
    pattern, weight = Pattern.parse("2:4"), torch.randn(ROWS, COLS, *size)
    images = torch.randn(2, COLS, 4, 6)
    x = images if size else images.flatten(2).mT.contiguous()
    geometry = [size, (1, 1), (0, 0), (1, 1)] if size else []
    for name, layout in (IMAGES if size else TOKENS).items():
        problem = MatmulProblem(tuple(x.shape), x.dtype, name == "channels_last", *geometry)
        assert check_family(find_family("cpu_free"), problem, pattern, weight, layout(x))


@pytest.mark.parametrize("there", [True, False], ids=["kernel", "no kernel"])
@pytest.mark.parametrize("layout", IMAGES)
def test_convolution_behind_a_norm_lies_as_its_fake(
    layout: str, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, x = case("2:4", 2, 12, torch.float32, (3, 3)), torch.randn(2, 8, 9, 11)
    if not there:
        monkeypatch.setattr(norm_conv, "why_unavailable", lambda: "there is no compiler")
    norm, ones = (None, torch.ones(8), None, 4, 1e-5, "silu"), [1, 1]
    args = (IMAGES[layout](x), held.packed, None, 12, *norm, [3, 3], ones, ones, ones, "none", 4)
    assert_lies_as_its_fake(norm_conv.nm_norm_conv2d_op, *args)


@pytest.mark.parametrize("pattern", ["2:4", "1:4x4", "1:2@8x8"])
def test_masked_weights_lie_as_their_fakes(pattern: str) -> None:
    weight = torch.randn(16, 16, 3, 3)
    for laid in (
        *(weight, weight.contiguous(memory_format=torch.channels_last), weight.transpose(0, 1)),
        *(weight[..., 0, 0].mT, weight[:8], weight[:, :1, 0, 0].expand(16, 16)),
    ):
        mask = nm_mask(laid, Pattern.parse(pattern))
        assert_lies_as_its_fake(mask_ste_op, laid, pattern)
        assert_lies_as_its_fake(hold_mask_op, laid, mask)
        if ":" in pattern and "@" not in pattern:
            assert_lies_as_its_fake(soft_threshold_op, laid, torch.ones(()), "2:4")
