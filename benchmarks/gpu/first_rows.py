"""The table of first calls."""

from __future__ import annotations

from .cells import GONE, markdown
from .quality import Quality
from .results import Results


def first_calls(results: Results, _: Quality) -> str:
    """A line per model and variant: seconds, over dense, and what they were spent on."""
    body = []
    for row in results["first_call"]:
        dense = row["variants"].get("dense", {}).get("wall_s")
        for name, cell in row["variants"].items():
            if "wall_s" not in cell:
                body.append((row["model"], row["batch"], name, GONE, GONE, cell["refused"][:80]))
                continue
            over = GONE if dense is None else f"{cell['wall_s'] / dense:.2f}"
            spent = ", ".join(f"{phase} {s:.1f}" for phase, s in cell["timings"].items())
            cells = (
                ("ran", GONE, "")
                if results["rehearsal"]
                else (f"{cell['wall_s']:.1f}", over, spent)
            )
            body.append((row["model"], row["batch"], name, *cells))
    note = (
        "The first call in a fresh process, Inductor's, Triton's and our caches empty; what "
        "Inductor builds once per machine was built before."
    )
    names = ("model", "batch", "", "seconds", "over dense", "of it (s)")
    return f"{note}\n\n{markdown(names, body)}"
