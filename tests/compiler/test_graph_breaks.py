"""Models that no single graph holds: covered, or an error that shows the line."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.config import CompileConfig
from sparsedm_compiler.graph import dynamo_settings
from sparsedm_compiler.graph.capture import capture, map_parameter_names
from sparsedm_compiler.graph.recorded_run import record_run
from sparsedm_compiler.passes import Sites, find_recorded_sites, find_sites, mark_prunable
from tests.oracle import OPTIONS, assert_gradients, assert_same, hand_masked, oracle_of
from tests.passes.analysis.test_mark_prunable import INPUTS, Net
from tests.zoo import FAMILIES

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


class Fused(Ragged):
    """Multiplies by a tensor made of two weights, where Dynamo sees it."""

    def middle(self, x: Tensor) -> Tensor:
        fused = torch.cat([self.b.weight, 2 * self.c.weight])
        return nn.functional.linear(self.b(x) + self.c(x), fused)[:, :16]


class UncoveredFusion(Fused):
    """Does so where Dynamo cannot see it, and only once ``taken``."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = False

    @torch.compiler.disable
    def middle(self, x: Tensor) -> Tensor:
        return super().middle(x) if self.taken else self.b(x)


def test_uncaptured_op_when_it_makes_a_tensor_of_a_pruned_weight_gets_it_masked() -> None:
    """A weight that is read so from the first call on stays dense, as in one graph."""
    student = sdm.compile(UncoveredFusion(), "2:4", backend="eager")
    call(student)
    student.taken = True
    out = call(student)
    assert set(sdm.explain(student).eager) == {"b.weight", "c.weight"}
    assert_same(out, call(oracle_of(student)))
    assert not torch.equal(out, call(hand_masked(student, {})))
    assert_gradients(student, oracle_of(student), ((torch.randn(3, 16), LENGTHS), {}))


TURNS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda w: w.T,
    lambda w: w.t(),
    lambda w: w.mT,
    lambda w: w.H,
    lambda w: w.mH,
    lambda w: w.adjoint(),
    lambda w: w.transpose(0, 1),
    lambda w: torch.permute(w, (1, 0)),
    lambda w: torch.swapaxes(w, 0, 1),
    lambda w: w.swapdims(0, -1),
    lambda w: w.movedim(0, 1),
    lambda w: torch.moveaxis(w, -1, 0),
)


class TurnedByHand(Ragged):
    """Multiplies by turned weights."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.ModuleList(nn.Linear(16, 16) for _ in TURNS)

    def middle(self, x: Tensor) -> Tensor:
        for turn, layer in zip(TURNS, self.turned, strict=True):
            x = x @ turn(layer.weight) + layer.bias
        return self.b(x)


class UncoveredTurnedByHand(TurnedByHand):
    """Multiplies so where Dynamo cannot see it."""

    middle = torch.compiler.disable(TurnedByHand.middle)


@pytest.mark.parametrize("kind", [TurnedByHand, UncoveredTurnedByHand])
def test_product_by_a_weight_that_is_turned_in_any_way_runs_masked(kind: Any) -> None:
    """What Dynamo writes into a graph for ``w.T`` depends on torch's version."""
    student = sdm.compile(kind(), "2:4", backend="eager")
    out = call(student)
    turned = {f"turned.{number}.weight" for number in range(len(TURNS))}
    assert set(sdm.explain(student).masked) == {"b.weight", "c.weight", *turned}
    assert set(sdm.explain(student).eager) in (set(), {"b.weight", *turned})
    assert_same(out, call(oracle_of(student)))
    assert not torch.equal(out, call(hand_masked(student, {"b.weight": "2:4", "c.weight": "2:4"})))


@pytest.mark.parametrize("kind", [Fused, UncoveredFusion])
def test_partial_graphs_when_no_weight_can_be_pruned_are_an_error(kind: Any) -> None:
    net = kind()
    net.taken = True
    student = sdm.compile(net, "2:4", backend="eager")
    with pytest.raises(sdm.ConfigError, match=f"no weight of {kind.__name__} is pruned.*read by"):
        call(student)


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


def decide(sites: Sites, model: nn.Module, policy: str) -> dict[str, tuple[Any, ...]]:
    """Returns the decisions on the weights of a model: pattern, refusal, op and shape by name."""
    config = CompileConfig.create("2:4", policy=policy)
    rows = mark_prunable(sites, config.bind([*map_parameter_names(model).values()]))
    return {row.weight: (str(row.pattern), row.refusal, row.op, row.shape) for row in rows}


class Rules(Net):
    """One layer per rule, and one weight that is read in a view, turned, or beside its product."""

    def __init__(self) -> None:
        super().__init__()
        self.turned_by_hand, self.reshaped, self.normalized = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        x = super().forward(x, label)
        x = torch.cat([x, x], 1)
        x = x @ self.turned_by_hand.weight.T
        x += nn.functional.linear(x, self.reshaped.weight.view(4, 16).view(8, 8))
        x[:, :4] = self.normalized(x)[:, 4:] / self.normalized.weight.norm()
        return x


