"""Sparse products of training: asked for by kernels=, the gradients those of the masked model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.backends.cusparselt.training import semi_train_grad_op, semi_train_op
from sparsedm_compiler.masks.nm_mask import apply_mask, nm_mask
from tests.backends.cuda.devices import device as device
from tests.oracle import assert_gradients, assert_same, oracle_of

BF16 = torch.bfloat16


class Net(nn.Module):
    """Linear layers, one of them used twice, one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 16)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            x = x + self.down(torch.nn.functional.gelu(self.up(x)))
        return self.last(x)


def student_of(device: str, pattern: str, backend: str = "eager", **kernels: str) -> nn.Module:
    net = Net().to(device)
    return sdm.compile(net, pattern, backend=backend, kernels=kernels or {"*": "sparse"})


def targets(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The ops of the graphs that are compiled from now on."""
    seen: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.extend(node.target for node in gm.graph.nodes)
        return gm

    monkeypatch.setattr(
        "sparsedm_compiler.compiler.inner_backend.resolve_backend", lambda name: backend
    )
    monkeypatch.setattr(
        "sparsedm_compiler.compiler.inner_backend.lookup_backend", lambda found: found
    )
    return seen


@pytest.mark.parametrize("pattern", ["2:4", "2:4t", "1:4t", "1:2@16x16+2:4"])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_semi_train_gradients_match_the_masked_model(
    device: str, pattern: str, backend: str
) -> None:
    student = student_of(device, pattern, backend)
    x = torch.randn(3, 5, 16, device=device)
    with torch.autocast(device, BF16):
        student(x)
        # Products round to bfloat16 in another order than the oracle's.
        assert_gradients(student, oracle_of(student), ((x,), {}), tolerance=0.1)
    found = {choice.weight: choice for choice in sdm.explain(student).choices}
    assert {choice.kernel for choice in found.values()} == {"cuda_semi"}
    assert ("is dense" in found["up.weight"].reason) == (not pattern.endswith("t"))
    assert "cuda_semi" in str(sdm.explain(student))


def test_training_with_kernels_option_runs_the_sparse_product(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = targets(monkeypatch)
    student = student_of(device, "2:4t", **{"up": "cuda_semi"})
    with torch.autocast(device, BF16):
        student(torch.randn(3, 16, device=device))
    assert seen.count(semi_train_op) == 2  # the layer is used twice
    assert [choice.weight for choice in sdm.explain(student).choices] == ["up.weight"]


def test_training_where_no_kernel_fits_shows_the_reason(device: str) -> None:
    x = torch.randn(3, 16, device=device)
    for pattern, kernels, said in (
        ("2:4", {}, "no 2:4 kernel for float32"),
        ("3:4", {}, "keeps up to 3 of 4 columns"),
        (
            "2:4",
            {"*": "cuda_vnm"},
            "'cuda_vnm' does not run in training, 'cuda_block' and 'cuda_semi' do",
        ),
    ):
        student = student_of(device, pattern, **kernels)
        with torch.autocast(device, BF16, enabled=pattern != "2:4"):
            out = student(x)
            assert_same(out, oracle_of(student)(x))
        choices = sdm.explain(student).choices
        assert {choice.kernel for choice in choices} == {"dense"}
        assert all(said in choice.reason for choice in choices)


def test_training_without_kernels_option_stays_dense_and_unexplained(device: str) -> None:
    student = sdm.compile(Net().to(device), "2:4", backend="eager")
    student(torch.randn(3, 16, device=device))
    assert sdm.explain(student).choices == ()


def test_training_without_a_gpu_stays_dense_with_the_reason() -> None:
    student = student_of("cpu", "2:4t")
    student(torch.randn(3, 16))
    reasons = {choice.reason for choice in sdm.explain(student).choices}
    assert reasons == {"no sparse product for training on cpu tensors"}


@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_semi_train_passes_opcheck(device: str, tokens: int) -> None:
    weight = torch.randn(32, 48, device=device).to(BF16)
    weight = apply_mask(weight, nm_mask(weight, "2:4t")).requires_grad_()
    x = torch.randn(2, tokens, 48, device=device).to(BF16).requires_grad_()
    bias = torch.randn(32, device=device).to(BF16).requires_grad_()
    torch.library.opcheck(semi_train_op, (x, weight, bias, True))
    out = semi_train_op(x, weight, bias, True)
    seed = torch.randn_like(out)
    torch.library.opcheck(semi_train_grad_op, (seed, weight.detach(), True))
    assert_same(out, torch.nn.functional.linear(x, weight, bias), tolerance=2e-2)
    ours = torch.autograd.grad(out, (x, weight, bias), seed)
    theirs = torch.autograd.grad(
        torch.nn.functional.linear(x, weight, bias), (x, weight, bias), seed
    )
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b, tolerance=5e-2)
