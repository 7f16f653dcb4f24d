"""Sparse against dense inference on a CPU: ops, one block, whole models, a sampled image.

    python benchmarks/sparse.py --only models --out out/bench/sparse.json --chart out/cpu.png

Everything compared runs in turns in one process; a ratio is the median of the rounds' ratios with
its quartiles. Weights are random: the time of a kernel does not depend on their values. A file
holds a section for each CPU and number of threads; what a run measures replaces its parts alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.autotune.side_by_side import (
    Samples,
    compute_ratio,
    describe_machine,
    format_ratio,
    sample_in_turns,
)
from sparsedm_compiler.backends.kernel_family import KernelConfig, MatmulProblem, WeightFormat
from sparsedm_compiler.backends.packing import fold_weight
from sparsedm_compiler.backends.processor import lacks_bfloat16, read_cpu_name
from sparsedm_compiler.backends.registry import find_families
from sparsedm_compiler.models import preset
from sparsedm_compiler.patterns import Pattern

Call = Callable[[], object]
FREE = ("31:32", "3:4", "2:4", "1:4", "1:8", "1:16", "1:32")
BLOCKS = ("1:2@64x16", "1:4@64x16", "1:2@64x32+2:4")
SHARED = ("2:4x4", "1:4x4", "1:8x4", "1:16x4", "2:4x64", "1:4x64", "1:8x64", *BLOCKS)
LINEARS = ((257, 512, 1536), (257, 2048, 512))
CONV = (256, 256, 16)
(CPU,) = find_families("cpu")


def op_cases() -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, x, weight) of every shape."""
    for tokens, width, rows in LINEARS:
        yield f"linear {tokens}x{width}x{rows}", torch.randn(tokens, width), draw(rows, width)
    width, rows, size = CONV
    x = torch.randn(1, width, size, size)
    yield f"conv3x3 {width}->{rows} {size}x{size}", x, draw(rows, width, 3, 3)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape) / shape[1] ** 0.5


def dense_op(x: Tensor, weight: Tensor) -> Call:
    """What torch runs; a convolution in its best form, channels_last with a prepacked weight."""
    if weight.dim() == 2:
        return lambda: F.linear(x, weight)
    last = x.to(memory_format=torch.channels_last)
    if x.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return lambda: F.conv2d(last, weight, padding=1)
    ones = [1, 1]
    packed = torch.ops.mkldnn._reorder_convolution_weight(
        weight, ones, ones, ones, 1, list(x.shape)
    )
    run = torch.ops.mkldnn._convolution_pointwise
    return lambda: run(last, packed, None, ones, ones, ones, 1, "none", [], "")


def sparse_op(x: Tensor, weight: Tensor, pattern: Pattern, kernel: KernelConfig) -> Call:
    form = WeightFormat(pattern, None, kernel.untiled)
    packed, rows = fold_weight(weight, form, "weight"), weight.shape[0]
    ones = () if weight.dim() == 2 else (1, 1)
    work = MatmulProblem(tuple(x.shape), x.dtype, False, tuple(weight.shape[2:]), ones, ones, ones)
    op, arguments = CPU.call(work, form, kernel.tile)
    return lambda: op(x, packed, None, rows, **arguments)


def bench_ops(rounds: int) -> list[dict[str, Any]]:
    """Every shape and pattern: the faster of the kernel's settings, over dense of its own dtype."""
    rows = []
    for name, x, weight in op_cases():
        for dtype in (torch.float32, torch.bfloat16):
            inputs, held = x.to(dtype), weight.to(dtype)
            calls = {"dense": dense_op(inputs, held)}
            for text in (*FREE, *SHARED):
                pattern = Pattern.parse(text)
                for kernel in CPU.list_candidates(pattern, dtype):
                    calls[f"{text}/{kernel}"] = sparse_op(inputs, held, pattern, kernel)
            samples = sample_in_turns(calls, rounds=rounds)
            dense = samples["dense"].wall
            for text in (*FREE, *SHARED):
                keys = [key for key in calls if key.startswith(text + "/")]
                best = max(
                    (compute_ratio(dense, samples[key].wall) for key in keys), key=lambda r: r[1]
                )
                rows.append({"what": name, "dtype": short(dtype), "pattern": text, "ratio": best})
            print(table(rows[-len(FREE) - len(SHARED) :]), flush=True)
    return rows


