"""Each method does what its line in METHODS says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import sparsedm_compiler as sdm
from sparsedm_compiler import ConfigError, Pattern
from sparsedm_compiler.masks.nm_mask import nm_mask
from sparsedm_compiler.train import METHODS, FinetuneConfig, finetune, loop
from sparsedm_compiler.train import stage_switch as staging
from sparsedm_compiler.train import step as steps
from sparsedm_compiler.train.methods import plan_patterns
from tests.train.cases import SPARSE, data, short, student_of, teacher, weights


def recorded(monkeypatch: pytest.MonkeyPatch, look: Any) -> list[Any]:
    """What ``look(run)`` says before every step."""
    seen: list[Any] = []
    real = loop.take_step

    def step(run: Any, batch: Any, **options: Any) -> Any:
        seen.append(look(run))
        return real(run, batch, **options)

    monkeypatch.setattr(loop, "take_step", step)
    return seen


def test_create_with_method_and_options_prefers_the_options() -> None:
    asp = FinetuneConfig.create("asp")
    assert (asp.static_mask, asp.beta, asp.sr_ste_lambda, asp.teacher) == (True, 0.0, 0.0, "none")
    assert FinetuneConfig.create("asp", beta=0.5).beta == 0.5
    paper = FinetuneConfig.create("sparsedm")
    assert (paper.alpha, paper.beta, paper.sr_ste_lambda) == (1.0, 0.1, 2e-4)
    assert paper == FinetuneConfig()


@pytest.mark.parametrize(
    ("pattern", "stages"),
    [
        ("2:4", ["3:4", "2:4"]),
        ("1:4", ["2:4", "1:4"]),
        ("1:8x16", ["4:8x16", "2:8x16", "1:8x16"]),
        ("64:1:8", ["64:2:8", "64:1:8"]),
        ("31:32", ["31:32"]),
        ("1:4t", ["2:4t", "1:4t"]),
        ("2:4t", ["3:4t", "2:4t"]),
        ("3:4t", ["3:4t"]),
    ],
)
def test_plan_patterns_halves_the_kept_weights_per_stage(pattern: str, stages: list[str]) -> None:
    assert [str(stage) for stage in plan_patterns(Pattern.parse(pattern))] == stages


def test_methods_sparsedm_and_sr_ste_differ_by_the_teacher_alone() -> None:
    lone = short("sr-ste")[0].losses
    assert short("sparsedm", beta=0.0)[0].losses == lone
    assert short("sparsedm")[0].losses != lone
    assert short("sr-ste", sr_ste_lambda=0.0)[0].losses == short("ste")[0].losses != lone


def test_method_asp_never_changes_its_mask() -> None:
    before = student_of(teacher())
    with torch.no_grad():
        before(torch.zeros(1, 1, 4, 4), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    kept = {
        name: nm_mask(weight, pattern)
        for name, (weight, pattern) in sdm.masked_parameters(before).items()
    }
    _, student = short("asp", weight_decay=0.1)
    for name, mask in kept.items():
        weight = student.get_parameter(name)
        assert not weight[~mask].any()
        assert weight[mask].all()


@pytest.mark.parametrize("method", ["ste", "asp"])
def test_flip_rate_is_zero_with_asp_alone(tmp_path: Any, method: str) -> None:
    short(method, tmp_path, lr=0.1)
    lines = [entry["flip_rate"] for entry in log_lines(tmp_path)]
    moved = [rate for rate in lines if rate]
    assert bool(moved) == (method == "ste")


def log_lines(folder: Any) -> list[dict[str, Any]]:
    from tests.train.cases import log_of

    return [entry for entry in log_of(folder) if "flip_rate" in entry]


def test_method_progressive_tightens_the_pattern_in_equal_shares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = recorded(monkeypatch, lambda run: str(sdm.pattern_of(run.student)))
    _, student = short("progressive", student=student_of(teacher(), pattern="1:8"))
    assert seen == ["4:8"] * 4 + ["2:8"] * 4 + ["1:8"] * 4
    assert str(sdm.pattern_of(student)) == "1:8"


def test_stages_option_sets_the_patterns() -> None:
    result, _ = short("progressive", stages=["3:4", "2:4", "1:4"])
    assert result.config.stages == ("3:4", "2:4", "1:4")
    with pytest.raises(ConfigError, match="not the student's own pattern '1:4'"):
        short("progressive", stages=["3:4", "2:4"])


def test_method_transfer_makes_each_student_teach_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    taught: list[Any] = []
    real = staging.begin_stage

    def begin(run: Any) -> None:
        average = [value.clone() for value in run.ema.state_dict().values()]
        real(run)
        taught.append((run, average))
        assert str(sdm.pattern_of(run.teacher)) == "2:4"
        assert str(sdm.pattern_of(run.student)) == "1:4"
        for ours, theirs, old in zip(
            run.student.parameters(), run.teacher.parameters(), average, strict=True
        ):
            assert torch.equal(ours, old)
            assert torch.equal(theirs, old)
            assert not theirs.requires_grad
        assert not run.process.optimizer.state

    monkeypatch.setattr(loop, "begin_stage", begin)
    rates = recorded(monkeypatch, lambda run: run.process.optimizer.param_groups[0]["lr"])
    short("transfer")
    assert len(taught) == 1
    run, average = taught[0]
    assert all(map(torch.equal, weights(run.teacher), average)), "the teacher was trained"
    assert rates[1:6] == pytest.approx(rates[7:12]), "the rate starts anew"


def test_method_untrained_changes_no_weight() -> None:
    before = weights(teacher())
    result, student = short("untrained")
    assert all(map(torch.equal, weights(student), before))
    assert (result.images, result.losses, result.ema) == (0, (), None)
    assert len(result.held_out) == 1


def test_method_dense_trains_the_model_itself() -> None:
    result, student = short("dense")
    assert result.pattern is None
    with pytest.raises(ConfigError, match="was not compiled"):
        sdm.explain(student)
    with pytest.raises(ConfigError, match="trains a dense model"):
        short("dense", student=student_of(teacher()))


@pytest.mark.parametrize("method", SPARSE)
def test_sparse_methods_with_a_dense_student_raise(method: str) -> None:
    if METHODS[method].options.get("sr_ste_lambda", 1.0) or method != "ste":
        with pytest.raises(ConfigError, match="was not compiled"):
            short(method, student=teacher(1))


def test_methods_end_with_different_losses() -> None:
    ends = {method: short(method)[0].held_out[-1].final for method in METHODS}
    assert len({*ends.values()}) == len(METHODS)
    assert max(ends, key=ends.__getitem__) == "untrained"
    assert min(ends, key=ends.__getitem__) == "dense"


def test_compute_losses_returns_the_weighted_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    terms: list[list[float]] = []
    real = steps.compute_losses

    def spy(run: Any, micro_batch: Any) -> Any:
        losses = real(run, micro_batch)
        terms.append(losses.tolist())
        return losses

    monkeypatch.setattr(steps, "compute_losses", spy)
    result, _ = short("sparsedm", alpha=0.5, beta=0.25)
    for (total, noise, taught), loss in zip(terms, result.losses, strict=True):
        assert total == pytest.approx(0.5 * noise + 0.25 * taught, rel=1e-6)
        assert loss == pytest.approx(total, rel=1e-7)
        assert taught > 0


def test_obs_distill_starts_from_obs_and_learns_the_teacher_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts: list[int] = []
    frozen = recorded(monkeypatch, lambda run: run.frozen)
    real = steps.compute_losses

    def spy(run: Any, micro_batch: Any) -> Any:
        losses = real(run, micro_batch)
        assert losses[0] == losses[2] > 0
        counts.append(sum(int((weight == 0).sum()) for weight in run.student.parameters()))
        return losses

    monkeypatch.setattr(steps, "compute_losses", spy)
    short("obs-distill")
    assert counts[0] > sum(int((weight == 0).sum()) for weight in teacher().parameters())
    assert frozen == [False] * 6 + [True] * 6


@pytest.mark.parametrize(
    ("method", "options"),
    [("obs-distill", {"beta": 0.0}), ("ste", {"alpha": 0.0}), ("dense", {"alpha": 0.0})],
)
def test_finetune_with_neither_truth_nor_teacher_raises(
    method: str, options: dict[str, float]
) -> None:
    with pytest.raises(ConfigError, match="learns from a teacher alone"):
        short(method, **options)


def test_obs_distill_without_a_teacher_raises() -> None:
    with pytest.raises(ConfigError, match="learns from a teacher alone"):
        finetune(student_of(teacher()), None, data(), method="obs-distill", images=8, batch_size=8)


def test_finetune_of_a_student_in_eval_mode_restores_the_mode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = student_of(teacher()).eval()
    modes = recorded(monkeypatch, lambda run: run.student.training)
    short("sparsedm", student=student)
    assert all(modes)
    assert not any(module.training for module in student.modules() if module is not nn.Identity)


def test_config_as_text_shows_the_budget_and_what_is_set() -> None:
    usual = FinetuneConfig.create("ste")
    assert str(usual) == "finetune ste images=128000 batch_size=128 lr=0.0002"
    config = usual.with_options({"images": 64, "flip": True, "beta": 0.5})
    assert str(config) == "finetune ste images=64 batch_size=128 beta=0.5 lr=0.0002 flip=True"
