"""The time there is, shared out to the sections."""

from __future__ import annotations

import time
from collections.abc import Mapping


class Clock:
    """So many minutes from now. What a section leaves over is there for those behind it."""

    def __init__(self, minutes: float, shares: Mapping[str, float]) -> None:
        self.end = time.time() + 60 * minutes
        self._shares = dict(shares)

    def until(self, section: str) -> float:
        """When the section must end, in seconds since 1970; asked for once, as it begins."""
        now, all_shares = time.time(), sum(self._shares.values())
        share = self._shares.pop(section) / all_shares
        return now + max(0.0, self.end - now) * share
