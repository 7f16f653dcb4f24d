"""Layers that Accelerate gives their weights only while they run."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.compiler.frozen_masks import read_frozen
from sparsedm_compiler.graph.python_state import PythonState
from sparsedm_compiler.graph.recorded_run import record_run
from tests.compiler.nets import Chain, X
from tests.oracle import OPTIONS, assert_same


def chain() -> nn.Module:
    torch.manual_seed(0)
    return Chain()


def offloaded() -> nn.Module:
    net = chain()
    cpu_offload(net, execution_device=torch.device("cpu"))
    return net


@pytest.mark.parametrize("finalize", [False, True])
def test_offloaded_model_runs_masked_and_stays_offloaded(finalize: bool) -> None:
    expected = sdm.compile(chain(), "2:4", backend="eager")(X)
    options = {**OPTIONS["sparse"], "finalize": finalize}
    student = sdm.compile(offloaded(), "2:4", backend="eager", **options)
    with torch.no_grad():
        for _ in range(3):
            assert_same(student(X), expected, tolerance=1e-5)
    assert all(parameter.is_meta for parameter in student.parameters())
    assert not student._sparsedm.weights.packed


def test_recorded_run_of_an_offloaded_model_holds_none_of_its_weights() -> None:
    with torch.no_grad():
        run = record_run(offloaded(), X)
    assert len(run.parameters) >= 3
    values = [op.value for op in run.ops if isinstance(op.value, Tensor)]
    assert len(values) > len(run.parameters)
    assert all(value.is_meta for value in values)


def test_python_state_of_an_offloaded_model_copies_none_of_its_weights() -> None:
    size = sum(parameter.nbytes for parameter in Chain().parameters())
    state = PythonState(offloaded())
    assert sum(before.nbytes for _, _, before in state._tensors) < size / 10


def test_frozen_mask_of_a_weight_on_a_disk_is_found_when_it_has_values() -> None:
    student = sdm.compile(Chain(), "2:4", backend="eager")
    student(X)
    decisions = student._sparsedm.decisions
    names = [name for name, decision in decisions.items() if decision.accepted]
    tensors = dict(student.state_dict())
    assert [*read_frozen(names, decisions, tensors)] == names
    tensors[names[0]] = tensors[names[0]].to("meta")
    assert [*read_frozen(names, decisions, tensors)] == names[1:]
