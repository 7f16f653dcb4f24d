"""Masks that settle: frozen at a share, chosen every k steps, by saliency, softly; and resumed."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sparsedm_compiler as sdm
from sparsedm_compiler import ConfigError, StoppedError
from sparsedm_compiler.masks.held_mask import project_softly
from sparsedm_compiler.train import FinetuneConfig, loop
from tests.oracle import brute_mask
from tests.train.cases import SPARSE, short, student_of, teacher
from tests.train.test_methods import recorded

HELD: tuple[dict[str, Any], ...] = (
    {"mask_every": 5},
    {"score": "saliency"},
    {"score": "saliency", "mask_every": 3},
    {"soft_threshold": True},
)
STOPS: tuple[tuple[dict[str, Any], int], ...] = (
    *((options, 56) for options in HELD),
    ({"freeze": 0.5}, 64),
    ({"freeze": 0.5, "mask_every": 5}, 32),
    ({"freeze": 0.4, "soft_threshold": True}, 56),
    ({"freeze": 0.5, "score": "saliency"}, 48),
)
"""Options, and the images after which the run of 96 is stopped."""


def read_masks(run: Any) -> dict[str, torch.Tensor]:
    """The masks of the run's student now; nothing before its first call."""
    try:
        return {n: m.clone() for n, m in sdm.get_masks(run.student).items()}
    except ConfigError:
        return {}


def count_changes(seen: list[dict[str, torch.Tensor]]) -> list[int]:
    """The steps before which a mask changed."""
    pairs = itertools.pairwise(seen)
    return [
        k
        for k, (old, new) in enumerate(pairs, 1)
        if old and any(not torch.equal(old[n], new[n]) for n in new)
    ]


def test_masks_change_in_most_steps_without_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded(monkeypatch, read_masks)
    short("ste")
    assert len(count_changes(seen)) > 6


def test_masks_of_every_fifth_step_change_there_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded(monkeypatch, read_masks)
    _, student = short("ste", mask_every=5)
    assert count_changes(seen) == [5, 10]
    assert sdm.get_masks(student, fixed=True) == {}  # at the end they are those of the weights


