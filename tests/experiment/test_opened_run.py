"""A request is checked whole before anything is written: data against the model, every image."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image

from sparsedm_compiler import ConfigError, DataError
from sparsedm_compiler.experiment import opened_run
from sparsedm_compiler.experiment import run as experiment
from sparsedm_compiler.experiment.inputs import make_training_scheduler
from sparsedm_compiler.experiment.run import describe, run
from sparsedm_compiler.experiment.run_config import RunConfig
from sparsedm_compiler.experiment.yaml_values import merge

VALUES: dict[str, Any] = {
    "model": {"name": "pipeline/unet"},
    "data": {"train": "photos"},
    "prune": {"pattern": "1:4", "backend": "eager"},
    "train": {"images": 16, "batch_size": 8},
    "sample": {"sampler": "ddim", "steps": 2, "grid": 4},
    "out": "run",
}


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline with a UNet for images of 8 pixels, and 12 photos of 9."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(experiment, "train_run", None)
    macs = {"dense": 2, "sparse": 1, "attention": 0}  # counting takes seconds
    monkeypatch.setattr(opened_run, "count_run_macs", lambda *_: macs)
    torch.manual_seed(0)
    make_unet().save_pretrained("pipeline/unet")
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (9, 9, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
    return folder


def make_unet(**options: Any) -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        **options,
    )


def make_config(**sections: Any) -> RunConfig:
    return RunConfig.create(merge(VALUES, sections))


def refuse(config: RunConfig, kind: type[Exception], says: str) -> None:
    """Holds that ``config`` is refused in one line, run and previewed, and nothing is written."""
    for call in (run, describe):
        with pytest.raises(kind, match=says) as refusal:
            call(config)
        assert "\n" not in str(refusal.value)
        assert not Path(config.out).exists()


def test_run_with_images_that_the_model_does_not_take_names_option_and_value(photos: Path) -> None:
    refuse(make_config(), DataError, r"\[3, 9, 9\]: it takes \[3, 8, 8\]: set data\.size=8")
    grey = make_config(data={"train": "digits", "labels": False})
    refuse(grey, DataError, "takes 3 channels: choose another data.train or another model.name")
    for name in ("a", "b"):
        (photos / name).mkdir()
    for number, path in enumerate(sorted(photos.glob("*.jpg"))):
        path.rename(photos / "ab"[number % 2] / path.name)
    sized = make_config(data={"size": 8})
    refuse(sized, DataError, r"and class labels: it takes no condition: set data\.labels=false")
    make_unet(num_class_embeds=1).save_pretrained("pipeline/unet")
    refuse(sized, DataError, "label 1 is none of the 1 classes of UNet2DModel: set model.options")
    plain = make_config(data={"size": 8, "labels": False})
    refuse(plain, DataError, "it needs class_labels: choose a data.train with labels")
    make_unet(num_class_embeds=2).save_pretrained("pipeline/unet")
    dropped = make_config(data={"size": 8}, train={"drop_condition": 0.1})
    refuse(dropped, ConfigError, "drop_condition needs null_label")
    dropped = make_config(data={"size": 8}, train={"drop_condition": 0.1, "null_label": 2})
    refuse(dropped, DataError, r"label 2 is none of the 2 classes .*: set train\.null_label")
    assert "2 classes" in describe(sized)


def test_describe_reads_every_image_and_names_all_that_are_broken(photos: Path) -> None:
    held = shutil.copytree(photos, "held")
    config = make_config(data={"size": 8, "held_out": "held"})
    assert "12 images [3, 8, 8] from photos, no labels" in describe(config)
    for folder in (photos, Path(held)):
        for number in (5, 7):
            path = folder / f"{number}.jpg"
            path.write_bytes(path.read_bytes()[:200])
        (folder / "notes.txt").write_text("notes")
        says = rf"2 images cannot be used: .*{folder.name}/5\.jpg .*; .*{folder.name}/7\.jpg cannot"
        with pytest.raises(DataError, match=says):
            describe(config)
        for number in (5, 7):
            (folder / f"{number}.jpg").unlink()
    text = describe(config)
    for name in ("photos", "held"):
        assert f"10 images [3, 8, 8] from {name}, no labels; left out 1 file of kinds" in text


def test_run_with_held_out_labels_that_the_model_does_not_have_is_refused(photos: Path) -> None:
    for name, classes in (("photos", 2), ("held", 3)):
        for number in range(classes):
            folder = Path(name, f"class{number}")
            folder.mkdir(parents=True)
            shutil.copy(photos / "0.jpg", folder)
    for path in photos.glob("*.jpg"):
        path.unlink()
    make_unet(num_class_embeds=2).save_pretrained("pipeline/unet")
    config = make_config(data={"size": 8, "held_out": "held"})
    refuse(config, DataError, "the held-out data: label 2 is none of the 2 classes of UNet2DModel")
    assert "2 classes" in describe(make_config(data={"size": 8, "held_out": "photos"}))


def test_describe_shows_weights_device_processes_and_held_out_data(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(data={"size": 8})
    lines = dict(line.split(maxsplit=1) for line in describe(config).splitlines())
    assert lines["model"].endswith("the weights in pipeline/unet")
    assert lines["device"] == "1 process on cpu"
    assert lines["held"] == "out   none: no held-out loss (set data.held_out)"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # as accelerate launch --cpu sets it
    held = make_config(data={"size": 8, "held_out": "photos", "held_out_limit": 3})
    lines = dict(line.split(maxsplit=1) for line in describe(held).splitlines())
    assert "launch --cpu starts one, whatever --num_processes says" in lines["device"]
    assert lines["held"] == "out   3 images [3, 8, 8] from photos, no labels"
    dense = make_config(model={"name": "pipeline/unet/config.json"}, train={"method": "dense"})
    text = describe(RunConfig.create(merge(dense.as_dict(), {"data": {"size": 8}})))
    assert "random weights of seed 0" in text


def test_config_of_a_folder_without_weights_is_refused(photos: Path) -> None:
    for path in Path("pipeline/unet").glob("diffusion_pytorch_model*"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"pipeline/unet has random weights: set model\.weights"):
        make_config()


def test_run_follows_the_scheduler_beside_the_model(photos: Path) -> None:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    saved = DDIMScheduler(**betas, prediction_type="v_prediction")
    saved.save_pretrained("pipeline/scheduler")
    sized = make_config(data={"size": 8})
    refuse(sized, ConfigError, "predicts 'v_prediction', train.objective is 'eps': set train.obj")
    config = make_config(data={"size": 8}, train={"objective": "v"})
    assert "objective v" in describe(config)
    scheduler = make_training_scheduler(config)
    assert scheduler is not None
    clean, noise, t = torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([500])
    assert scheduler.add_noise(clean, noise, t) == saved.add_noise(clean, noise, t)
    opened = opened_run.open_run(config, torch.device("cpu"))
    inputs = experiment.make_run_inputs(config, opened)
    assert inputs.scheduler is not None
    assert inputs.scheduler.config["beta_end"] == 0.012
    assert "model.scheduler" in opened.prints


def test_dense_runs_start_from_the_same_random_weights(photos: Path) -> None:
    name = "pipeline/unet/config.json"
    for seed, same in ((0, True), (1, False)):
        config = make_config(model={"name": name}, train={"method": "dense", "seed": seed})
        model = opened_run.open_dense_model(config, torch.device("cpu"))
        first = opened_run.open_dense_model(
            make_config(model={"name": name}, train={"method": "dense"}), torch.device("cpu")
        )
        assert torch.equal(model.conv_in.weight, first.conv_in.weight) == same
