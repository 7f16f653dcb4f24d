"""``StopRequest``: catches SIGTERM and Ctrl-C, so that the loop stops where it can be resumed."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """A context in which ``received`` tells whether a signal told the process to end.

    The second signal ends it at once. Nothing is caught unless ``enabled``, or outside of the
    main thread, the only one that gets signals.
    """

    def __init__(self, enabled: bool) -> None:
        self.received = False
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if self._enabled:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        signal.signal(number, self._before[signal.Signals(number)])
