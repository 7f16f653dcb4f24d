"""Single linear layers: every kernel setting of every family against cuBLASLt.

One row per shape and number of tokens. All settings are checked against float32, then screened in a
few rounds; the fastest of each pattern is timed again, beside dense, in rounds of their own: the
ratios shown are from those, so that the fastest is not fast by having been chosen. Kernels that
change numbers (8 bits) are screened at 2:4, and never the fastest: only a user who pins them gets
them. Nor are peers, which are not ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsedm_compiler import KernelError, PatternError
from sparsedm_compiler.autotune.select_kernel import MARGIN
from sparsedm_compiler.backends.custom_op import apply_activation
from sparsedm_compiler.backends.kernel_family import (
    KernelConfig,
    KernelFamily,
    MatmulProblem,
    WeightFormat,
)
from sparsedm_compiler.backends.packing import fold_weight
from sparsedm_compiler.backends.registry import find_families
from sparsedm_compiler.patterns import Pattern

from .case import Case, Row, Tell, format_error
from .comparing import (
    compute_medians,
    compute_speedup,
    error,
    is_device_lost,
    sample_ops,
    sample_sound_ops,
)
from .peers import COMPILED_FP8, list_peers
from .plan import Layer, Plan

DTYPE = torch.bfloat16
TOLERANCE = 4e-3
"""Of ||out - exact|| / ||exact||: rounding to bfloat16 once gives 1.7e-3."""
INEXACT, INEXACT_AT = 0.1, "2:4"

Run = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Operands:
    """The operands of one case: x [tokens, cols], weight [rows, cols], bias [rows]."""

    layer: Layer
    x: Tensor
    weight: Tensor
    bias: Tensor

    @property
    def work(self) -> MatmulProblem:
        return MatmulProblem(tuple(self.x.shape), DTYPE, act=self.layer.act)


def cases(plan: Plan, avoid: frozenset[str]) -> Iterator[Case]:
    """One per number of tokens and layer."""
    for tokens in plan.tokens:
        for layer in plan.layers:
            key = f"{layer.model} {layer.name} {tokens}x{layer.cols}x{layer.rows}"
            yield Case(key, partial(compare, plan, layer, tokens, avoid))


def compare(
    plan: Plan, layer: Layer, tokens: int, avoid: frozenset[str], tell: Tell
) -> Iterator[Row]:
    """The row of one layer."""
    torch.compiler.reset()
    operands = draw_operands(layer, tokens, plan.device)
    row: Row = {
        **{"model": layer.model, "layer": layer.name, "tokens": tokens, "cols": layer.cols},
        **{"rows": layer.rows, "act": layer.act, "dtype": "bfloat16", "patterns": {}},
    }
    baseline, finalists = dense(operands, plan), dict[str, Run]()
    for text in plan.op_patterns:
        trial = Trial(operands, text, avoid, tell)
        best = trial.fastest(baseline, plan)
        row["patterns"][text] = trial.record
        if best is not None:
            finalists[text] = best
    times = sample_ops({"dense": baseline, **finalists}, plan, plan.rounds)
    row["dense_ms"] = compute_medians(times)["dense"]
    for text in finalists:
        row["patterns"][text]["ratio"] = compute_speedup(times, text)
    print(format_row(row), flush=True)
    yield row


def draw_operands(layer: Layer, tokens: int, device: str) -> Operands:
    """Random ones: as large as those of a real layer, and no zeros, which would run faster."""
    torch.manual_seed(0)
    draw = partial(torch.randn, device=device)
    weight = draw(layer.rows, layer.cols) / layer.cols**0.5
    x, bias = draw(tokens, layer.cols), 0.1 * draw(layer.rows)
    return Operands(layer, x.to(DTYPE), weight.to(DTYPE), bias.to(DTYPE))


def dense(operands: Operands, plan: Plan) -> Run:
    """The unpruned layer as torch runs it, compiled where an activation can be fused to it."""

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return apply_activation(F.linear(x, weight, bias), operands.layer.act)

    if operands.layer.act != "none" and plan.compiled:
        run = torch.compile(run, fullgraph=True, dynamic=False)
    return partial(run, operands.x, operands.weight, operands.bias)


class Trial:
    """One layer at one pattern: what every kernel does. ``record``: what was seen, by kernel."""

    def __init__(self, operands: Operands, text: str, avoid: frozenset[str], tell: Tell) -> None:
        self.operands, self.text, self.avoid, self.tell = operands, text, avoid, tell
        self.record: dict[str, Any] = {"refused": {}, "wrong": {}, "error": {}, "ms": {}}
        self.record["aside"] = []  # what is timed, and never the fastest
        self.ready: dict[str, Run] = {}

    def fastest(self, baseline: Run, plan: Plan) -> Run | None:
        """The fastest kernel of those that are right; None where there is none."""
        try:
            pattern = Pattern.parse(self.text)
        except PatternError as why:
            self.record["refused"]["pattern"] = str(why)
            return None
        exact = compute_exact(self.operands, pattern)
        for family in find_families(self.operands.x.device.type):
            if not family.inexact or self.text == INEXACT_AT:
                self.try_family(family, pattern, exact)
        self.try_peers(pattern, exact, plan)
        return self.screen(baseline, plan) if self.ready else None

    def try_family(self, family: KernelFamily, pattern: Pattern, exact: Tensor) -> None:
        """All kernels of a family."""
        size, name = (self.operands.layer.rows, self.operands.layer.cols), "/".join(family.names)
        why_not = family.why_unavailable() or family.why_refused(pattern, *size, DTYPE)
        if why_not is not None:
            self.record["refused"][name] = why_not
            return
        bound = INEXACT if family.inexact else TOLERANCE
        try:
            for kernel, run in calls(self.operands, pattern, family):
                if self.fits(str(kernel), run, exact, bound):
                    self.ready[str(kernel)] = run
                    self.record["aside"] += [str(kernel)] if family.inexact else []
        except Exception as bug:  # of packing
            if is_device_lost():
                raise
            self.record["wrong"][name] = format_error(bug)

    def try_peers(self, pattern: Pattern, exact: Tensor, plan: Plan) -> None:
        """What is not ours, if it runs this shape."""
        it = self.operands
        try:
            for name, run in list_peers(it.x, it.weight, it.bias, it.layer.act, pattern, plan):
                bound = INEXACT if name == COMPILED_FP8 else TOLERANCE
                if self.fits(name, run, exact, bound):
                    self.ready[name] = run
                    self.record["aside"].append(name)
        except Exception as bug:
            if is_device_lost():
                raise
            self.record["error"]["peers"] = format_error(bug)

    def fits(self, kernel: str, run: Run, exact: Tensor, bound: float) -> bool:
        """Whether a kernel runs this shape and is as near to float32 as that."""
        name = f"{kernel} at {self.text}"
        if name in self.avoid:
            self.record["wrong"][kernel] = "the process died of it"
            return False
        self.tell(name)
        poison(exact)
        try:
            off = error(run(), exact)
        except KernelError as why:
            self.record["refused"][kernel] = str(why)[:200]
            return False
        except Exception as bug:
            if is_device_lost():
                raise
            self.record["wrong"][kernel] = format_error(bug)
            return False
        self.record["error"][kernel] = float(f"{off:.3g}")
        if off > bound:
            self.record["wrong"][kernel] = f"off by {off:.2g}"
        return off <= bound

    def screen(self, baseline: Run, plan: Plan) -> Run | None:
        """The fastest of a few rounds of all, and what the gate would say to it."""
        samples, broken = sample_sound_ops({"dense": baseline, **self.ready}, plan, plan.screening)
        times = {name: round(ms, 6) for name, ms in compute_medians(samples).items()}
        self.record["wrong"] |= broken
        self.record["screened_dense_ms"] = dense_ms = times.pop("dense")
        self.record["ms"] = times
        exactly = [name for name in times if name not in self.record["aside"]]
        if not exactly:
            return None
        best = min(exactly, key=times.__getitem__)
        gated = "sparse" if times[best] < MARGIN * dense_ms else "dense"
        self.record |= {"kernel": best, "gated": gated}
        return self.ready[best]


def calls(
    operands: Operands, pattern: Pattern, family: KernelFamily
) -> Iterator[tuple[KernelConfig, Run]]:
    """Every kernel of a family with its call; weights are packed once for all that share them."""
    packed: dict[KernelConfig, Tensor] = {}
    kernels = family.list_candidates(pattern, DTYPE)
    shape = operands.layer.rows, operands.layer.cols
    family.prepare(kernels, pattern, (operands.work,), shape)
    for kernel in kernels:
        form = WeightFormat(pattern, DTYPE, kernel.untiled)
        if kernel.untiled not in packed:
            packed[kernel.untiled] = fold_weight(operands.weight, form, "weight")
        op, arguments = family.call(operands.work, form, kernel.tile)
        weight = packed[kernel.untiled]
        yield (
            kernel,
            partial(op, operands.x, weight, operands.bias, operands.layer.rows, **arguments),
        )


def poison(like: Tensor) -> None:
    """Leave NaN in memory of the output's size, for a kernel that does not write all of it."""
    del_me = torch.full(like.shape, torch.nan, dtype=DTYPE, device=like.device)
    del del_me


def compute_exact(operands: Operands, pattern: Pattern) -> Tensor:
    """The masked layer in float32."""
    weight = fold_weight(operands.weight, WeightFormat(pattern), "weight")
    out = F.linear(operands.x.float(), weight.float(), operands.bias.float())
    return apply_activation(out, operands.layer.act)


def format_row(row: Row) -> str:
    """The row in one line."""
    parts = [
        f"{text} {cell['ratio'][1]:.2f}" if "ratio" in cell else f"{text} -"
        for text, cell in row["patterns"].items()
    ]
    size = f"{row['tokens']}x{row['cols']}x{row['rows']}"
    return f"ops: {row['model']} {row['layer']} {size}: {', '.join(parts)}"
