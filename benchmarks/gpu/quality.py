"""What a pattern costs: the held-out losses of docs/results/methods.json, for every speed shown."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from .case import ROOT

MEASURED = ROOT / "docs/results/methods.json"
METHOD = "sparsedm"
NOT_HERE = "quality not measured here"


@dataclass(frozen=True, slots=True)
class Quality:
    """Held-out losses, means over seeds: by pattern, and of the dense model trained alike."""

    dense: float | None
    losses: dict[str, float]

    def of(self, pattern: str) -> str:
        """In the words that stand beside a speed."""
        if pattern in self.losses:
            return f"loss {self.losses[pattern]:.4f}"
        return NOT_HERE

    @property
    def about(self) -> str:
        """What the losses are, in one sentence."""
        if self.dense is None:
            return f"No measured losses were found in docs/results/methods.json: {NOT_HERE}."
        return (
            "Losses: held-out denoising error of a U-ViT of 0.68 M parameters on CIFAR-10 at "
            f"16x16, fine-tuned by {METHOD!r} on 6,400 images (dense, trained alike: "
            f"{self.dense:.4f}), from docs/results/methods.json; not the models timed here."
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
