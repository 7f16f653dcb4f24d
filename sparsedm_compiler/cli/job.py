"""What every command is made of, and what its errors and signals come to."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from ..errors import (
    ConfigError,
    DenseRunError,
    GraphError,
    KernelError,
    SparseDMError,
    StoppedError,
)

FINE, FAILED, REFUSED = 0, 1, 2
"""Exit statuses: done; something failed on the way; the request cannot be carried out as it is."""
SIGNALLED = 128
"""Plus the signal's number: ended by it."""
ON_THE_WAY = (DenseRunError, GraphError, KernelError)
"""Errors that no check of the request could have found."""


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request. ``lines``: what will be done and where; ``run``: does it."""

    lines: tuple[str, ...]
    run: Callable[[], None]


class Command(Protocol):
    """A module of this package that is a command."""

    ABOUT: str
    EXAMPLE: str

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""

    def prepare(self, options: argparse.Namespace) -> Job:
        """Check all of the request without writing anything. Raises SparseDMError."""


class TerminatedError(BaseException):
    """SIGTERM: unwinds the stack as KeyboardInterrupt does, so that files are closed."""


def execute(name: str, command: Command, options: argparse.Namespace) -> int:
    """Carry out a request; the exit status. An error takes one line on stderr, ``name`` first."""
    with signals() as received:
        try:
            job = command.prepare(options)
            if options.dry_run:
                print("\n".join([*job.lines, "dry run: nothing was computed or written"]))
            else:
                job.run()
            sys.stdout.flush()
        except StoppedError as error:
            return failed(name, str(error), SIGNALLED + (received() or signal.SIGTERM))
        except SparseDMError as error:
            late = type(error) is SparseDMError or isinstance(error, ON_THE_WAY)
            return failed(name, str(error), FAILED if late else REFUSED)
        except KeyboardInterrupt:
            return failed(name, "interrupted", SIGNALLED + signal.SIGINT)
        except TerminatedError:
            return failed(name, "terminated", SIGNALLED + signal.SIGTERM)
        except BrokenPipeError:  # the reader has seen enough, e.g. "| head"
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        except OSError as error:
            return failed(name, str(error), FAILED)
    return FINE


def failed(name: str, text: str, status: int) -> int:
    """``status``, after its reason has been written as one line."""
    print(f"{name}: {' '.join(text.split())}", file=sys.stderr)
    return status


@contextmanager
def signals() -> Iterator[Callable[[], int | None]]:
    """SIGTERM raises TerminatedError in the block; yields what tells the last signal received.

    A handler set inside the block replaces ours (training saves first); the signal is told still.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)

    def received() -> int | None:
        try:
            return reader.recv(4096)[-1]
        except BlockingIOError:
            return None

    before = signal.signal(signal.SIGTERM, terminate)
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield received
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, before)
        reader.close()
        writer.close()


def terminate(number: int, frame: FrameType | None) -> None:
    """The handler of SIGTERM."""
    raise TerminatedError


def writable(path: str | Path, *, folder: bool = False) -> Path:
    """``path`` if a file (or folder) can be written there. Raises ConfigError; makes nothing."""
    target = Path(path)
    if target.exists() and target.is_dir() != folder:
        kind, wanted = ("a file", "folder") if folder else ("a folder", "file")
        raise ConfigError(f"cannot write {target}: it is {kind}, name a {wanted}")
    place = target
    while not place.exists() and place != place.parent:
        place = place.parent
    if place != target and not place.is_dir():
        raise ConfigError(f"cannot write {target}: {place} is a file, not a folder")
    if not os.access(place, os.W_OK):
        raise ConfigError(f"cannot write {target}: no permission in {place}")
    return target
