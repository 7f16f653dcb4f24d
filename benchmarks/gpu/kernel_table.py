"""Writes the table of kernels of a card from results of the section "ops".

    python -m benchmarks.gpu.kernel_table out/gpu/results.json

Of several results of one card later ones win. A kernel that the package no longer has is left out,
and so is a row that is marked as doubtful.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sparsedm_compiler import ConfigError, KernelError
from sparsedm_compiler.backends.registry import find_family

from .case import ROOT

Key = tuple[Any, ...]
TABLES = ROOT / "sparsedm_compiler/autotune/tables"


def main(arguments: list[str] | None = None) -> int:
    """Write one file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.kernel_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("results", nargs="+", type=Path, metavar="JSON", help="results of one card, oldest first")
    add("--out", type=Path, default=TABLES, help="the folder to write CARD.json to")
    options = parser.parse_args(arguments)
    table = make_table([json.loads(path.read_text()) for path in options.results])
    path = options.out / f"{name_file(table['card'])}.json"
    path.write_text(format_table(table), encoding="utf-8")
    print(f"{path}: {len(table['rows'])} rows")
    return 0


def make_table(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The table of several runs on one card."""
    abouts = [run["environment"] for run in runs]
    cards = {about["gpu"] for about in abouts}
    if len(cards) != 1:
        raise ConfigError(f"one table is of one card, these results are of {sorted(cards)}")
    rows: dict[Key, dict[str, Any]] = {}
    for run in runs:
        for row in list_rows(run):
            rows[tuple(row[name] for name in ("pattern", "tokens", "cols", "rows", "act"))] = row
    measured = "; ".join(
        f"{about['time'].split()[0]}, commit {about['commit']}, torch {about['torch']}"
        for about in abouts
    )
    capability = next(about["capability"] for about in abouts if "capability" in about)
    ordered = [rows[key] for key in sorted(rows)]
    return {"card": cards.pop(), "capability": capability, "measured": measured, "rows": ordered}


def list_rows(run: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of one run: of results.json as it is written, or of what docs/results keeps."""
    if run.get("rehearsal"):
        raise ConfigError("a rehearsal on a CPU measures nothing")
    for layer in run.get("ops") or run.get("layers") or []:
        for pattern, cell in layer["patterns"].items():
            if "ratio" not in cell or not is_known(cell["kernel"]) or cell.get("doubtful"):
                continue
            name, *numbers = cell["kernel"].split("/")
            layout = count_layout(name)
            yield {
                "pattern": pattern,
                "kernel": name,
                "tile": [int(number) for number in numbers[layout:]],
                **{key: layer[key] for key in ("tokens", "cols", "rows", "act", "dense_ms")},
                "ratio": cell["ratio"][1],
            }


def is_known(kernel: str) -> bool:
    """Whether the package has a kernel of that name."""
    try:
        find_family(kernel.partition("/")[0])
    except KernelError:
        return False
    return True


def count_layout(name: str) -> int:
    """How many numbers of a kernel's text are its layout; the others are its tile."""
    return 0 if name == "cuda_semi" else 1


def name_file(card: str) -> str:
    """The name of a card as the name of a file.

    >>> name_file("NVIDIA H100 80GB HBM3")
    'nvidia_h100_80gb_hbm3'
    """
    return re.sub(r"\W+", "_", card.lower()).strip("_")


def format_table(table: dict[str, Any]) -> str:
    """JSON with a line for every row."""
    head = {key: value for key, value in table.items() if key != "rows"}
    rows = ",\n".join(f"  {json.dumps(row)}" for row in table["rows"])
    return json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{rows}\n ]\n}}\n'


if __name__ == "__main__":
    raise SystemExit(main())
