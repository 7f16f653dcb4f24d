"""Students when they are copied and pickled, also by classes and wrappers in ways of their own."""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.compiler.masked_state import copy_masked
from tests.compiler.nets import Chain, X, compiled_chain
from tests.oracle import OPTIONS, ROUNDING, assert_same, masked_patterns, oracle_of

modes = pytest.mark.parametrize("mode", ["train", "infer", "sparse"])


@pytest.fixture(autouse=True)
def _state_of_accelerate() -> Iterator[None]:
    """Accelerators share a state within a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def rebuild(state: dict[str, Any]) -> nn.Module:
    net = Persistent.__new__(Persistent)
    net.__setstate__(state["values"])
    return net


class Persistent(Chain):
    """Copies itself as the persistent classes of EDM do."""

    def __reduce__(self) -> Any:
        return rebuild, ({"values": super().__reduce__()[2]},)

    def tail(self, x: Tensor) -> Tensor:
        return self.c(self.b(x))  # type: ignore[no-any-return]


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@modes
@pytest.mark.parametrize("again", [copy.deepcopy, pickled])
def test_student_of_a_persistent_class_when_copied_masks_its_own(again: Any, mode: str) -> None:
    torch.manual_seed(0)
    net = Persistent()
    student = sdm.compile(net, "2:4", backend="eager", **OPTIONS[mode])
    early = again(student)
    out = student(X)
    assert_same(out, oracle_of(student)(X), tolerance=ROUNDING[mode])
    for twin in (early, again(student), again(again({"ema": student}))["ema"]):
        assert_same(twin(X), out, tolerance=ROUNDING[mode])
        assert masked_patterns(twin) == masked_patterns(student)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(-1.5)
        oracle = oracle_of(twin)
        assert_same(twin(X), oracle(X), tolerance=ROUNDING[mode])
        assert_same(twin.tail(X), oracle.tail(X), tolerance=ROUNDING[mode])
        with pytest.raises(sdm.DenseRunError, match="outside of the calls of the compiled Persis"):
            twin.b(X)
    assert_same(student(X), out)
    assert type(again(net)) is Persistent
    assert "forward" not in again(net).__dict__


def test_student_of_a_persistent_class_with_a_method_of_its_own_keeps_it_in_a_file() -> None:
    torch.manual_seed(0)
    net = Persistent()
    net.tail = shifted  # type: ignore[method-assign]
    student = pickled(sdm.compile(net, "2:4", backend="eager"))
    student(X)
    assert_same(student.tail(X), shifted(X))
    fast = sdm.compile(pickled(student), mode="infer", backend="eager")
    assert_same(fast(X), student(X))


def shifted(x: Tensor) -> Tensor:
    return x + 1


def compiled_and_called(mode: str) -> nn.Module:
    student = compiled_chain(mode)
    student(X)
    return student


def wrapped(student: nn.Module, how: str) -> nn.Module:
    """Wraps the forward of a student; how: as accelerate does, or by hand."""
    if how == "by hand":
        student.forward = types.MethodType(call_twice, student)
        return student
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepared: nn.Module = accelerator.prepare(student)
    if how == "unwrapped":
        prepared = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    return prepared


def call_twice(student: nn.Module, x: Tensor) -> Tensor:
    return type(student).forward(student, x)  # type: ignore[no-any-return, operator]


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("called", [True, False], ids=["called", "not called"])
@pytest.mark.parametrize("how", ["prepared", "unwrapped"])
def test_student_wrapped_by_accelerate_when_pickled_runs_masked(
    how: str, called: bool, mode: str
) -> None:
    student = wrapped(compiled_chain(mode), how)
    if called:
        student(X)
    loaded, oracle = pickled(student), oracle_of(compiled_and_called(mode))
    assert_same(loaded(X), oracle(X))  # as a plain model's, its wrapper is not in the file
    assert_same(copy.deepcopy(student)(X), student(X))
    with pytest.raises(sdm.DenseRunError, match="outside of the calls of the compiled Chain"):
        loaded.b(X)


def test_student_whose_forward_was_replaced_is_masked_again_from_a_file() -> None:
    student = wrapped(compiled_and_called("train"), "by hand")
    with pytest.raises(sdm.DenseRunError, match="was replaced by call_twice"):
        student(X)
    assert_same(pickled(student)(X), oracle_of(compiled_and_called("train"))(X))


@modes
def test_plain_copy_of_a_student_knows_nothing_of_this_package(mode: str) -> None:
    plain = copy_masked(compiled_and_called(mode))
    ours = [
        name
        for module in plain.modules()
        for name, value in module.__dict__.items()
        if type(value).__module__.startswith("sparsedm_compiler")
    ]
    assert ours == []
    assert b"sparsedm_compiler" not in pickle.dumps(plain)


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_student_of_a_graph_module_when_copied_masks_its_own(mode: str) -> None:
    torch.manual_seed(0)
    graph = torch.fx.symbolic_trace(Chain())
    student = sdm.compile(graph, "2:4", backend="eager", **OPTIONS[mode])
    out = student(X)
    twin = copy.deepcopy(student)
    assert_same(twin(X), out)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(-1.5)
    assert not torch.equal(twin(X), out)
    assert_same(student(X), out)
    with pytest.raises(sdm.DenseRunError, match="outside of the calls"):
        twin.b(X)
