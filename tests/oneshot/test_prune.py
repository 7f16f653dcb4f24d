"""``prune_one_shot`` on small models: what it prunes, by how much, and what it refuses."""

from __future__ import annotations

import copy
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler import CheckpointError, ConfigError, DataError, MaskError, Pattern
from sparsedm_compiler.config import CompileConfig
from sparsedm_compiler.oneshot import job as jobs
from sparsedm_compiler.oneshot.batches import CalibrationBatch
from sparsedm_compiler.oneshot.job import Job
from sparsedm_compiler.oneshot.layer_matrix import from_matrix, iterate_rows, to_matrix
from sparsedm_compiler.oneshot.mixed.layer_costs import list_candidates
from sparsedm_compiler.oneshot.solve_layer import prune_damped
from tests.compiler.nets import UNET, Chain
from tests.oneshot.cases import PATTERNS, measure, solve


class Convs(nn.Module):
    """Convolutions of every shape between a first and a last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.c = nn.Conv2d(32, 32, 1, bias=False)
        self.d = nn.Conv2d(32, 16, 3, padding="same", dilation=2)
        self.e = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c, self.d):
            x = F.relu(layer(x))
        out: Tensor = self.e(x)
        return out


def make_chain(width: int = 16, seed: int = 0) -> Chain:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return Chain(width)


def make_inputs(count: int = 3, width: int = 16) -> list[Tensor]:
    source = torch.Generator().manual_seed(5)
    mix = torch.randn(width, width, generator=source)
    return [torch.randn(40, width, generator=source) @ mix + 1 for _ in range(count)]


def prune(model: nn.Module, pattern: Any = "2:4", batches: Any = None, **options: Any) -> Any:
    batches = make_inputs() if batches is None else batches
    return sdm.prune_one_shot(model, pattern, batches, **{"progress": False, **options})


def list_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("text", [text for text in PATTERNS if ":32" not in text])
def test_prune_of_convolutions_then_every_pattern_holds_and_no_layer_is_worse(text: str) -> None:
    torch.manual_seed(0)
    model = Convs()
    report = prune(model, text, [torch.randn(4, 3, 12, 12)])
    assert [row.weight for row in report.rows] == ["b.weight", "c.weight", "d.weight"]
    for row in report.rows:
        weight = model.get_parameter(row.weight).detach()
        mask = Pattern.parse(text).compute_mask(weight)
        assert torch.equal(weight * mask, weight)
        assert float((weight != 0).double().mean()) == float(Pattern.parse(text).density)
        assert row.error <= row.magnitude_error


def test_prune_then_the_same_weights_as_by_compile_are_pruned() -> None:
    options = {"keep_dense": ["b"], "overrides": {"c": "1:4"}, "policy": "all"}
    model = make_chain()
    before = list_weights(model)
    student = sdm.compile(model, "2:4", backend="eager", **options)
    student(make_inputs()[0])
    report = prune(model, "2:4", **options)
    expected = {name: str(pattern) for name, (_, pattern) in sdm.masked_parameters(student).items()}
    assert {row.weight: row.pattern for row in report.rows} == expected
    assert expected == {"a.weight": "2:4", "c.weight": "1:4", "d.weight": "2:4"}
    assert torch.equal(model.b.weight, before["b.weight"])
    again = sdm.compile(model, "2:4", backend="eager", **options)
    x = make_inputs()[0]
    assert torch.equal(again(x), model(x))  # the masks keep all that is left


def test_prune_of_one_layer_equals_the_best_weights_under_its_mask() -> None:
    model, dense = make_chain(), make_chain()
    report = prune(model, keep_dense=["c"], damping=1e-9)
    (row,) = report.rows
    inputs = torch.cat([dense.a(x) for x in make_inputs()]).detach().double()
    centered = inputs - inputs.mean(0)
    hessian = centered.T @ centered / len(inputs)
    target, pruned = dense.b.weight.detach().double(), model.b.weight.detach().double()
    best = solve(target, hessian, pruned != 0)
    assert measure(pruned - target, hessian) == pytest.approx(
        measure(best - target, hessian), rel=1e-3
    )
    whole = measure(target, hessian)
    assert row.error == pytest.approx(measure(pruned - target, hessian) / whole, rel=1e-4)
    plain = target * Pattern.parse("2:4").compute_mask(target)
    assert row.magnitude_error == pytest.approx(measure(plain - target, hessian) / whole, rel=1e-4)
    means = [model.b(inputs.float()).mean(0), dense.b(inputs.float()).mean(0)]
    torch.testing.assert_close(*means, rtol=1e-4, atol=1e-4)  # the bias takes up the shift


def test_prune_in_one_pass_sees_dense_inputs_and_in_many_those_of_pruned_layers() -> None:
    together, apart = make_chain(), make_chain()
    prune(together, passes=1)
    prune(apart, passes=4)
    assert torch.equal(together.b.weight, apart.b.weight)
    assert not torch.equal(together.c.weight, apart.c.weight)
    alone = make_chain()
    alone.b.load_state_dict(apart.b.state_dict())
    report = prune(alone, keep_dense=["b"])
    assert [row.weight for row in report.rows] == ["c.weight"]
    torch.testing.assert_close(alone.c.weight, apart.c.weight)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_prune_by_a_mask_alone_changes_no_kept_weight(method: str) -> None:
    model, dense = make_chain(), make_chain()
    report = prune(model, method=method, calibrate_bias=False, keep_dense=["c"])
    kept = model.b.weight != 0
    assert torch.equal(model.b.weight[kept], dense.b.weight[kept])
    assert torch.equal(model.b.bias, dense.b.bias)
    scores = dense.b.weight.detach()
    if method == "wanda" and report.rows[0].method == "wanda":
        inputs = torch.cat([dense.a(x) for x in make_inputs()])
        scores = scores * inputs.square().mean(0).sqrt()
    assert torch.equal(kept, Pattern.parse("2:4").compute_mask(scores))


def test_prune_with_a_worse_result_takes_magnitude_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "sparsedm_compiler.oneshot.solve_layer.prune_damped",
        lambda original, hessians, parts, pattern, damping: (torch.zeros_like(original), damping),
    )
    model, plain = make_chain(), make_chain()
    report = prune(model)
    prune(plain, method="magnitude")
    assert [row.method for row in report.rows] == ["magnitude"] * 2
    assert report.fallbacks == ("b.weight", "c.weight")
    assert "obs has a larger error" in str(report)
    assert torch.equal(model.c.weight, plain.c.weight)


def test_prune_damped_then_damping_rises_until_the_hessian_can_be_inverted() -> None:
    inputs = torch.randn(3, 8, dtype=torch.float64)  # of rank 3
    hessian = inputs.T @ inputs - 0.05 * torch.eye(8, dtype=torch.float64)
    weight = torch.randn(4, 8, dtype=torch.float64)
    pruned, damping = prune_damped(weight, [hessian], (range(8),), Pattern.parse("2:4"), 0.0)
    assert damping > 1e-3
    assert bool(pruned.isfinite().all())
    assert int((pruned != 0).sum()) == 16


def test_prune_of_inputs_that_are_all_zero_still_holds_the_pattern() -> None:
    model = make_chain()
    report = prune(model, batches=[torch.zeros(4, 16)], calibrate_bias=False, keep_dense=["c"])
    nn.init.zeros_(model.a.weight)
    nn.init.zeros_(model.a.bias)
    model.b.load_state_dict(make_chain().b.state_dict())
    report = prune(model, keep_dense=["c"])
    assert int((model.b.weight == 0).sum()) == 128
    assert report.rows[0].error == report.rows[0].magnitude_error == 0


def test_prune_of_inputs_far_from_zero_is_as_exact_as_around_zero() -> None:
    far, near = make_chain(), make_chain()
    with torch.no_grad():
        far.a.bias += 1000
        near.b.bias += 1000 * near.b.weight.sum(1)
    errors = [prune(model, keep_dense=["c"]).rows[0].error for model in (far, near)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)


def test_prune_counts_a_batch_by_its_weight() -> None:
    first, second = make_inputs(2)
    many, weighted = make_chain(), make_chain()
    prune(many, batches=[first, first, first, second])
    prune(weighted, batches=[sdm.CalibrationBatch((first,), weight=3.0), {"x": second}])
    torch.testing.assert_close(many.b.weight, weighted.b.weight)
    other = make_chain()
    prune(other, batches=[first, second])
    assert not torch.allclose(other.b.weight, weighted.b.weight)


class Tied(nn.Module):
    """A weight that is used twice, once as a factor of a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.d = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.b(self.a(x)))
        out: Tensor = self.d(3 * h @ self.b.weight.T)
        return out


