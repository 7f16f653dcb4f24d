"""The cost per call of a compiled model beyond what its graph computes.

    python benchmarks/call_cost.py --out call_cost.json
    python benchmarks/call_cost.py --device cuda     # replayed as CUDA graphs

A model of 61 linear layers, 59 of them pruned, folded for inference with every kernel pinned dense,
beside the same model under torch.compile alone: whole calls in turns, and the pieces of a call. And
one packed linear layer of tiny size, which is all dispatch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.autotune.side_by_side import (
    compute_ratio,
    describe_machine,
    format_ratio,
    sample_in_turns,
)
from sparsedm_compiler.backends.cpu.build import why_unavailable
from sparsedm_compiler.backends.cpu.family import CpuFamily
from sparsedm_compiler.backends.kernel_family import KernelConfig, MatmulProblem, WeightFormat
from sparsedm_compiler.backends.packing import fold_weight
from sparsedm_compiler.compiler.folded_graph import FoldedGraph
from sparsedm_compiler.config import GRAPHS
from sparsedm_compiler.patterns import Pattern

LAYERS = 61


class Deep(nn.Module):
    """Linear layers in a row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def prepare(width: int, tokens: int, device: str) -> dict[str, Callable[[], object]]:
    """Returns the calls to compare: of the dense model, of the pruned one, and parts of both.

    On a GPU the graphs are replayed as CUDA graphs.
    """
    torch.manual_seed(0)
    graphed = device == "cuda"
    dtype = torch.bfloat16 if graphed else torch.float32
    model = Deep(width).to(device, dtype).eval()
    x = torch.randn(tokens, width, device=device, dtype=dtype)
    patches = {"triton.cudagraphs": True} if graphed else {}
    graphs: list[Any] = []

    def keep_graph(gm: Any, inputs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        run = compile_fx(gm, inputs, config_patches=patches)

        def note(*arguments: Any) -> Any:
            graphs[:] = run, arguments
            return run(*arguments)

        return note

    dense = torch.compile(model, mode="reduce-overhead" if graphed else None)
    torch.compile(model, backend=keep_graph)(x)
    run_dense, dense_arguments = graphs
    backend = GRAPHS if graphed else "inductor"
    student = sdm.compile(model, "2:4", mode="infer", backend=backend, kernels={"*": "dense"})
    folded, inputs = find_folded_graph(lambda: student(x))
    assert len(sdm.explain(student).masked) == LAYERS - 2
    arguments = list(inputs)
    check = folded._check
    assert check is not None
    check.replace(arguments)
    fresh = list(inputs)
    forward = student._sparsedm
    compiled = forward.entry._compiled

    def enter() -> None:
        with forward.guard:
            pass

    def replay(graph: Any, values: Any) -> Any:
        if graphed:  # or the second call would be recorded as one behind the first
            torch.compiler.cudagraph_mark_step_begin()
        return graph(*values)

    return {
        "dense": lambda: dense(x),
        "pruned, all dense": lambda: student(x),
        "  without the guarded forward": lambda: compiled(student, x),
        "  without TorchDynamo": lambda: replay(folded, inputs),
        "  its graph alone": lambda: replay(folded.run, arguments),
        "  dense: its graph alone": lambda: replay(run_dense, dense_arguments),
        "  check of the folded weights": lambda: check.holds(fresh),
        "  read guard": enter,
    }


def find_folded_graph(call: Callable[[], object]) -> tuple[FoldedGraph, tuple[Any, ...]]:
    """Returns the folded graph that a call runs at last, and its arguments."""
    seen: list[tuple[FoldedGraph, tuple[Any, ...]]] = []
    original = FoldedGraph.__call__

    def spy(self: FoldedGraph, *inputs: Any) -> Any:
        seen.append((self, inputs))
        return original(self, *inputs)

    FoldedGraph.__call__ = spy  # type: ignore[method-assign]
    try:
        call(), call()
    finally:
        FoldedGraph.__call__ = original  # type: ignore[method-assign]
    return seen[-1]


def prepare_packed() -> dict[str, Callable[[], object]]:
    """Returns calls of one packed linear layer, 16 x 16 of one token, and of a dense one."""
    if why_unavailable() is not None:
        return {}
    x, weight, bias = torch.randn(1, 16), torch.randn(16, 16), torch.randn(16)
    pattern = Pattern.parse("2:4")
    kernel = KernelConfig("cpu_free", (64, 0), (6,))
    packed = fold_weight(weight, WeightFormat(pattern, None, kernel), "weight")
    op, options = CpuFamily().call(MatmulProblem((1, 16), x.dtype), WeightFormat(pattern), (6,))
    return {
        "packed linear": lambda: op(x, packed, bias, 16, **options),
        "dense linear": lambda: nn.functional.linear(x, weight, bias),
    }


def measure(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, Any]:
    """Returns the median microseconds of every call, and the quartiles of pruned over dense."""
    samples = {name: s.of("wall") for name, s in sample_in_turns(calls, rounds=rounds).items()}
    values: dict[str, Any] = {name.strip(): 1e6 * median(s) for name, s in samples.items()}
    return values


def compare(calls: dict[str, Callable[[], object]], rounds: int) -> tuple[float, float, float]:
    """Returns the quartiles of the time of the pruned model over the dense one, in turns."""
    whole = {name: calls[name] for name in ("dense", "pruned, all dense")}
    samples = sample_in_turns(whole, rounds=rounds, warmup=4)  # graphs are recorded in the second
    return compute_ratio(samples["pruned, all dense"].of("wall"), samples["dense"].of("wall"))


@torch.no_grad()
def main() -> None:
    """Prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    on_cpu = options.device == "cpu"
    calls = prepare(options.width, options.tokens, options.device)
    ratio = compare(calls, options.rounds)
    row = measure(calls, options.rounds)
    if on_cpu:
        row |= measure(prepare_packed(), 5 * options.rounds)
    title = f"{LAYERS} linear layers, {options.width} wide, {options.tokens} tokens"
    print(tabulate(row.items(), (title, "us (median)"), floatfmt=".1f"))
    print(f"59 weights pinned dense over compiled dense: {format_ratio(ratio)}")
    if options.out is not None:
        values = {
            "machine": describe_machine(),
            "rounds": options.rounds,
            "width": options.width,
            "tokens": options.tokens,
            "device": options.device,
            "ratio": ratio,
            "microseconds": row,
        }
        options.out.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
