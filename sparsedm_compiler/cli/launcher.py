"""Commands under ``accelerate launch`` and ``torchrun``: joining and awaiting other processes."""

from __future__ import annotations

import os


def join_processes() -> bool:
    """Joins the processes that a launcher started; returns whether this is the one that prints."""
    from ..evaluate.process_group import join_process_group, own_share

    if os.environ.get("WORLD_SIZE", "1") != "1":
        join_process_group()

    return own_share()[0] == 0


def wait_for_processes() -> None:
    """Waits until every process has called this."""
    from ..evaluate.process_group import gather_objects

    gather_objects(None)
