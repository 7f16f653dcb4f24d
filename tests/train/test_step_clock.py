"""The rate of training: steps alone, without compiling, measuring, sampling and saving."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

import sparsedm_compiler as sdm
from sparsedm_compiler.models import UViT
from sparsedm_compiler.reporting import StepEntry, read_log, read_run
from sparsedm_compiler.train import loop, step_clock
from sparsedm_compiler.train.step_clock import StepClock
from sparsedm_compiler.train.training_bar import TrainingBar


def test_step_clock_laps_leave_compiling_and_pauses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(step_clock.time, "perf_counter", lambda: now[0])
    clock = StepClock()
    now[0] = 15.0
    clock.count(8, compiling=4.5)
    lap = clock.stop()
    assert (lap.images, lap.seconds, lap.compiling, lap.rate) == (8, 0.5, 4.5, None)
    now[0] = 100.0
    clock.start()
    now[0] = 100.25
    clock.count(8, compiling=0.0)
    now[0] = 100.5
    clock.count(8, compiling=0.0)
    assert clock.stop().rate == 32.0
    assert clock.stop().rate is None


def slow_backend(gm: fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., Any]:
    time.sleep(0.6)
    return gm.forward


def test_finetune_rate_leaves_compiling_measuring_and_sampling_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """48 steps of 8 images take milliseconds each; the rest takes seconds."""
    slow = loop.held_out_loss

    def measure(*args: Any, **options: Any) -> float:
        time.sleep(0.6)
        return slow(*args, **options)

    monkeypatch.setattr(loop, "held_out_loss", measure)
    torch._dynamo.reset()
    teacher = UViT(img_size=4, in_chans=1, embed_dim=8, depth=2, num_heads=2)
    student = sdm.compile(teacher, pattern="2:4", backend=slow_backend)
    images = torch.rand(32, 1, 4, 4) * 2 - 1
    options = {"held_out": images[:8], "held_out_every": 128, "log_every": 128, "out": tmp_path}
    result = sdm.finetune(
        student, teacher, images, images=384, batch_size=8, progress=False, **options
    )
    assert result.compile_seconds >= 0.6
    assert result.seconds < 48 * 0.1
    assert result.images_per_second > 8 / 0.1
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["images_per_second"] == result.images_per_second
    assert saved["compile_seconds"] == result.compile_seconds
    assert read_run(tmp_path).images_per_second == result.images_per_second
    steps = [entry for entry in read_log(tmp_path / "log.jsonl") if isinstance(entry, StepEntry)]
    assert [entry.images for entry in steps] == [128, 256, 384]
    assert all(entry.images_per_second > 8 / 0.1 for entry in steps)


def test_training_bar_estimates_from_steps_alone() -> None:
    bar = TrainingBar(total=1000, disable=False, file=open("/dev/null", "w"))  # noqa: SIM115
    bar.n = 100
    bar.start_t -= 500.0
    assert "?" in str(bar)
    bar.rates = [5.0, 10.0, 10.0]
    assert "01:30, 10.00it/s" in str(bar)
    bar.close()
    bar.fp.close()
