"""``mask_ste``: the masked weight forward, the whole gradient backward, in every compiler."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsedm_compiler.errors import MaskError, PatternError
from sparsedm_compiler.masks.mask_ste import mask_ste, mask_ste_op
from sparsedm_compiler.patterns import SharedNM
from tests.oracle import brute_mask


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def weights() -> dict[str, Tensor]:
    """Weights of every layout the op may meet."""
    torch.manual_seed(0)
    conv = torch.randn(4, 8, 3, 3)
    return {
        "linear": leaf(torch.randn(8, 16)),
        "conv": leaf(conv),
        "channels_last": leaf(conv.to(memory_format=torch.channels_last)),
        "conv1d": leaf(torch.randn(4, 8, 3)),
        "conv3d": leaf(torch.randn(4, 8, 1, 3, 2)),
        "transposed": leaf(torch.randn(16, 8).t()),
        "every_other": leaf(torch.randn(8, 32)[:, ::2]),
        "bfloat16": leaf(torch.randn(8, 16, dtype=torch.bfloat16)),
        "float16": leaf(torch.randn(8, 16, dtype=torch.float16)),
        "float64": leaf(torch.randn(8, 16, dtype=torch.float64)),
    }


@pytest.mark.parametrize("name", weights())
def test_mask_ste_forward_is_the_mask_times_the_weight(name: str) -> None:
    weight = weights()[name]
    before = weight.detach().clone()
    masked = mask_ste(weight, "2:4")
    assert torch.equal(masked, weight * brute_mask(weight, "2:4"))
    assert masked.dtype == weight.dtype
    assert torch.equal(weight, before)
    assert masked.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", weights())
def test_mask_ste_backward_passes_the_gradient_unchanged(name: str) -> None:
    weight = weights()[name]
    masked = mask_ste(weight, "2:4")
    grad = torch.randn_like(masked)
    masked.backward(grad)
    assert weight.grad is not None
    assert torch.equal(weight.grad, grad)


@pytest.mark.parametrize("name", weights())
@pytest.mark.parametrize("pattern", ["2:4", "1:8", "4:4", "1:4x2", "2:2:8", "1:2@2x4+2:4"])
def test_mask_ste_passes_opcheck(name: str, pattern: str) -> None:
    torch.library.opcheck(mask_ste_op, (weights()[name], pattern))


@pytest.mark.parametrize("name", weights())
def test_mask_ste_of_a_fake_tensor_has_the_real_strides_and_dtype(name: str) -> None:
    weight = weights()[name]
    real = mask_ste(weight, "2:4")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mask_ste(mode.from_tensor(weight), "2:4")
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    on_meta = mask_ste(torch.empty(8, 16, device="meta"), "2:4")
    assert on_meta.is_meta
    assert on_meta.shape == (8, 16)


def test_mask_ste_takes_a_pattern_or_its_text() -> None:
    weight = weights()["linear"]
    assert torch.equal(mask_ste(weight, SharedNM(1, 4, 2)), mask_ste(weight, "1:4x2"))


def test_mask_ste_in_a_layer_gives_the_gradient_of_the_masked_weight() -> None:
    """dL/dW = dL/d(m W) and dL/dx = dL/dy (m W), by hand."""
    torch.manual_seed(0)
    x, weight = torch.randn(5, 16, requires_grad=True), leaf(torch.randn(8, 16))
    F.linear(x, mask_ste(weight, "2:4")).square().sum().backward()
    masked = weight.detach() * brute_mask(weight, "2:4")
    y = x.detach() @ masked.t()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, (2 * y).t() @ x.detach())
    torch.testing.assert_close(x.grad, 2 * y @ masked)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mask_ste_under_autocast_keeps_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    weight = weights()["linear"]
    with torch.autocast("cpu", dtype):
        masked = mask_ste(weight, "2:4")
        out = F.linear(torch.randn(3, 16), masked)
    assert masked.dtype == torch.float32
    assert out.dtype == dtype
    out.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


class Masked(nn.Module):
    """A linear and a convolution, masked in their forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(8, 16), nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, mask_ste(self.linear.weight, "2:4"), self.linear.bias)
        grid = h.view(-1, 4, 2, 2)
        return F.conv2d(grid, mask_ste(self.conv.weight, "1:4"), self.conv.bias, padding=1)


@pytest.mark.parametrize(
    ("backend", "autocast"),
    [*product(["eager", "aot_eager"], [False, True]), ("inductor", False)],
)
def test_mask_ste_compiles_in_one_graph_with_eager_values(backend: str, autocast: bool) -> None:
    torch.manual_seed(0)
    model, x = Masked(), torch.randn(3, 8)
    results = []
    for run in (model, torch.compile(model, backend=backend, fullgraph=True)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = run(x)
        out.float().square().sum().backward()
        grads = {name: value.grad for name, value in model.named_parameters()}
        results.append((out, grads))
    # Inductor sums in another order than eager; nothing else may differ.
    tolerance = 1e-5 if backend == "inductor" else 0.0
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def test_mask_ste_raises_for_a_pattern_that_does_not_fit() -> None:
    for weight in (torch.randn(4, 6), torch.empty(4, 6, device="meta")):
        with pytest.raises(PatternError, match=r"'2:4' does not fit.*\[4, 6\]: input width 6"):
            mask_ste(weight, "2:4")
    with pytest.raises(PatternError, match="4:2"):
        mask_ste(torch.randn(4, 8), "4:2")


def test_mask_ste_of_nan_and_inf_keeps_them_or_gives_zero() -> None:
    """What is kept stays broken; what is pruned is zero, not 0 * inf."""
    weight = torch.tensor([[torch.nan, 1.0, torch.nan, torch.inf]])
    masked = mask_ste(weight, "2:4")
    assert masked.isnan().tolist() == [[True, False, True, False]]
    assert masked[0, 1::2].tolist() == [0.0, 0.0]


def test_mask_ste_when_a_dtype_has_no_mask_names_it() -> None:
    with pytest.raises(MaskError, match=r"is torch\.float8_e4m3fn .* a mask needs"):
        mask_ste(torch.ones(4, 4).to(torch.float8_e4m3fn), "2:4")
