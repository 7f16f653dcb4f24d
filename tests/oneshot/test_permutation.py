"""``permute_channels``: exact in the function of every model, and more energy kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import sparsedm_compiler as sdm
from sparsedm_compiler import CalibrationBatch, ConfigError, GraphError, Pattern
from sparsedm_compiler.models.presets import from_diffusers
from sparsedm_compiler.oneshot.permutation import rules
from sparsedm_compiler.oneshot.permutation.arrangement import (
    ScoredWeight,
    make_units,
    make_view,
    measure_units,
)
from sparsedm_compiler.oneshot.permutation.aten_graph import capture_call, trace_aten
from sparsedm_compiler.oneshot.permutation.couplings import Couplings, find_couplings
from sparsedm_compiler.oneshot.permutation.propagate import Propagation
from sparsedm_compiler.oneshot.permutation.search import SearchOptions, UnitGroup, search_order
from tests.zoo import FAMILIES, fill_zeros, sample_of

QUICK = {"rounds": 6, "escapes": 0, "progress": False}


class ConvNet(nn.Module):
    """A residual stream of convolutions, a skip concatenation, both kinds of norm, a flat end."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.batch = nn.BatchNorm2d(16)
        self.down = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.group = nn.GroupNorm(2, 16)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.mix = nn.Conv2d(16, 16, 1)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.join = nn.Conv2d(32, 16, 3, padding=1)
        self.end = nn.Linear(16 * 16, 8)

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.batch(self.first(x)))
        low = F.silu(self.group(self.down(first)))
        low = low + self.mix(F.relu(self.depth(low)))
        out = self.join(torch.cat([first, self.up(low)], 1))
        out: Tensor = self.end(F.max_pool2d(F.silu(out), 2).flatten(1))
        return out


def make_unet() -> nn.Module:
    config = {
        "sample_size": 4,
        "block_out_channels": (16,),
        "layers_per_block": 1,
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "add_attention": False,
        "attention_head_dim": 16,
        "norm_num_groups": 2,
    }
    return from_diffusers("UNet2DModel", config)


def make_call(name: str) -> tuple[nn.Module, CalibrationBatch]:
    """Returns a model in float64 without zeros, and a call of it."""
    torch.manual_seed(0)
    if name == "conv":
        model, call = ConvNet(), ((torch.randn(2, 3, 8, 8),), {})
    elif name == "unet":
        model, call = make_unet(), ((torch.randn(1, 3, 4, 4), torch.tensor([3])), {})
    else:
        family = next(family for family in FAMILIES if family.name == name)
        model = family.build()
        call = family.inputs(model)
    model = fill_zeros(model).eval().double()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():  # no two channels are alike
                tensor.add_(0.05 * torch.rand_like(tensor))
    args, kwargs = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, call)
    return model, CalibrationBatch(args, kwargs)


def call(model: nn.Module, batch: CalibrationBatch) -> Tensor:
    with torch.no_grad():
        return sample_of(model(*batch.args, **batch.kwargs))


def measure_kept(model: nn.Module, pattern: str, names: Sequence[str]) -> float:
    """Returns the mean kept share of energy of some weights, computed anew."""
    shares = []
    for name in names:
        weight = model.get_parameter(name).detach()
        mask = Pattern.parse(pattern).compute_mask(weight)
        shares.append(float((weight * mask).square().sum() / weight.square().sum()))
    return sum(shares) / len(shares)


def find(model: nn.Module, *args: Tensor) -> Couplings:
    graph = trace_aten(model, *capture_call(model, args, {}))
    return find_couplings(Propagation(graph).run(rules.RULES))


def list_sets(model: nn.Module, *args: Tensor) -> dict[tuple[tuple[str, int | None], ...], list]:
    """Returns the index arrays of all sets, by their axes."""
    sets: dict[Any, list] = {}
    for one in find(model, *args).sets:
        key = tuple((axis.parameter, axis.dim) for axis in one.axes)
        sets.setdefault(key, []).append([axis.indices.tolist() for axis in one.axes])
    return sets


