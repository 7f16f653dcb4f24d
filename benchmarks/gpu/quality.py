"""What a pattern costs: held-out losses for every speed shown.

Those of the section "quality" of the same run, where it got that far; else those of
docs/results/methods.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from .case import ROOT

MEASURED = ROOT / "docs/results/methods.json"
METHOD = "sparsedm"
NOT_HERE = "quality not measured here"


@dataclass(frozen=True, slots=True)
class Quality:
    """Held-out losses, means over seeds: by pattern, and of the dense model trained alike.

    ``source``: where they are from, where that is not docs/results/methods.json.
    """

    dense: float | None
    losses: dict[str, float]
    source: str = ""

    def of(self, pattern: str) -> str:
        """In the words that stand beside a speed."""
        if pattern in self.losses:
            return f"loss {self.losses[pattern]:.4f}"
        return NOT_HERE

    @property
    def about(self) -> str:
        """What the losses are, in one sentence."""
        if self.source:
            return self.source
        if self.dense is None:
            return f"No measured losses were found in docs/results/methods.json: {NOT_HERE}."
        return (
            "Losses: held-out denoising error of a U-ViT of 0.68 M parameters on CIFAR-10 at "
            f"16x16, fine-tuned by {METHOD!r} on 6,400 images (dense, trained alike: "
            f"{self.dense:.4f}), from docs/results/methods.json; not the models timed here."
        )


def read_quality(results: dict[str, Any]) -> Quality:
    """Of the students of a run, if it trained any; else of ``MEASURED``."""
    rows = [] if results["rehearsal"] else results.get("quality", [])
    cells = {text: cell for row in rows for text, cell in row["patterns"].items() if "loss" in cell}
    if "dense" not in cells or len(cells) < 2:
        return quality()
    losses = {text: cell["loss"] for text, cell in cells.items() if text != "dense"}
    return Quality(cells["dense"]["loss"], losses, describe_students(rows[0]))


def describe_students(row: dict[str, Any]) -> str:
    """What was trained, in two sentences."""
    return (
        f"Losses: held-out denoising error of a U-ViT of width {row['width']} and "
        f"{row['parameters'] / 1e6:.1f} M parameters on {row['data']}: {row['teacher_images']:,} "
        f"images dense (loss {row['teacher_loss']:.4f}), then {row['images']:,} for each student, "
        f"'asp', and for a dense copy ({row['patterns']['dense']['loss']:.4f}); one seed. Not the "
        "models timed here."
    )


def quality(path: Path = MEASURED) -> Quality:
    """What was measured of each pattern; nothing where the file is missing."""
    if not path.exists():
        return Quality(None, {})
    grouped: dict[str | None, list[float]] = {}
    for run in json.loads(path.read_text())["methods"]:
        if run["method"] in (METHOD, "dense"):
            grouped.setdefault(run["pattern"], []).append(run["loss"])
    dense = grouped.pop(None, None)
    losses = {pattern: mean(values) for pattern, values in grouped.items() if pattern is not None}
    return Quality(None if dense is None else mean(dense), losses)
