"""The tests marked ``gpu``, in a process of their own, with whatever packages are here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .case import ROOT
from .packages import find_absent
from .processes import wait_or_stop
from .recorder import LOG

MARK = re.compile(r"\bmark\.gpu\b")
_MISSING = re.compile(r"ModuleNotFoundError: No module named '([\w.]+)'")
_TOGETHER = 12
_EACH = 120


def find_marked_files(root: Path = ROOT) -> list[str]:
    """The test files that hold tests marked ``gpu``, or import a helper that marks them."""
    texts = {path: path.read_text() for path in sorted((root / "tests").rglob("*.py"))}
    marking = [path for path, text in texts.items() if MARK.search(text)]
    helpers = {".".join(path.relative_to(root).with_suffix("").parts) for path in marking}
    files = [
        path
        for path, text in texts.items()
        if path.name.startswith("test_")
        and (path in marking or any(f"from {name} import" in text for name in helpers))
    ]
    return [str(path.relative_to(root)) for path in files]


def command(files: list[str]) -> list[str]:
    """pytest on these files, without the options of pyproject.toml that need plugins."""
    missing = find_absent(("xdist", "pytest_timeout"))
    options = ["-m", "gpu", "-v", "-p", "no:cacheprovider", "-o", "addopts=", "-W", "default"]
    options += ["-p", "benchmarks.gpu.recorder", "--continue-on-collection-errors", "--tb=short"]
    together = min(_TOGETHER, 3 * (os.cpu_count() or 1) // 4)
    if "xdist" not in missing and together > 1:
        options += ["-n", str(together), "--dist", "worksteal"]
    if "pytest_timeout" not in missing:
        options += ["--timeout", str(_EACH)]
    return [sys.executable, "-m", "pytest", *options, *files]


def run_tests(
    out: Path, scratch: Path, until: float, environment: Mapping[str, str]
) -> dict[str, Any]:
    """What became of every test; what pytest said is written to ``out``/tests.txt."""
    files, log = find_marked_files(), scratch / "tests.jsonl"
    log.touch()
    start = time.time()
    keep = {key: value for key, value in environment.items() if not key.startswith("PYTEST_")}
    environment = {**keep, LOG: str(log)}
    with (out / "tests.txt").open("w") as said:
        process = subprocess.Popen(
            command(files), cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        code = wait_or_stop(process, until)
    outcomes = read_outcomes(log.read_text())
    outcomes |= {"files": files, "stopped": code is None, "seconds": time.time() - start}
    # 5: no test was collected. None: the time was up.
    broken = code not in (0, 1, 5, None) and not outcomes["failed"] and not outcomes["left_out"]
    if broken:
        outcomes["failed"]["pytest"] = f"ended with code {code}; see tests.txt"
    return outcomes


def read_outcomes(log: str) -> dict[str, Any]:
    """{"passed": [...], "failed": {name: why}, "skipped": {...}, "left_out": {file: why}}.

    And "tracebacks": the short tracebacks of failed tests, by name.
    """
    outcomes: dict[str, Any] = {"passed": [], "failed": {}, "skipped": {}, "left_out": {}}
    outcomes["tracebacks"] = {}
    for line in log.splitlines():
        entry = json.loads(line)
        name, outcome, why = entry["test"], entry["outcome"], entry["reason"]
        missing = _MISSING.search(why)
        if outcome == "passed":
            outcomes["passed"].append(name)
        elif outcome.endswith("skipped"):
            outcomes["skipped"][name] = why
        elif missing and find_absent([missing[1].split(".")[0]]):
            outcomes["left_out"][name] = f"needs {missing[1]}, which is not installed"
        elif "which is not installed" in why:  # as the package words it where it wants an extra
            outcomes["left_out"][name] = why
        else:
            outcomes["failed"][name] = why
            outcomes["tracebacks"][name] = entry.get("traceback", "")
    outcomes["passed"] = [name for name in outcomes["passed"] if name not in outcomes["failed"]]
    return outcomes
