"""``choose_patterns``: the least error within a budget, and options that ``compile`` takes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler import CalibrationBatch, ConfigError, PatternError
from sparsedm_compiler.compiler import time_patterns as timing
from sparsedm_compiler.oneshot.mixed import layer_errors
from sparsedm_compiler.oneshot.mixed.layer_costs import LayerCosts
from sparsedm_compiler.oneshot.mixed.pattern_choice import choose_within
from sparsedm_compiler.oneshot.mixed.solve_budget import solve_budget
from sparsedm_compiler.oneshot.outputs import run_once
from sparsedm_compiler.passes import KernelTimes

CANDIDATES = ["2:4", "1:4", "1:8"]


class Branches(nn.Module):
    """Two branches, one of which hardly matters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)
        self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        strong, weak = self.b(self.a(x).tanh()), self.d(self.c(x).tanh())
        out: Tensor = self.last(strong + 0.02 * weak)
        return out


def make_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Branches()


def make_inputs() -> list[Tensor]:
    source = torch.Generator().manual_seed(3)
    return [torch.randn(64, 16, generator=source) for _ in range(2)]


def choose(model: nn.Module, **options: Any) -> sdm.PatternChoice:
    options = {"macs": "1:4", "progress": False, **options}
    return sdm.choose_patterns(
        model, options.pop("candidates", CANDIDATES), make_inputs(), **options
    )


@pytest.mark.parametrize("seed", range(4))
def test_solve_budget_equals_a_search_of_all_choices(seed: int) -> None:
    random = np.random.default_rng(seed)
    errors = [np.sort(random.random(3)) for _ in range(6)]
    costs = [np.sort(random.integers(1, 50, 3))[::-1].astype(float) for _ in range(6)]
    budget = 0.6 * sum(own.max() for own in costs)
    chosen = solve_budget(errors, costs, budget)
    assert sum(own[k] for own, k in zip(costs, chosen, strict=True)) <= budget

    def total(numbers: tuple[int, ...]) -> float:
        if sum(own[k] for own, k in zip(costs, numbers, strict=True)) > budget:
            return float("inf")
        return float(sum(own[k] for own, k in zip(errors, numbers, strict=True)))

    best = min(map(total, itertools.product(range(3), repeat=6)))
    assert total(tuple(chosen)) == pytest.approx(best)


@pytest.mark.parametrize("count", [3, 7])
def test_solve_budget_that_a_uniform_choice_meets_exactly_then_no_worse(count: int) -> None:
    errors, costs = (
        [np.array([0.0, 0.1, 0.18])] * count,
        [np.array([8192.0, 4096.0, 2048.0])] * count,
    )
    chosen = solve_budget(errors, costs, 4096.0 * count)
    assert chosen == [1] * count


def test_solve_budget_that_all_cheapest_just_meet_then_those() -> None:
    errors, costs = [np.array([0.0, 1.0])] * 2, [np.array([4.0, 1.0])] * 2
    assert solve_budget(errors, costs, 2.0) == [1, 1]
    assert sorted(solve_budget(errors, costs, 5.0)) == [0, 1]
    with pytest.raises(ValueError, match="less than the cheapest"):
        solve_budget(errors, costs, 1.9)


@pytest.mark.parametrize("score", ["output", "layer"])
def test_choose_within_macs_then_less_error_than_uniform_and_compile_takes_it(
    score: str, tmp_path: Path
) -> None:
    model, (x, _) = make_net(), make_inputs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    choice = choose(model, score=score)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    uniform = sdm.count_macs(model, x, pattern="1:4").sparse
    assert choice.budget == uniform
    mixed = sdm.count_macs(
        model, x, pattern=choice.pattern, overrides=choice.overrides, keep_dense=choice.keep_dense
    )
    assert mixed.sparse == choice.cost <= uniform
    assert choice.error <= sum(row.errors["1:4"] for row in choice.rows)
    for row in choice.rows:
        assert row.errors["2:4"] < row.errors["1:4"] < row.errors["1:8"]
    student = sdm.compile(model, choice.pattern, backend="eager", **choice.options)
    student(x)
    masked = {name: str(pattern) for name, (_, pattern) in sdm.masked_parameters(student).items()}
    assert masked == {row.weight: row.pattern for row in choice.rows}
    weak = masked["c.weight"], masked["d.weight"]
    assert score == "layer" or (weak == ("1:8", "1:8") and "2:4" in masked.values())
    tighter = choice.within(0.9 * choice.budget)
    assert tighter.cost <= 0.9 * choice.budget < choice.cost
    assert tighter.error > choice.error
    choice.save(tmp_path / "patterns.json")
    written = json.loads((tmp_path / "patterns.json").read_text())
    assert written["overrides"] == choice.overrides
    assert written["cost"] == choice.cost


