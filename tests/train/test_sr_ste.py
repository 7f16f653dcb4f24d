"""SR-STE equals ``g + lam (1 - m) W`` to the bit, however the optimizer is driven."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import sparsedm_compiler as sdm
from sparsedm_compiler.train.sr_ste import sr_ste
from tests.group import run_group
from tests.oracle import assert_same
from tests.train.sr_ste_cases import (
    FORMS,
    LAM,
    LR,
    PATTERN,
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
@pytest.mark.parametrize("twice", [False, True])
def test_sr_ste_step_equals_the_formula(fused: bool, twice: bool) -> None:
    student = student_of(net(twice=twice))
    expected = expected_step(student, ste_grads(student, batch()))
    optimizer = sgd(student, fused=fused)
    sr_ste(optimizer, student, lam=LAM)
    student(batch()).sum().backward()
    optimizer.step()
    assert_stepped(student, expected)


def test_sr_ste_cases_have_a_nonzero_term() -> None:
    """Else every test of this file would pass without it."""
    assert int((term_of(net().middle.weight) != 0).sum()) > 20


def test_sr_ste_with_accumulation_adds_the_term_once() -> None:
    student = student_of(net())
    inputs = [batch(seed) for seed in range(5)]
    expected = expected_step(student, ste_grads(student, *inputs))
    optimizer = sgd(student)
    sr_ste(optimizer, student, lam=LAM)
    for x in inputs:
        student(x).sum().backward()
    optimizer.step()
    assert_stepped(student, expected)


def test_sr_ste_uses_the_mask_of_the_forward() -> None:
    """Two steps: the second masks the weights the first has made."""
    student = student_of(net())
    optimizer = sgd(student)
    sr_ste(optimizer, student, lam=LAM)
    for seed in range(2):
        expected = expected_step(student, ste_grads(student, batch(seed)))
        optimizer.zero_grad()
        student(batch(seed)).sum().backward()
        optimizer.step()
        assert_stepped(student, expected)


@pytest.mark.parametrize("how", ["positional", "keyword"])
@pytest.mark.parametrize("form", FORMS)
def test_sr_ste_with_a_closure_adds_the_term_after_the_backward(how: str, form: str) -> None:
    student = student_of(net())
    expected = expected_step(student, ste_grads(student, batch()))
    optimizer = sgd(student)
    sr_ste(optimizer, student, lam=LAM, form=form)

    def closure() -> float:
        optimizer.zero_grad()
        loss = student(batch()).sum()
        loss.backward()
        return loss.item()

    before = student(batch()).sum().item()
    loss = optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure)
    assert loss == before
    assert_stepped(student, expected)


class Thrice(SGD):
    """Evaluates its closure three times a step, as a line search does, and moves nothing."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            return [closure() for _ in range(3)]


@pytest.mark.parametrize("form", FORMS)
def test_sr_ste_with_a_closure_called_several_times_is_right(form: str) -> None:
    """Each new gradient has the term once; the decoupled decay happens once a step."""
    student = student_of(net())
    weight = student.middle.weight
    before, term = weight.detach().clone(), term_of(weight)
    grad = ste_grads(student, batch())["middle.weight"]
    optimizer = Thrice(student.parameters(), lr=LR)
    sr_ste(optimizer, student, lam=LAM, form=form)

    def closure() -> None:
        optimizer.zero_grad()
        student(batch()).sum().backward()

    optimizer.step(closure)
    assert weight.grad is not None
    if form == "paper":
        assert_same(weight.detach(), before)
        assert_same(weight.grad, grad + term)
    else:
        assert_same(weight.detach(), before - LR * term)


@pytest.mark.parametrize("form", FORMS)
def test_sr_ste_with_a_tensor_learning_rate_works(form: str) -> None:
    student = student_of(net())
    expected = expected_step(student, ste_grads(student, batch()))
    optimizer = SGD(student.parameters(), lr=torch.tensor(LR))
    sr_ste(optimizer, student, lam=LAM, form=form)
    student(batch()).sum().backward()
    optimizer.step()
    assert_stepped(student, expected)


def test_sr_ste_decoupled_uses_the_lr_of_each_group() -> None:
    student = student_of(net())
    weight = student.middle.weight
    before, term = weight.detach().clone(), term_of(weight)
    groups = [{"params": [weight], "lr": 0.25}, {"params": student.first.parameters()}]
    optimizer = SGD(groups, lr=LR)
    sr_ste(optimizer, student, lam=LAM, form="decoupled")
    grad = ste_grads(student, batch())["middle.weight"]
    student(batch()).sum().backward()
    optimizer.step()
    assert_same(weight.detach(), before - 0.25 * term - 0.25 * grad)


