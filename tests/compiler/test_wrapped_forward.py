"""The own forward is taken by compile(): whatever wraps or replaces it, nothing runs dense."""

from __future__ import annotations

import copy
import functools
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from tests.compiler.nets import Chain, X, assert_chain, compiled_chain
from tests.oracle import assert_same, oracle_of


def wrap_by_closure(model: nn.Module) -> None:
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)  # type: ignore[method-assign]


def wrap_by_partial(model: nn.Module) -> None:
    name = f"_old_forward_{len(vars(model))}"

    def call(module: nn.Module, *args: Any) -> Any:
        return getattr(module, name)(*args)

    setattr(model, name, model.forward)
    model.forward = functools.update_wrapper(  # type: ignore[method-assign]
        functools.partial(call, model), model.forward
    )


def wrap_as_method(model: nn.Module) -> None:
    function = model.forward.__func__

    @functools.wraps(function)
    def call(self: nn.Module, *args: Any) -> Any:
        return function(self, *args)

    model.forward = types.MethodType(call, model)  # type: ignore[method-assign]


wrappers = pytest.mark.parametrize("wrap", [wrap_by_closure, wrap_by_partial, wrap_as_method])


@wrappers
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_wrapper_when_put_on_before_during_and_after_captures_runs_masked(
    wrap: Any, mode: str
) -> None:
    before = compiled_chain(mode)
    wrap(before)
    assert_chain(before)
    after = compiled_chain(mode)
    assert_chain(after)
    wrap(after)
    assert_chain(after)
    assert_chain(after, torch.randn(5, 3, 16))  # a capture after the wrapper
    wrap(after)
    assert_chain(after, torch.randn(1, 2, 3, 16))


def test_wrapper_when_removed_again_leaves_the_guarded_forward() -> None:
    student = compiled_chain()
    guarded = student.forward
    wrap_by_closure(student)
    assert_chain(student)
    student.forward = guarded  # type: ignore[method-assign]
    assert_chain(student)
    del student.__dict__["forward"]
    with pytest.raises(sdm.DenseRunError, match="would run dense"):
        student(X)


def test_autocast_wrapper_when_around_forward_casts_the_masked_model() -> None:
    student = compiled_chain()
    student.forward = torch.autocast("cpu", torch.bfloat16)(student.forward)  # type: ignore
    out = student(X)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(out, oracle_of(student)(X))


def test_wrapped_model_when_copied_has_a_forward_of_its_own() -> None:
    student = compiled_chain()
    wrap_as_method(student)
    assert_chain(student)
    twin = copy.deepcopy(student)
    with torch.no_grad():
        twin.b.weight.mul_(-1)
    assert_chain(twin)
    assert_chain(student)


def test_replaced_forward_when_called_is_an_error_that_names_it() -> None:
    def skip(self: nn.Module, x: Tensor) -> Tensor:
        return type(self).forward(self, x)  # type: ignore[no-any-return]

    for called_before in (False, True):
        student = compiled_chain()
        if called_before:
            student(X)
        student.forward = types.MethodType(skip, student)  # type: ignore[method-assign]
        with pytest.raises(sdm.DenseRunError, match=r"was replaced by .*skip .*test_wrapped_for"):
            student(X)
        again = sdm.compile(student, "2:4", backend="eager", inplace=True)
        assert_chain(again)


def test_class_forward_when_patched_is_captured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    student = compiled_chain()
    before = student(X)
    forward = Chain.forward
    monkeypatch.setattr(Chain, "forward", lambda self, x: forward(self, x) + 1)
    assert_chain(student)
    assert_same(student(X), before + 1, tolerance=1e-6)


def test_wrapped_model_when_compiled_again_keeps_its_wrapper_or_is_refused() -> None:
    calls = []

    def count(module: nn.Module, *args: Any) -> Any:
        calls.append(1)
        return module._old_forward(*args)  # type: ignore[operator]

    student = compiled_chain()
    student._old_forward = student.forward
    student.forward = functools.partial(count, student)  # type: ignore[method-assign]
    fast = sdm.compile(student, mode="infer", backend="eager", kernels={"*": "dense"})
    assert_chain(fast)
    assert calls
    method = compiled_chain()
    wrap_as_method(method)
    fast = sdm.compile(method, mode="infer", backend="eager", kernels={"*": "dense"})
    assert not isinstance(fast.forward, type(compiled_chain().forward))
    assert_chain(fast)
    closed = compiled_chain()
    wrap_by_closure(closed)
    with pytest.raises(sdm.ConfigError, match=r"is wrapped by .*lambda.*unwrap it first"):
        sdm.compile(closed, mode="infer", backend="eager")
    again = sdm.compile(closed, mode="infer", backend="eager", kernels={"*": "dense"}, inplace=True)
    assert_chain(again)
