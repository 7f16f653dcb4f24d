"""Single linear layers: every kernel setting of every family against cuBLASLt.

One row per shape and number of tokens. All settings are checked against float32, then screened in a
few rounds; the fastest of each pattern is timed again, beside dense, in rounds of their own: the
ratios shown are from those, so that the fastest is not fast by having been chosen.
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
from sparsedm_compiler.backends import families
from sparsedm_compiler.backends.family import Family, Form, Kernel, Work
from sparsedm_compiler.backends.register import activate
from sparsedm_compiler.choose import MARGIN
from sparsedm_compiler.folding import fold_weight
from sparsedm_compiler.pattern import Pattern

from .case import Case, Row, Tell, plainly
from .comparing import each_alone, error, faster, lost, of_ops, typical
from .plan import Layer, Plan

DTYPE = torch.bfloat16
TOLERANCE = 4e-3
"""Of ||out - exact|| / ||exact||: rounding to bfloat16 once gives 1.7e-3."""

Run = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Given:
    """The operands of one case: x [tokens, cols], weight [rows, cols], bias [rows]."""

    layer: Layer
    x: Tensor
    weight: Tensor
    bias: Tensor

    @property
    def work(self) -> Work:
        return Work(tuple(self.x.shape), DTYPE, act=self.layer.act)


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
    given = operands(layer, tokens, plan.device)
    row: Row = {
        "model": layer.model,
        "layer": layer.name,
        "tokens": tokens,
        "cols": layer.cols,
        "rows": layer.rows,
        "act": layer.act,
        "dtype": "bfloat16",
        "patterns": {},
    }
    baseline, finalists = dense(given, plan), dict[str, Run]()
    for text in plan.op_patterns:
        found, best = screened(given, text, baseline, plan, Trial(avoid, tell))
        row["patterns"][text] = found
        if best is not None:
            finalists[text] = best
    times = of_ops({"dense": baseline, **finalists}, plan, plan.rounds)
    row["dense_ms"] = typical(times)["dense"]
    for text in finalists:
        row["patterns"][text]["ratio"] = faster(times, text)
    print(told(row), flush=True)
    yield row


def operands(layer: Layer, tokens: int, device: str) -> Given:
    """Random ones: as large as those of a real layer, and no zeros, which would run faster."""
    torch.manual_seed(0)
    draw = partial(torch.randn, device=device)
    weight = draw(layer.rows, layer.cols) / layer.cols**0.5
    x, bias = draw(tokens, layer.cols), 0.1 * draw(layer.rows)
    return Given(layer, x.to(DTYPE), weight.to(DTYPE), bias.to(DTYPE))


def dense(given: Given, plan: Plan) -> Run:
    """The unpruned layer as torch runs it, compiled where an activation can be fused to it."""

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return activate(F.linear(x, weight, bias), given.layer.act)

    if given.layer.act != "none" and plan.compiled:
        run = torch.compile(run, fullgraph=True, dynamic=False)
    return partial(run, given.x, given.weight, given.bias)


@dataclass(frozen=True, slots=True)
class Trial:
    """What not to try, and how to say what is tried."""

    avoid: frozenset[str]
    tell: Tell


def screened(
    given: Given, text: str, baseline: Run, plan: Plan, trial: Trial
) -> tuple[dict[str, Any], Run | None]:
    """What every kernel does for a pattern, and the fastest of those that are right."""
    try:
        pattern = Pattern.parse(text)
    except PatternError as why:
        return {"refused": {"pattern": str(why)}}, None
    found: dict[str, Any] = {"refused": {}, "wrong": {}, "error": {}, "ms": {}}
    exact = expected(given, pattern)
    ready: dict[str, Run] = {}
    for family in families.families_of("cuda"):
        size = given.layer.rows, given.layer.cols
        why_not = family.unavailable() or family.refusal(pattern, *size, DTYPE)
        if why_not is not None:
            found["refused"]["/".join(family.names)] = why_not
            continue
        for kernel, run in calls(given, pattern, family):
            if fits(kernel, text, run, exact, found, trial):
                ready[str(kernel)] = run
    if not ready:
        return found, None
    samples, broken = each_alone({"dense": baseline, **ready}, plan, plan.screening)
    times = {name: round(ms, 6) for name, ms in typical(samples).items()}
    found["wrong"] |= broken
    found["screened_dense_ms"] = times.pop("dense")
    found["ms"] = times
    if not times:
        return found, None
    best = min(times, key=times.__getitem__)
    gated = times[best] < MARGIN * found["screened_dense_ms"]
    found |= {"kernel": best, "gated": "sparse" if gated else "dense"}
    return found, ready[best]


def calls(given: Given, pattern: Pattern, family: Family) -> Iterator[tuple[Kernel, Run]]:
    """Every kernel of a family with its call; weights are packed once for all that share them."""
    packed: dict[Kernel, Tensor] = {}
    for kernel in family.candidates(pattern, DTYPE):
        form = Form(pattern, DTYPE, kernel.untiled)
        if kernel.untiled not in packed:
            packed[kernel.untiled] = fold_weight(given.weight, form, "weight")
        op, how = family.call(given.work, form, kernel.tile)
        weight = packed[kernel.untiled]
        yield kernel, partial(op, given.x, weight, given.bias, given.layer.rows, *how)


def fits(
    kernel: Kernel, text: str, run: Run, exact: Tensor, found: dict[str, Any], trial: Trial
) -> bool:
    """Whether a kernel runs this shape and gives what float32 gives; noted where it does not."""
    name = f"{kernel} at {text}"
    if name in trial.avoid:
        found["wrong"][str(kernel)] = "the process died of it"
        return False
    trial.tell(name)
    poison(exact)
    try:
        off = error(run(), exact)
    except KernelError as why:
        found["refused"][str(kernel)] = str(why)[:200]
        return False
    except Exception as bug:
        if lost():
            raise
        found["wrong"][str(kernel)] = plainly(bug)
        return False
    found["error"][str(kernel)] = float(f"{off:.3g}")
    if off > TOLERANCE:
        found["wrong"][str(kernel)] = f"off by {off:.2g}"
    return off <= TOLERANCE


def poison(like: Tensor) -> None:
    """Leave NaN in memory of the output's size, for a kernel that does not write all of it."""
    del_me = torch.full(like.shape, torch.nan, dtype=DTYPE, device=like.device)
    del del_me


def expected(given: Given, pattern: Pattern) -> Tensor:
    """The masked layer in float32."""
    weight = fold_weight(given.weight, Form(pattern), "weight")
    out = F.linear(given.x.float(), weight.float(), given.bias.float())
    return activate(out, given.layer.act)


def told(row: Row) -> str:
    """The row in one line."""
    parts = [
        f"{text} {each['ratio'][1]:.2f}" if "ratio" in each else f"{text} -"
        for text, each in row["patterns"].items()
    ]
    size = f"{row['tokens']}x{row['cols']}x{row['rows']}"
    return f"ops: {row['model']} {row['layer']} {size}: {', '.join(parts)}"
