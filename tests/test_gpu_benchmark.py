"""``python -m benchmarks.gpu`` without a GPU: rehearsed, and judged on made-up results."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.gpu.case import Read, read, write
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.goals import GOALS, MET, MISSED, OPEN, judge_goals
from benchmarks.gpu.main import main
from benchmarks.gpu.models import DiT, Flux
from benchmarks.gpu.peers import why_no_bsr
from benchmarks.gpu.plan import TINY
from benchmarks.gpu.processes import wait_or_stop
from benchmarks.gpu.quality import NOT_HERE, Quality, quality
from benchmarks.gpu.results import SECTIONS, empty, list_failures, load
from benchmarks.gpu.summary import REHEARSAL, summary
from benchmarks.gpu.testing import find_marked_files, read_outcomes
from sparsedm_compiler.patterns import BlockNM

ROOT = Path(__file__).parents[1]
MADE_UP = {"gpu": "made up", "commit": "none", "card": None, "time": "never"}
MADE_UP |= dict.fromkeys(("torch", "cuda", "cusparselt", "triton"), "0")


def results_of(**found: Any) -> dict[str, Any]:
    return {**empty(dict(MADE_UP), rehearsal=False), **found}


def op(ratio: float, **more: Any) -> dict[str, Any]:
    """A layer of FLUX at 2:4, made up."""
    size = {"tokens": 4096, "cols": 3072, "rows": 3072, "model": "FLUX", "layer": "proj"}
    each = {"ratio": [ratio] * 3, "kernel": "some/1", "gated": "sparse", **more}
    return {"key": "FLUX proj", **size, "act": "none", "patterns": {"2:4": each}}


def statuses(results: dict[str, Any]) -> dict[str, str]:
    return {each.goal: each.status for each in judge_goals(results)}


@pytest.mark.parametrize(
    ("pattern", "tokens", "why"),
    [
        (BlockNM(1, 2, 64, 16), 4096, None),
        (BlockNM(1, 2, 64, 48), 4096, "blocks of 64 x 48 are no powers of two from 16 on"),
        (BlockNM(1, 2, 64, 8), 4096, "blocks of 64 x 8 are no powers of two from 16 on"),
        (BlockNM(1, 2, 64, 16), 1000, "1000 tokens are no multiple of 64"),
    ],
)
def test_why_no_bsr_names_blocks_and_tokens_that_torch_refuses(
    pattern: BlockNM, tokens: int, why: str | None
) -> None:
    assert why_no_bsr(pattern, tokens, on_cuda=True) == why
    assert why_no_bsr(pattern, tokens, on_cuda=False) == (why or "it runs on a GPU alone")


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one rehearsal wrote."""
    out = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "tests.rehearse", "--tiny", "--minutes", "7"]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OUT": str(out)},
        capture_output=True,
        text=True,
        check=False,
        timeout=540,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.endswith("nothing failed\n")
    return out


def test_every_section_is_rehearsed(rehearsed: Path) -> None:
    found = json.loads((rehearsed / "results.json").read_text())
    assert found["rehearsal"] is True
    assert found["environment"]["gpu"] is None
    assert {name for name in SECTIONS if found[name]} == {*SECTIONS}
    assert {*found["sections"]} == {*SECTIONS}
    assert not any(each["failed"] or each["stopped"] for each in found["sections"].values())
    assert found["tests"]["skipped"]
    assert not found["tests"]["failed"]
    for row in found["ops"]:
        for each in row["patterns"].values():
            assert not each.get("wrong")
        eight = {name.partition("/")[0] for name in row["patterns"]["2:4"]["aside"]}
        peers = {"compiled_fp8"} if row["tokens"] == TINY.tokens[0] else set()
        assert eight == {"cuda_fp8", "cuda_semi_fp8", "cuda_semi_int8"} | peers
        refused = row["patterns"]["1:2@64x16"]["refused"]
        assert ("bsr_dense_addmm" in refused) == bool(peers)
    for row in found["models"]:
        for each in row["patterns"].values():
            assert each["error"] < 0.05
    (first,) = found["first_call"]
    assert all(cell["wall_s"] > 0 for cell in first["variants"].values())


def test_no_number_of_a_rehearsal_is_shown_as_a_speed(rehearsed: Path) -> None:
    said = (rehearsed / "summary.md").read_text()
    assert said.startswith(f"# {REHEARSAL}\n")
    titles = re.findall(r"^## (.*)$", said, flags=re.MULTILINE)
    assert [title for title in titles if REHEARSAL not in title] == ["Goals", "Tests"]
    assert not re.search(r"\d\.\d+ \[", said)  # as ratios are shown
    assert MISSED not in said
    assert said.count(f"| {OPEN} |") == len(GOALS)
    assert len([*rehearsed.iterdir()]) <= 8


