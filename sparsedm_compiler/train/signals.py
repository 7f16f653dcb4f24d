"""``Stop``: SIGTERM and Ctrl-C as a wish that the loop grants when it can be resumed."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Stop:
    """While entered, ``asked`` says whether the process was told to end.

    The second signal ends it at once. Nothing is caught if ``wanted`` is False, or outside of the
    main thread, which alone gets signals.
    """

    def __init__(self, wanted: bool) -> None:
        self.asked = False
        self._wanted = wanted and threading.current_thread() is threading.main_thread()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        if self._wanted:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, self._before[signal.Signals(number)])