def test_choose_by_output_then_the_error_is_that_of_the_model() -> None:
    model, inputs = make_net(), make_inputs()
    choice = choose(model, score="output", passes=1)
    row = choice.rows[0]
    pruned = make_net()
    others = [other.weight for other in choice.rows[1:]]
    sdm.prune_one_shot(pruned, "1:8", inputs, keep_dense=others, progress=False)
    with torch.no_grad():
        change = sum(float((pruned(x) - model(x)).double().square().sum()) for x in inputs)
        size = sum(float(model(x).double().square().sum()) for x in inputs)
    assert row.errors["1:8"] == pytest.approx(change / size, rel=1e-4)


def test_choose_by_taylor_of_a_linear_model_and_single_features_then_errors_are_exact() -> None:
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(8))
    choice = sdm.choose_patterns(
        net, CANDIDATES, [torch.eye(8)], macs=1e9, score="taylor", policy="all", progress=False
    )
    weight = net[1].weight.detach()
    (row,) = (row for row in choice.rows if row.weight == "1.weight")
    for text, error in row.errors.items():
        kept = sdm.Pattern.parse(text).compute_mask(weight).bool()
        left = weight.masked_fill(kept, 0).square().sum() / weight.square().sum()
        assert error == pytest.approx(float(left), rel=1e-5)


