"""SR-STE: ``g = dL/d(m W) + lambda (1 - m) W``, once per optimizer step, on unscaled gradients.

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

from .. import ConfigError, get_masks, masked_parameters
from .fsdp import get_local_rows, zero_kept_locally

FORMS = ("paper", "decoupled")

Apply = Callable[[Optimizer], None]
Changed = tuple[tuple[Any, ...], dict[str, Any]] | None


def sr_ste(
    optimizer: Optimizer, model: nn.Module, *, lam: float = 2e-4, form: str = "paper"
) -> RemovableHandle:
    """Adds SR-STE's term to every ``optimizer.step()`` from now on.

    In the training loop that is all; there is nothing to call per step. The mask is that of the
    weight as this step's forward saw it, held or frozen ones too. It holds under GradScaler (fused
    optimizers too), gradient accumulation, weights used twice, closures, skipped steps and DDP.
    Gradients are clipped before the term joins them.

    Args:
        optimizer: The optimizer that steps the model's parameters.
        model: A student from ``compile(..., mode="train")``, called at least once before the first
            step.
        lam: Lambda, the weight of the term, finite and >= 0; 0 adds nothing.
        form: "paper" adds ``lam (1 - m) W`` to the gradient, and the optimizer sees it as such.
            "decoupled" does ``W -= lr lam (1 - m) W`` before the optimizer's own update, with each
            group's lr, as AdamW decays weights; there ``lr * lam`` below 1e-7 is lost in a float32
            weight.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        ConfigError: ``form`` or ``lam`` is not valid, or ``model`` was not compiled. Also at a
            step of an optimizer that holds no masked weight.

    Example:
        >>> import torch, sparsedm_compiler as sdm
        >>> net = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])
        >>> student = sdm.compile(net, pattern="2:4", backend="eager")
        >>> optimizer = torch.optim.AdamW(student.parameters())
        >>> handle = sdm.sr_ste(optimizer, student)
        >>> student(torch.randn(1, 8)).square().mean().backward()
        >>> optimizer.step()
    """
    if form not in FORMS:
        raise ConfigError(f"form {form!r} is neither {' nor '.join(map(repr, FORMS))}")
    if isinstance(lam, bool) or not isinstance(lam, (int, float)) or not 0 <= lam < math.inf:
        raise ConfigError(f"lam {lam!r} is not a finite number >= 0, e.g. 2e-4")
    masked_parameters(model)
    apply = partial(_apply, model=model, lam=lam, form=form) if lam else _add_nothing
    return optimizer.register_step_pre_hook(partial(_before_step, apply=apply, form=form))


def _add_nothing(optimizer: Optimizer) -> None:
    """Adds the term of a lambda of 0."""


def _before_step(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], *, apply: Apply, form: str
) -> Changed:
    """Applies the term now or, if a closure computes the gradient, right after it has."""
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
    masked, fixed = masked_parameters(model), get_masks(model, fixed=True)
    patterns = {id(weight): pattern for weight, pattern in masked.values()}
    masks = {id(masked[name][0]): mask for name, mask in fixed.items()}
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
                term = zero_kept_locally(weight, patterns[id(weight)], masks.get(id(weight)))
                if form == "paper":
                    signed = -lam if group.get("maximize") else lam
                    _add_to_gradient(get_local_rows(weight.grad), term, signed, optimizer)
                else:
                    _decay(get_local_rows(weight), term, group["lr"] * lam, optimizer)


def _add_to_gradient(grad: Tensor, term: Tensor, lam: float, optimizer: Optimizer) -> None:
    """Adds ``lam * term`` to ``grad``, times the loss scale that a fused optimizer divides by."""
    scale = vars(optimizer).get("grad_scale")
    _add(grad, term, lam if scale is None else scale * lam)


def _decay(weight: Tensor, term: Tensor, rate: float | Tensor, optimizer: Optimizer) -> None:
    """Subtracts ``rate * term`` from ``weight``, unless a fused optimizer will skip the step."""
    overflow = vars(optimizer).get("found_inf")
    _add(weight, term, -rate if overflow is None else (overflow == 0) * -rate)


def _add(target: Tensor, term: Tensor, factor: float | Tensor) -> None:
    """Adds ``factor * term`` with one rounding; ``alpha=`` would round the factor as well."""
    wide = torch.promote_types(target.dtype, torch.float32)
    if not isinstance(factor, Tensor):
        factor = torch.full((1,), factor, dtype=wide, device=target.device)
    target.addcmul_(term, factor.to(target.device, wide).reshape(1))
