"""The lock of a run's folder: one folder has one writer, and the lock dies with its process."""

from __future__ import annotations

import errno
import os
import socket
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""The file in a run's folder that its writer locks; it names the writer while there is one."""
BUSY = (errno.EACCES, errno.EAGAIN)

_HOLDERS: dict[Path, int] = {}
"""Folder -> the thread of this process that has locked it.

The system's lock belongs to the process, is no obstacle to its other threads, and is lost when any
of its handles of the file is closed.
"""


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Makes a folder and keeps every other process and thread from locking it for the block.

    The thread that holds the lock may enter again. The system drops the lock when the process
    ends, however it ends; forked children do not inherit it. Folders that were made and are empty
    at the end are removed. Where a file system cannot lock, a warning says so. Raises ConfigError
    where the folder is locked.
    """
    key, thread = folder.resolve(), threading.get_ident()
    if _HOLDERS.get(key) == thread:
        yield
        return
    check_unlocked(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _try_lock(handle, folder, exclusive=True) or not _is_current(handle, folder):
            raise ConfigError(describe_writer(folder))
        _HOLDERS[key] = thread
        try:
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
            yield
        finally:
            del _HOLDERS[key]
            (folder / LOCK).unlink(missing_ok=True)
            remove_empty_folders(made)
    finally:
        os.close(handle)


def remove_empty_folders(folders: Iterable[Path]) -> None:
    """Removes folders, innermost first, up to the first that is not empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def check_unlocked(folder: Path) -> None:
    """Raises ConfigError where another process or thread has locked a folder; writes nothing."""
    holder = _HOLDERS.get(folder.resolve())
    if holder == threading.get_ident():
        return
    if holder is not None:
        raise ConfigError(describe_writer(folder))
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        if not _try_lock(handle, folder, exclusive=False):
            raise ConfigError(describe_writer(folder))
    finally:
        os.close(handle)


def describe_writer(folder: Path) -> str:
    """Returns the message about a folder that another process writes."""
    try:
        writer = (folder / LOCK).read_text(encoding="utf-8")
    except FileNotFoundError:
        writer = ""
    return (
        f"{folder} is being written by {writer or 'another process'}: wait for its end, or choose "
        "another folder"
    )


def _is_current(handle: int, folder: Path) -> bool:
    """Returns whether an open lock file is still the folder's: its holder removes it at the end."""
    try:
        return os.path.samestat(os.fstat(handle), (folder / LOCK).stat())
    except FileNotFoundError:
        return False


def _try_lock(handle: int, folder: Path, *, exclusive: bool) -> bool:
    """Locks an open file at once, or returns False where another process has locked it."""
    if fcntl is None:
        return True
    try:
        fcntl.lockf(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in BUSY:
            return False
        warnings.warn(
            f"the file system of {folder} cannot lock files ({error.strerror}): see to it yourself "
            "that no other process writes there",
            stacklevel=2,
        )
    return True