def test_choose_by_taylor_then_the_weak_branch_is_pruned_most_and_the_model_stays() -> None:
    net = make_net().requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    choice = choose(net, score="taylor")
    patterns = {row.weight: row.pattern for row in choice.rows}
    assert {patterns["c.weight"], patterns["d.weight"]} == {"1:8"}
    assert "2:4" in {patterns["a.weight"], patterns["b.weight"]}
    assert not any(p.requires_grad or p.grad is not None for p in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert choose(net, score="taylor").rows == choice.rows  # the same signs again


def test_choose_by_taylor_of_outputs_without_gradients_raises() -> None:
    class Detached(Branches):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    with pytest.raises(sdm.DataError, match="no gradient of the outputs of Detached"):
        choose(Detached(), score="taylor")


def test_choose_with_a_dense_candidate_and_room_then_layers_stay_dense() -> None:
    model, (x, _) = make_net(), make_inputs()
    choice = choose(model, candidates=["1:1", "1:8"], macs="2:4")
    dense = [row.weight for row in choice.rows if row.pattern == "1:1"]
    assert dense
    assert {*dense} <= {*choice.keep_dense}
    student = sdm.compile(model, choice.pattern, backend="eager", **choice.options)
    student(x)
    assert {*sdm.masked_parameters(student)} == {r.weight for r in choice.rows} - {*dense}


def test_choose_within_measured_time_then_times_of_the_kernel_search_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = {"2:4": 3.0, "1:4": 2.0, "1:8": None}

    def measure(row: Any, weight: Tensor, config: Any, budget: Any) -> Any:
        sparse = times[str(row.pattern)]
        reason = row.run_dense("", times=KernelTimes(5.0, sparse or 9.0))
        if sparse is None:
            return reason
        return row.run_sparse(
            "kernel",
            row.weight_format,
            status=row.status,
            reason="",
            times=KernelTimes(5.0, sparse),
        )

    monkeypatch.setattr(timing, "select_kernel", measure)
    choice = choose(make_net(), macs=None, milliseconds="1:4")
    assert (choice.unit, choice.budget) == ("ms", 2.0 * len(choice.rows))
    assert {row.pattern for row in choice.rows} == {"1:4"}
    assert choice.rows[0].costs == {"2:4": 3.0, "1:4": 2.0, "1:8": 5.0}
    looser = choose(make_net(), macs=None, milliseconds=2.0 * len(choice.rows) + 1)
    assert sorted(row.pattern for row in looser.rows).count("2:4") == 1
    monkeypatch.setattr(timing, "select_kernel", lambda row, *rest: row.run_dense("no kernel"))
    with pytest.raises(ConfigError, match="was not timed at 2:4, 1:4, 1:8"):
        choose(make_net(), macs=None, milliseconds="1:4")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"macs": None}, ConfigError, "needs one budget"),
        ({"milliseconds": 1.0}, ConfigError, "needs one budget"),
        ({"macs": -1.0}, ConfigError, "is not > 0"),
        ({"macs": 10.0}, ConfigError, "less than the .* cheapest candidates cost"),
        ({"macs": "4:2"}, PatternError, "4:2"),
        ({"candidates": "2:4"}, ConfigError, "no list of patterns"),
        ({"candidates": ["1:1"]}, ConfigError, "no candidate that prunes"),
        ({"candidates": ["1:32"]}, ConfigError, "no candidate would prune anything"),
        ({"score": "size"}, ConfigError, "score 'size' is none of output, layer, taylor"),
        ({"output_batches": 0}, ConfigError, "is not >= 1"),
    ],
)
def test_choose_with_bad_input_then_one_sentence(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        choose(make_net(), **options)


def test_choose_within_its_own_cost_in_thirds_then_the_same_choice() -> None:
    costs = {f"w{k}": {"1:3": macs / 3, "2:3": 2 * macs / 3} for k, macs in enumerate((7, 11, 13))}
    errors = {name: {"1:3": 0.2, "2:3": 0.1} for name in costs}
    for fixed in (1e9, 123456789.0, 3.0):
        layers = LayerCosts("MACs", fixed, costs, None)
        least = fixed + sum(min(own.values()) for own in costs.values())
        options = {"score": "layer", "keep_dense": (), "policy": "structural"}
        choice = choose_within(least, layers, errors, **options)
        assert {row.pattern for row in choice.rows} == {"1:3"}
        assert choice.cost <= choice.budget


def test_choose_where_a_pruned_layer_overflows_then_its_error_is_the_worst(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def overflow(model: nn.Module, batch: CalibrationBatch) -> list[Tensor]:
        pruned = float((model.get_parameter("c.weight") == 0).float().mean()) > 0.6
        return [x * float("nan") if pruned else x for x in run_once(model, batch)]

    monkeypatch.setattr(layer_errors, "run_once", overflow)
    choice = choose(make_net(), method="magnitude")
    (row,) = (row for row in choice.rows if row.weight == "c.weight")
    assert row.pattern == "2:4"
    assert choice.error < min(row.errors["1:4"], row.errors["1:8"])


def test_choice_when_it_is_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    choice = choose(make_net(), candidates=["1:1", "2:4", "1:8"], macs="2:4", keep_dense="last")
    choice.save(tmp_path / "patterns.json")
    again = sdm.PatternChoice.load(tmp_path / "patterns.json")
    assert again == choice
    assert again.within(choice.budget * 0.9) == choice.within(choice.budget * 0.9)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("choice") / "patterns.json"
    choose(make_net(), score="layer").save(path)
    values: dict[str, Any] = json.loads(path.read_text())
    return values


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("fixed",), None, "fixed None is no number >= 0"),
        (("colour",), 1, "it has colour, which no choice has"),
        (("unit",), "s", "unit 's' is none of MACs, ms"),
        (("score",), "x", "score 'x' is none of output, layer"),
        (("policy",), ["all"], r"policy \['all'\] is none of structural"),
        (("budget",), float("nan"), "budget nan is no number"),
        (("cost",), True, "cost True is no number"),
        (("cost",), 1.0, "its layers cost .* together, not 1"),
        (("keep_dense",), "last", "keep_dense 'last' is no list of names"),
        (("pattern",), "4:2", "pattern '4:2' is not"),
        (("overrides",), {"b": "2:4"}, "overrides are not those of its layers"),
        (("error",), 0.0, "error are not those of its layers"),
        (("layers",), [], "layers is no list of weights"),
        (("layers", 0), 5, "a layer is a int"),
        (("layers", 0, "weight"), 5, "weight 5 is no name"),
        (("layers", 0, "weight"), "b.weight", "a weight stands in layers twice"),
        (("layers", 0, "pattern"), "1:16", "errors and costs of a.weight are not of the same"),
        (("layers", 0, "costs"), 5, "costs of a.weight are no numbers"),
        (("layers", 0, "costs", "2:4"), "5", "costs of a.weight at 2:4 '5' is no number"),
        (("layers", 0, "errors", "2-4"), 0.5, "pattern '2-4' is not"),
    ],
)
def test_choice_of_a_damaged_file_is_refused(
    path: tuple[Any, ...], value: Any, says: str, saved: dict[str, Any], tmp_path: Path
) -> None:
    values = json.loads(json.dumps(saved))
    *outer, last = path
    inner: Any = values
    for key in outer:
        inner = inner[key]
    inner[last] = value
    file = tmp_path / "patterns.json"
    file.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=says):
        sdm.PatternChoice.load(file)


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "is no JSON"), ("5", "it is a int"), ("{}", "it lacks budget, cost"), (None, "cannot")],
)
def test_choice_of_a_file_that_is_none_is_refused(
    text: str | None, says: str, tmp_path: Path
) -> None:
    file = tmp_path / "patterns.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        sdm.PatternChoice.load(file)
