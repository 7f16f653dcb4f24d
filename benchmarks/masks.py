"""The cost of a mask: ``nm_mask`` against an argsort and a topk, per pattern.

    python benchmarks/masks.py --out masks.json

Shared and transposable patterns are compared with the per-row n:m of the same n and m, since
nothing else computes them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from sparsedm_compiler.autotune.side_by_side import (
    compute_ratio,
    describe_machine,
    format_ratio,
    sample_in_turns,
)
from sparsedm_compiler.masks.nm_mask import compute_mask
from sparsedm_compiler.patterns import Pattern

JOINT = ["2:4t", "1:8x16", "64:2:8", "1:2@64x16", "1:2@64x32+2:4"]
PATTERNS = ["31:32", "3:4", "2:4", "1:4", "2:8", "1:8", "1:16", "1:32", "16:32", *JOINT]
SHAPES = {"linear": (2048, 512), "conv": (256, 256, 3, 3)}


def mask_by_argsort(weight: Tensor, n: int, m: int) -> Tensor:
    """Sorts every group and drops the m - n smallest, as published code does."""
    groups = weight.abs().movedim(1, -1).reshape(-1, m)
    drop = groups.argsort(dim=1)[:, : m - n]
    return _restore_shape(
        torch.ones_like(groups, dtype=torch.bool).scatter_(1, drop, False), weight
    )


def mask_by_topk(weight: Tensor, n: int, m: int) -> Tensor:
    """Selects the n largest of every group by topk."""
    groups = weight.abs().movedim(1, -1).reshape(-1, m)
    keep = groups.topk(n, dim=1, sorted=False).indices
    return _restore_shape(
        torch.zeros_like(groups, dtype=torch.bool).scatter_(1, keep, True), weight
    )


def _restore_shape(groups: Tensor, weight: Tensor) -> Tensor:
    shape = weight.movedim(1, -1).shape
    return groups.reshape(shape).movedim(-1, 1)


def compare(weight: Tensor, pattern: Pattern, rounds: int) -> dict[str, Any]:
    """Returns milliseconds and ratios of one weight and pattern."""
    n, m = pattern.n, pattern.m
    calls: dict[str, Callable[[], object]] = {
        "nm_mask": lambda: compute_mask(weight, pattern),
        "argsort": lambda: mask_by_argsort(weight, n, m),
        "topk": lambda: mask_by_topk(weight, n, m),
        "copy": weight.clone,
    }
    samples = sample_in_turns(calls, rounds=rounds)
    row: dict[str, Any] = {"pattern": str(pattern), "shape": list(weight.shape)}
    for clock in ("wall", "cpu"):
        times = {name: sample.of(clock) for name, sample in samples.items()}
        row[clock] = {
            "median_ms": {name: 1e3 * sorted(ts)[len(ts) // 2] for name, ts in times.items()},
            "min_ms": {name: 1e3 * min(ts) for name, ts in times.items()},
            "times_faster": {
                name: compute_ratio(times[name], times["nm_mask"]) for name in ("argsort", "topk")
            },
        }
    return row


def format_table(rows: list[dict[str, Any]], clock: str) -> str:
    """Returns one line per weight and pattern."""
    body = [
        (
            row["pattern"],
            "x".join(map(str, row["shape"])),
            row[clock]["median_ms"]["nm_mask"],
            row[clock]["min_ms"]["nm_mask"],
            row[clock]["median_ms"]["copy"],
            format_ratio(row[clock]["times_faster"]["argsort"]),
            format_ratio(row[clock]["times_faster"]["topk"]),
        )
        for row in rows
    ]
    headers = ("pattern", "weight", "nm_mask ms", "best ms", "copy ms", "x argsort", "x topk")
    return tabulate(body, headers, floatfmt=".2f", disable_numparse=[0, 1, 5, 6])


def main() -> None:
    """Prints the table, and writes it as JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    for shape in SHAPES.values():
        weight = torch.randn(shape).to(args.device, getattr(torch, args.dtype))
        for text in args.patterns:
            rows.append(compare(weight, Pattern.parse(text), args.rounds))  # noqa: PERF401
    print(f"{args.dtype} on {args.device}, {args.threads} threads, medians of {args.rounds}, ")
    print(f"{args.clock} time; ratios are medians [quartiles] of the same rounds")
    print(format_table(rows, args.clock))
    if args.out:
        args.out.write_text(
            json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
