"""Announcements of long work, with a clock, and progress bars.

A library must not print unasked, and a command must not keep silent for minutes. So an announcement
is always a record of the logger "sparsedm_compiler" at level INFO, and is shown on stderr

- by the command line, and by calls with ``progress=True``, everywhere;
- by other calls, where stderr is a terminal; the line disappears when the work is done;
- nowhere at all with ``SPARSEDM_PROGRESS=0`` in the environment.

Work that is done within ``DELAY`` seconds is not shown.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from .optional_deps import is_installed

DELAY = 3.0
"""Seconds after which an announcement is shown."""
TICK = 1.0
"""Seconds between two movements of its clock."""
SWITCH = "SPARSEDM_PROGRESS"
LOGGER = logging.getLogger("sparsedm_compiler")

COMPILING = "may take minutes the first time; what Inductor makes is kept on disk"
"""The note on a compilation."""

_wanted: ContextVar[bool | None] = ContextVar("wanted", default=None)
_outer: ContextVar[Announcement | None] = ContextVar("outer", default=None)


class ProgressBar(Protocol):
    """The part of a tqdm bar that this package uses."""

    def update(self, n: float = 1) -> bool | None:
        """Counts ``n`` more."""

    def close(self) -> None:
        """Ends the bar."""


class NoProgressBar:
    """A progress bar that is not shown."""

    def update(self, n: float = 1) -> bool | None:
        """Does nothing."""
        return None

    def close(self) -> None:
        """Does nothing."""


@contextmanager
def show_progress_bar(
    total: int, *, unit: str, name: str, shown: bool = True
) -> Iterator[ProgressBar]:
    """Yields a progress bar, which counts nothing where it is not ``shown`` or tqdm is missing."""
    if not shown or not is_installed("tqdm"):
        yield NoProgressBar()
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit=unit, desc=name) as bar:
        yield bar


@contextmanager
def show_announcements(wanted: bool) -> Iterator[None]:
    """Shows the announcements of the block on stderr, terminal or not, or shows none."""
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


@contextmanager
def announce(text: str, note: str = "") -> Iterator[None]:
    """Announces that the block does ``text``, e.g. "compiling the training step".

    ``note``: more for its first line. An announcement inside another one becomes part of its line.
    """
    started, outer, shown = time.perf_counter(), _outer.get(), None
    LOGGER.info("%s%s", text, f" ({note})" if note else "")
    with ExitStack() as stack:
        if outer is not None:
            outer.steps.append(text)
            stack.callback(outer.steps.pop)
        elif is_shown():
            shown = Announcement(text, note)
            stack.callback(_outer.reset, _outer.set(shown))
            stack.callback(shown.end)
        yield
        if shown is not None:
            shown.lasting = _wanted.get() is True
    LOGGER.info("%s took %s", text, format_duration(time.perf_counter() - started))


def is_shown() -> bool:
    """Returns whether announcements are shown on stderr."""
    wanted = _wanted.get()
    if wanted is False or os.environ.get(SWITCH) == "0" or sys.stderr is None:
        return False
    return wanted is True or sys.stderr.isatty()


class Announcement:
    """A line on stderr that a thread shows after ``DELAY`` seconds, and whose clock it moves.

    On a terminal the line is a tqdm bar without a bar, so that it stands below those that are
    there. Elsewhere, and without tqdm, it is printed once. ``lasting``: a line with the duration
    stays when the work has been done. ``steps``: the announcements inside this one.
    """

    def __init__(self, text: str, note: str) -> None:
        self.text, self.note, self.lasting = text, note, False
        self.steps: list[str] = []
        self.started, self.visible = time.time(), False
        self.file = sys.stderr
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sparsedm clock", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Removes the line."""
        self._ended.set()
        self._thread.join()
        if self.visible and self.lasting:
            took = format_duration(time.time() - self.started)
            print_line(f"{self.text} took {took}", self.file)

    def _run(self) -> None:
        if self._ended.wait(DELAY):
            return
        self.visible = True
        if not (self.file.isatty() and is_installed("tqdm")):
            print_line(f"{self.text} ...{f' {self.note}' if self.note else ''}", self.file)
            return
        from tqdm import tqdm

        form = "{elapsed} {desc}"  # the clock first, as a narrow window cuts off the end
        with tqdm(bar_format=form, leave=False, file=self.file, desc=self._describe()) as line:
            line.start_t = self.started
            while not self._ended.wait(TICK):
                line.set_description_str(self._describe())

    def _describe(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return "".join([self.text, *(f": {step}" for step in self.steps[-1:]), note])


def print_line(text: str, file: Any) -> None:
    """Prints a line, above the progress bars that are there."""
    if is_installed("tqdm"):
        from tqdm import tqdm

        tqdm.write(text, file=file)
    else:
        print(text, file=file, flush=True)


def format_duration(seconds: float) -> str:
    """Returns minutes and seconds as text.

    >>> format_duration(4.21), format_duration(83.5), format_duration(3723)
    ('4.2 s', '1:23 min', '62:03 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


def format_bytes(size: float) -> str:
    """Returns a number of bytes as text, in powers of ten.

    >>> format_bytes(640), format_bytes(2_240), format_bytes(10.3e9)
    ('640 B', '2.2 kB', '10.3 GB')
    """
    units = ("B", "kB", "MB", "GB", "TB")
    power = next((k for k in range(len(units)) if size < 10 ** (3 * k + 3)), len(units) - 1)
    return f"{size:.0f} B" if power == 0 else f"{size / 10 ** (3 * power):.1f} {units[power]}"


@dataclass(slots=True)
class Stopwatch:
    """Seconds that were spent compiling."""

    seconds: float = 0.0


@contextmanager
def watch_compilation(text: str) -> Iterator[Stopwatch]:
    """Announces every compilation by TorchDynamo in the block as ``text``, and times it."""
    from torch._dynamo.callback import CallbackArgs, callback_handler

    watch, compiling = Stopwatch(), ExitStack()
    started = 0.0

    def start(_: CallbackArgs) -> None:
        nonlocal started
        started = time.perf_counter()
        compiling.enter_context(announce(text, COMPILING))

    def stop(_: CallbackArgs) -> None:
        compiling.close()
        watch.seconds += time.perf_counter() - started

    callback_handler.register_start_callback(start)
    callback_handler.register_end_callback(stop)
    try:
        yield watch
    finally:
        callback_handler.remove_start_callback(start)
        callback_handler.remove_end_callback(stop)
