"""The paper's figures of the study: drawn from results, and judged in words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study import figures, run
from benchmarks.study.figure_runs import list_figure_settings
from benchmarks.study.plan import QUICK, RATIOS, SMALL, Study
from benchmarks.study.run import run_folder, run_settings
from benchmarks.study.setting import Setting
from benchmarks.study.tables import FORMATS, read_results

RATES = {"sparsedm": 0.05, "ste": 0.06, "diff-pruning": 0.09, "untrained": 0.5}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """A study at quick size without anything in its folder but the classifier's scores."""
    about = {"network": "SmallResNet", "accuracy": 0.5, "floor": 1.0, "count": 40}
    (tmp_path / "judge.json").write_text(json.dumps(about))
    return Study("digits", "digits:test", None, tmp_path, QUICK)


def write_run(study: Study, setting: Setting, loss: float) -> None:
    """A finished run that ends at that loss."""
    folder = run_folder(study, setting)
    folder.mkdir(parents=True)
    held = [{"images": i, "student": 1.0, "ema": loss * (3 - i / 64)} for i in (0, 64, 128)]
    values: dict[str, Any] = {"held_out": held, "images": 128, "seconds": 1.0}
    values |= {"macs": {"sparse": 1_000_000}, "samples": "samples/final.png"}
    values |= {"scores": [{"metric": "FD", "value": 10 * loss}]}
    (folder / "results.json").write_text(json.dumps(values))
    (folder / "log.jsonl").write_text("")


def test_write_figures_draws_all_six_and_says_which_orderings_hold(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    for setting in list_figure_settings(study):
        write_run(study, setting, RATES.get(setting.method, 0.07))
    figures.write_figures(study)
    page = (study.out / "figures.md").read_text()
    assert page in capsys.readouterr().out
    for letter in "abcdef":
        assert (study.out / f"figures/{letter}.png").read_bytes().startswith(b"\x89PNG")
        assert f"![{figures.FIGURES['abcdef'.index(letter)].title}](figures/{letter}.png)" in page
    assert page.count("python benchmarks/figures.py --data digits") == 6
    beaten = "sparsedm is below diff-pruning at 1 of 1 ratios (1:4)"
    assert f"SparseDM beats Diff-Pruning. **It holds here**: in loss {beaten}" in page
    assert "below at 2 and above at 0 of 2 measured points" in page
    rows = json.loads((study.out / "figures.json").read_text())["runs"]
    assert len(rows) == len(list_figure_settings(study))
    assert {row["macs"] for row in rows} == {1_000_000}


def test_verdict_when_the_order_is_mixed_level_or_missing_says_so(study: Study) -> None:
    judge = figures.judge_order("Claim.", "sparsedm", "ste")
    rows = [
        {"method": method, "pattern": ratio, "loss": loss}
        for ratio, losses in {
            "2:4": (0.05, 0.06),
            "1:4": (0.06, 0.05),
            "1:8": (0.07, 0.0703),
        }.items()
        for method, loss in zip(("sparsedm", "ste"), losses, strict=True)
    ]
    assert judge(study, []) == "Claim. Not judged: no runs of both have finished."
    assert judge(study, rows[:2]).startswith("Claim. **It holds here**")
    assert judge(study, rows[2:]).startswith("Claim. **It does not hold here**")
    assert judge(study, rows) == (
        "Claim. **It holds in part here**: in loss sparsedm is below ste at 1 of 3 ratios (2:4), "
        "above at 1 (1:4), level at 1."
    )


def test_figure_settings_have_all_ten_ratios_and_no_run_twice(tmp_path: Path) -> None:
    study = Study("digits", "digits:test", None, tmp_path, SMALL)
    settings = list_figure_settings(study)
    folders = [run_folder(study, setting) for setting in settings]
    assert len({*folders}) == len(folders)
    for method in ("sparsedm", "ste", "untrained"):
        assert {s.pattern for s in settings if s.method == method} == {*RATIOS}
    assert {s.seed for s in settings} == {0}


def test_run_settings_trains_the_classifier_once_and_only_what_is_missing(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, missing = list_figure_settings(study)[:2]
    write_run(study, done, 0.1)
    calls: list[str] = []

    class Pool:
        """A pool that runs its tasks here."""

        def __init__(self, jobs: int, maxtasksperchild: int) -> None:
            calls.append(f"pool of {jobs}")

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        imap_unordered = staticmethod(map)

    def attempt(task: tuple[Study, Setting]) -> tuple[str, str | None]:
        calls.append(task[1].name)
        return task[1].name, "it failed"

    monkeypatch.setattr(run, "open_judge", lambda study: calls.append("judge"))
    monkeypatch.setattr(run, "attempt", attempt)
    monkeypatch.setattr(run.multiprocessing, "get_context", lambda _: run.multiprocessing)
    monkeypatch.setattr(run.multiprocessing, "Pool", Pool)
    assert run_settings(study, [done], 2) == 0
    assert calls == []
    assert run_settings(study, [done, missing], 2) == 1
    assert calls == ["judge", "pool of 2", missing.name]


def test_baselines_table_names_macs_start_and_images(study: Study) -> None:
    for setting in study.list_settings("baselines"):
        write_run(study, setting, RATES.get(setting.method, 0.07))
    text = FORMATS["baselines"](read_results(study, "baselines"))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["1:4", "diff-pruning", "1.00 M", "128", "0.0900", "0.90"] in lines
    assert ["1:4", "asp, start=obs", "1.00 M", "128", "0.0700", "0.70"] in lines
    assert ["dense", "dense", "1.00 M", "128", "0.0700", "0.70"] in lines


def test_tables_of_a_study_with_a_recipe_are_of_the_timed_group_alone(study: Study) -> None:
    timed = replace(study, recipe="cifar10-uvit+short-gpu")
    settings = list(timed.list_settings("timed"))
    for setting in settings:
        write_run(timed, setting, RATES.get(setting.method, 0.07))
    text = FORMATS["timed"](read_results(timed, "timed"))
    assert "held-out loss (dense 0.0700)" in text
    assert "FD (dense 0.70)" in text
    assert "obs-distill" in text