def bench_model(
    name: str,
    model: nn.Module,
    call: tuple[Any, Any],
    patterns: tuple[str, ...],
    rounds: int,
    policy: str = "structural",
) -> list[dict[str, Any]]:
    """The whole model, gated, over each baseline."""
    args, kwargs = call
    calls = {key: bind(run, args, kwargs) for key, run in baselines(model).items()}
    dtype = short(next(model.parameters()).dtype)
    if dtype == "fp32" and not lacks_bfloat16():
        calls["inductor bf16"] = bind(
            compile_frozen(copy.deepcopy(model).bfloat16()), *cast_half(call)
        )
    for text in patterns:
        calls[text] = bind(sdm.compile(model, text, mode="infer", policy=policy), args, kwargs)
    samples = sample_in_turns(calls, rounds=rounds, again=True)
    return over_baselines(name, dtype, samples, patterns)


def cast_half(call: tuple[Any, Any]) -> tuple[Any, Any]:
    """The same inputs in bfloat16."""
    half: tuple[Any, Any] = torch.utils._pytree.tree_map(
        lambda x: x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x, call
    )
    return half


def over_baselines(
    name: str, dtype: str, samples: dict[str, Samples], patterns: tuple[str, ...]
) -> list[dict[str, Any]]:
    rows = []
    for text in patterns:
        ratios = {
            key: compute_ratio(samples[key].wall, samples[text].wall)
            for key in samples
            if key not in patterns
        }
        rows.append({"what": name, "dtype": dtype, "pattern": text, **ratios})
    print(table(rows), flush=True)
    return rows


def baselines(model: nn.Module) -> dict[str, Any]:
    return {
        "eager": model,
        "inductor": torch.compile(copy.deepcopy(model)),
        "inductor frozen": compile_frozen(copy.deepcopy(model)),
    }


def compile_frozen(model: nn.Module) -> Any:
    """Inductor's best for inference: weights are constants, packed as the matrix library likes."""
    return torch.compile(model, options={"freezing": True})


def bind(run: Any, args: Any, kwargs: Any) -> Call:
    return lambda: run(*args, **kwargs)


def uvit_block() -> tuple[nn.Module, tuple[Any, Any]]:
    model, _, _ = preset("uvit-cifar10-small", "cpu")
    block = model.mid_block  # type: ignore[union-attr]
    assert isinstance(block, nn.Module)
    return block.eval(), ((torch.randn(1, 257, 512),), {})


def whole(name: str, batch: int) -> tuple[nn.Module, tuple[Any, Any]]:
    model, args, kwargs = preset(name, "cpu", batch)
    return model.eval(), (args, kwargs)


def bench_sampling(patterns: tuple[str, ...], rounds: int) -> list[dict[str, Any]]:
    """One 20-step image of a U-ViT-S, drawn by DPM-Solver++."""
    from diffusers import DPMSolverMultistepScheduler

    from sparsedm_compiler.diffusion import sample

    model, _ = whole("uvit-cifar10-small", 1)

    def draw_image(run: nn.Module) -> Call:
        scheduler = DPMSolverMultistepScheduler()
        shape = (1, 3, 32, 32)
        return lambda: sample(run, scheduler, shape=shape, steps=20, progress=False)

    compiled = copy.deepcopy(model)
    compiled.compile(options={"freezing": True})
    calls = {"eager": draw_image(model), "inductor frozen": draw_image(compiled)}
    for text in patterns:
        calls[text] = draw_image(sdm.compile(model, text, mode="infer"))
    samples = sample_in_turns(calls, rounds=rounds, warmup=1)
    return over_baselines("U-ViT-S, 20-step image", "fp32", samples, patterns)


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def table(rows: list[dict[str, Any]]) -> str:
    body = [
        {
            key: format_ratio(value) if isinstance(value, tuple) else value
            for key, value in row.items()
        }
        for row in rows
    ]
    return tabulate(body, headers="keys", disable_numparse=True) + "\n"


