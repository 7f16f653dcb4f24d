"""Measured gating: every kernel that could run a weight is timed beside dense, the fastest wins."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..backends.kernel_family import KernelConfig, WeightFormat
from ..backends.registry import find_families, find_family
from ..config import GRAPHS, CompileConfig
from ..passes.analysis.find_uses import WeightUse
from ..patterns import Pattern, TransposableNM
from ..reports import Choice
from .measure import AutotuneBudget, KernelTrial, measure_kernels, reproduces_dense

MARGIN = 0.96
"""A sparse kernel must take less than this part of dense's time: a tie goes to dense."""

TRAINING = "cuda_semi"
"""The kernel that masked weights may be multiplied by in training."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A Choice with what carries it out: the form of the weight, and the kernel (None: dense)."""

    choice: Choice
    form: WeightFormat
    kernel: KernelConfig | None = None


def select_kernel(
    weight: Tensor,
    name: str,
    pattern: Pattern,
    uses: tuple[WeightUse, ...] | str,
    config: CompileConfig,
    search: AutotuneBudget,
) -> Chosen:
    """The kernel for a weight, with the reason: pinned, the only one, or the fastest measured."""
    asked = config.kernel_of(name)
    why_not, able = _able(weight, pattern, uses, config, asked)
    dense = WeightFormat(pattern)
    if isinstance(uses, str) or not able:
        return Chosen(_choice(name, weight, uses, "dense", why_not), dense)
    works = tuple(use.work for use in uses)
    subject = KernelTrial(weight, name, pattern, works, config.backend == GRAPHS)
    if asked != "auto":
        if (
            weight.is_cuda
            and not find_family(able[0].name).inexact
            and not reproduces_dense(subject, able[0])
        ):
            why = _distrust(able[:1])
            return Chosen(_choice(name, weight, uses, "dense", why), dense)
        return _sparse(name, weight, pattern, uses, able[0], "pinned by kernels=")
    times = measure_kernels(subject, able, search)
    if times is None:
        why = f"not measured: autotune_seconds={config.autotune_seconds:g} were spent"
        return Chosen(_choice(name, weight, uses, "dense", why), dense)
    best = min(able, key=lambda each: times[str(each)])
    if times[str(best)] == math.inf:
        return Chosen(_choice(name, weight, uses, "dense", _distrust(able)), dense)
    measured = {"dense_ms": times["dense"], "sparse_ms": times[str(best)]}
    if times[str(best)] >= MARGIN * times["dense"]:
        why = f"{best.name} was not faster"
        return Chosen(_choice(name, weight, uses, "dense", why, **measured), dense)
    return _sparse(name, weight, pattern, uses, best, "fastest measured", **measured)


def _distrust(able: tuple[KernelConfig, ...]) -> str:
    names = " and ".join(dict.fromkeys(each.name for each in able))
    return f"{names} refused its size, or gave other numbers than dense"


def _able(
    weight: Tensor,
    pattern: Pattern,
    uses: tuple[WeightUse, ...] | str,
    config: CompileConfig,
    asked: str,
) -> tuple[str, tuple[KernelConfig, ...]]:
    """Why dense, and the kernels that could run the weight; none if there is a reason."""
    if isinstance(uses, str):
        return uses, ()
    if asked == "dense":
        return "pinned by kernels=", ()
    families = find_families(weight.device.type)
    named = tuple(each for each in families if asked in each.names)
    families = named or tuple(each for each in families if not each.inexact)
    if isinstance(weight, FakeTensor) or not families:
        return f"no sparse kernel for {weight.device.type} tensors yet", ()
    dtypes = {use.work.dtype for use in uses}
    if len(dtypes) > 1:
        return "it runs in more than one dtype", ()
    dtype = dtypes.pop()
    size = weight.shape[0], weight[0].numel()
    why_not = {each: each.unavailable() or each.refusal(pattern, *size, dtype) for each in families}
    if all(why_not.values()):
        return "; ".join(dict.fromkeys(filter(None, why_not.values()))), ()
    able = [
        each
        for family in families
        if not why_not[family]
        for each in family.candidates(pattern, dtype)
    ]
    found = tuple(each for each in able if each.name not in config.exclude_kernels)
    if asked in ("auto", "sparse"):
        return "every kernel for it is in exclude_kernels=", found
    found = tuple(each for each in found if each.name == asked)
    where = f"pattern {pattern} on {weight.device.type}"
    return f"{asked!r}, asked by kernels=, does not run {where}", found


def _sparse(
    name: str,
    weight: Tensor,
    pattern: Pattern,
    uses: tuple[WeightUse, ...],
    kernel: KernelConfig,
    why: str,
    **measured: float,
) -> Chosen:
    if inexact := find_family(kernel.name).inexact:
        why = f"{why}; it {inexact}"
    choice = _choice(name, weight, uses, kernel.name, why, **measured)
    dtype = None if uses[0].work.dtype == weight.dtype else uses[0].work.dtype
    return Chosen(choice, WeightFormat(pattern, dtype, kernel.untiled), kernel)


def _choice(
    name: str,
    weight: Tensor,
    uses: tuple[WeightUse, ...] | str,
    kernel: str,
    why: str,
    dense_ms: float | None = None,
    sparse_ms: float | None = None,
) -> Choice:
    inputs = () if isinstance(uses, str) else tuple(use.work.inputs for use in uses)
    return Choice(name, inputs, kernel, why, dense_ms, sparse_ms)


def select_training_kernel(
    weight: Tensor,
    name: str,
    pattern: Pattern,
    uses: tuple[WeightUse, ...] | str,
    config: CompileConfig,
) -> Choice | None:
    """Whether a masked weight is multiplied sparse in training; None where nobody asked for it."""
    asked = config.kernel_of(name)
    if asked in ("auto", "dense"):
        return None
    why_not = _no_training(weight, pattern, uses, asked)
    if why_not is not None:
        return _choice(name, weight, uses, "dense", why_not)
    backward = (
        ""
        if isinstance(pattern, TransposableNM)
        else "; the gradient of x is dense, '2:4t' makes it sparse"
    )
    return _choice(name, weight, uses, TRAINING, f"pinned by kernels={backward}")


def _no_training(
    weight: Tensor, pattern: Pattern, uses: tuple[WeightUse, ...] | str, asked: str
) -> str | None:
    if asked not in ("sparse", TRAINING):
        return f"{asked!r} does not run in training, {TRAINING!r} does"
    if isinstance(uses, str):
        return uses
    families = [each for each in find_families(weight.device.type) if TRAINING in each.names]
    if not families:
        return f"no sparse product for training on {weight.device.type} tensors"
    if any(use.work.kernel for use in uses):
        return "no sparse convolution for training"
    size = weight.shape[0], weight[0].numel()
    why_not = families[0].unavailable()
    for use in uses:
        why_not = why_not or families[0].refusal(pattern, *size, use.work.dtype)
    return why_not
