"""Ways to put a mask into a compiled graph: first-compile time and step time of each.

    python benchmarks/mask_ste.py --out mask_ste.json

dense   no mask at all: the baseline
op      one opaque op per weight, ``sparsedm::mask_ste``
op-all  one opaque op for all weights (Tensor[] in, Tensor[] out)
keys    tensor code that Inductor sees: unique integer keys, one threshold per group
slices  tensor code that Inductor sees: thresholds, ties and masks slice by slice

A step is forward + backward + SGD. Every first compile starts from empty caches, in this process.
Times are CPU time by default, so that other processes on the machine count for little.
"""

from __future__ import annotations

import argparse
import json
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from sparsedm_compiler.autotune.side_by_side import (
    Samples,
    compute_ratio,
    describe_machine,
    format_ratio,
    sample_in_turns,
)
from sparsedm_compiler.masks.mask_ste import mask_ste
from sparsedm_compiler.masks.nm_mask import apply_mask, compute_mask
from sparsedm_compiler.models import UViT, UViTConfig
from sparsedm_compiler.patterns import Pattern
from sparsedm_compiler.selection.sorting_network import build_selection_network

MaskAll = Callable[[list[Tensor]], list[Tensor]]


@torch.library.custom_op(
    "sparsedm_benchmark::mask_ste_all",
    mutates_args=(),
    schema="(Tensor[] weights, str[] patterns) -> Tensor[]",
)
def mask_ste_all(weights: list[Tensor], patterns: list[str]) -> list[Tensor]:
    """Masks all weights by one op."""
    return [
        apply_mask(weight, compute_mask(weight, Pattern.parse(text)))
        for weight, text in zip(weights, patterns, strict=True)
    ]


mask_ste_all.register_fake(lambda weights, patterns: [torch.empty_like(w) for w in weights])
mask_ste_all.register_autograd(lambda ctx, grads: (grads, None))


def find_edge(slots: list[Tensor], network: tuple[Any, ...], smallest: bool) -> Tensor:
    """Returns the n-th largest (or m-n-th smallest) of the slices."""
    steps, output = network
    high_of, low_of = torch.maximum, torch.minimum
    if smallest:
        high_of, low_of = low_of, high_of
    wires = dict(enumerate(slots))
    for a, b, high, low in steps:
        if high is not None:
            wires[high] = high_of(wires[a], wires[b])
        if low is not None:
            wires[low] = low_of(wires[a], wires[b])
    return wires[output]


def flatten_network(n: int, m: int) -> tuple[tuple[Any, ...], bool]:
    """Returns the selection network as plain tuples, which need no Dynamo guard per field."""
    smallest = m - n < n
    rank = (m - n if smallest else n) - 1
    network = build_selection_network((1,) * m, (rank,))
    steps = tuple((step.a, step.b, step.high, step.low) for step in network.steps)
    return (steps, network.outputs[0]), smallest


def mask_by_keys(weight: Tensor, pattern: Pattern, network: Any, smallest: bool) -> Tensor:
    """Returns the mask by unique keys: the weight's bits, then the slot in the group (float32)."""
    m = pattern.m
    slots = torch.arange(m - 1, -1, -1, device=weight.device).view(
        1, 1, m, *[1] * (weight.dim() - 2)
    )
    bits = weight.abs().view(torch.int32).to(torch.int64)
    keys = torch.unflatten(bits << 16, 1, (-1, m)) + slots
    edge = find_edge(list(keys.unbind(2)), network, smallest).unsqueeze(2)
    return (keys > edge if smallest else keys >= edge).flatten(1, 2)


def mask_by_slices(weight: Tensor, pattern: Pattern, network: Any, smallest: bool) -> Tensor:
    """Returns the mask slice by slice; a running count from the end that loses breaks ties."""
    slots = list(torch.unflatten(weight.abs(), 1, (-1, pattern.m)).unbind(2))
    edge = find_edge(slots, network, smallest)
    beyond = [slot < edge if smallest else slot > edge for slot in slots]
    count = pattern.m - pattern.n if smallest else pattern.n
    room = count - sum(flag.to(torch.int32) for flag in beyond)
    order = reversed(range(pattern.m)) if smallest else range(pattern.m)
    taken: dict[int, Tensor] = {}
    for i in order:
        level = slots[i] == edge
        taken[i] = beyond[i] | (level & (room > 0))
        room = room - level.to(torch.int32)
    mask = torch.stack([taken[i] for i in range(pattern.m)], 2).flatten(1, 2)
    return mask.logical_not() if smallest else mask


