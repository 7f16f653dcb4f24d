"""``ForkServer``: pieces of Python, each in a process forked after one prelude has run."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[1]


class ForkServer:
    """A process that has run a prelude, imports above all, and forks a child for every run.

    What a child does reaches neither the prelude's process nor another child.
    """

    def __init__(self, prelude: str) -> None:
        code = f"from tests.forked import serve\nserve({prelude!r})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def run(self, code: str) -> subprocess.CompletedProcess[str]:
        """Runs code with the names of the prelude; returns its status and what it printed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({"code": code, "folder": folder}), file=self.process.stdin, flush=True)
            status = self.process.stdout.readline()
            assert status, "the prelude failed"
            printed = ((Path(folder) / str(descriptor)).read_text() for descriptor in (1, 2))
            return subprocess.CompletedProcess(code, int(status), *printed)

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.communicate()


def serve(prelude: str) -> None:
    """Runs the prelude, then forks for every line of stdin and answers with an exit status."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(prelude, names)
    gc.collect()
    gc.freeze()  # what was imported stays: no child looks through it again
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(execute(names, **json.loads(line)))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def execute(names: dict[str, Any], code: str, folder: str) -> int:
    """Runs code, prints into files of ``folder``, and returns the exit status."""
    for descriptor in (1, 2):
        with open(Path(folder) / str(descriptor), "wb") as file:
            os.dup2(file.fileno(), descriptor)
    return find_status(lambda: exec(code, names))


def find_status(action: Callable[[], int | None]) -> int:
    """Returns the exit status of a forked process that does this: 0 for None, 1 for an error."""
    try:
        return action() or 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
