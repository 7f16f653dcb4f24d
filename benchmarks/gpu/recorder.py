"""A pytest plugin that writes one JSON line per test as it ends, to the file in $GPU_TESTS_LOG."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

LOG = "GPU_TESTS_LOG"
_KEPT_LINES = 30
_IN_WORKER = "PYTEST_XDIST_WORKER"  # whose reports the main process gets, too


def pytest_runtest_logreport(report: Any) -> None:
    """The outcome of a test: of its call, or of what failed or skipped before or after it."""
    if report.when == "call" or report.outcome != "passed":
        more = {"traceback": _shorten(report)} if report.failed else {}
        _write(report.nodeid, report.outcome, _reason(report), seconds=report.duration, **more)


def pytest_collectreport(report: Any) -> None:
    """A file that could not be collected, or was skipped as a whole."""
    if report.outcome != "passed":
        _write(report.nodeid, f"collection {report.outcome}", _reason(report))


def _reason(report: Any) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    lines = [line for line in str(report.longrepr or "").splitlines() if line.startswith("E  ")]
    return " ".join(line[1:].strip() for line in lines[:6])[:1000]


def _shorten(report: Any) -> str:
    """The end of the traceback, without what the test printed."""
    return "\n".join(str(report.longrepr).splitlines()[-_KEPT_LINES:])


def _write(nodeid: str, outcome: str, reason: str, **more: Any) -> None:
    if _IN_WORKER in os.environ:
        return
    entry = {"test": nodeid, "outcome": outcome, "reason": reason, **more}
    with Path(os.environ[LOG]).open("a") as log:
        log.write(json.dumps(entry) + "\n")