@pytest.mark.parametrize(
    ("name", "pattern"), [("uvit", "1:4"), ("unet", "2:4"), ("dit", "1:2@8x4"), ("conv", "1:8")]
)
def test_permute_then_outputs_are_the_same_and_more_energy_is_kept(name: str, pattern: str) -> None:
    model, batch = make_call(name)
    before, state = call(model, batch), {k: v.clone() for k, v in model.state_dict().items()}
    dense = copy.deepcopy(model)
    report = sdm.permute_channels(model, pattern, [batch], **QUICK)
    after = call(model, batch)
    assert float((after - before).abs().max() / before.abs().max()) <= 1e-12
    assert report.difference <= 1e-12
    names = [row.weight for row in report.weights]
    assert report.kept_after > report.kept_before
    assert report.kept_before == pytest.approx(measure_kept(dense, pattern, names))
    assert report.kept_after == pytest.approx(measure_kept(model, pattern, names))
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in state.items()
    }
    for key, value in model.state_dict().items():  # the same numbers in other places
        assert torch.equal(value.reshape(-1).sort()[0], state[key].reshape(-1).sort()[0])


class Gated(nn.Module):
    """Halves of one product that are multiplied, as in GEGLU, and a reader of both norms."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).chunk(2, -1)
        out: Tensor = self.b(left * F.gelu(right))
        return out


class TwoPaths(nn.Module):
    """Halves that go through different functions, into one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).chunk(2, -1)
        out: Tensor = self.b(torch.cat([left.relu(), right.tanh()], -1))
        return out


class Fixed(nn.Module):
    """A buffer with one number for so many neighbours each."""

    def __init__(self, neighbours: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)
        self.register_buffer("scale", torch.arange(8.0)[: 8 // neighbours])

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).unflatten(-1, (len(self.scale), -1)) * self.scale.unsqueeze(-1)
        out: Tensor = self.b(hidden.flatten(-2))
        return out


class Unknown(nn.Module):
    """An op for which there is no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x).cumsum(-1))
        return out


class Tied(nn.Module):
    """One matrix that is used twice in a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).relu()
        out: Tensor = self.c(hidden + self.b(self.b(hidden)))
        return out


