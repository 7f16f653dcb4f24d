"""Reading logs of whole, torn and resumed runs, and drawing their curves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image, ImageColor

from sparsedm_compiler.errors import DataError
from sparsedm_compiler.reporting import HeldOutEntry, StepEntry, read_log, save_curves
from sparsedm_compiler.reporting.charts import (
    CHARTS,
    DARK,
    LIGHT,
    Theme,
    draw_curves,
    find_charts,
    find_curves,
    has_curve,
    smooth,
    style_axis,
    trace_held_out_loss,
    trace_mask_flips,
    trace_training_loss,
)


def step(images: int, **changes: Any) -> dict[str, Any]:
    """A line as the loop writes it."""
    return {
        "images": images,
        "loss": 0.5,
        "noise_loss": 0.4,
        "teacher_loss": None,
        "lr": 1e-3,
        "grad_norm": 1.5,
        "flip_rate": 0.01,
        "density": {"a.weight": 0.5},
        "images_per_second": 100.0,
        **changes,
    }


def held(images: int, student: float = 0.25, ema: float | None = 0.125) -> dict[str, Any]:
    return {"images": images, "held_out": student, "held_out_ema": ema}


def written(folder: Path, *lines: dict[str, Any], tail: str = "") -> Path:
    path = folder / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return path


def test_read_log_returns_entries(tmp_path: Path) -> None:
    path = written(tmp_path, held(0, ema=None), step(64), step(128, loss=math.nan), held(128))
    first, second, third, last = read_log(path)
    assert first == HeldOutEntry(0, 0.25, None)
    assert second == StepEntry(64, 0.5, 1e-3, 0.4, None, 1.5, 0.01, 100.0)
    assert isinstance(third, StepEntry)
    assert math.isnan(third.loss)
    assert last == HeldOutEntry(128, 0.25, 0.125)
    assert read_log(written(tmp_path)) == ()


@pytest.mark.parametrize("tail", ['{"images": 128, "lo', '{"images": 128}', "{", "12"])
def test_read_log_ignores_a_torn_last_line(tmp_path: Path, tail: str) -> None:
    whole = read_log(written(tmp_path, step(64)))
    assert read_log(written(tmp_path, step(64), tail=tail)) == whole


def test_read_log_keeps_a_whole_last_line_without_newline(tmp_path: Path) -> None:
    assert len(read_log(written(tmp_path, step(64), tail=json.dumps(held(64))))) == 2


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"images": 128, "lo\n', r"log\.jsonl:2 is no line of a training log: "),
        ('{"images": 128, "lr": 1}\n', r"log\.jsonl:2 .*'loss' is None, not a number"),
        ('{"images": true, "loss": 1, "lr": 1}\n', "'images' is True"),
        ('{"images": 1, "loss": 1, "lr": 1, "flip_rate": "a"}\n', "'flip_rate' is 'a'"),
        ('{"images": 1, "held_out": null}\n', "'held_out' is None"),
        ("[1]\n", r"\[1\] is not an object"),
    ],
)
def test_read_log_of_a_broken_line_raises_with_its_number(
    tmp_path: Path, line: str, says: str
) -> None:
    with pytest.raises(DataError, match=says):
        read_log(written(tmp_path, step(64), tail=line))


def test_read_log_of_a_missing_file_raises_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*log\.jsonl: No such file"):
        read_log(tmp_path / "log.jsonl")


def test_read_log_of_a_resumed_run_replaces_old_lines(tmp_path: Path) -> None:
    before = [step(64), step(128), held(128), step(192, loss=9.0), step(256, loss=9.0), held(256)]
    after = [step(192), step(256), held(256, 0.1), step(320)]
    entries = read_log(written(tmp_path, *before, *after))
    assert entries == read_log(written(tmp_path, *before[:3], *after))
    assert [entry.images for entry in entries] == [64, 128, 128, 192, 256, 256, 320]
    again = read_log(written(tmp_path, step(64), held(64), step(64, loss=0.1), held(64, 0.2)))
    values = [entry.loss if isinstance(entry, StepEntry) else entry.held_out for entry in again]
    assert sorted(values) == [0.1, 0.2]


def test_smooth_equals_the_mean_of_finite_values_in_the_window() -> None:
    values = [math.nan, *np.random.default_rng(0).normal(size=30), math.inf]
    for window in (1, 2, 5):
        expected = []
        for index in range(len(values)):
            around = values[max(0, index - (window - 1) // 2) : index + window // 2 + 1]
            finite = [value for value in around if math.isfinite(value)]
            expected.append(sum(finite) / len(finite) if finite else math.nan)
        np.testing.assert_allclose(smooth(values, window), expected, rtol=1e-12)


def test_trace_training_loss_smooths_long_logs_only() -> None:
    log = [StepEntry(64 * number, float(number % 2), 1e-3) for number in range(1, 121)]
    (images, raw, faint), (same, mean, _) = trace_training_loss(log)
    assert list(images) == list(same) == [entry.images for entry in log]
    assert list(raw) == [entry.loss for entry in log]
    assert list(mean) == smooth(raw, 4)
    assert faint["alpha"] < 0.5
    ((images, only, _),) = trace_training_loss(log[:10])
    assert list(only) == [entry.loss for entry in log[:10]]


def test_trace_held_out_loss_and_mask_flips_skip_missing_values() -> None:
    log = [HeldOutEntry(0, 1.0), StepEntry(64, 1.0, 1e-3), StepEntry(128, 1.0, 1e-3, flip_rate=0.5)]
    log = [*log, HeldOutEntry(128, 0.5, 0.25)]
    (images, student, _), (at, average, style) = trace_held_out_loss(log)
    assert (list(images), list(student)) == ([0, 128], [1.0, 0.5])
    assert (list(at), list(average)) == ([128], [0.25])
    assert style["linestyle"] == "--"
    ((images, flips, _),) = trace_mask_flips(log)
    assert (list(images), list(flips)) == ([128], [0.5])


def colours(picture: bytes, folder: Path) -> set[tuple[int, ...]]:
    path = folder / "seen.png"
    path.write_bytes(picture)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    return {*map(tuple, np.unique(pixels, axis=0).tolist())}


def rgb(text: str) -> tuple[int, ...]:
    return ImageColor.getrgb(text)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_draw_curves_uses_a_colour_per_run_and_the_background_of_the_theme(
    tmp_path: Path, theme: Theme
) -> None:
    log = [StepEntry(64 * number, 1 / number, 1e-3) for number in range(1, 9)]
    one = colours(draw_curves({"a": log}, theme), tmp_path)
    two = colours(draw_curves({"a": log, "b": [HeldOutEntry(64, 0.5)]}, theme), tmp_path)
    assert {rgb(theme.paper), rgb(theme.runs[0])} <= one & two
    assert rgb(theme.runs[1]) in two - one
    with Image.open(tmp_path / "seen.png") as image:
        assert image.convert("RGB").getpixel((0, 0)) == rgb(theme.paper)


def test_draw_curves_lists_empty_runs_in_the_legend(tmp_path: Path) -> None:
    log = [HeldOutEntry(64, 0.5), HeldOutEntry(128, 0.25)]
    assert rgb(LIGHT.runs[1]) in colours(draw_curves({"a": log, "b": []}), tmp_path)


@pytest.mark.parametrize(
    "log",
    [
        [],
        [HeldOutEntry(0, 1.0)],
        [StepEntry(64, 0.5, 0.0, flip_rate=0.0)],
        [StepEntry(64, math.nan, 1e-3), StepEntry(128, math.inf, 1e-3)],
        [StepEntry(64, 50.0, 1e-3), StepEntry(128, 0.05, 1e-3)],
    ],
    ids=["none", "held out", "one point", "not finite", "decades"],
)
def test_save_curves_of_any_log_writes_a_png(tmp_path: Path, log: list[Any]) -> None:
    path = tmp_path / "new" / "curves.png"
    save_curves(path, {"run": log})
    save_curves(path, {"run": log})
    assert [file.name for file in path.parent.iterdir()] == ["curves.png"]
    with Image.open(path) as image:
        image.load()
        assert image.size == (1300, 832)


def test_find_charts_takes_only_charts_with_more_than_two_points() -> None:
    steps = [StepEntry(64 * number, 0.5, 1e-3) for number in range(1, 4)]
    ends = [HeldOutEntry(0, 1.0, 1.0), HeldOutEntry(192, 0.5, 0.5)]
    assert [chart.title for chart in find_charts({"a": [*steps, *ends]})] == [
        "training loss",
        "learning rate",
    ]
    assert find_charts({"a": [*steps[:2], *ends]}) == []
    assert [has_curve(log) for log in (steps, steps[:2], [*steps[:2], *ends])] == [1, 0, 0]
    more = [*ends, HeldOutEntry(256, 0.25)]  # of the EMA there are still two
    (held,) = find_charts({"a": ends, "b": more})
    assert [len(find_curves(held, log)) for log in (ends, more)] == [0, 1]
    flat = [StepEntry(64 * k, 0.5, 1e-3 if k else math.nan) for k in range(3)]
    assert [chart.title for chart in find_charts({"a": flat})] == ["training loss"]


@pytest.mark.parametrize(("count", "height"), [(1, 416), (2, 416), (3, 832)])
def test_draw_curves_of_some_charts_is_as_high_as_they_need(
    tmp_path: Path, count: int, height: int
) -> None:
    log = [StepEntry(64 * number, 1 / number, 1e-3, flip_rate=0.1) for number in range(1, 9)]
    (tmp_path / "c.png").write_bytes(draw_curves({"a": log}, charts=CHARTS[:count]))
    with Image.open(tmp_path / "c.png") as image:
        assert image.size == (1300, height)


def test_style_axis_without_values_prints_that_they_are_few() -> None:
    axis = Figure().subplots()
    axis.plot([64], [math.nan])
    style_axis(axis, CHARTS[0], LIGHT)
    assert [text.get_text() for text in axis.texts] == ["fewer than 3 values"]
    assert [*axis.get_xticks(), *axis.get_yticks()] == []


def test_save_curves_of_more_runs_than_colours_reuses_colours(tmp_path: Path) -> None:
    save_curves(tmp_path / "c.png", {f"run {n}": [HeldOutEntry(64, 0.5 + n)] for n in range(11)})
    assert (tmp_path / "c.png").exists()


def test_save_curves_with_long_names_keeps_the_legend_inside(tmp_path: Path) -> None:
    """Nothing but background at the edges, to which names that are too long would run."""
    names = [f"sparsedm-2_4x4-seed{n}-images=25600-lr=0.002" for n in range(4)]
    save_curves(tmp_path / "c.png", {name: [HeldOutEntry(64, 0.5)] for name in names})
    with Image.open(tmp_path / "c.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels[:, :3] == 255).all()
    assert (pixels[:, -3:] == 255).all()
