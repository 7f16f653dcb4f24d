"""The cost of training with masks: a masked step over a dense step under the same compiler.

    python benchmarks/train_step.py --out docs/results/train_step.json

A step is forward, squared error, backward and AdamW, with everything but the optimizer compiled by
Inductor. "mask" is the student alone, "sr-ste" has the decayed pruned weights too, in the paper's
form, "every 10" chooses the masks in one of ten steps (``mask_every=10``): a step with held masks
and a tenth of a choice. Freed memory is kept from step to step, as by ``finetune``. All of a row
run in turns in one process; a ratio is the median of the rounds' ratios with its quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn

import sparsedm_compiler as sdm
from sparsedm_compiler.autotune.side_by_side import (
    compute_ratio,
    describe_machine,
    format_ratio,
    sample_in_turns,
)
from sparsedm_compiler.models import preset
from sparsedm_compiler.train.allocator import keep_freed_memory

MODELS = ("uvit-cifar10-small", "ddpm-cifar10")
PATTERNS = ("2:4", "1:4", "1:8", "2:4x4")
KINDS = ("mask", "sr-ste", "every 10")


def build_step(
    student: nn.Module, calls: Any, *, sr_ste: bool, autocast: bool | None = None
) -> Callable[[], None]:
    """Returns a training step of ``student`` on one batch.

    ``autocast``: whether to bfloat16; None for on a GPU alone.
    """
    args, kwargs = calls
    target = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(0))
    target = target.to(args[0].device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    if sr_ste:
        sdm.sr_ste(optimizer, student, lam=2e-4)

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        half = target.is_cuda if autocast is None else autocast
        with torch.autocast(target.device.type, torch.bfloat16, enabled=half):
            guess = student(*args, **kwargs)
        guess = guess if isinstance(guess, torch.Tensor) else guess.sample
        F.mse_loss(guess.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Times every pattern of one model against the dense model, in turns."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model, *calls = preset(name, args.device, args.batch)
    dense = torch.compile(model, backend="inductor")
    steps = {"dense": build_step(dense, calls, sr_ste=False)}
    shares = {}
    for pattern in args.patterns:
        for kind in args.kinds:
            student = sdm.compile(model, pattern=pattern, mode="train", backend="inductor")
            steps[f"{pattern} {kind}"] = build_step(student, calls, sr_ste=kind == "sr-ste")
            student(*calls[0], **calls[1])
            if kind == "every 10":
                steps[f"{pattern} choice"] = partial(sdm.hold_masks, student)
        masked = sum(w.numel() for w, _ in sdm.masked_parameters(student).values())
        shares[pattern] = masked / sum(w.numel() for w in student.parameters())
    with keep_freed_memory():
        samples = sample_in_turns(steps, rounds=args.rounds)
    times = {key: sample.of(args.clock) for key, sample in samples.items()}
    for pattern in args.patterns:
        if (choice := times.pop(f"{pattern} choice", None)) is not None:
            held = times[f"{pattern} every 10"]
            times[f"{pattern} every 10"] = [a + b / 10 for a, b in zip(held, choice, strict=True)]
    return {
        "model": name,
        "batch": args.batch,
        "masked_share": shares,
        "step_over_dense": {
            key: compute_ratio(values, times["dense"])
            for key, values in times.items()
            if key != "dense"
        },
    }


def format_table(rows: list[dict[str, Any]], patterns: list[str], kinds: list[str]) -> str:
    """Returns one line per model and pattern."""
    body = [
        (
            row["model"],
            row["batch"],
            pattern,
            f"{row['masked_share'][pattern]:.3f}",
            *(format_ratio(row["step_over_dense"][f"{pattern} {kind}"]) for kind in kinds),
        )
        for row in rows
        for pattern in patterns
    ]
    headers = ("model", "batch", "pattern", "masked", *(f"{kind} / dense" for kind in kinds))
    return tabulate(body, headers, disable_numparse=True)


def main() -> None:
    """Prints the table, and writes it as JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    started = time.perf_counter()
    for name in args.models:
        rows.append(compare(name, args))
        print(format_table(rows[-1:], args.patterns, args.kinds), flush=True)
    print(f"{time.perf_counter() - started:.0f} s; {args.clock} clock; medians [quartiles]")
    if args.out:
        plain = {key: value for key, value in vars(args).items() if key != "out"}
        record = {"machine": describe_machine(), "arguments": plain, "rows": rows}
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