def test_prune_of_a_tied_weight_sums_over_its_uses() -> None:
    torch.manual_seed(0)
    model = Tied()
    dense = copy.deepcopy(model)
    report = prune(model)
    assert [(row.weight, row.bias) for row in report.rows] == [("b.weight", False)]
    inputs = []
    for x in make_inputs():
        first = dense.a(x)
        inputs += [first, 3 * torch.relu(dense.b(first))]
    rows = torch.cat(inputs).detach().double()
    hessian = rows.T @ rows / len(rows)
    target, pruned = dense.b.weight.detach().double(), model.b.weight.detach().double()
    error = measure(pruned - target, hessian) / measure(target, hessian)
    assert report.rows[0].error == pytest.approx(error, rel=1e-4)


class Attending(nn.Module):
    """A module whose last projection is hidden inside an op."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.d = nn.Linear(16, 16), nn.Linear(16, 16)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        out: Tensor = self.d(self.attn(h, h, h, need_weights=False)[0])
        return out


def test_prune_of_hidden_inputs_takes_magnitude_and_says_so() -> None:
    model = Attending()
    dense = copy.deepcopy(model)
    report = prune(model, batches=[torch.randn(4, 6, 16)])
    hidden = [row for row in report.rows if row.weight == "attn.out_proj.weight"]
    assert [(row.method, row.error) for row in hidden] == [("magnitude", None)]
    assert hidden[0].reason == "its inputs are hidden inside multi_head_attention"
    weight = dense.attn.out_proj.weight.detach()
    mask = Pattern.parse("2:4").compute_mask(weight)
    assert torch.equal(model.attn.out_proj.weight, weight * mask)


def test_prune_of_a_student_then_its_calls_stay_what_its_weights_are() -> None:
    dense, teacher = make_chain(), make_chain()
    student = sdm.compile(teacher, "2:4", backend="eager")
    report = prune(student, None)
    prune(dense)
    assert [row.weight for row in report.rows] == ["b.weight", "c.weight"]
    torch.testing.assert_close(student.c.weight, dense.c.weight)
    x = make_inputs()[0]
    torch.testing.assert_close(student(x), dense(x))


def test_prune_of_a_diffusers_unet_equals_its_compiled_student() -> None:
    model, args, kwargs = UNET.make(batch=4)
    report = prune(model, "2:4", [sdm.CalibrationBatch(args, kwargs)], passes=1)
    assert report.fallbacks == ()
    assert report.mean_error < 0.5 * report.mean_magnitude_error
    student = sdm.compile(model, "2:4", backend="eager")
    with torch.no_grad():
        out, expected = student(*args, **kwargs).sample, model(*args, **kwargs).sample
    assert torch.equal(out, expected)
    assert {row.weight for row in report.rows} == {*sdm.masked_parameters(student)}


def test_prune_in_parts_where_the_memory_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.OneShotOptions, "most_columns", 10)
    model = make_chain()
    report = prune(model)
    assert [row.parts for row in report.rows] == [2, 2]
    for row in report.rows:
        weight = model.get_parameter(row.weight).detach()
        assert torch.equal(weight, weight * Pattern.parse("2:4").compute_mask(weight))
        assert row.error <= row.magnitude_error


def test_prune_makes_more_passes_where_hessians_do_not_fit_together() -> None:
    model = make_chain(512)
    batches = make_inputs(1, 512)
    few = prune(model, batches=batches, passes=1, memory=1 << 24)
    apart = make_chain(512)
    prune(apart, batches=batches, passes=1, memory=1 << 20)
    assert len(few.rows) == 2
    assert not torch.equal(model.c.weight, apart.c.weight)


def test_prune_of_a_bfloat16_model_holds_the_pattern_and_its_dtype() -> None:
    model = make_chain().bfloat16()
    report = prune(model, batches=[x.bfloat16() for x in make_inputs()])
    for row in report.rows:
        weight = model.get_parameter(row.weight).detach()
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, weight * Pattern.parse("2:4").compute_mask(weight))
        assert row.error < row.magnitude_error


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_iterate_rows_of_a_convolution_times_its_matrix_is_its_output(dims: int) -> None:
    x = torch.randn(2, 4, *[7] * dims)
    weight = torch.randn(6, 4, *[3] * dims)
    conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    for options in (
        {"stride": 2, "padding": 1},
        {"padding": "same", "dilation": 2},
        {"padding": "valid"},
        {"stride": (2,) * dims, "padding": (1,) * dims, "dilation": (1,) * dims},
    ):
        values = {"input": x, "weight": weight, **options}
        rows = torch.cat([*iterate_rows(values, f"conv{dims}d", 4 * 3**dims)])
        out = (rows.double() @ to_matrix(weight).T).view(2, -1, 6).mT
        expected = conv(x, weight, **options).flatten(2)
        torch.testing.assert_close(out.float(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(from_matrix(to_matrix(weight), weight), weight)


REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"batches": []}, DataError, "there are no calibration batches"),
    ({"batches": torch.zeros(4, 16)}, DataError, "are no list of calls"),
    ({"batches": [3.0]}, DataError, "of type float is neither a tensor"),
    ({"batches": [torch.zeros(4, 9)]}, DataError, r"cannot be called with .* shapes \[4, 9\]"),
    ({"batches": [*make_inputs(), torch.zeros(4, 9)]}, DataError, r"of shapes \[4, 9\]"),
    ({"batches": [torch.full((4, 16), torch.nan)]}, DataError, "'b.weight' hold NaN or Inf"),
    ({"pattern": None}, ConfigError, "pattern is missing"),
    ({"pattern": None, "policy": "all"}, ConfigError, "go with a pattern"),
    ({"pattern": "1:32"}, ConfigError, "no weight of Chain is pruned to 1:32"),
    ({"method": "taylor"}, ConfigError, "method 'taylor' is none of obs, wanda, magnitude"),
    ({"damping": -1.0}, ConfigError, "damping -1.0 is not a share"),
    ({"passes": 0}, ConfigError, "passes 0"),
    ({"memory": 5}, ConfigError, "memory 5 bytes"),
    ({"keep_dense": ["nothing"]}, ConfigError, "names no parameter"),
]


@pytest.mark.parametrize(("options", "error", "says"), REFUSALS)
def test_prune_of_an_invalid_request_is_refused_and_the_model_untouched(
    options: dict[str, Any], error: type[Exception], says: str
) -> None:
    model = make_chain()
    before = list_weights(model)
    with pytest.raises(error, match=says) as caught:
        prune(model, **options)
    assert "\n" not in str(caught.value)
    assert_untouched(model, before)


def test_prune_with_a_failure_in_a_later_pass_leaves_the_model_untouched() -> None:
    class Breaking(Chain):
        """Its third layer's inputs are infinite once its second layer is pruned."""

        def forward(self, x: Tensor) -> Tensor:
            bad = torch.inf if is_pruned(self.b) else 0.0
            out: Tensor = self.d(self.c(self.b(self.a(x)) + bad))
            return out

    def is_pruned(layer: nn.Module) -> bool:  # unseen: what other ops read is not pruned
        with torch._C.DisableTorchFunction():
            return bool((layer.weight == 0).any())

    model = Breaking()
    before = list_weights(model)
    with pytest.raises(DataError, match=r"inputs of 'c\.weight' hold NaN or Inf"):
        prune(model, batches=make_inputs())
    assert_untouched(model, before)