def test_the_report_can_be_written_again(rehearsed: Path, tmp_path: Path) -> None:
    assert main(["--report", str(rehearsed / "results.json"), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "summary.md").read_text() == (rehearsed / "summary.md").read_text()
    assert (tmp_path / "models.png").stat().st_size > 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().out == (
        "No CUDA GPU here, so there is nothing to measure; --tiny rehearses on a CPU.\n"
    )
    assert not (tmp_path / "none").exists()


def test_a_log_knows_what_a_process_died_of(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert read(log) == Read({}, {}, (), (), "")
    write(log, begin="one")
    write(log, key="one", row={"x": 1})  # type: ignore[arg-type]
    write(log, end="one")
    write(log, begin="two")
    write(log, note="kernel a")
    with log.open("a") as file:
        file.write('{"row": {"x"')  # cut short
    write(log, died="ended with code -11")
    found = read(log)
    assert found.rows == {"one": {"x": 1}}
    assert found.failed == {"two": "ended with code -11, while trying kernel a"}
    assert (found.done, found.tried) == (("one",), ("kernel a",))  # two is begun again, without it
    write(log, begin="two")
    write(log, died="ended with code -9")
    assert read(log).done == ("one", "two")  # nobody knows of what
    write(log, begin="three")
    write(log, stopped="")
    assert read(log).stopped == "during three, at its beginning"


def test_time_left_over_is_for_those_behind() -> None:
    clock = Clock(1.0, {"first": 1, "second": 3})
    assert clock.until("first") - time.time() == pytest.approx(15, abs=1)
    assert clock.until("second") == pytest.approx(clock.end)


def test_a_process_is_stopped_with_all_that_it_started() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        assert wait_or_stop(process, time.time() + 1) is None
        assert process.returncode is not None
    finally:
        assert process.stdin is not None
        process.stdin.close()


def test_marked_tests_are_found() -> None:
    files = find_marked_files()
    assert "tests/masks/test_nm_mask.py" in files
    assert all((ROOT / file).exists() for file in files)


def test_outcomes_of_tests() -> None:
    def line(test: str, outcome: str, reason: str = "") -> str:
        return json.dumps({"test": test, "outcome": outcome, "reason": reason})

    missing = "ModuleNotFoundError: No module named"
    found = read_outcomes(
        "\n".join(
            [
                line("a", "passed"),
                line("b", "failed", "assert 1 == 2"),
                line("c", "skipped", "needs a GPU"),
                line(
                    "d.py", "collection failed", "ModuleNotFoundError: No module named 'nonesuch'"
                ),
                line("e", "failed", "comes from diffusers, which is not installed"),
                line("f.py", "collection failed", f"{missing} 'torch.x'"),
            ]
        )
    )
    assert found["passed"] == ["a"]
    assert {*found["failed"]} == {"b", "f.py"}
    assert found["skipped"] == {"c": "needs a GPU"}
    assert found["left_out"]["d.py"] == "needs nonesuch, which is not installed"
    assert {*found["left_out"]} == {"d.py", "e"}


def test_goals_are_judged() -> None:
    goal = "2:4 layers >= 1.3 over cuBLASLt, 4096 tokens and width 2048 up"
    assert {*statuses(results_of()).values()} == {OPEN}
    assert statuses(results_of(ops=[op(1.3)]))[goal] == MET
    assert statuses(results_of(ops=[op(2), {**op(1.2), "key": "b"}]))[goal] == MISSED
    assert statuses(results_of(ops=[{**op(2), "tokens": 512}]))[goal] == OPEN
    never = next(each for each in statuses(results_of()) if each.startswith("gated"))
    assert statuses(results_of(ops=[op(0.5, gated="dense")]))[never] == OPEN
    assert statuses(results_of(ops=[op(0.97)]))[never] == MISSED
    each = {"ratio": [1, 1, 1], "wrong": False, "kernels": {"dense": 3}}
    row = {"key": "m", "model": "m", "name": "m", "batch": 1, "patterns": {"1:8": each}}
    judged = results_of(models=[row])
    assert statuses(judged)[never] == MET
    assert "Lowest of all models: 1.000 (m at 1:8)." in summary(judged)
    assert set(statuses({**judged, "rehearsal": True}).values()) == {OPEN}


def test_first_calls_are_judged_by_the_best_of_each_model() -> None:
    goal = next(goal for goal in statuses(results_of()) if "first call" in goal)
    seconds = {"dense": 10.0, "2:4": 16.0, "2:4, regional": 12.9}
    variants = {name: {"wall_s": wall, "timings": {}} for name, wall in seconds.items()}
    row = {"key": "m", "model": "m", "batch": 1, "variants": variants}
    assert statuses(results_of(first_call=[row]))[goal] == MET
    slow = {**variants, "2:4, regional": {"refused": "it took more than 9 s"}}
    assert statuses(results_of(first_call=[{**row, "variants": slow}]))[goal] == MISSED
    said = summary(results_of(first_call=[{**row, "variants": slow}]))
    assert "| m | 1 | 2:4 | 16.0 | 1.60 |" in said
    assert "it took more than 9 s" in said


def test_steps_with_frozen_masks_are_judged_by_blocks_of_dit_width_alone() -> None:
    frozen = next(goal for goal in statuses(results_of()) if "frozen" in goal)
    masked = next(goal for goal in statuses(results_of()) if goal.startswith("a masked training"))

    def judge(share: float, model: str = "7 of DiT-XL/2's", text: str = "1:4@128x32") -> str:
        cell = {"step": {"frozen": [share] * 3}}
        row = {"key": "m", "model": model, "batch": 16, "patterns": {text: cell}}
        judged = statuses(results_of(training=[row]))
        assert judged[masked] == OPEN
        return judged[frozen]

    assert [judge(0.83), judge(0.84)] == [MET, MISSED]
    assert judge(2.0, model="U-ViT") == judge(2.0, text="1:2@128x64") == OPEN


def test_no_speed_without_its_quality() -> None:
    row = op(1.5)
    row["patterns"]["64:2:99"] = dict(row["patterns"]["2:4"])
    said = summary(results_of(ops=[row]))
    known = quality()
    (line,) = (line for line in said.splitlines() if line.startswith("| quality"))
    assert [cell.strip() for cell in line.split("|")][-3:-1] == [known.of("2:4"), NOT_HERE]
    assert known.of("2:4") == f"loss {known.losses['2:4']:.4f}"
    assert known.about in said
    assert quality(ROOT / "nowhere.json") == Quality(None, {})


def test_all_that_went_wrong_is_told() -> None:
    found = results_of(
        ops=[op(1.5, wrong={"kernel/2": "off by 1"})],
        tests={**read_outcomes(""), "failed": {"t": "why"}, "seconds": 1, "stopped": False},
        sections={"table": {"seconds": 1, "stopped": "", "failed": {"cell": "no memory"}}},
    )
    assert list_failures(found) == [
        "test t: why",
        "table: cell: no memory",
        "ops: FLUX proj at 2:4: kernel/2 is wrong: off by 1",
    ]
    assert all(f"- {line}" in summary(found) for line in list_failures(found))


def test_runs_are_put_together(tmp_path: Path) -> None:
    first, second, other = (tmp_path / name for name in ("a.json", "b.json", "c.json"))
    done = {"seconds": 1, "stopped": "", "failed": {}}
    failed = {**done, "failed": {"FLUX proj": "died"}}
    first.write_text(json.dumps(results_of(sections={"ops": failed})))
    again = results_of(ops=[op(1.5)], sections={"ops": done})
    again["environment"]["commit"] = "later"
    second.write_text(json.dumps(again))
    both = load([first, second])
    assert [row["key"] for row in both["ops"]] == ["FLUX proj"]
    assert both["environment"]["commit"] == "none, later"
    assert list_failures(both) == []
    other.write_text(json.dumps({**results_of(), "rehearsal": True}))
    with pytest.raises(ValueError, match="different machines"):
        load([first, other])


def linears(model: nn.Module) -> list[tuple[int, int]]:
    return [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]


def test_stand_ins_have_the_layers_of_the_published_models() -> None:
    with torch.device("meta"):
        dit, flux = DiT(1152, 28, 16), Flux(3072, 24, 1, 1)
    assert sum(p.numel() for p in dit.parameters()) == 675_129_632  # Peebles & Xie's DiT-XL/2
    stream = [(3072, 18432), *[(3072, 3072)] * 4, (3072, 12288), (12288, 3072)]
    single = [(3072, 9216), *[(3072, 3072)] * 3, (3072, 12288), (15360, 3072)]
    assert linears(flux) == [*stream, *stream, *single]
    tiny = DiT(16, 1, 2, side=4)
    x = torch.randn(2, 4, 4, 4)
    assert tiny(x, torch.ones(2), torch.arange(2)).shape == x.shape
