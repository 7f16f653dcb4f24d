"""``report_page`` of hand-written runs: its cells, its escaping, and its look in a browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sparsedm_compiler.errors import DataError
from sparsedm_compiler.reporting import read_run, report_page
from tests.reporting.parsed_page import ParsedPage, report
from tests.reporting.run_folders import FD, write_json, write_run, write_unfinished_run


def test_report_page_shows_one_row_per_run(tmp_path: Path) -> None:
    speed = {"ratio": 1.684, "baseline": "Inductor, frozen"}
    page = report(
        write_run(tmp_path / "a", speed=speed),
        write_run(tmp_path / "b", method="dense", pattern=None),
    )
    assert page.row("sparsedm") == {
        "run": "a samples",
        "method": "sparsedm",
        "pattern": "2:4",
        "seed": "0",
        "images": "64,000",
        "held-out loss": "0.08000",
        "of the EMA": "0.07000",
        "FD-DigitsCNN [1]": "1.250",
        "MACs": "10.70 → 5.38 M ÷ 1.99",
        "speed": "1.68x",
        "images/s": "100",
    }
    assert page.row("dense")["pattern"] == "dense"
    assert page.row("dense")["speed"] == "-"
    assert "2 training runs compared" in page.text
    assert "dense, sparsedm 2:4; seed 0." in page.text
    assert (
        "[1] FD-DigitsCNN: 360 samples against 1,437 images, "
        "DPMSolverMultistepScheduler 20 steps; lower is better." in page.text
    )
    assert "Speed: times faster than Inductor, frozen, side by side in one process." in page.text
    assert "standard deviation" not in page.text


def test_report_page_names_every_speed_baseline_and_shows_a_score_of_zero(tmp_path: Path) -> None:
    page = report(
        write_run(
            tmp_path / "a", speed={"ratio": 2.0, "baseline": "eager"}, scores=[{**FD, "value": 0.0}]
        ),
        write_run(tmp_path / "b", pattern="1:4", speed={"ratio": 3.0, "baseline": "Inductor"}),
    )
    assert "Speed of sparsedm 2:4: times faster than eager." in page.text
    assert "Speed of sparsedm 1:4: times faster than Inductor." in page.text
    assert page.row("sparsedm", "2:4")["FD-DigitsCNN [1]"] == "0.000"


def test_report_page_averages_the_seeds_of_one_experiment(tmp_path: Path) -> None:
    losses = (0.0781, 0.0792, 0.0811)
    folders = [
        write_run(
            tmp_path / f"s{seed}",
            seed=seed,
            held_out=[{"images": 64_000, "student": loss, "ema": None}],
            scores=[{**FD, "value": 10 * loss}] if seed else [],
        )
        for seed, loss in enumerate(losses)
    ]
    row = report(*folders).row("sparsedm")
    assert row["seed"] == "0, 1, 2"
    assert row["held-out loss"] == f"{np.mean(losses):.5f} ± {np.std(losses, ddof=1):.5f} n = 3"
    assert "of the EMA" not in row
    two = 10 * np.array(losses[1:])
    assert row["FD-DigitsCNN [1]"] == f"{np.mean(two):.4f} ± {np.std(two, ddof=1):.4f} n = 2"


def test_report_page_averages_over_seeds_only(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "first"),
        write_run(tmp_path / "again"),
        write_run(tmp_path / "lr", seed=1, train={"lr": 5e-3}),
        write_run(tmp_path / "second", seed=2),
        write_unfinished_run(tmp_path / "going", seed=3),
    ]
    other = write_run(tmp_path / "model", seed=4)
    values = json.loads((other / "run.json").read_text())
    write_json(other / "run.json", {**values, "model": {**values["model"], "name": "ddpm-cifar10"}})
    heads, *rows = report(*folders, other).tables[0]
    assert [row[heads.index("seed")] for row in rows] == ["0, 2", "0", "1", "3", "4"]


def test_report_page_sorts_rows_from_dense_to_sparse(tmp_path: Path) -> None:
    patterns = ("1:8", "2:4x4", None, "1:4", "2:4", "odd")
    folders = [
        write_run(tmp_path / f"run{k}", pattern=pattern) for k, pattern in enumerate(patterns)
    ]
    assert report(*folders).column("pattern") == ["dense", "2:4", "2:4x4", "1:4", "1:8", "odd"]


def test_report_page_of_many_runs_draws_charts_by_pattern(tmp_path: Path) -> None:
    def of(name: str, seed: int = 0, pattern: str = "2:4") -> Path:
        return write_run(tmp_path / name, pattern=pattern, seed=seed, train={"lr": int(name[1:])})

    pairs = [of(f"{'ab'[seed]}{lr}", seed) for lr in range(4) for seed in (0, 1)]
    few = report(*pairs)
    assert (few.tags.count("source"), few.tags.count("img")) == (1, 1 + 8)
    assert "Curves and samples" not in few.text
    more = report(*pairs, of("c4", pattern="1:8"))
    assert (more.tags.count("source"), more.tags.count("img")) == (1, 1 + 5)
    assert "Curves and samples are those of the first." in more.text
    assert len(more.tables[0]) == 1 + 5
    many = report(*(of(f"d{lr}") for lr in range(9)), of("e9", pattern="1:8"))
    assert many.tags.count("source") == 3  # eight lines in a chart at most, a pattern in each
    assert many.tags.count("img") == 3 + 10


def test_report_page_separates_incomparable_scores(tmp_path: Path) -> None:
    other = {**FD, "count": 5000, "value": 3.5}
    page = report(
        write_run(tmp_path / "a"), write_run(tmp_path / "b", method="ste", scores=[other])
    )
    heads = page.tables[0][0]
    assert [head for head in heads if head.startswith("FD")] == [
        "FD-DigitsCNN [1]",
        "FD-DigitsCNN [2]",
    ]
    assert page.row("ste")["FD-DigitsCNN [1]"] == "-"
    assert page.row("ste")["FD-DigitsCNN [2]"] == "3.500"
    assert "5,000 samples" in page.text


def test_report_page_of_an_unfinished_run_shows_its_progress(tmp_path: Path) -> None:
    page = report(
        write_unfinished_run(tmp_path / "going", method="ste"), write_run(tmp_path / "done")
    )
    row = page.row("ste")
    assert row["run"] == "going unfinished"
    assert (row["images"], row["FD-DigitsCNN [1]"], row["MACs"]) == ("12,800 of 64,000", "-", "-")
    assert float(row["held-out loss"]) == pytest.approx(0.1 + np.exp(-59 / 8) / 2, rel=1e-3)
    assert "Not finished: going." in page.text
    assert page.tags.count("img") == 2  # the curves and the samples of the other


def test_report_page_of_a_run_without_log_reads_its_config(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    write_json(begun / "config.json", {"method": "dense", "images": 640, "seed": 4})
    row = report(begun).row("dense")
    assert row["run"] == "begun unfinished"
    assert (row["pattern"], row["seed"], row["images"]) == ("dense", "4", "0 of 640")
    write_json(
        begun / "run.json", {"prune": {"pattern": "1:8"}, "train": {"method": "ste", "seed": 5}}
    )
    row = report(begun).row("ste")
    assert (row["pattern"], row["seed"], row["images"]) == ("1:8", "5", "0")


def test_report_page_marks_a_run_without_scores_as_unfinished(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", scores=[], complete=False)
    row = report(folder).row("sparsedm")
    assert (row["run"], row["images"]) == ("a unfinished samples", "64,000 of 64,000")
    (folder / "run.json").unlink()  # finetune alone scores nothing
    row = report(folder).row("sparsedm")
    assert (row["run"], row["images"]) == ("a samples", "64,000")


def test_read_run_without_log_rebuilds_it_from_the_results(tmp_path: Path) -> None:
    silent = write_run(tmp_path / "silent")
    for name in ("log.jsonl", "config.json", "run.json"):
        (silent / name).unlink()
    record = read_run(silent)
    assert [entry.images for entry in record.log] == [64, 128, 0, 64_000]
    assert record.config["images"] == 64_000
    assert report(silent).row("sparsedm")["images"] == "64,000"


def test_report_page_compares_only_options_that_differ(tmp_path: Path) -> None:
    first, second = (
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", seed=1, train={"ema": None}),
    )
    page = report(first, second)
    assert page.tables[1] == [
        ["run", "train.seed", "train.ema"],
        ["a", "0", "-"],
        ["b", "1", "none"],
    ]
    assert '"betas"' in page.text
    assert len(report(first).tables) == 1


def test_report_page_prefixes_runs_of_equal_name_with_their_folder(tmp_path: Path) -> None:
    page = report(
        write_run(tmp_path / "x" / "r"),
        write_run(tmp_path / "y" / "r", seed=1),
        write_run(tmp_path / "r2"),
    )
    assert [row[0] for row in page.tables[1]] == ["run", "x/r", "y/r", "r2"]


EVIL = '<script>alert("1")</script><img src=x onerror=alert(2)> &amp; "\''


def test_report_page_escapes_every_text(tmp_path: Path) -> None:
    scores = [{**FD, "metric": EVIL, "network": EVIL, "sampler": EVIL}]
    speed = {"ratio": 2.0, "baseline": EVIL}
    changes = {"scores": scores, "speed": speed, "name": EVIL, "machine": {EVIL: EVIL}}
    page = report(
        write_run(tmp_path / "a", method=EVIL, pattern=EVIL, train={EVIL: EVIL}, **changes),
        write_run(tmp_path / "b"),
    )
    assert page.tags.count("script") == 1
    assert page.tags.count("img") == 3
    assert page.row(EVIL, EVIL)["images"] == "64,000"
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)


def test_report_page_fetches_nothing_and_contains_no_local_path(tmp_path: Path) -> None:
    report_page(
        [write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1)],
        tmp_path / "r" / "report.html",
    )
    text = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    for name in ("a", "b"):
        grid = (tmp_path / name / "samples" / "000000064000.png").read_bytes()
        assert base64.b64encode(grid).decode() in text
    assert not re.search(r"https?://|url\(|@import|<link", text)
    assert "default-src 'none'; img-src data:" in text
    assert str(tmp_path) not in text


def test_report_page_leaves_out_curves_of_two_points_and_says_so(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", method="ste")]
    lines = (folders[1] / "log.jsonl").read_text().splitlines(keepends=True)
    (folders[1] / "log.jsonl").write_text("".join(lines[:2]))
    page = report(*folders)
    assert page.tags.count("source") == 1
    assert "Fewer than three values, and so no curve: b." in page.text
    alone = report(folders[1])
    assert alone.tags.count("source") == 0
    assert "No curves: no log of these runs has three values to draw." in alone.text


def test_report_page_with_an_unknown_reference_count_says_so(tmp_path: Path) -> None:
    page = report(
        write_run(tmp_path / "a", scores=[{**FD, "reference_count": None, "spread": 0.1}])
    )
    assert "360 samples against an unknown number of images" in page.text


def test_read_run_without_named_samples_takes_the_newest_grid(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", samples=None)
    assert read_run(folder).samples == folder / "samples" / "000000064000.png"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: shutil.rmtree(folder), "is no folder of a run"),
        (lambda folder: [path.unlink() for path in folder.glob("*.json*")], "is no run: it has"),
        (lambda folder: (folder / "results.json").write_text("{"), r"cannot read .*results\.json"),
        (lambda folder: (folder / "results.json").write_text("[]"), "holds no JSON object"),
        (lambda folder: change(folder, version=9), "format version 9, this package reads 1"),
        (lambda folder: change(folder, macs={}), r"results\.json is damaged: KeyError\('dense'\)"),
        (lambda folder: change(folder, scores=[{}]), "is damaged"),
        (lambda folder: change(folder, held_out=3), "is damaged"),
        (lambda folder: (folder / "log.jsonl").write_text("x\n\n"), r"log\.jsonl:1 is no line"),
        (lambda folder: shutil.rmtree(folder / "samples"), "cannot read .*000000064000"),
    ],
    ids=["gone", "empty", "torn", "list", "version", "macs", "scores", "held", "log", "samples"],
)
def test_report_page_of_a_damaged_run_raises_data_error(
    tmp_path: Path, spoil: Any, says: str
) -> None:
    folder = write_run(tmp_path / "a")
    spoil(folder)
    with pytest.raises(DataError, match=says):
        report_page([folder], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def change(folder: Path, **values: Any) -> None:
    results = json.loads((folder / "results.json").read_text())
    write_json(folder / "results.json", {**results, **values})


def test_report_page_of_invalid_requests_raises_data_error(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    with pytest.raises(DataError, match="no run to report on"):
        report_page([], tmp_path / "report.html")
    with pytest.raises(DataError, match="named twice"):
        report_page([folder, tmp_path / "a" / ".." / "a"], tmp_path / "report.html")
    with pytest.raises(DataError, match="cannot write"):
        report_page([folder], folder / "config.json" / "report.html")


# ------------------------------------------------------------------ in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--virtual-time-budget=5000",
)
WATCH = """<script>
const seen = document.documentElement.dataset;
seen.errors = "";
addEventListener("error", event => seen.errors += event.message);
addEventListener("securitypolicyviolation", event => seen.errors += event.violatedDirective);
addEventListener("load", () => {
  seen.widths = [...document.images].map(image => image.naturalWidth).join();
  seen.clipped = [...document.querySelectorAll(".card")].filter(card =>
    card.scrollWidth > card.clientWidth && getComputedStyle(card).overflowX != "auto").length;
  seen.overflow = document.documentElement.scrollWidth - innerWidth;
  const table = document.querySelector("#results table");
  const column = () => [...table.tBodies[0].rows].map(row => row.cells[8].dataset.value).join();
  const button = table.querySelectorAll("thead button")[8];
  button.click(); seen.up = column();
  button.click(); seen.down = column();
  seen.order = table.querySelector("[aria-sort]").getAttribute("aria-sort");
  const [search, ...picks] = document.querySelectorAll("#results .controls :is(input, select)");
  const names = () => [...table.tBodies[0].rows].filter(row => row.offsetParent)
    .map(row => row.cells[0].querySelector("a").textContent).join();
  const set = (control, value) => {
    control.value = value; control.dispatchEvent(new Event("input", { bubbles: true }));
  };
  set(search, "UNFIN sparse"); seen.search = names();
  seen.count = document.querySelector("#results output").textContent;
  set(search, "");
  seen.picks = picks.map(pick => pick.getAttribute("aria-label")).join();
  set(picks[0], "1:4"); seen.picked = names();
  set(picks[0], ""); seen.all = names();
  const image = document.querySelector(".zoom img");
  image.click(); seen.full = image.clientWidth + " " + location.hash;
  dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
  seen.closed = location.hash;
});
</script>"""


def browse(page: Path, folder: Path, *options: str, width: int) -> str:
    assert CHROMIUM is not None
    window = [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},1400"]
    command = [CHROMIUM, *FLAGS, *window, *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on PATH")
@pytest.mark.parametrize("width", [1280, 800, 400])
def test_report_page_renders_and_sorts_in_a_browser(tmp_path: Path, width: int) -> None:
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", pattern="1:4", seed=1)]
    before = report(*folders, write_unfinished_run(tmp_path / "c"))
    copy = tmp_path / "copy.html"
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    copy.write_text(text.replace("<title>", WATCH + "<title>", 1), encoding="utf-8")
    dom = browse(copy, tmp_path, "--dump-dom", width=width)
    seen = dict(re.findall(r'data-(\w+)="([^"]*)"', dom[: dom.index("<head>")]))
    assert seen["errors"] == ""
    assert (seen["overflow"], seen["clipped"]) == ("0", "0")
    assert seen["widths"] == "1300,160,160"
    assert seen["up"].split(",") == ["2713344", "5376768", ""]
    assert seen["down"].split(",") == ["5376768", "2713344", ""]
    assert seen["order"] == "descending"
    assert (seen["search"], seen["count"]) == ("c", "1 of 3 rows")
    assert (seen["picks"], seen["picked"], seen["all"]) == ("pattern,sort by", "b", "a,b,c")
    assert (seen["full"], seen["closed"]) == ("160 #full-1", "#samples-1")
    shown = ParsedPage(dom)
    assert sorted(shown.tables[0]) == sorted(before.tables[0])
    assert shown.tables[1:] == before.tables[1:]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on PATH")
def test_report_page_screenshot_follows_the_window_width(tmp_path: Path) -> None:
    report(write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1))
    shots = []
    for width in (1280, 400):
        shot = tmp_path / f"{width}.png"
        browse(tmp_path / "report.html", tmp_path, f"--screenshot={shot}", width=width)
        with Image.open(shot) as image:
            shots.append((image.width, len(np.unique(np.asarray(image.convert("RGB"))))))
    assert [width for width, _ in shots] == [1280, 400]
    assert min(colours for _, colours in shots) > 50
