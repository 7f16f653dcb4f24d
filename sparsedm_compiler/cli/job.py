"""The parts of a command, and the exit statuses of its errors and signals."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from ..errors import (
    ConfigError,
    DenseRunError,
    GraphError,
    KernelError,
    SparseDMError,
    StoppedError,
)
from ..optional_deps import require_extra
from ..progress import announce, show_announcements

DONE, FAILED, REFUSED = 0, 1, 2
"""Exit statuses: success; failure while running; a request that cannot be carried out."""
SIGNALLED = 128
"""The exit status of a command ended by a signal, less the signal's number."""
STDOUT = "-"
"""The name of a file that means standard output."""
RUN_ERRORS = (DenseRunError, GraphError, KernelError)
"""Errors that no check of the request could have detected."""


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request: ``lines`` describe it for --dry-run, ``run`` carries it out.

    ``run`` may return an exit status; None is success.
    """

    lines: tuple[str, ...]
    run: Callable[[], int | None]


class Command(Protocol):
    """The interface of a module that implements a command."""

    ABOUT: str
    EXAMPLE: str

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Adds the options of the command."""

    def prepare(self, options: argparse.Namespace) -> Job:
        """Checks the whole request without writing anything. Raises SparseDMError."""


_SMALLER = "take a smaller batch or model, or a device with more memory"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Returns whether a device or the machine had no memory left, in torch's words."""
    said = str(error)
    on_cpu = "not enough memory" in said or "can't allocate memory" in said
    return type(error).__name__ == "OutOfMemoryError" or on_cpu


class TerminatedError(BaseException):
    """Raised by SIGTERM; unwinds the stack as KeyboardInterrupt does, so that files are closed."""


def execute(name: str, command: Command, options: argparse.Namespace) -> int:
    """Carries out a request and returns the exit status.

    An error is printed as one line on stderr that starts with ``name``.
    """
    status: int | None = DONE
    with handle_signals() as last_signal, show_announcements(True):
        try:
            with require_extra("this command", "train"):
                with announce("importing torch and checking the request"):
                    job = command.prepare(options)
                if options.dry_run:
                    print("\n".join([*job.lines, "dry run: nothing was computed or written"]))
                else:
                    status = job.run()
            sys.stdout.flush()
        except StoppedError as error:
            return print_failure(name, str(error), SIGNALLED + (last_signal() or signal.SIGTERM))
        except SparseDMError as error:
            running = type(error) is SparseDMError or isinstance(error, RUN_ERRORS)
            return print_failure(name, str(error), FAILED if running else REFUSED)
        except KeyboardInterrupt:
            return print_failure(name, "interrupted", SIGNALLED + signal.SIGINT)
        except TerminatedError:
            return print_failure(name, "terminated", SIGNALLED + signal.SIGTERM)
        except BrokenPipeError:  # the reader closed the pipe, e.g. "| head"
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        except OSError as error:
            return print_failure(name, str(error), FAILED)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            first = str(error).partition("\n")[0].partition(". Of the allocated")[0]
            return print_failure(name, f"{first}; {_SMALLER}", FAILED)
    return status or DONE


def print_failure(name: str, text: str, status: int) -> int:
    """Prints the reason of a failure as one line on stderr and returns ``status``."""
    print(f"{name}: {' '.join(text.split())}", file=sys.stderr)
    return status


@contextmanager
def handle_signals() -> Iterator[Callable[[], int | None]]:
    """Makes SIGTERM raise TerminatedError; yields a function that returns the last signal.

    That function knows the signal even where a handler set inside the block replaces this one, as
    training does in order to save first. It returns None where there was no signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)

    def last_signal() -> int | None:
        try:
            return reader.recv(4096)[-1]
        except BlockingIOError:
            return None

    before = signal.signal(signal.SIGTERM, terminate)
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield last_signal
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, before)
        reader.close()
        writer.close()


def terminate(number: int, frame: FrameType | None) -> None:
    """Handles SIGTERM. Raises TerminatedError."""
    raise TerminatedError


def check_writable(path: str | Path, *, folder: bool = False) -> Path:
    """Returns ``path`` if a file (or a folder) can be written there; makes nothing.

    Raises ConfigError otherwise.
    """
    target = Path(path)
    if target.exists() and target.is_dir() != folder:
        kind, wanted = ("a file", "folder") if folder else ("a folder", "file")
        raise ConfigError(f"cannot write {target}: it is {kind}, name a {wanted}")
    existing = target
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if existing != target and not existing.is_dir():
        raise ConfigError(f"cannot write {target}: {existing} is a file, not a folder")
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"cannot write {target}: no permission in {existing}")
    return target


def write_json(file: str, values: Mapping[str, Any]) -> None:
    """Writes values as JSON to a file, whole or not at all, or to standard output (STDOUT)."""
    from ..fileio import write_atomically

    text = json.dumps(values, indent=1) + "\n"
    if file == STDOUT:
        sys.stdout.write(text)
    else:
        write_atomically(Path(file), text.encode())
