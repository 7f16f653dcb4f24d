"""What a run leaves for people: log lines, TensorBoard, curves, mask flips, sample grids."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.diffusion import make_scheduler, sample
from sparsedm_compiler.masks.nm_mask import nm_mask
from sparsedm_compiler.train import SampleGrids
from sparsedm_compiler.train.run_log import MaskWatch, RunLog
from sparsedm_compiler.train.sample_grids import save_real_images
from tests.train.cases import CLASSES, data, log_of, short, student_of, teacher


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Every TensorBoard scalar by step."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_holds_the_values_of_the_log(tmp_path: Path) -> None:
    _, student = short("sparsedm", tmp_path, log_every=32)
    shown = scalars(tmp_path)
    lines = [line for line in log_of(tmp_path) if "loss" in line]
    assert [line["images"] for line in lines] == [32, 64, 96]
    for name in ("loss", "noise_loss", "teacher_loss", "lr", "grad_norm"):
        told = {line["images"]: line[name] for line in lines}
        assert shown[f"train/{name}"] == pytest.approx(told)
        assert all(value > 0 for value in told.values())
    masked = sdm.masked_parameters(student)
    for name, (weight, pattern) in masked.items():
        density = nm_mask(weight, pattern).float().mean().item()
        assert shown[f"density/{name}"] == pytest.approx(dict.fromkeys((32, 64, 96), density))
    held = [line["images"] for line in log_of(tmp_path) if "held_out" in line]
    assert [*shown["train/held_out_ema"]] == held == [0, 24, 48, 72, 96]


def test_log_of_a_short_run_has_a_line_per_step(tmp_path: Path) -> None:
    short("ste", tmp_path, log_every=None)
    assert [line["images"] for line in log_of(tmp_path) if "loss" in line] == [*range(8, 97, 8)]


def test_log_line_holds_the_mean_losses_since_the_line_before(tmp_path: Path) -> None:
    result, _ = short("sparsedm", tmp_path, log_every=32)
    lines = [line["loss"] for line in log_of(tmp_path) if "loss" in line]
    means = [sum(result.losses[k : k + 4]) / 4 for k in (0, 4, 8)]
    assert lines == pytest.approx(means)


def test_curves_png_is_drawn(tmp_path: Path) -> None:
    short("sparsedm", tmp_path, curves=True)
    curves = matplotlib.image.imread(tmp_path / "curves.png")
    assert curves.shape[0] > 400
    assert curves.std() > 0.02


def test_mask_watch_counts_changed_masks() -> None:
    model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 4))
    student = sdm.compile(model, pattern="2:4", policy="all", backend="eager")
    student(torch.randn(1, 8))
    watch = MaskWatch(student)
    first = watch.measure()
    assert first.rate is None
    assert set(first.density.values()) == {0.5}
    assert watch.measure().rate == 0
    with torch.no_grad():
        weight = student[0].weight
        mask = nm_mask(weight, sdm.Pattern.parse("2:4"))
        weight.copy_(torch.where(mask, 0.0, 1.0))  # kept and pruned change places: 32 of 48
    assert watch.measure().rate == pytest.approx(32 / 48)


def test_mask_watch_of_a_dense_model_has_no_rate() -> None:
    assert MaskWatch(nn.Linear(2, 2)).measure() == (found := MaskWatch(nn.Linear(2, 2)).measure())
    assert (found.rate, found.density) == (None, {})


def test_run_log_when_resumed_drops_later_lines(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    for images in (8, 16, 24):
        log.write_losses(images, (1.0, 0.5, 0.5), lr=0.1)
    log.write_held_out(24, 1.0, None)
    log.close()
    log = RunLog(tmp_path, 16)
    log.write_losses(20, (3.0, 2.0, 1.0), lr=0.1)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["images"], line["loss"]) for line in lines] == [(8, 1.0), (16, 1.0), (20, 3.0)]
    assert scalars(tmp_path)["train/loss"] == {8: 1.0, 16: 1.0, 20: 3.0}


def test_sample_grids_of_a_run_show_the_ema_at_fixed_seeds(tmp_path: Path) -> None:
    grids = SampleGrids(
        (1, 4, 4), count=12, sampler="ddim", steps=2, condition=torch.arange(12) % CLASSES
    )
    result, student = short("ste", tmp_path, sample_grids=grids, sample_every=48)
    held_out = data()[0][:8]  # all of them, fewer than a grid has
    grids.save(tmp_path / "again.png", held_out)
    assert (tmp_path / "real.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "000000000048.png",
        "000000000096.png",
    ]
    assert result.ema is not None
    grids.save(tmp_path / "again.png", grids.draw(result.ema, "eps"))
    again = (tmp_path / "again.png").read_bytes()
    assert (tmp_path / "samples/000000000096.png").read_bytes() == again
    grids.save(tmp_path / "other.png", grids.draw(student, "eps"))
    assert (tmp_path / "other.png").read_bytes() != again


def test_sample_grids_draw_samples_that_do_not_depend_on_the_count(tmp_path: Path) -> None:
    model = student_of(teacher())
    drawn = SampleGrids(
        (1, 4, 4), count=12, sampler="ddim", steps=2, condition=torch.zeros(12).long()
    )
    images = drawn.draw(model, "eps")
    alone = sample(
        model,
        make_scheduler("ddim", "eps"),
        shape=(1, 1, 4, 4),
        steps=2,
        condition=torch.zeros(1).long(),
        progress=False,
    )
    torch.testing.assert_close(images[:1], alone)
    drawn.save(tmp_path / "grid.png", images)
    assert matplotlib.image.imread(tmp_path / "grid.png").shape[1] > 10 * 64


def test_real_images_are_decoded_where_samples_are(tmp_path: Path) -> None:
    devices = []

    def decode(latents: Tensor) -> Tensor:
        devices.append(latents.device)
        return torch.zeros(len(latents), 3, 8, 8)

    grids = SampleGrids((1, 4, 4), count=4, columns=2, decode=decode)
    for device in (None, torch.device("meta")):
        save_real_images(grids, tmp_path / "real.png", torch.rand(6, 1, 4, 4), None, device)
    assert [device.type for device in devices] == ["cpu", "meta"]
    assert (tmp_path / "real.png").exists()