def chart(results: dict[str, Any], path: Path) -> None:
    """Speed-up over dense by pattern: ops against torch, models against frozen Inductor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ops = [r for r in results.get("ops", ()) if r["dtype"] == "fp32" and "x" not in r["pattern"]]
    models = [row for part in ("block", "models", "sampling") for row in results.get(part, ())]
    panels = {
        "one layer, over torch": [(r["what"], r["pattern"], r["ratio"][1]) for r in ops],
        "whole model, over frozen Inductor": [
            (r["what"], r["pattern"], r["inductor frozen"][1])
            for r in models
            if "x" not in r["pattern"]
        ],
    }
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5))
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        for what in dict.fromkeys(point[0] for point in points):
            line = {pattern: value for name, pattern, value in points if name == what}
            places = [FREE.index(pattern) for pattern in line]
            axis.plot(places, list(line.values()), marker="o", label=what)
        axis.axhline(1, color="grey", linewidth=1)
        axis.set_xticks(range(len(FREE)), FREE)
        axis.set_title(title)
        axis.set_xlabel("kept : of")
        axis.set_ylabel("times faster than dense fp32")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def commit() -> str:
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip()


PARTS = ("ops", "block", "models", "bf16", "sampling")
PATTERNS = ("31:32", "2:4", "1:4", "1:8", "1:16", "2:4x4", "1:8x4")
WIDE = ("2:4", "1:8", "2:4x64", "1:4x64", "1:8x64")


def run_part(part: str, rounds: int, batches: list[int]) -> list[dict[str, Any]]:
    """One of PARTS."""
    if part == "ops":
        return bench_ops(2 * rounds)
    if part == "block":
        return bench_model("one U-ViT-S block", *uvit_block(), PATTERNS, 2 * rounds, policy="all")
    if part == "bf16":
        model, call = whole("uvit-cifar10-small", 1)
        title = "U-ViT-S CIFAR10, batch 1"
        return bench_model(title, model.bfloat16(), cast_half(call), WIDE, rounds)
    if part == "sampling":
        return bench_sampling(("2:4", "1:4", "1:8", "1:16"), 3)
    rows = []
    for batch in batches:
        some = rounds if batch == 1 else max(3, rounds // 2)
        for name, title in (("uvit-cifar10-small", "U-ViT-S"), ("ddpm-cifar10", "DDPM UNet")):
            title = f"{title} CIFAR10, batch {batch}"
            rows += bench_model(title, *whole(name, batch), PATTERNS, some)
            torch._dynamo.reset()
    return rows


def keep(path: Path, section: dict[str, Any]) -> None:
    """Writes the parts that have run into this machine's section of the file, and keeps others."""
    held = json.loads(path.read_text()) if path.exists() else {}
    name = f"{read_cpu_name()}, {section['machine']['threads']} threads"
    held[name] = held.get(name, {}) | section
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(held, indent=1) + "\n")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/bench/sparse.json"))
    parser.add_argument("--chart", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    usual = [part for part in PARTS if part != "bf16" or not lacks_bfloat16()]
    parser.add_argument("--only", choices=PARTS, action="append", help=f"repeatable; {usual}")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    section: dict[str, Any] = {}
    for part in args.only or usual:
        torch.manual_seed(0)
        started = time.perf_counter()
        section[part] = run_part(part, args.rounds, args.batches)
        print(f"{part}: {time.perf_counter() - started:.0f} s", flush=True)
        ran = {"machine": describe_machine(), "commit": commit(), "argv": sys.argv[1:]}
        keep(args.out, ran | {part: section[part]})  # a part that has run is not lost
        torch._dynamo.reset()
    print(f"wrote {args.out}")
    if args.chart is not None:
        args.chart.parent.mkdir(parents=True, exist_ok=True)
        chart(section, args.chart)
        print(f"wrote {args.chart}")


if __name__ == "__main__":
    main()
