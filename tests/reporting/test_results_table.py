"""The table of results: names, formats, best marks, and columns that nobody measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparsedm_compiler.reporting import page as page_module
from tests.reporting.parsed_page import report
from tests.reporting.run_folders import FD, write_grid, write_json, write_run, write_unfinished_run


@pytest.fixture(autouse=True)
def without_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matplotlib takes longer than all else on these pages."""
    monkeypatch.setattr(page_module, "has_curve", lambda log: False)


def held_out(student: float, ema: float | None = None) -> list[dict[str, Any]]:
    return [{"images": 64_000, "student": student, "ema": ema}]


def write_scored_run(folder: Path, value: float, metric: str = "FD", **options: Any) -> Path:
    scores = [{**FD, "metric": metric, "value": value}]
    return write_run(folder, method=folder.name, scores=scores, **options)


def test_results_table_names_the_runs_of_every_row(tmp_path: Path) -> None:
    page = report(
        write_run(tmp_path / "first"),
        write_run(tmp_path / "second", seed=1),
        write_run(tmp_path / "third", pattern="1:4"),
    )
    assert page.column("run") == ["first seed 1 · samples", "third samples"]
    titles = [values.get("title") for tag, values in page.attributes if tag == "th"]
    assert "first, second" in titles


def test_results_table_links_lead_to_elements_of_the_page(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", pattern="1:4", samples=None)]
    write_grid(folders[0] / "real.png", (9, 9, 9))
    page = report(*folders, write_unfinished_run(tmp_path / "c"))
    anchors = [link[1:] for link in page.links if link.startswith("#")]
    sections = ["results", "curves", "samples", "differences", "configurations"]
    assert anchors[:5] == sections
    assert anchors[5:10] == ["run-1", "samples-1", "run-2", "run-3", "samples-3"]
    assert {*anchors} == {*page.ids}
    assert len(page.ids) == len({*page.ids})


def test_numbers_of_one_column_have_equally_many_decimals(tmp_path: Path) -> None:
    page = report(
        write_scored_run(tmp_path / "a", 20.0, held_out=held_out(0.08)),
        write_scored_run(tmp_path / "b", 3.91686, held_out=held_out(0.450512)),
        write_run(tmp_path / "c", pattern="1:4", held_out=held_out(1.0), scores=[]),
    )
    assert page.column("held-out loss") == ["best 0.08000", "0.45051", "1.00000"]
    assert page.column("FD-DigitsCNN [1]") == ["20.000", "best 3.917", "-"]
    assert page.column("MACs")[::2] == ["10.70 → 5.38 M ÷ 1.99", "10.70 → 2.71 M ÷ 3.94"]


def test_value_that_is_not_finite_is_shown_and_never_best(tmp_path: Path) -> None:
    page = report(
        write_run(tmp_path / "a", held_out=held_out(float("nan"))),
        write_run(tmp_path / "b", method="ste", held_out=held_out(0.5)),
        write_run(tmp_path / "c", method="asp", held_out=held_out(0.25)),
    )
    assert page.column("held-out loss") == ["nan", "0.5000", "best 0.2500"]


def test_best_of_every_pattern_is_marked_by_the_direction_of_the_metric(tmp_path: Path) -> None:
    values = {"a": (0.3, "2:4"), "b": (0.2, "2:4"), "c": (0.1, "1:4"), "d": (0.4, "1:4")}
    for metric, best in (("FD", {"b", "c"}), ("recall", {"a", "d"}), ("other", set())):
        folders = [
            write_scored_run(tmp_path / metric / name, value, metric, pattern=pattern)
            for name, (value, pattern) in values.items()
        ]
        page = report(*folders)
        column = zip(page.column("method"), page.column(f"{metric}-DigitsCNN [1]"), strict=True)
        assert {name for name, text in column if text.startswith("best ")} == best
        assert ("Best: of the finished runs" in page.text) == bool(best)
        assert page.column("held-out loss") == ["0.08000"] * 4  # all equal: none is best


def test_best_needs_another_finished_run_with_the_same_data(tmp_path: Path) -> None:
    other = write_run(tmp_path / "c", method="ste", held_out=held_out(0.5), scores=[])
    values = {"model": {"name": "UViT", "options": {"depth": 4}}, "train": {"method": "ste"}}
    write_json(other / "run.json", {**values, "data": {"train": "other"}})
    page = report(
        write_run(tmp_path / "a"), write_unfinished_run(tmp_path / "b", method="asp"), other
    )
    assert not any("best" in text for row in page.tables[0] for text in row)
    assert "Best:" not in page.text


def test_columns_without_a_value_are_left_out_and_named_once(tmp_path: Path) -> None:
    page = report(
        write_run(tmp_path / "a", held_out=held_out(0.1), scores=[], macs=None),
        write_run(tmp_path / "b", pattern="1:4", held_out=held_out(0.2), scores=[], macs=None),
    )
    assert page.tables[0][0] == [
        *("run", "method", "pattern", "seed", "images", "held-out loss", "images/s"),
    ]
    assert page.text.count("ot measured") == 1
    assert (
        "Not measured in any of these runs: of the EMA, MACs, speed, compile time "
        "(sparsedm bench RUN measures the speed)." in page.text
    )


def test_spread_has_the_decimals_of_its_mean(tmp_path: Path) -> None:
    page = report(
        *(
            write_run(tmp_path / f"s{seed}", seed=seed, scores=[{**FD, "value": value}])
            for seed, value in enumerate((3.9169, 3.9171))
        ),
        write_run(tmp_path / "b", pattern="1:4", scores=[{**FD, "value": 20.0}]),
    )
    assert page.column("FD-DigitsCNN [1]") == ["3.917 ± 0.000 n = 2", "20.000"]


def test_images_per_second_of_a_run_that_trained_on_none_are_not_measured(tmp_path: Path) -> None:
    page = report(
        write_run(tmp_path / "a", images_per_second=0.0, images=0),
        write_run(tmp_path / "b", method="ste"),
    )
    assert page.column("images/s") == ["-", "100"]


def test_speed_measured_of_one_run_is_a_column_with_gaps(tmp_path: Path) -> None:
    speed = {"ratio": 1.684, "baseline": "Inductor"}
    page = report(write_run(tmp_path / "a", speed=speed), write_run(tmp_path / "b", method="ste"))
    assert page.column("speed") == ["1.68x", "-"]
    assert "bench RUN" not in page.text


@pytest.mark.parametrize(
    ("seconds", "column", "says"),
    [
        ((12.5, 1.25), ["12.5 s", "1.2 s"], "Images/s: while training, the median"),
        ((12.5, None), ["12 s", "-"], "where no compile time is shown, over all of it"),
        ((None, None), None, "Images/s: over the whole training, with compiling"),
    ],
    ids=["both", "one", "none"],
)
def test_compile_time_stands_apart_from_images_per_second(
    tmp_path: Path, seconds: tuple[float | None, ...], column: list[str] | None, says: str
) -> None:
    folders = [
        write_run(tmp_path / f"run{k}", seed=k, method=f"m{k}", compile_seconds=value)
        for k, value in enumerate(seconds)
    ]
    page = report(*folders)
    assert page.column("images/s") == ["100", "101"]
    assert (page.column("compile time") if column else column) == column
    assert says in page.text


def test_samples_begin_with_the_real_images_and_are_enlarged_by_a_link(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, method=name) for name in "abc"]
    for folder, colour in zip(folders[:2], ((9, 9, 9), (9, 9, 9)), strict=True):
        write_grid(folder / "real.png", colour)
    page = report(*folders)
    assert page.text.count("real images") == 1  # equal ones are shown once
    assert page.text.index("real images, as a yardstick") < page.text.index("a : a 2:4, after")
    figures = [values for tag, values in page.attributes if tag == "figure"]
    assert [f["id"] for f in figures if "id" in f] == ["full-0", "full-1", "full-2", "full-3"]
    zoomed = [v["href"] for tag, v in page.attributes if v.get("class") == "zoom"]
    closed = [v["href"] for tag, v in page.attributes if v.get("class") == "close"]
    assert zoomed == [f"#full-{k}" for k in range(4)]
    assert closed == [f"#samples-{k}" for k in range(4)]
    write_grid(folders[1] / "real.png", (200, 9, 9))
    other = report(*folders).text
    assert "real images of a, as a yardstick" in other
    assert "real images of b, as a yardstick" in other


def test_page_without_script_shows_all_rows_and_no_dead_control(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "a"), write_run(tmp_path / "b", method="ste"))
    assert not {"input", "select", "button", "output"} & {*page.tags}
    assert [len(table) for table in page.tables] == [3, 3]
    assert not any("hidden" in values for _, values in page.attributes)
