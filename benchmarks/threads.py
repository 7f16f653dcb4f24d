"""How a call of the CPU kernels is cut for more threads than this machine has.

    python benchmarks/threads.py --out threads.json

A call is cut into pieces for N threads, which one thread runs and times one after the other. Then
N threads that take the next piece when they are free are simulated. The figure is the speedup over
one thread's call divided by N: it sees pieces of unequal size, threads without work and what is
computed twice, not that threads share memory and the last cache.
"""

from __future__ import annotations

import argparse
import ctypes
import heapq
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from sparsedm_compiler import Pattern
from sparsedm_compiler.autotune.side_by_side import describe_machine
from sparsedm_compiler.backends.cpu import ops
from sparsedm_compiler.backends.cpu.abi import KernelArguments
from sparsedm_compiler.backends.cpu.build import load_library
from sparsedm_compiler.backends.cpu.family import CpuFamily
from sparsedm_compiler.masks.nm_mask import nm_mask

THREADS = (1, 2, 4, 8, 16, 32)
ROOM = 4096
PATTERNS = ("2:4", "1:8", "1:32", "2:4x4", "1:16x4")
Call = Callable[[], Any]


def make_linear(tokens: int, cols: int, rows: int, pattern: Pattern) -> Call:
    """Returns a call of a linear layer in the first setting that the search tries."""
    packed, tile = pack(torch.randn(rows, cols), pattern)
    x = torch.randn(tokens, cols)
    return lambda: ops.run_linear(x, packed, None, rows, "none", tile)


def make_conv(images: int, channels: int, size: int, pattern: Pattern) -> Call:
    """Returns a call of a 3x3 convolution of images that lie as planes."""
    packed, tile = pack(torch.randn(channels, channels, 3, 3), pattern)
    x, ones = torch.randn(images, channels, size, size), (1, 1)
    return lambda: ops.run_conv2d(x, packed, None, channels, (3, 3), ones, ones, ones, "none", tile)


def pack(weight: Tensor, pattern: Pattern) -> tuple[Tensor, int]:
    """Returns a packed weight and the vectors of a tile."""
    family = CpuFamily()
    kernel = family.list_candidates(pattern, weight.dtype)[0]
    return family.pack(weight, nm_mask(weight, pattern), pattern, kernel), kernel.tile[0]


@contextmanager
def timing_pieces(threads: int, loops: list[list[float]]) -> Iterator[None]:
    """Lets calls in the block run in pieces for ``threads``, and fills in the seconds of each."""

    def run(call: KernelArguments) -> None:
        call.threads = threads
        seconds, numbers = (ctypes.c_double * ROOM)(), (ctypes.c_int32 * ROOM)()
        count = load_library().sdm_time(ctypes.byref(call), seconds, numbers, ROOM)
        if not 0 < count <= ROOM:
            raise SystemExit(f"a call is cut into {count} pieces, of which {ROOM} can be timed")
        loops[:] = [
            [s for s, k in zip(seconds[:count], numbers[:count], strict=True) if k == number]
            for number in range(numbers[count - 1] + 1)
        ]

    own, ops.run_call = ops.run_call, run
    try:
        yield
    finally:
        ops.run_call = own


def simulate(loops: list[list[float]], threads: int) -> float:
    """Returns the seconds that threads take which fetch the next piece when they are free."""
    total = 0.0
    for pieces in loops:
        free = [0.0] * threads
        for seconds in pieces:
            heapq.heapreplace(free, free[0] + seconds)
        total += max(free)
    return total


def measure(make: Callable[[], Call], rounds: int) -> dict[int, tuple[float, int]]:
    """Returns {threads: (speedup over one thread / threads, pieces)}, medians over rounds."""
    calls, pieces = {}, {}
    for threads in THREADS:
        torch.set_num_threads(threads)  # a weight is packed for so many
        calls[threads] = make()
    torch.set_num_threads(1)
    taken: dict[int, list[float]] = {threads: [] for threads in THREADS}
    for _ in range(rounds):
        for threads, call in calls.items():
            loops: list[list[float]] = []
            with timing_pieces(threads, loops):
                call()
            taken[threads].append(simulate(loops, threads))
            pieces[threads] = len(loops[-1])
    one = median(taken[1])
    return {k: (one / median(taken[k]) / k, pieces[k]) for k in THREADS}


def list_calls() -> Iterator[tuple[str, Callable[[Pattern], Call]]]:
    """Yields the layers: of U-ViT-S and of the DDPM UNet, at batch 1 and 8."""
    for batch in (1, 8):
        for cols, rows in ((512, 1536), (2048, 512)):
            tokens = 257 * batch
            yield f"linear {tokens}x{cols}x{rows}", partial(make_linear, tokens, cols, rows)
        yield f"conv3x3 256 16x16, batch {batch}", partial(make_conv, batch, 256, 16)


def main() -> None:
    """Prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows, values = [], []
    for name, make in list_calls():
        for text in options.patterns.split(","):
            shares = measure(partial(make, Pattern.parse(text)), options.rounds)
            cells = [f"{share:.2f} ({count})" for share, count in shares.values()]
            rows.append((name, text, *cells))
            values.append({"layer": name, "pattern": text, "efficiency": shares})
    heads = [f"{threads} threads" for threads in THREADS]
    print(tabulate(rows, ("layer", "pattern", *heads), disable_numparse=True))
    if options.out is not None:
        result = {"machine": describe_machine(), "rounds": options.rounds, "rows": values}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
