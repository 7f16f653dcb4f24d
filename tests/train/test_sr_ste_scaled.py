"""SR-STE under loss scaling and AdamW, fused and not: the term meets the unscaled gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import AdamW

from sparsedm_compiler.train.sr_ste import sr_ste
from tests.train.sr_ste_cases import (
    FORMS,
    LAM,
    assert_stepped,
    batch,
    expected_step,
    net,
    sgd,
    ste_grads,
    student_of,
    term_of,
)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_sr_ste_under_loss_scaling_adds_the_same_term(fused: bool, unscale: bool) -> None:
    student = student_of(net())
    expected = expected_step(student, ste_grads(student, batch()))
    optimizer = sgd(student, fused=fused)
    sr_ste(optimizer, student, lam=LAM)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(student(batch()).sum()).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert_stepped(student, expected)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_sr_ste_in_a_step_that_overflowed_changes_nothing(fused: bool, form: str) -> None:
    student = student_of(net())
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    optimizer = sgd(student, fused=fused)
    sr_ste(optimizer, student, lam=LAM, form=form)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(student(batch()).sum() * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_stepped(student, before)
    optimizer.zero_grad()
    expected = expected_step(student, ste_grads(student, batch()))
    scaler.scale(student(batch()).sum()).backward()
    scaler.step(optimizer)
    assert_stepped(student, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_sr_ste_form_decides_whether_adamw_sees_the_term(
    form: str, fused: bool, scaled: bool
) -> None:
    """The paper's term is rescaled by Adam like any gradient; the decoupled one is not."""
    student, twin = student_of(net()), net()
    how: dict[str, Any] = {"lr": 0.125, "weight_decay": 0.1, "fused": fused}
    reference, optimizer = AdamW(twin.parameters(), **how), AdamW(student.parameters(), **how)
    for name, grad in ste_grads(student, batch()).items():
        twin.get_parameter(name).grad = grad
    weight, term = twin.middle.weight, term_of(twin.middle.weight)
    assert weight.grad is not None
    if form == "paper":
        weight.grad += term
    else:
        weight.data -= 0.125 * term
    reference.step()
    sr_ste(optimizer, student, lam=LAM, form=form)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
    scaler.scale(student(batch()).sum()).backward()
    scaler.step(optimizer)
    assert_stepped(student, {name: value.detach() for name, value in twin.named_parameters()})