class Grouped(nn.Module):
    """Group norm between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(F.silu(self.norm(self.a(x))))
        return out


X = torch.ones(2, 4)


def test_couplings_of_gated_halves_then_a_channel_is_a_row_of_each() -> None:
    sets = list_sets(Gated(), X)
    (key,) = [key for key in sets if ("b.weight", 1) in key]
    slots = dict(zip(key, sets[key][0], strict=True))
    assert slots["a.weight", 0] == [[*range(8)], [*range(8, 16)]]
    assert slots["a.bias", None] == slots["a.weight", 0]
    assert slots["b.weight", 1] == [[*range(8)]]


def test_couplings_of_halves_with_other_functions_then_two_sets() -> None:
    sets = list_sets(TwoPaths(), X)
    indices = [dict(zip(key, one, strict=True)) for key, ones in sets.items() for one in ones]
    columns = sorted(one["b.weight", 1] for one in indices if ("b.weight", 1) in one)
    assert columns == [[[*range(8)]], [[*range(8, 16)]]]


def test_couplings_of_fixed_numbers_then_only_channels_of_one_number_are_exchanged() -> None:
    sets = list_sets(Fixed(4), X)
    indices = [dict(zip(key, one, strict=True)) for key, ones in sets.items() for one in ones]
    columns = sorted(one["b.weight", 1] for one in indices if ("b.weight", 1) in one)
    assert columns == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    single = find(Fixed(1), X)
    assert not [one for one in single.sets if "b.weight" in one.list_parameters(1)]
    assert "scale" in single.reasons["b.weight", 1][0]


def test_couplings_of_group_norm_then_channels_stay_in_their_group() -> None:
    sets = list_sets(Grouped(), torch.ones(1, 3, 2, 2))
    indices = [dict(zip(key, one, strict=True)) for key, ones in sets.items() for one in ones]
    columns = sorted(one["b.weight", 1] for one in indices if ("b.weight", 1) in one)
    assert columns == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]


def test_couplings_of_a_tied_weight_then_its_rows_and_columns_go_together() -> None:
    (key,) = [key for key in list_sets(Tied(), X) if ("c.weight", 1) in key]
    assert {("a.weight", 0), ("b.weight", 0), ("b.weight", 1), ("b.bias", None)} <= {*key}


def test_couplings_of_an_op_without_a_rule_then_its_channels_stay() -> None:
    couplings = find(Unknown(), X)
    assert couplings.reasons["a.weight", 0] == ("they go through cumsum, which has no rule",)
    assert not [one for one in couplings.sets if "b.weight" in one.list_parameters(1)]


def forget_bias(walk: Propagation, node: Any, rows: Tensor, bias: Any) -> None:
    """A wrong rule: biases stay where they are."""


def test_permute_with_a_wrong_coupling_then_an_error_and_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(3)])
    before = copy.deepcopy(model.state_dict())
    batch = torch.randn(8, 16)
    monkeypatch.setattr(rules, "apply_bias", forget_bias)
    with pytest.raises(GraphError, match="the model was put back"):
        sdm.permute_channels(model, "2:4", [batch], **QUICK)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    monkeypatch.undo()
    assert sdm.permute_channels(model, "2:4", [batch], **QUICK).rows[0].moved


def test_permute_by_wanda_then_norms_of_inputs_count() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(3)])
    with torch.no_grad():
        model[0].weight[:4] *= 20
    batch = torch.randn(8, 16)
    report = sdm.permute_channels(model, "1:4", [batch], score="wanda", **QUICK)
    inputs = model[0](batch).detach()
    scores = model[1].weight.detach() * inputs.square().mean(0).sqrt()
    kept = scores * Pattern.parse("1:4").compute_mask(scores)
    share = float(kept.square().sum() / scores.square().sum())
    assert report.weights[0].kept_after == pytest.approx(share, rel=1e-4)
    assert report.kept_after > report.kept_before


@pytest.mark.parametrize("text", ["2:4", "1:8", "1:4x8", "1:2@8x4", "16:2:8"])
def test_search_then_no_worse_than_before_and_as_measured(text: str) -> None:
    torch.manual_seed(1)
    pattern = Pattern.parse(text)
    weight = ScoredWeight("w", pattern, torch.randn(16, 32, dtype=torch.float64))
    view = make_view(weight, 1, np.arange(32)[None])
    assert view is not None
    units = make_units([view], 32)
    assert len(units) == 32 // pattern.width
    lines = torch.from_numpy(np.stack([unit.lines[0] for unit in units]))
    assert float(measure_units(view, lines).sum()) == pytest.approx(weight.measure())
    before = weight.measure()
    order = search_order([view], 32, SearchOptions(8, 1, 0), lambda n: None)
    assert sorted(order) == [*range(32)]
    weight.scores = weight.scores[:, torch.from_numpy(order)]
    assert weight.measure() > before


@pytest.mark.parametrize("text", ["2:4", "1:8", "3:4"])
def test_exchanges_under_per_row_patterns_are_as_measured_by_masks(text: str) -> None:
    random = np.random.default_rng(0)
    weight = ScoredWeight("w", Pattern.parse(text), torch.randn(6, 32, 2, 1, dtype=torch.float64))
    view = make_view(weight, 1, np.arange(32)[None])
    assert view is not None
    group = UnitGroup.make([view], make_units([view], 32))
    group.exchange_once(random)
    a, b = np.array([0, 2]), np.array([3, 1])
    i, j = group.list_exchanges(random)
    fast = group.measure_exchanges(a, b, i, j)
    new = group.swap(a, b, i, j)
    for side, numbers in enumerate((a, b)):
        for pair, unit in enumerate(numbers):
            slow = group.measure_view(0, np.repeat(unit, len(i)), new[side][pair])
            np.testing.assert_allclose(fast[side, pair], slow, rtol=1e-12)


def test_search_of_few_columns_finds_the_best_order() -> None:
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0, 0.1, 0.2, 0.3, 0.4]])
    weight = ScoredWeight("w", Pattern.parse("2:4"), scores)
    view = make_view(weight, 1, np.arange(8)[None])
    assert view is not None
    order = search_order([view], 8, SearchOptions(16, 1, 0), lambda n: None)
    weight.scores = scores[:, torch.from_numpy(order)]
    kept = (weight.scores * weight.pattern.compute_mask(weight.scores)).sort()[0][0, -4:]
    assert kept.tolist() == [6.0, 7.0, 8.0, 9.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: {"score": "taylor"}, "score 'taylor' is none of magnitude, wanda"),
        (lambda: {"rounds": 0}, "rounds 0 is not >= 1"),
        (lambda: {"batches": []}, "there are no calibration batches"),
    ],
)
def test_permute_with_a_bad_option_then_one_sentence(
    change: Callable[[], dict[str, Any]], message: str
) -> None:
    options = {"batches": [torch.ones(1, 16)], **QUICK, **change()}
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(3)])
    with pytest.raises(sdm.SparseDMError, match=message):
        sdm.permute_channels(model, "2:4", **options)


def test_permute_of_a_model_with_unread_parameters_then_refused_unless_allowed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(3)])
    model.register_parameter("extra", nn.Parameter(torch.ones(2)))
    with pytest.raises(ConfigError, match="the call does not read extra"):
        sdm.permute_channels(model, "2:4", [torch.ones(1, 16)], **QUICK)
    report = sdm.permute_channels(model, "2:4", [torch.ones(1, 16)], allow_unread=True, **QUICK)
    assert report.rows
    student = sdm.compile(model, "2:4", backend="eager")
    with pytest.raises(ConfigError, match="before compile"):
        sdm.permute_channels(student, "2:4", [torch.ones(1, 16)], **QUICK)


class Turned(nn.Module):
    """Three channels of either half, each multiplied by another of the same half."""

    def __init__(self, turns: tuple[int, int]) -> None:
        super().__init__()
        self.a, self.b, self.turns = nn.Linear(4, 6), nn.Linear(6, 4), turns

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        halves = zip(hidden.chunk(2, -1), self.turns, strict=True)
        out: Tensor = self.b(hidden * torch.cat([h.roll(turn, -1) for h, turn in halves], -1))
        return out


@pytest.mark.parametrize(("turns", "count"), [((1, 1), 1), ((1, 2), 0)])
def test_couplings_of_channels_that_meet_each_other_in_other_pairs_then_not_exchanged(
    turns: tuple[int, int], count: int
) -> None:
    sets = find(Turned(turns), X).sets
    assert len([one for one in sets if "b.weight" in one.list_parameters(1)]) == count


class Experts(nn.Module):
    """A stack of matrices, or one row of a matrix, and the bytes of a number."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(4, 4), nn.Linear(4, 4), kind
        self.stack = nn.Parameter(torch.randn((4, 4) if kind == "row" else (4, 4, 4)))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        if self.kind == "row":
            hidden = hidden * (hidden @ self.stack[0]).unsqueeze(-1)
        elif self.kind == "stack":
            hidden = torch.bmm(hidden.expand(4, 2, 4), self.stack)
        else:
            hidden = hidden * hidden.view(torch.int32).sign() + self.stack.mean()
        out: Tensor = self.b(hidden)
        return out


