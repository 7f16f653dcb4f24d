"""What a pattern costs: held-out losses for every speed shown.

Those of a study on a GPU (``make study-gpu``), where a run is given its methods.json; else those of
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
    """Of the study whose losses a run was given, if it was; else of ``MEASURED``."""
    rows = results.get("quality")
    if not rows:
        return quality()
    cells = rows[0]["patterns"]
    losses = {text: cell["loss"] for text, cell in cells.items() if text != "dense"}
    return Quality(cells["dense"]["loss"], losses, describe_students(rows[0]))


def read_losses(path: Path) -> dict[str, Any]:
    """The row of a study by the clock: the lowest loss of every pattern, with its method.

    Raises ValueError for a file without such runs.
    """
    values = json.loads(path.read_text())
    runs = sorted(values.get("timed", ()), key=lambda run: -run["loss"])
    patterns = {
        run["pattern"] or "dense": {"loss": run["loss"], "method": describe_method(run)}
        for run in runs  # the best of a pattern comes last
    }
    if "dense" not in patterns:
        raise ValueError(f"{path} has no dense student of a study by the clock (make study-gpu)")
    order = ["dense", *dict.fromkeys(run["pattern"] for run in values["timed"] if run["pattern"])]
    return {
        "key": "students",
        "patterns": {text: patterns[text] for text in order},
        "about": f"{values['recipe']}, {values['data']}, commit {values['commit']}",
        "machine": values["machine"],
        "teacher_images": values["budget"]["teacher_images"],
        "images": values["budget"]["images"],
    }


def describe_method(run: dict[str, Any]) -> str:
    """The method of a run, with its start and its freeze."""
    return " ".join([run["method"], *(f"{k}={run[k]}" for k in ("start", "freeze") if k in run)])


def describe_students(row: dict[str, Any]) -> str:
    """What was trained, in two sentences."""
    return (
        f"Losses: held-out denoising error of students by the study of methods ({row['about']}; "
        f"{row['machine']}): {row['teacher_images']:,} images dense, then {row['images']:,} for "
        f"each student, the best method of a pattern, and for a dense copy "
        f"({row['patterns']['dense']['loss']:.4f}); one seed. Not the models timed here."
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
