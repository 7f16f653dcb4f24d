"""Commands under ``accelerate launch`` and ``torchrun``: who prints, and who waits for whom."""

from __future__ import annotations

import os


def join() -> bool:
    """Meet the other processes that a launcher started; whether this is the one that prints."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from accelerate import PartialState

        PartialState()
    from ..evaluate.process_group import own_share

    return own_share()[0] == 0


def wait() -> None:
    """Wait until every process has come here."""
    from ..evaluate.process_group import gathered

    gathered(None)