def test_prune_of_weights_with_nan_is_refused() -> None:
    model = make_chain()
    with torch.no_grad():
        model.b.weight[0, 0] = torch.nan
    with pytest.raises(MaskError, match=r"'b\.weight' holds 1 NaN"):
        prune(model)


def test_prune_of_layers_that_are_never_called_is_refused() -> None:
    model = make_chain()
    model.extra = nn.Linear(16, 16)
    with pytest.raises(ConfigError, match=r"never call extra: .* keep_dense=\['extra'\]"):
        prune(model)
    assert len(prune(model, keep_dense=["extra"]).rows) == 2


def test_prune_of_a_folded_or_partly_compiled_model_is_refused() -> None:
    folded = sdm.compile(make_chain(), "2:4", mode="infer", backend="eager")
    with pytest.raises(ConfigError, match="folded for inference"):
        prune(folded, None)
    student = sdm.compile(make_chain(), "2:4", backend="eager")
    with pytest.raises(ConfigError, match="is compiled to '2:4' already"):
        prune(student, "1:4")
    with pytest.raises(ConfigError, match="parts of Sequential are compiled"):
        prune(nn.Sequential(student, nn.Linear(16, 16)), "2:4")


class _StopError(Exception):
    pass


def test_prune_interrupted_in_a_pass_then_resumes_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, model = make_chain(), make_chain()
    options = {"policy": "all", "passes": 2}
    expected = prune(whole, **options)
    before, solve_layer, calls = list_weights(model), jobs.solve_layer, 0

    def solve_three(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise _StopError
        return solve_layer(*args, **kwargs)

    monkeypatch.setattr(jobs, "solve_layer", solve_three)
    with pytest.raises(_StopError):
        prune(model, out=tmp_path, **options)
    assert_untouched(model, before)
    assert len(list((tmp_path / "layers").iterdir())) == 3
    calls = 10
    report = prune(model, out=tmp_path, **options)
    assert calls == 11  # only the layer that was missing
    assert_untouched(model, list_weights(whole))
    assert [row.to_dict() for row in report.rows] == [row.to_dict() for row in expected.rows]


def test_prune_into_the_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    prune(make_chain(), out=tmp_path)
    for options, what in (({"damping": 0.5}, "damping"), ({"batches": make_inputs(2)}, "batches")):
        with pytest.raises(ConfigError, match=f"one-shot run with another {what}"):
            prune(make_chain(), out=tmp_path, **options)
    with pytest.raises(ConfigError, match="one-shot run with another model"):
        prune(make_chain(seed=1), out=tmp_path)
    (tmp_path / "layers" / "00000.safetensors").write_bytes(b"broken")
    model = make_chain()
    before = list_weights(model)
    with pytest.raises(CheckpointError, match="is damaged"):
        prune(model, out=tmp_path)
    assert_untouched(model, before)
    (tmp_path / "one_shot.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is damaged"):
        prune(make_chain(), out=tmp_path)


def test_report_is_plain_values_and_a_table() -> None:
    report = prune(make_chain())
    plain = json.loads(json.dumps(report.to_dict()))
    assert [row["weight"] for row in plain["layers"]] == ["b.weight", "c.weight"]
    assert plain["mean_error"] < plain["mean_magnitude_error"]
    assert "2 weights pruned in one shot by obs" in str(report)
    assert report.batches == 3
    assert report.fallbacks == ()


def test_batches_are_moved_to_the_model_for_its_first_call() -> None:
    net = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)]).to("meta")
    batch = CalibrationBatch((torch.randn(2, 16),), {"y": torch.ones(1), "n": 3})
    placed = batch.to_model(net)
    assert placed.args[0].is_meta
    assert placed.kwargs["y"].is_meta
    assert placed.kwargs["n"] == 3
    config = CompileConfig.create("2:4")
    _, targets = list_candidates(net, config, [Pattern.parse("2:4")], CalibrationBatch(batch.args))
    assert [*targets] == ["1.weight", "2.weight"]


def test_moments_of_a_pass_are_freed_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []
    collect = Job.collect

    def watch(self: Job, *arguments: Any) -> Any:
        assert not any(squares() is not None for squares in alive)
        statistics = collect(self, *arguments)
        alive.extend(weakref.ref(own.squares[0]) for own in statistics.values())
        return statistics

    monkeypatch.setattr(Job, "collect", watch)
    net = nn.Sequential(*[nn.Linear(16, 16) for _ in range(6)])
    sdm.prune_one_shot(net, "2:4", [torch.randn(8, 16)], passes=4, progress=False)
    assert len(alive) == 4
    options = {"macs": "2:4", "passes": 4, "progress": False}
    sdm.choose_patterns(net, ["2:4", "1:4"], [torch.randn(8, 16)], **options)
    assert len(alive) == 8
