"""Announcements: where they are shown, what they say, and their clock on a terminal."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable

import pytest
import torch

from sparsedm_compiler import progress
from sparsedm_compiler.progress import announce, show_announcements, watch_compilation


class Records(logging.Handler):
    """Keeps the messages of a logger."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> Records:
    """The INFO records of the package's logger."""
    handler = Records()
    monkeypatch.setattr(progress.LOGGER, "handlers", [handler])
    monkeypatch.setattr(progress.LOGGER, "level", logging.INFO)
    progress.LOGGER._cache.clear()  # type: ignore[attr-defined]
    return handler


@pytest.fixture
def err(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Returns what was written to stderr, which is no terminal; announcements show at once."""
    monkeypatch.setattr(progress, "DELAY", 0.01)
    monkeypatch.delenv(progress.SWITCH, raising=False)
    return lambda: capsys.readouterr().err


def test_announce_in_a_library_call_logs_and_prints_nothing(
    records: Records, err: Callable[[], str]
) -> None:
    with announce("compiling", "once"):
        time.sleep(0.05)
    assert records.messages[0] == "compiling (once)"
    assert records.messages[1].startswith("compiling took 0.")
    assert err() == ""


def test_announce_where_wanted_prints_the_outermost_one(err: Callable[[], str]) -> None:
    with show_announcements(True), announce("measuring", "a minute"):
        time.sleep(0.05)
        with announce("compiling"):
            time.sleep(0.05)
    first, last = err().splitlines()
    assert first == "measuring ... a minute"
    assert last.startswith("measuring took 0.")


def test_announce_of_quick_or_unwanted_work_prints_nothing(
    err: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with show_announcements(False), announce("compiling"):
        time.sleep(0.05)
    monkeypatch.setattr(progress, "DELAY", 30.0)
    with show_announcements(True), announce("compiling"):
        pass
    monkeypatch.setattr(progress, "DELAY", 0.01)
    monkeypatch.setenv(progress.SWITCH, "0")
    with show_announcements(True), announce("compiling"):
        time.sleep(0.05)
    assert err() == ""


def test_announce_of_failed_work_does_not_say_how_long_it_took(err: Callable[[], str]) -> None:
    @announce("compiling")
    def fail() -> None:
        time.sleep(0.05)
        raise ValueError("broken")

    with show_announcements(True), pytest.raises(ValueError, match="broken"):
        fail()
    assert err() == "compiling ...\n"


TERMINAL = """
import sys, time
from sparsedm_compiler import progress
progress.DELAY, progress.TICK = 0.05, 0.05
with progress.announce("compiling the model", "a minute"):
    time.sleep(1.3)
    with progress.announce("choosing the kernel"):
        time.sleep(1.0)
"""


def test_announce_on_a_terminal_moves_a_clock_and_removes_its_line() -> None:
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != progress.SWITCH}
    child = subprocess.Popen([sys.executable, "-c", TERMINAL], stderr=side, env=environment)
    assert child.wait(timeout=120) == 0
    os.close(side)
    text = ""
    try:
        while part := os.read(main, 4096):
            text += part.decode()
    except OSError:  # the end, on Linux
        pass
    os.close(main)
    frames = text.split("\r")
    assert any(frame.startswith("00:01 compiling the model (a minute)") for frame in frames)
    assert any(
        frame.startswith("00:02 compiling the model: choosing the kernel") for frame in frames
    )
    assert frames[-1] == ""
    assert frames[-2].strip() == ""


def test_watch_compilation_times_and_announces_what_torch_compiles(records: Records) -> None:
    torch._dynamo.reset()
    double = torch.compile(lambda x: 2 * x, backend="eager")
    for expected in (True, False):
        with watch_compilation("compiling it") as watch:
            double(torch.ones(3))
        assert (watch.seconds > 0) is expected
        assert (f"compiling it ({progress.COMPILING})" in records.messages) is expected
        records.messages.clear()
