"""``g = dL/d(m W) + lambda (1 - m) W``: SR-STE, once per optimizer step, on unscaled gradients.

Zhou et al. 2021, "Learning N:M fine-grained structured sparse neural networks from scratch";
SparseDM eq. 9 and 14. The term pulls pruned weights to zero, so that masks settle.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .. import ConfigError, Pattern, masked_parameters
from .fsdp import here, pruned_here

FORMS = ("paper", "decoupled")

Patterns = dict[int, Pattern]
Apply = Callable[[Optimizer], None]
Changed = tuple[tuple[Any, ...], dict[str, Any]] | None


def sr_ste(
    optimizer: Optimizer, model: nn.Module, *, lam: float = 2e-4, form: str = "paper"
) -> RemovableHandle:
    """A handle whose ``remove()`` ends it; until then every ``optimizer.step()`` adds the term.

    ``model``: from ``compile(..., mode="train")``, called at least once before the first step.
    ``form`` "paper": ``lam (1 - m) W`` joins the gradient, and the optimizer sees it as such.
    "decoupled": ``W -= lr lam (1 - m) W`` before the optimizer's own update, with each group's lr,
    as AdamW decays weights; there ``lr * lam`` below 1e-7 is lost in a float32 weight.

    The mask is that of the weight as this step's forward saw it. It holds under GradScaler (fused
    optimizers too), gradient accumulation, weights used twice, closures, skipped steps and DDP.
    Gradients are clipped before the term joins them. ``lam=0`` does nothing.

    Raises ConfigError for a form or lambda that is not one, for a model that was not compiled,
    and at the step where the optimizer holds no masked weight.
    """
    if form not in FORMS:
        raise ConfigError(f"form {form!r} is neither {' nor '.join(map(repr, FORMS))}")
    if isinstance(lam, bool) or not isinstance(lam, (int, float)) or not 0 <= lam < math.inf:
        raise ConfigError(f"lam {lam!r} is not a finite number >= 0, e.g. 2e-4")
    masked_parameters(model)
    apply = partial(_apply, model=model, lam=lam, form=form) if lam else _nothing
    return optimizer.register_step_pre_hook(partial(_before_step, apply=apply, form=form))


def _nothing(optimizer: Optimizer) -> None:
    """What a lambda of 0 adds."""


def _before_step(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], *, apply: Apply, form: str
) -> Changed:
    """Apply now, or, where a closure will compute the gradient, right after it has."""
    positional = len(args) > 1
    closure = args[1] if positional else kwargs.get("closure")
    if closure is None:
        apply(optimizer)
        return None
    calls = 0

    def evaluate() -> Any:
        nonlocal calls
        loss = closure()
        if form == "paper" or calls == 0:
            apply(optimizer)
        calls += 1
        return loss

    if positional:
        return (args[0], evaluate, *args[2:]), kwargs
    return args, {**kwargs, "closure": evaluate}


@torch.no_grad()
def _apply(optimizer: Optimizer, *, model: nn.Module, lam: float, form: str) -> None:
    patterns = {id(weight): pattern for weight, pattern in masked_parameters(model).values()}
    held = [p for group in optimizer.param_groups for p in group["params"] if id(p) in patterns]
    if not held:
        raise ConfigError(
            f"SR-STE found none of the {len(patterns)} masked weights of {type(model).__name__} in "
            "the optimizer: call the model before the first step, and build the optimizer from "
            "the model that compile returned"
        )
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if id(weight) in patterns and weight.grad is not None:
                term = pruned_here(weight, patterns[id(weight)])
                if form == "paper":
                    _join(
                        here(weight.grad), term, -lam if group.get("maximize") else lam, optimizer
                    )
                else:
                    _decay(here(weight), term, group["lr"] * lam, optimizer)


def _join(grad: Tensor, term: Tensor, lam: float, optimizer: Optimizer) -> None:
    """``grad += lam * term``, times the loss scale that a fused optimizer is about to divide by."""
    scale = vars(optimizer).get("grad_scale")
    _add(grad, term, lam if scale is None else scale * lam)


def _decay(weight: Tensor, term: Tensor, rate: float | Tensor, optimizer: Optimizer) -> None:
    """``weight -= rate * term``, or nothing where a fused optimizer will skip the step."""
    overflow = vars(optimizer).get("found_inf")
    _add(weight, term, -rate if overflow is None else (overflow == 0) * -rate)


def _add(target: Tensor, term: Tensor, factor: float | Tensor) -> None:
    """``target += factor * term`` in one rounding; ``alpha=`` would round the factor as well."""
    wide = torch.promote_types(target.dtype, torch.float32)
    if not isinstance(factor, Tensor):
        factor = torch.full((1,), factor, dtype=wide, device=target.device)
    target.addcmul_(term, factor.to(target.device, wide).reshape(1))