@pytest.mark.parametrize(
    ("kind", "reason"), [("row", "matmul"), ("stack", "bmm"), ("bytes", "view")]
)
def test_couplings_of_what_is_no_matrix_then_its_channels_stay(kind: str, reason: str) -> None:
    couplings = find(Experts(kind), X)
    assert couplings.reasons["a.weight", 0] == (f"they go through {reason}, which has no rule",)
    assert not [one for one in couplings.sets if "stack" in one.list_parameters(0)]


@dataclass
class Wrapped:
    """An output that no pytree knows."""

    sample: Tensor


class Chain(nn.Module):
    """Three layers; what the last gives is returned in some form."""

    def __init__(self, form: Callable[[Tensor], Any], width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(width, width) for _ in range(3)])
        self.form = form

    def forward(self, x: Tensor, *, cumulated: bool = False) -> Any:
        hidden = self.layers[0](x)
        return self.form(self.layers[2](self.layers[1](hidden.cumsum(-1) if cumulated else hidden)))


def test_permute_of_a_model_with_a_dataclass_as_output_then_its_change_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model, x = Chain(Wrapped), torch.randn(8, 16)
    assert sdm.permute_channels(model, "2:4", [x], **QUICK).difference > 0
    monkeypatch.setattr(rules, "apply_bias", forget_bias)
    with pytest.raises(GraphError, match="the model was put back; this is a bug"):
        sdm.permute_channels(Chain(Wrapped), "2:4", [x], **QUICK)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda x: x / 0, "the outputs of Chain hold NaN or Inf"),
        (lambda x: x.argmax(-1), "the output of Chain holds no floating-point tensor"),
    ],
)
def test_permute_or_choose_where_outputs_cannot_be_compared_then_one_sentence(
    form: Callable[[Tensor], Any], message: str
) -> None:
    model, x = Chain(form), torch.randn(8, 16)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(sdm.DataError, match=message):
        sdm.permute_channels(model, "2:4", [x], **QUICK)
    with pytest.raises(sdm.DataError, match=message):
        sdm.choose_patterns(model, ["2:4", "1:4"], [x], macs="1:4", progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_permute_where_another_batch_takes_another_path_then_an_error_and_the_model_as_it_was() -> (
    None
):
    torch.manual_seed(0)
    model, x = Chain(lambda out: out), torch.randn(8, 16)
    before = copy.deepcopy(model.state_dict())
    other = CalibrationBatch((x,), {"cumulated": True})
    with pytest.raises(GraphError, match=r"inputs of shapes \[8, 16\] takes another path"):
        sdm.permute_channels(model, "2:4", [x, other], **QUICK)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sdm.permute_channels(model, "2:4", [x], **QUICK).rows[0].moved


def test_permute_of_a_model_without_parameters_then_one_sentence() -> None:
    with pytest.raises(ConfigError, match="no weight of ReLU is pruned"):
        sdm.permute_channels(nn.ReLU(), "2:4", [torch.randn(8, 16)], **QUICK)


class Positions(nn.Module):
    """Learned positions, of which a call reads the first few, and half of a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.positions = nn.Parameter(torch.randn(1, 8, 16))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x) + self.positions[:, : x.shape[1]]
        width = 2 * x.shape[1]
        out: Tensor = F.linear(self.b(hidden)[..., :width].relu(), self.c.weight[:, :width])
        return out


def test_permute_where_the_call_reads_a_part_of_a_parameter_then_longer_calls_are_the_same() -> (
    None
):
    torch.manual_seed(0)
    model, long = Positions().double(), torch.randn(2, 8, 4, dtype=torch.float64)
    options = {"policy": "all", "allow_unread": True, **QUICK}
    before = model(long)
    report = sdm.permute_channels(model, "2:4", [long[:, :5]], **options)
    assert report.refusals["b.weight"] == (
        "its input channels stay: the call reads only a part of positions"
    )
    assert torch.allclose(model(long), before, rtol=0, atol=1e-12)
    assert sdm.permute_channels(model, "2:4", [long], **options).rows
    assert torch.allclose(model(long), before, rtol=0, atol=1e-12)


def test_permute_of_attention_with_batches_last_then_outputs_are_the_same() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2)
            self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x)
            out: Tensor = self.b(self.attention(hidden, hidden, hidden, need_weights=False)[0])
            return out

    torch.manual_seed(0)
    model, x = Attention().double(), torch.randn(3, 2, 4, dtype=torch.float64)
    before = model(x[:2])
    assert sdm.permute_channels(model, "2:4", [x], **QUICK).rows
    assert torch.allclose(model(x[:2]), before, rtol=0, atol=1e-12)
