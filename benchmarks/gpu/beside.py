"""One table of a line per pattern: what it costs in quality, and what it gains in speed."""

from __future__ import annotations

from statistics import median
from typing import Any

from .cells import GONE, markdown, speed
from .quality import Quality
from .results import Results

TOKENS = 4096
"""Layers of so many tokens and more are summed up."""


def beside(results: Results, _: Quality) -> str:
    """Held-out losses of a study with the speeds of all sections, by pattern."""
    row = results["quality"][0]
    models = results["models"]
    body = [
        (
            text,
            cell.get("method", ""),
            loss(cell),
            compare_losses(row, cell),
            layers(results, text),
            *(model(results, other, text) for other in models),
        )
        for text, cell in row["patterns"].items()
    ]
    names = (
        "pattern",
        "best method",
        "held-out loss",
        "over dense",
        f"layers, {TOKENS} tokens and more",
    )
    titles = (f"{other['model']}, batch {other['batch']}" for other in models)
    note = (
        f"Each student saw {row['images']:,} images, as did the dense copy. Layers: the median of "
        "the fastest kernels over cuBLASLt; models: over compiled dense."
    )
    return f"{note}\n\n{markdown((*names, *titles), body)}"


def loss(cell: dict[str, Any]) -> str:
    """The loss of a student."""
    return f"{cell['loss']:.4f}"


def compare_losses(row: dict[str, Any], cell: dict[str, Any]) -> str:
    """The loss over that of the dense copy."""
    return f"{cell['loss'] / row['patterns']['dense']['loss']:.3f}"


def layers(results: Results, text: str) -> str:
    """The median speed of all layers of many tokens."""
    ratios = [
        row["patterns"][text]["ratio"][1]
        for row in results["ops"]
        if row["tokens"] >= TOKENS and "ratio" in row["patterns"].get(text, {})
    ]
    if text == "dense" or not ratios or results["rehearsal"]:
        return GONE
    return f"{median(ratios):.2f} of {len(ratios)}"


def model(results: Results, row: dict[str, Any], text: str) -> str:
    """The speed of a whole model."""
    cell = row["patterns"].get(text, {})
    return speed(results, cell["ratio"]) if "ratio" in cell else GONE
