"""One folder has one writer, and the lock ends with its process, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from sparsedm_compiler import ConfigError
from sparsedm_compiler.train import folder_lock
from sparsedm_compiler.train.folder_lock import LOCK, check_unlocked, lock_folder

HOLD = """
import os, sys, time
from pathlib import Path
from sparsedm_compiler.train.folder_lock import lock_folder
with lock_folder(Path(sys.argv[1])):
    if os.fork() == 0:  # as a worker that loads data
        time.sleep(60)
    print("locked", flush=True)
    time.sleep(60)
"""


@contextmanager
def held_elsewhere(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of ``folder``, and has a child that outlives it."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        yield holder
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.communicate()


def test_lock_folder_held_by_a_process_is_refused_until_it_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with held_elsewhere(folder) as holder:
        for attempt in (check_unlocked, lambda path: lock_folder(path).__enter__()):
            with pytest.raises(ConfigError, match=rf"written by process {holder.pid} on .*: wait"):
                attempt(folder)
        holder.kill()  # the forked child lives on
        holder.wait()
        check_unlocked(folder)
        with lock_folder(folder):
            assert (folder / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert not (folder / LOCK).exists()


def test_lock_folder_of_another_thread_is_refused_and_of_this_one_is_entered(
    tmp_path: Path,
) -> None:
    (tmp_path / "other").mkdir()
    spelled_otherwise = tmp_path / "other" / ".." / "run"
    with ThreadPoolExecutor(1) as pool:
        with lock_folder(tmp_path / "run"), lock_folder(tmp_path / "run"):
            check_unlocked(spelled_otherwise)
            for attempt in (check_unlocked, lambda path: lock_folder(path).__enter__()):
                with pytest.raises(ConfigError, match=f"written by process {os.getpid()} on"):
                    pool.submit(attempt, spelled_otherwise).result()
        pool.submit(check_unlocked, spelled_otherwise).result()


def test_lock_folder_leaves_no_folder_that_stays_empty(tmp_path: Path) -> None:
    check_unlocked(tmp_path / "a/b/c")
    with lock_folder(tmp_path / "a/b/c"):
        assert (tmp_path / "a/b/c" / LOCK).exists()
    assert [*tmp_path.iterdir()] == []
    with lock_folder(tmp_path / "a/b/c"):
        (tmp_path / "a/b/kept").touch()
    assert [*tmp_path.rglob("*")] == [tmp_path / "a", tmp_path / "a/b", tmp_path / "a/b/kept"]


def test_lock_folder_on_a_file_system_without_locks_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lockf(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(folder_lock.fcntl, "lockf", lockf)
    with pytest.warns(UserWarning, match="cannot lock files"), lock_folder(tmp_path):
        pass