def mask_in_graph(weights: list[Tensor], mask_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Returns ``w + (m w - w)``, the bracket without gradient: ``m w`` with a gradient of one."""
    out = []
    for weight in weights:
        value = weight.detach()
        out.append(weight + (value * mask_of(value) - value))
    return out


def list_candidates(pattern: Pattern) -> dict[str, MaskAll]:
    """Returns the ways to mask, by name."""
    text = str(pattern)
    network, smallest = flatten_network(pattern.n, pattern.m)
    options = {"pattern": pattern, "network": network, "smallest": smallest}
    return {
        "dense": lambda weights: weights,
        "op": lambda weights: [mask_ste(weight, text) for weight in weights],
        "op-all": lambda weights: mask_ste_all(weights, [text] * len(weights)),
        "keys": partial(mask_in_graph, mask_of=partial(mask_by_keys, **options)),
        "slices": partial(mask_in_graph, mask_of=partial(mask_by_slices, **options)),
    }


class Residual(nn.Module):
    """Two 3x3 convolutions beside a 1x1 shortcut."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, out)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class ConvUNet(nn.Module):
    """Three resolutions, seven residual blocks, long skips."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.downs = nn.ModuleList(map(Residual, [width, *widths[:2]], widths))
        self.middle = Residual(widths[2], widths[2])
        outs = [widths[1], widths[0], width]
        self.ups = nn.ModuleList(
            Residual(below + skip, out)
            for below, skip, out in zip([widths[2], *outs[:2]], reversed(widths), outs, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.downs:
            x = down(x)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.middle(x)
        for up in self.ups:
            x = up(torch.cat([F.interpolate(x, scale_factor=2), skips.pop()], 1))
        return x


def build(name: str, device: str) -> tuple[nn.Module, tuple[Tensor, ...], dict[str, nn.Parameter]]:
    """Returns a model, inputs, and the weights to mask."""
    torch.manual_seed(0)
    model: nn.Module
    if name == "uvit":
        model = UViT(UViTConfig(img_size=16, embed_dim=256, depth=12, num_heads=4, conv=False))
        inputs: tuple[Tensor, ...] = (torch.randn(4, 3, 16, 16), torch.rand(4))
        names = ("qkv.weight", "attn.proj.weight", "fc1.weight", "fc2.weight")
    else:
        model, inputs = ConvUNet(), (torch.randn(4, 64, 16, 16),)
        names = ("conv1.weight", "conv2.weight", "shortcut.weight")
    model, inputs = model.to(device), tuple(x.to(device) for x in inputs)
    weights = {key: value for key, value in model.named_parameters() if key.endswith(names)}
    return model, inputs, weights


def build_step(name: str, mask_all: MaskAll, device: str) -> tuple[Callable[[], Tensor], int]:
    """Returns a training step of a new compiled model, and its number of masked weights."""
    model, inputs, weights = build(name, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def masked(*args: Tensor) -> Tensor:
        swapped = dict(zip(weights, mask_all(list(weights.values())), strict=True))
        out: Tensor = torch.func.functional_call(model, swapped, args)
        return out

    forward = torch.compile(masked, backend="inductor", dynamic=False)

    def step() -> Tensor:
        loss = forward(*inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step, sum(weight.numel() for weight in weights.values())


def read_cpu_seconds() -> float:
    """Returns the CPU time of this process and of the compilers it has run."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def compare(name: str, text: str, args: argparse.Namespace) -> dict[str, Any]:
    """Times the first compile and the step of every candidate, on one model and pattern."""
    chosen = {
        k: v for k, v in list_candidates(Pattern.parse(text)).items() if k in ("dense", *args.only)
    }
    steps: dict[str, Callable[[], object]] = {}
    compiled, losses, count = {}, {}, 0
    for key, mask_all in chosen.items():
        torch.compiler.reset()
        steps[key], count = build_step(name, mask_all, args.device)
        with fresh_cache():
            before = read_cpu_seconds()
            losses[key] = float(steps[key]())  # type: ignore[arg-type]
            compiled[key] = read_cpu_seconds() - before
    samples: dict[str, Samples] = sample_in_turns(steps, rounds=args.rounds)
    times = {key: sample.of(args.clock) for key, sample in samples.items()}
    return {
        "model": name,
        "pattern": text,
        "masked_weights": count,
        "first_compile_cpu_s": compiled,
        "first_loss": losses,
        "step_ms": {key: 1e3 * sorted(ts)[len(ts) // 2] for key, ts in times.items()},
        "step_over_dense": {key: compute_ratio(ts, times["dense"]) for key, ts in times.items()},
    }


def format_table(rows: list[dict[str, Any]]) -> str:
    """Returns one line per model, pattern and candidate."""
    body = [
        (
            row["model"],
            row["pattern"],
            key,
            row["first_compile_cpu_s"][key],
            row["step_ms"][key],
            format_ratio(row["step_over_dense"][key]),
            f"{row['first_loss'][key]:.7f}",
        )
        for row in rows
        for key in row["step_ms"]
    ]
    headers = ("model", "pattern", "mask", "compile s", "step ms", "step / dense", "first loss")
    return tabulate(body, headers, floatfmt=".1f", disable_numparse=[0, 1, 2, 5, 6])


def main() -> None:
    """Prints the table, and writes it as JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="cpu", help="of the steps")
    parser.add_argument("--models", nargs="+", default=["uvit", "unet"])
    parser.add_argument("--patterns", nargs="+", default=["2:4", "1:4", "1:8", "2:8"])
    parser.add_argument("--only", nargs="+", default=["op", "op-all", "keys", "slices"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch._inductor.config.compile_threads = 1
    torch.compile(lambda x: F.gelu(x) + 1)(torch.randn(64, 64, requires_grad=True)).sum().backward()
    rows = []
    for name in args.models:
        for text in args.patterns:
            rows.append(compare(name, text, args))
            print(format_table(rows[-1:]), flush=True)
    if args.out:
        args.out.write_text(
            json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
