"""``kill -9`` at any moment: what is left on the disk resumes to the identical end."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparsedm_compiler.train.checkpoint import list_checkpoints
from tests.train.cases import log_of, plain_teacher, short

KILLS = int(os.environ.get("SPARSEDM_KILLS", "5"))
"""``make kills`` takes 20."""

TIMED = ("log.jsonl", "results.json", "state.json", "curves.png")


def run(folder: Path) -> None:
    """The run that is killed: a checkpoint every second step, and everything else that is kept.

    Of a network that is captured quickly, so that most kills come after the first checkpoint.
    """
    kept = {"images": 160, "save_every": 16, "held_out_every": 40}
    short("progressive", folder, teacher=plain_teacher(), **kept)


def serve() -> None:
    """A line of stdin is seconds and a folder: a forked child trains in it, until it is killed.

    Forked, so that all is imported once. Answers with exit code and seconds.
    """
    import tests.preload  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        seconds, folder = line.split(maxsplit=1)
        started = time.perf_counter()
        child = os.fork()
        if child == 0:
            run(Path(folder.strip()))
            os._exit(0)
        if seconds != "inf":
            time.sleep(float(seconds))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), time.perf_counter() - started, flush=True)


class Server:
    """The process that forks the runs."""

    def __init__(self) -> None:
        call = "from tests.train.test_kill import serve; serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", call], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.seconds = 0.0

    def train(self, folder: Path, kill_after: float = math.inf) -> int:
        """The exit code of a run in ``folder``, killed after so many seconds if it still runs."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(kill_after, folder, file=self.process.stdin, flush=True)
        code, seconds = self.process.stdout.readline().split()
        self.seconds = float(seconds)
        return int(code)


@pytest.fixture
def server() -> Iterator[Server]:
    served = Server()
    yield served
    served.process.kill()
    served.process.communicate()


def contents(path: Path) -> object:
    """The bytes of a file; of safetensors, whose header has no fixed order, header and bytes."""
    content = path.read_bytes()
    if path.suffix != ".safetensors":
        return content
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def state(folder: Path) -> dict[str, object]:
    """What every file of a finished run holds, but for pictures and times."""
    files = (path for path in folder.rglob("*") if path.is_file() and "events" not in path.name)
    return {str(f.relative_to(folder)): contents(f) for f in files if f.name not in TIMED}


def test_finetune_killed_at_any_moment_resumes_to_the_same_end(
    server: Server, tmp_path: Path
) -> None:
    assert server.train(tmp_path / "whole") == 0
    seconds = server.seconds
    expected, log = state(tmp_path / "whole"), log_of(tmp_path / "whole")
    draw, killed = random.Random(0), 0
    for attempt in itertools.count():
        folder, copy = tmp_path / f"killed{attempt}", tmp_path / "copy"
        while server.train(folder, draw.uniform(0, 0.8 * seconds)) != 0:
            killed += 1
            shutil.rmtree(copy, ignore_errors=True)
            if folder.exists():
                shutil.copytree(folder, copy)
                print("killed with checkpoints", list_checkpoints(folder))
            assert server.train(copy) == 0
            assert state(copy) == expected
            assert log_of(copy) == log
            if killed == KILLS:
                return
        assert state(folder) == expected
        assert log_of(folder) == log
        assert attempt < KILLS, "most runs end before they are killed"
