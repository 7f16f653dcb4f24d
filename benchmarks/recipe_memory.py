"""The memory that the recipes for big models need on one device, computed from shapes alone.

    python benchmarks/recipe_memory.py --out docs/results/recipe_memory.json

Models are the published sizes on the meta device, pruned to --pattern: weights, gradients,
optimizer state, EMA, masks and teacher to the byte, activations as autograd keeps them for one
micro-batch. What ops need while they run comes on top. No weights are read, nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import sparsedm_compiler as sdm
from sparsedm_compiler.experiment.recipes import find_recipe
from sparsedm_compiler.models import open_with_inputs
from sparsedm_compiler.progress import format_bytes
from sparsedm_compiler.train import FinetuneConfig
from sparsedm_compiler.train.memory import MemoryEstimate, estimate_memory, list_pruned_names

RECIPES = ("sd15", "dit-xl-2", "sdxl", "sd3-medium", "flux1")
WAYS: Mapping[str, tuple[str, bool]] = {
    "as it is": ("", True),
    "teacher on the disk": ("", False),
    "+less-memory, teacher on the disk": ("+less-memory", False),
    "+less-memory+adapters, teacher on the disk": ("+less-memory+adapters", False),
}
"""By the name of a row: what goes on top of the recipe, and whether the teacher is in memory."""


def estimate(recipe: str, taught: bool, pattern: str) -> tuple[MemoryEstimate, FinetuneConfig]:
    """Returns the memory of one process with a recipe, and its options."""
    values = find_recipe(recipe)
    name = values["model"]["name"]
    config = FinetuneConfig.create(**values["train"])
    model, args, kwargs = open_with_inputs(name)
    report = sdm.count_macs(model, *args, pattern=pattern, **kwargs)
    pruned = list_pruned_names(model, report)

    def make_call(count: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return open_with_inputs(name, batch=count)[1:]

    return estimate_memory(model, config, make_call, pruned=pruned, taught=taught), config


def main() -> None:
    """Reads the command line, computes and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/bench/recipe_memory.json"))
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for recipe in options.recipes:
        for way, (extra, taught) in WAYS.items():
            needed, config = estimate(recipe + extra, taught, options.pattern)
            micro = config.batch_size // config.accumulation
            fixed = {"recipe": recipe, "way": way, "images": config.images, "micro_batch": micro}
            rows.append({**fixed, **asdict(needed), "total": needed.total})
            print(f"{recipe} {way}, {micro} images at once: {needed}", flush=True)
    described = ["git", "describe", "--always"]
    commit = subprocess.run(described, capture_output=True, text=True, check=False).stdout.strip()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"pattern": options.pattern, "torch": torch.__version__, "commit": commit}
    options.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    shown = [
        [row["recipe"], row["way"], row["micro_batch"], f"{row['images']:,}"]
        + [format_bytes(row[key]) for key in ("weights", "optimizer", "activations", "total")]
        for row in rows
    ]
    head = ("recipe", "", "images at once", "images", "weights", "optimizer", "activations", "all")
    print(tabulate(shown, head, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