def test_sr_ste_with_maximize_still_pulls_to_zero() -> None:
    student = student_of(net())
    grads = {name: -grad for name, grad in ste_grads(student, batch()).items()}
    expected = expected_step(student, grads)
    optimizer = sgd(student, maximize=True)
    sr_ste(optimizer, student, lam=LAM)
    student(batch()).sum().backward()
    optimizer.step()
    assert_stepped(student, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sr_ste_with_half_precision_parameters_works(dtype: torch.dtype) -> None:
    """One rounding, of the exact sum: gradients here are as small as the term."""
    student = student_of(net())
    student.to(dtype)
    student(batch().to(dtype)).sum().backward()
    weight = student.middle.weight
    weight.grad = (torch.randn(8, 8, generator=torch.Generator().manual_seed(0)) * 1e-4).to(dtype)
    exact = weight.grad.double() + term_of(weight.double(), lam=2e-4)
    optimizer = sgd(student)
    sr_ste(optimizer, student, lam=2e-4)
    optimizer.step()
    assert weight.grad.dtype == dtype
    assert_same(weight.grad, exact.to(dtype))


def test_sr_ste_with_lambda_zero_is_plain_ste() -> None:
    student = student_of(net())
    expected = expected_step(student, ste_grads(student, batch()), lam=0)
    optimizer = sgd(student)
    sr_ste(optimizer, student, lam=0)
    student(batch()).sum().backward()
    optimizer.step()
    assert_stepped(student, expected)


def test_sr_ste_with_lambda_zero_accepts_an_uncalled_model() -> None:
    """Not even for masks, which this student does not have yet."""
    student = sdm.compile(net(), PATTERN, backend="eager")
    optimizer = sgd(student)
    sr_ste(optimizer, student, lam=0)
    optimizer.step()


def test_sr_ste_after_remove_adds_nothing() -> None:
    student = student_of(net())
    expected = expected_step(student, ste_grads(student, batch()), lam=0)
    optimizer = sgd(student)
    sr_ste(optimizer, student, lam=LAM).remove()
    student(batch()).sum().backward()
    optimizer.step()
    assert_stepped(student, expected)


@pytest.mark.parametrize("form", FORMS)
def test_sr_ste_for_a_weight_without_gradient_does_nothing(form: str) -> None:
    student = student_of(net())
    before = student.middle.weight.detach().clone()
    optimizer = sgd(student)
    sr_ste(optimizer, student, lam=LAM, form=form)
    student.middle.weight.requires_grad_(False)
    student(batch()).sum().backward()
    optimizer.step()
    assert_same(student.middle.weight.detach(), before)


def test_sr_ste_defaults_are_those_of_the_paper() -> None:
    student = student_of(net())
    student(batch()).sum().backward()
    weight = student.middle.weight
    assert weight.grad is not None
    expected = weight.grad.double() + term_of(weight.double(), lam=2e-4)
    optimizer = sgd(student)
    sr_ste(optimizer, student)
    optimizer.step()
    assert_same(weight.grad, expected.float())


@pytest.mark.parametrize("form", ["Paper", "", None, "coupled"])
def test_sr_ste_with_an_unknown_form_raises(form: Any) -> None:
    student = student_of(net())
    with pytest.raises(sdm.ConfigError, match="neither 'paper' nor 'decoupled'"):
        sr_ste(sgd(student), student, form=form)


@pytest.mark.parametrize("lam", [-1e-4, float("nan"), float("inf"), "2e-4", True, None])
def test_sr_ste_with_an_invalid_lambda_raises(lam: Any) -> None:
    student = student_of(net())
    with pytest.raises(sdm.ConfigError, match="not a finite number >= 0"):
        sr_ste(sgd(student), student, lam=lam)


def test_sr_ste_for_a_model_that_was_not_compiled_raises() -> None:
    with pytest.raises(sdm.SparseDMError, match="was not compiled"):
        sr_ste(sgd(net()), net())


def test_sr_ste_step_before_the_first_forward_raises() -> None:
    student = sdm.compile(net(), PATTERN, backend="eager")
    optimizer = sgd(student)
    sr_ste(optimizer, student, lam=LAM)
    with pytest.raises(sdm.SparseDMError, match="call the model before the first step"):
        optimizer.step()


def test_sr_ste_with_the_optimizer_of_another_model_raises() -> None:
    student = student_of(net())
    optimizer = sgd(net())
    sr_ste(optimizer, student, lam=LAM)
    student(batch()).sum().backward()
    with pytest.raises(sdm.ConfigError, match="none of the 1 masked weights of Net"):
        optimizer.step()


def ddp_rank(rank: int, folder: Path) -> None:
    """One of two processes: a step of each form on its own half of the batch."""
    for form in FORMS:
        student = student_of(net())
        parallel = DistributedDataParallel(student)
        optimizer = sgd(student)
        sr_ste(optimizer, student, lam=LAM, form=form)
        parallel(batch(rank)).sum().backward()
        optimizer.step()
        torch.save(student.state_dict(), folder / f"{form}.{rank}")


def test_sr_ste_in_two_processes_adds_the_same_term_once(tmp_path: Path) -> None:
    run_group(ddp_rank, tmp_path)
    model = net()
    halves = [ste_grads(model, batch(rank)) for rank in range(2)]
    grads = {name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]}
    expected = expected_step(model, grads)
    saved = sorted(tmp_path.glob("*.[01]"))
    assert len(saved) == 4
    for path in saved:
        weights = torch.load(path)
        for name, value in expected.items():
            assert_same(weights[name], value)
