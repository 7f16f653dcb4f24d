"""``python -m tests.rehearse --tiny``: ``python -m benchmarks.gpu``, its sections forked from here.

Imports take a section longer than what it rehearses. The first process, which compiles ahead, is
started as a user's are, from its command line; so are those of pytest and of first calls.
"""

from __future__ import annotations

import gc
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import benchmarks.gpu.charts
import benchmarks.gpu.main
import benchmarks.gpu.sections
from benchmarks.gpu import child
from tests.forked import find_status

CHILD = [sys.executable, "-m", "benchmarks.gpu.child"]
STARTED = "warm"
"""The section whose process is started, not forked."""


class ForkedSection:
    """A process of a section, as ``subprocess.Popen`` would give it."""

    def __init__(self, command: Sequence[str], cwd: Path, env: Mapping[str, str]) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(run_section(command, cwd, env))

    def poll(self) -> int | None:
        """Returns the exit code, None while the process runs."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Returns the exit code; raises TimeoutExpired after so many seconds."""
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("section", timeout)
            time.sleep(0.02)
        return code


def run_section(command: Sequence[str], cwd: Path, env: Mapping[str, str]) -> int:
    """Runs a section in a forked process, as its command says; returns the exit code."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    return find_status(lambda: child.main([*command[len(CHILD) :]]))


def start(
    command: Sequence[str], *, cwd: Path, env: Mapping[str, str], start_new_session: bool
) -> ForkedSection | subprocess.Popen[bytes]:
    """Stands for ``subprocess.Popen`` in ``benchmarks.gpu.main``."""
    assert [*command[: len(CHILD)]] == CHILD
    assert start_new_session
    if command[len(CHILD)] == STARTED:
        return subprocess.Popen(command, cwd=cwd, env=env, start_new_session=True)
    return ForkedSection(command, cwd, env)


if __name__ == "__main__":
    gc.collect()
    gc.freeze()
    benchmarks.gpu.main.subprocess = SimpleNamespace(Popen=start)  # type: ignore[attr-defined]
    runpy.run_module("benchmarks.gpu", run_name="__main__", alter_sys=True)