@pytest.mark.parametrize("method", [name for name in SPARSE if name != "asp"])
def test_frozen_masks_stay_from_the_share_on(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded(monkeypatch, lambda run: (run.frozen, read_masks(run)))
    result, student = short(method, freeze=0.5)
    first = 9 if method in ("progressive", "transfer") else 6  # of the last stage's steps
    assert [state for state, _ in seen] == [step >= first for step in range(12)]
    masks = sdm.get_masks(student, fixed=True)
    assert masks
    for name, mask in masks.items():
        for model in (student, result.ema):
            weight = model.get_parameter(name)
            assert int((weight[~mask] != 0).sum()) == 0
    after = [masks for state, masks in seen if state]
    assert count_changes(after) == []


def test_saliency_masks_keep_the_largest_weight_times_root_mean_square_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checked = 0

    def check(run: Any) -> None:
        nonlocal checked
        state = run.process.optimizer.optimizer.state
        for name, (weight, pattern) in sdm.masked_parameters(run.student).items():
            mask = sdm.get_masks(run.student, fixed=True)[name]
            scores = weight.detach().clone()
            if weight in state:
                scores *= state[weight]["exp_avg_sq"].sqrt()
            assert torch.equal(mask, brute_mask(scores, pattern))
            checked += weight in state and not torch.equal(mask, brute_mask(weight, pattern))

    recorded(monkeypatch, check)
    _, student = short("ste", score="saliency")
    assert checked > 0
    for name, mask in sdm.get_masks(student, fixed=True).items():  # frozen at the end
        assert int((student.get_parameter(name)[~mask] != 0).sum()) == 0


def test_soft_threshold_runs_by_fixed_scales_and_is_written_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = recorded(monkeypatch, lambda run: dict(run.mask_scales))
    result, student = short("ste", soft_threshold=True)
    assert seen[0]
    assert all(scales == seen[0] for scales in seen)
    for model in (student, result.ema):
        for name, (weight, pattern) in sdm.masked_parameters(model).items():
            assert torch.equal(weight, weight * pattern.compute_mask(weight.detach())), name
    x, t, y = torch.randn(2, 1, 4, 4), torch.tensor([5, 500]), torch.tensor([0, 1])
    plain = teacher()
    plain.load_state_dict(result.ema.state_dict())
    torch.testing.assert_close(result.ema(x, t, y), plain(x, t, y))


def test_soft_threshold_shrinks_by_the_largest_pruned_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = {}

    def look(run: Any) -> None:
        before.update(
            {n: w.detach().clone() for n, (w, _) in sdm.masked_parameters(run.student).items()}
        )
        before["scales"] = dict(run.mask_scales)

    recorded(monkeypatch, look)
    real = loop.take_step
    monkeypatch.setattr(loop, "take_step", lambda run, batch, **o: real(run, batch, **o))
    _, student = short("ste", soft_threshold=True, lr=0.0, weight_decay=0.0, schedule="constant")
    for name, (weight, pattern) in sdm.masked_parameters(student).items():
        soft = project_softly(before[name], pattern) * before["scales"][name]
        torch.testing.assert_close(weight.detach(), soft)


@pytest.mark.parametrize(("options", "stop"), STOPS, ids=str)
def test_a_stopped_run_resumes_to_the_same_weights(
    options: dict[str, Any], stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**options, "held_out": None, "save_every": 96, "log_every": 96}  # which cost time
    whole, _ = short("sr-ste", tmp_path / "whole", **options)
    real = loop.record

    def record(run: Any, before: int, norm: Any) -> None:
        real(run, before, norm)
        if run.progress.seen == stop and not resumed:
            loop.save_run(run)
            raise StoppedError("stopped")

    resumed = False
    monkeypatch.setattr(loop, "record", record)
    with pytest.raises(StoppedError):
        short("sr-ste", tmp_path / "parts", **options)
    resumed = True
    parts, _ = short("sr-ste", tmp_path / "parts", **options)
    assert parts.losses == whole.losses
    files = [load_file(tmp_path / run / "student.safetensors") for run in ("whole", "parts")]
    assert files[0].keys() == files[1].keys()
    for name in files[0]:
        assert torch.equal(files[0][name], files[1][name]), name


def test_one_shot_start_equals_pruning_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded(monkeypatch, lambda run: copy.deepcopy(run.student.state_dict()))
    emas = recorded(monkeypatch, lambda run: [v.clone() for v in run.ema._values])
    short("asp", start="obs", start_images=24, seed=3)
    from tests.train.cases import data

    student = student_of(teacher(), "asp")
    batches = sdm.make_calibration_batches(student, data(), images=24, seed=3)
    sdm.prune_one_shot(student, None, batches, progress=False)
    for name, weight in student.state_dict().items():
        assert torch.equal(seen[0][name], weight), name
    for ours, weight in zip(emas[0], student.parameters(), strict=True):
        assert torch.equal(ours, weight)
    assert not torch.equal(
        student.get_parameter("mid_block.mlp.fc1.weight"),
        teacher().get_parameter("mid_block.mlp.fc1.weight"),
    )


def test_one_shot_start_of_an_untrained_student_is_measured() -> None:
    plain, _ = short("untrained", images=0)
    pruned, _ = short("untrained", images=0, start="obs")
    # Of two untrained students; which of them is the better one depends on torch's version.
    assert pruned.held_out[0].student != plain.held_out[0].student


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"freeze": 1.5}, r"freeze 1.5 is not a share, in \(0, 1\]"),
        ({"freeze": 0}, "freeze 0 is not > 0"),
        ({"mask_every": 0}, "mask_every 0 of a fine-tune is not >= 1"),
        ({"score": "gradient"}, "score 'gradient' is neither 'magnitude' nor 'saliency'"),
        ({"start": "obc"}, "start 'obc' is neither 'given', 'obs', 'wanda' nor 'magnitude'"),
        ({"soft_threshold": True, "mask_every": 3}, "does not go with mask_every"),
        ({"soft_threshold": True, "static_mask": True}, "does not go with static_mask=True"),
        ({"start": "obs", "shard": True}, "needs whole weights, not shard=True"),
        ({"method": "dense", "freeze": 0.5}, "method 'dense' has no masks"),
    ],
)
def test_options_of_masks_that_fit_nothing_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        FinetuneConfig.create(**options)


def test_saliency_with_an_optimizer_without_second_moment_is_refused() -> None:
    student = student_of(teacher(), "ste")
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)
    with pytest.raises(ConfigError, match="which SGD does not keep"):
        short("ste", student=student, optimizer=optimizer, score="saliency")
