"""The cost per call of the guard against reads of pruned weights outside of the model's calls.

    python benchmarks/read_guard.py --out read_guard.json

A model of 61 small linear layers, 59 of them pruned, folded for inference with every kernel pinned
dense: calls with the guard and with one that does nothing, in turns.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import torch
from tabulate import tabulate
from torch import nn

import sparsedm_compiler as sdm
from sparsedm_compiler.autotune.side_by_side import describe_machine, sample_in_turns

LAYERS = 61


class NoGuard(nullcontext[None]):
    """A guard that does nothing."""

    hollow = ()


def build(width: int) -> nn.Module:
    """Returns a compiled chain of linear layers that has been called."""
    chain = nn.Sequential(*[nn.Linear(width, width) for _ in range(LAYERS)])
    model = sdm.compile(chain, "2:4", mode="infer", backend="eager", kernels={"*": "dense"})
    for _ in range(3):
        model(torch.zeros(1, width))
    assert len(sdm.explain(model).masked) == LAYERS - 2
    return model


def measure(rounds: int) -> dict[str, float]:
    """Returns microseconds: of the guard alone, and of calls with and without it."""
    model, x = build(8), torch.zeros(1, 8)
    forward = model._sparsedm
    guard, no_guard = forward.guard, NoGuard()

    def enter() -> None:
        with guard:
            pass

    def call_unwatched() -> None:
        forward.guard = no_guard
        model(x)
        forward.guard = guard

    calls = {
        "guard": enter,
        "call, watched": lambda: model(x),
        "call, unwatched": call_unwatched,
    }
    samples = sample_in_turns(calls, rounds=rounds)
    return {name: 1e6 * median(sample.of("cpu")) for name, sample in samples.items()}


def main() -> None:
    """Prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    row = measure(options.rounds)
    print(tabulate(row.items(), ("59 masked weights", "us (CPU time, median)"), floatfmt=".1f"))
    if options.out is not None:
        values = {"machine": describe_machine(), "rounds": options.rounds, "microseconds": row}
        options.out.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
