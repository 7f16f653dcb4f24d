"""Sections of ``python -m benchmarks.gpu`` go on behind what fails, dies or hangs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import memory, processes, training, whole
from benchmarks.gpu.case import read
from benchmarks.gpu.main import Runner
from benchmarks.gpu.plan import TINY
from benchmarks.gpu.processes import Listener, SilentError
from benchmarks.gpu.rehearsal import cuda_families_on_cpu
from benchmarks.gpu.results import empty, list_failures
from benchmarks.gpu.summary import summary
from sparsedm_compiler import KernelError
from tests.test_gpu_benchmark import MADE_UP

PLAN = replace(TINY, model_patterns=("2:4", "1:2@64x16"), train_patterns=("2:4", "1:8"))


def fail_first(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
    """Lets the first call of a function of a module raise."""
    calls, own = [], getattr(module, name)

    def function(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            raise KernelError("a fault of the first pattern")
        return own(*args, **kwargs)

    monkeypatch.setattr(module, name, function)


@pytest.mark.parametrize(
    ("section", "part", "shows"),
    [
        (training, "build_steps", "step"),
        (whole, "check_student", "ratio"),
        (memory, "bytes_of_student", "kernels"),
    ],
    ids=["training", "models", "memory"],
)
def test_a_pattern_that_fails_is_told_and_those_behind_it_are_measured(
    section: Any, part: str, shows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_first(monkeypatch, section, part)
    with cuda_families_on_cpu():
        case = next(iter(section.cases(PLAN, frozenset())))
        row = [*case.run(lambda what: None)][-1]
    first, second = row["patterns"].values()
    assert first.keys() == {"failed"}
    assert shows in second
    name = "models" if section is whole else section.__name__.rpartition(".")[-1]
    found = {**empty(dict(MADE_UP), rehearsal=True), name: [{"key": "toy", **row}]}
    (told,) = list_failures(found)
    assert "toy at 2:4: KernelError: a fault of the first pattern (" in told
    assert told in summary(found)


def test_a_profile_that_fails_leaves_what_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_first(monkeypatch, whole, "profile_device")
    with cuda_families_on_cpu():
        case = next(whole.cases(replace(PLAN, model_patterns=("2:4",)), frozenset()))
        rows = [json.loads(json.dumps(row)) for row in case.run(lambda what: None)]
    before, after = (row["patterns"]["2:4"] for row in rows[-2:])
    assert "ratio" in before
    assert "device" not in before
    assert "fault" in after["device"]["dense"]["failed"]
    assert after["device"]["sparse"] == {}


HANGING = """
import json, sys, time
log = open(sys.argv[1], "a")
for entry in ({"begin": "layer"}, {"note": "kernel a"}):
    log.write(json.dumps(entry) + chr(10))
log.close()
time.sleep(60)
"""


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes of a section, of which the first hangs and the second ends."""
    started = list[subprocess.Popen[bytes]]()

    def child(runner: Runner, name: str, *_: Any) -> subprocess.Popen[bytes]:
        code = "" if started else HANGING
        log = runner.scratch / f"{name}-0.jsonl"
        command = [sys.executable, "-c", code, str(log)]
        started.append(subprocess.Popen(command, start_new_session=True))
        return started[-1]

    monkeypatch.setattr(Runner, "child", child)
    yield started
    for process in started:
        process.kill()


def test_a_process_that_hangs_is_stopped_and_its_section_goes_on_without_what_it_tried(
    children: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(processes, "SILENCE", 2.0)
    runner = Runner(empty(dict(MADE_UP), rehearsal=False), tmp_path, tmp_path, True)
    runner.section("ops", time.time() + 60)
    assert [process.returncode for process in children] == [-15, 0]
    assert read(tmp_path / "ops-0.jsonl").tried == ("kernel a",)
    assert list_failures(runner.results) == [
        "ops: layer: no sign of life for 2 s, while trying kernel a"
    ]


def test_a_log_that_grows_is_heard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processes, "SILENCE", 0.2)
    listener = Listener(tmp_path / "log")
    for line in range(3):
        with (tmp_path / "log").open("a") as log:
            log.write(f"{line}\n")
        time.sleep(0.15)
        listener.check()
    time.sleep(0.3)
    with pytest.raises(SilentError, match="no sign of life"):
        listener.check()
