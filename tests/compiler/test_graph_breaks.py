"""Models that no single graph holds: covered, or an error that shows the line."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.graph import dynamo_settings
from tests.oracle import OPTIONS, assert_gradients, assert_same, hand_masked, oracle_of

LENGTHS = torch.tensor([1, 2, 3])


class Ragged(nn.Module):
    """Asks a tensor for Python values between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))
        self.register_buffer("calls", torch.zeros(()))

    def middle(self, x: Tensor) -> Tensor:
        return self.b(x)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        self.calls.add_(1)
        x = self.a(x) + 0 * torch.rand(())
        if len(set(lengths.tolist())) > 1:
            x = x + 1
        return self.d(self.c(self.middle(x)))


class Uncovered(Ragged):
    """Runs one layer where Dynamo cannot see it."""

    @torch.compiler.disable
    def middle(self, x: Tensor) -> Tensor:
        return self.b(x)


class UncoveredCast(Ragged):
    """Multiplies by a cast of the weight where Dynamo cannot see it."""

    @torch.compiler.disable
    def middle(self, x: Tensor) -> Tensor:
        weight = self.b.weight.to(torch.float64).contiguous()
        return nn.functional.linear(x.double(), weight).float()


def call(net: nn.Module) -> Tensor:
    out = net(torch.linspace(-1, 1, 48).reshape(3, 16), LENGTHS)
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_partial_graphs_when_all_weights_are_covered_run_masked(mode: str, backend: str) -> None:
    student = sdm.compile(Ragged(), "2:4", **OPTIONS[mode], backend=backend)
    out = call(student)
    assert sdm.explain(student).masked == ("b.weight", "c.weight")
    # Inductor may reorder the sums of a matrix product.
    tolerance = 0.0 if backend == "eager" else 1e-6
    assert_same(out, call(oracle_of(student)), tolerance=tolerance)
    assert not torch.equal(out, call(hand_masked(student, {})))
    assert_same(call(student), out)
    assert "runs as several graphs" in str(sdm.explain(student))
    assert "set(lengths.tolist())" in str(sdm.explain(student).broken)


def test_partial_graphs_at_the_recompile_limit_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("recompile_limit", "accumulated_recompile_limit"):
        monkeypatch.setitem(dynamo_settings.SETTINGS, key, 2)
    student = sdm.compile(Ragged(), "2:4", backend="eager")
    for rank in (1, 2):
        student(torch.randn(*[1] * rank, 16), LENGTHS)
    with pytest.raises(sdm.DenseRunError, match="more shapes and settings than it may"):
        student(torch.randn(1, 1, 1, 16), LENGTHS)


def test_gradients_through_partial_graphs_match_oracle() -> None:
    student = sdm.compile(Ragged(), "2:4", backend="eager")
    call(student)
    assert_gradients(student, oracle_of(student), ((torch.randn(3, 16), LENGTHS), {}))


def test_deciding_run_over_graph_breaks_leaves_no_trace() -> None:
    student = sdm.compile(Ragged(), "2:4", backend="eager")
    torch.manual_seed(0)
    call(student)
    drawn = torch.rand(())
    torch.manual_seed(0)
    torch.rand(())  # the forward's own
    assert_same(drawn, torch.rand(()))
    assert student.calls.item() == 1
    assert all(parameter.grad is None for parameter in student.parameters())


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("kind", [Uncovered, UncoveredCast])
def test_uncaptured_product_when_weight_is_pruned_runs_masked(kind: Any, mode: str) -> None:
    student = sdm.compile(kind(), "2:4", **OPTIONS[mode], backend="eager")
    for _ in range(2):
        out = call(student)
        assert_same(out, call(oracle_of(student)))
        assert not torch.equal(out, call(hand_masked(student, {})))
    assert sdm.explain(student).masked == ("b.weight", "c.weight")
    assert sdm.explain(student).eager == ("b.weight",)
    assert "without a kernel: b.weight" in str(sdm.explain(student))
    kept = sdm.compile(kind(), "2:4", keep_dense=["b"], backend="eager")
    out = call(kept)
    assert sdm.explain(kept).masked == ("c.weight",)
    assert sdm.explain(kept).eager == ()
    assert_same(out, call(oracle_of(kept)))


@pytest.mark.parametrize("kind", [Uncovered, UncoveredCast])
def test_uncaptured_product_when_trained_has_the_oracles_gradients(kind: Any) -> None:
    student = sdm.compile(kind(), "2:4", backend="eager")
    call(student)
    unread = {"b.bias"} if kind is UncoveredCast else set()
    assert_gradients(student, oracle_of(student), ((torch.randn(3, 16), LENGTHS), {}), unread)


class UncoveredFusion(Ragged):
    """Multiplies by a tensor made of two weights where Dynamo cannot see it."""

    @torch.compiler.disable
    def middle(self, x: Tensor) -> Tensor:
        fused = torch.cat([self.b.weight, 2 * self.c.weight])
        return nn.functional.linear(self.b(x) + self.c(x), fused)[:, :16]


def test_uncaptured_op_when_it_makes_a_tensor_of_a_pruned_weight_gets_it_masked() -> None:
    student = sdm.compile(UncoveredFusion(), "2:4", backend="eager")
    out = call(student)
    assert set(sdm.explain(student).eager) == {"b.weight", "c.weight"}
    assert_same(out, call(oracle_of(student)))
    assert_gradients(student, oracle_of(student), ((torch.randn(3, 16), LENGTHS), {}))


class Branches(Ragged):
    """Multiplies by a cast of a weight in a branch that the deciding run does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = False

    @torch.compiler.disable
    def middle(self, x: Tensor) -> Tensor:
        if self.taken:
            return nn.functional.linear(x.double(), self.b.weight.double()).float()
        return x


def test_uncaptured_cast_when_weight_is_not_decided_is_an_error_that_shows_the_line() -> None:
    student = sdm.compile(Branches(), "2:4", backend="eager")
    call(student)
    student.taken = True
    line = re.escape("nn.functional.linear(x.double(), self.b.weight.double())")
    shown = rf"'b.weight' would run dense.*test_graph_breaks.py:\d+: .*{line}.*keep_dense"
    with pytest.raises(sdm.DenseRunError, match=shown):
        call(student)
    out = call(student)
    assert "b.weight" in sdm.explain(student).masked
    assert_same(out, call(oracle_of(student)))


def test_macs_of_a_model_with_graph_breaks_are_counted() -> None:
    report = sdm.count_macs(Ragged(), torch.randn(3, 16), LENGTHS)
    assert (report.dense, report.sparse) == (4 * 768, 3 * 768)
    reasons = {row.name: row.refusal for row in report.rows if row.refusal}
    assert reasons == {"a": "first op of the graph", "d": "last op of the graph"}
    with pytest.raises(sdm.ConfigError, match="takes several graphs"):
        sdm.topology(Ragged(), torch.randn(3, 16), LENGTHS)