@pytest.mark.parametrize("policy", ["structural", "all"])
def test_every_rule_decides_on_an_eager_run_as_on_a_graph(policy: str) -> None:
    def read(decisions: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
        return {
            name: (pattern, re.sub(r"by \w+,", "by it,", str(refusal)), *rest)
            for name, (pattern, refusal, *rest) in decisions.items()
        }

    model = Rules()
    captured = capture(model, *INPUTS)
    assert captured is not None
    graph = read(decide(find_sites(captured), model, policy))
    assert len(graph) == 13
    assert sum(name.startswith("from ") for name in graph) == 1
    run = find_recorded_sites(record_run(model, *INPUTS))
    assert read(decide(run, model, policy)) == graph


class Mixer(nn.Module):
    """Blocks that read one context: a first layer only where it is the context's sole reader."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.inp, self.middle, self.out = (nn.Linear(8, 8) for _ in range(3))
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(blocks))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = x + block(context)
        return self.out(self.middle(x))  # type: ignore[no-any-return]


def break_graph(module: nn.Module, args: Any) -> None:
    """A hook that breaks the graph."""
    torch._dynamo.graph_break()


def explain_rows(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, split: bool
) -> dict[str, tuple[str, str | None]]:
    """Returns the rows of ``explain``; of a model whose blocks break the graph where ``split``."""
    for blocks in (m for m in model.modules() if isinstance(m, nn.ModuleList) and split):
        blocks[0].register_forward_pre_hook(break_graph)
    student = sdm.compile(model, "2:4", backend="eager", **OPTIONS["infer"])
    with torch.no_grad():
        student(*args, **kwargs)
    report = sdm.explain(student)
    assert (report.broken is not None) == split
    return {row.weight: (str(row.pattern), row.refusal) for row in report.rows}


@pytest.mark.parametrize("blocks", [1, 2, None], ids=["sole", "shared", "uvit"])
def test_explained_rows_when_blocks_break_the_graph_are_those_of_the_one_graph(
    blocks: int | None,
) -> None:
    rows = []
    for split in (False, True):
        model: nn.Module = Mixer(blocks or 1)
        args, kwargs = (torch.randn(1, 8), torch.randn(1, 8)), {}
        if blocks is None:
            model, args, kwargs = FAMILIES[0].make()
        rows.append(explain_rows(model, args, kwargs, split=split))
    assert rows[0] == rows[1]
    refusals = [refusal for _, refusal in rows[0].values()]
    assert refusals.count("first op of the graph") == (2 if blocks != 2 else 1)
    assert refusals.count("last op of the graph") == 1


class Stack(nn.Module):
    """Equal blocks of a norm and a layer; the graph breaks in each block, between the two."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = add_layer(x, norm, layer)
        return x


def add_layer(x: Tensor, norm: nn.Module, layer: nn.Module) -> Tensor:
    """Returns one block's output; a frame that TorchDynamo compiles on its own."""
    y = torch.relu(norm(x))
    torch._dynamo.graph_break()
    return x + layer(y)  # type: ignore[no-any-return]


def count_graphs(blocks: int) -> int:
    """Returns how many graphs a Stack takes, and asserts that it runs masked."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    student = sdm.compile(Stack(blocks).eval(), "2:4", backend="eager", **OPTIONS["infer"])
    x = torch.randn(2, 8)
    with torch.no_grad():
        out = student(x)
        graphs = int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert_same(out, oracle_of(student)(x))
        assert not torch.equal(out, hand_masked(student, {})(x))
    return graphs


def test_graphs_of_norms_when_blocks_are_equal_are_shared_and_those_of_layers_are_not() -> None:
    """A graph that holds a weight stays with its layer: one may be dense, the next pruned."""
    assert count_graphs(6) - count_graphs(4) == 2


class Routed(nn.Module):
    """Sends every token through one expert, by counts that Python reads."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 3)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).argmax(-1)
        counts = torch.bincount(chosen, minlength=3).tolist()
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            if counts[index] == 0:
                continue
            (rows,) = torch.where(chosen == index)
            out = out.index_add(0, rows, expert(x[rows]))
        return out


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_experts_that_are_chosen_by_counts_run_masked(mode: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), Routed(), nn.Linear(16, 16))
    x = torch.randn(40, 16)
    student = sdm.compile(net, "2:4", backend="eager", **OPTIONS[mode])
    for tokens in (x, x[:7]):
        assert_same(student(tokens), oracle_of(student)(tokens))
    assert sum("expert" in name for name in sdm.explain(student).masked) == 3
