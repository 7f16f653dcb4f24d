"""The noise schedule in ``../scheduler`` of a pipeline, for training and sampling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from sparsedm_compiler.diffusion.schedulers import make_scheduler
from sparsedm_compiler.errors import ConfigError
from sparsedm_compiler.models.schedules import read_schedule

STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    folder = tmp_path / "pipeline/unet"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "euler"])
@pytest.mark.parametrize("zero", [False, True], ids=["", "zero_snr"])
def test_make_scheduler_with_the_betas_of_a_pipeline_has_its_noise_levels(
    unet: Path, sampler: str, zero: bool
) -> None:
    saved = DDIMScheduler(**STABLE, prediction_type="v_prediction", rescale_betas_zero_snr=zero)
    saved.save_pretrained(unet.parent / "scheduler")
    for spec in (unet, unet / "config.json"):
        schedule = read_schedule(str(spec))
        assert schedule is not None
        assert schedule.objective == "v"
        assert schedule.source == unet.parent / "scheduler/scheduler_config.json"
        made = make_scheduler(sampler, schedule.objective, betas=schedule.betas)
        assert made.config.prediction_type == "v_prediction"
        torch.testing.assert_close(made.alphas_cumprod[:-1], saved.alphas_cumprod[:-1])
        default = make_scheduler(sampler, "v")
        assert not torch.allclose(default.alphas_cumprod, saved.alphas_cumprod, atol=1e-2)


@pytest.mark.parametrize(
    ("scheduler", "objective"),
    [
        (DDPMScheduler(), "eps"),
        (DDPMScheduler(prediction_type="sample"), "x0"),
        (FlowMatchEulerDiscreteScheduler(), "flow"),
    ],
    ids=["eps", "x0", "flow"],
)
def test_read_schedule_returns_the_objective(unet: Path, scheduler: Any, objective: str) -> None:
    assert read_schedule(str(unet)) is None
    scheduler.save_pretrained(unet.parent / "scheduler")
    schedule = read_schedule(str(unet))
    assert schedule is not None
    assert schedule.objective == objective
    assert (schedule.betas is None) == (objective == "flow")
    assert read_schedule("uvit-cifar10-small") is None
    assert read_schedule("package.module:function") is None


def test_read_schedule_of_a_damaged_or_unknown_file_raises(unet: Path) -> None:
    file = unet.parent / "scheduler/scheduler_config.json"
    file.parent.mkdir()
    for text in ("{", "[]", "{}"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"cannot read .*scheduler_config"):
            read_schedule(str(unet))
    file.write_text(json.dumps({"_class_name": "DDPMScheduler", "prediction_type": "score"}))
    with pytest.raises(ConfigError, match="prediction_type 'score'; known: epsilon"):
        read_schedule(str(unet))
