"""What one thread's calls of a compiled model know of each other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class CallState(threading.local):
    """The state of the calls in this thread.

    ``runs``: how often it has run masked weights. ``refusal``: what calls raise, if anything.
    """

    runs = 0
    refusal: type[BaseException] | None = None

    @contextmanager
    def refuse(self, error: type[BaseException]) -> Iterator[None]:
        """Raises ``error`` at every call of the model's methods in this thread, for a while."""
        self.refusal = error
        try:
            yield
        finally:
            self.refusal = None
