"""What a finalized model keeps, and how much memory its first call takes."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.compiler import free_memory

WIDTH, LAYERS = 1024, 16


def make_stack(width: int, layers: int) -> nn.Sequential:
    """Pruned layers of one width between a first and a last one."""
    inner = [nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(layers)]
    return nn.Sequential(nn.Linear(8, width), *inner, nn.Linear(width, 8))


def own_memory(model: nn.Module) -> dict[str, weakref.ref[Any]]:
    """Puts every weight into an array of its own, which dies with the last tensor that uses it."""
    arrays: dict[str, weakref.ref[Any]] = {}
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy().copy()
        parameter.data = torch.from_numpy(array)
        arrays[name] = weakref.ref(array)
    return arrays


def list_alive(arrays: dict[str, weakref.ref[Any]]) -> set[str]:
    gc.collect()
    return {name for name, array in arrays.items() if array() is not None}


def sparse(model: nn.Module, **options: Any) -> nn.Module:
    fixed: dict[str, Any] = {"mode": "infer", "backend": "eager", "kernels": {"*": "cpu_free"}}
    return sdm.compile(model.eval(), pattern="2:4", inplace=True, **fixed, **options)


def test_finalized_model_keeps_no_dense_weight() -> None:
    model = make_stack(64, 3)
    arrays = own_memory(model)
    with torch.no_grad():
        sparse(model, finalize=True)(torch.randn(16, 8))
    pruned = {name for name in arrays if name.startswith(("1.", "2.", "3.")) and "weight" in name}
    assert len(pruned) == 3
    assert list_alive(arrays) == set(arrays) - pruned


def test_weights_that_were_replaced_are_freed_after_the_next_call() -> None:
    model = make_stack(64, 3)
    arrays, batches = own_memory(model), (torch.randn(16, 8), torch.randn(2, 16, 8))
    with torch.no_grad():
        sparse(model)
        for x in batches:  # a graph each, which checks these weights
            model(x)
        for parameter in model.parameters():
            parameter.data = parameter.detach().clone()
        model(batches[0])
    assert list_alive(arrays) == set()


MEASURE = """
import json, gc, torch, sparsedm_compiler as sdm
from tests.compiler.test_memory import LAYERS, WIDTH, make_stack, sparse

def read(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

x = torch.randn(64, 8)
with torch.no_grad():
    sparse(make_stack(32, 1), finalize=True)(x)
    model = make_stack(WIDTH, LAYERS)
    gc.collect()
    before = read("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    sparse(model, finalize=True)(x)
    gc.collect()
    values = {"peak": read("VmHWM") - before, "after": read("VmRSS") - before}
choices = sdm.explain(model).choices
values["run"] = [choice.run_bytes for choice in choices]
print(json.dumps(values))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_first_call_takes_the_packed_weights_and_room_for_one_more() -> None:
    run = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    values = json.loads(run.stdout)
    weight = WIDTH * WIDTH * 4
    dense, packed = LAYERS * weight, sum(values["run"])
    assert len(values["run"]) == LAYERS
    assert packed <= 0.65 * dense
    slack = 20 << 20  # code, graphs, tables
    assert values["peak"] <= packed + 5 * weight + slack
    assert values["after"] <= packed - dense + slack


def test_release_after_packing_of_small_weights_and_other_libraries_does_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    def count(pad: int) -> int:
        calls.append(pad)
        return 1

    monkeypatch.setattr(free_memory, "_find_trim", lambda: count)
    large: Tensor = torch.empty(1 << 18)
    free_memory.release_after_packing(large[:-1])
    free_memory.release_after_packing(large.to("meta"))
    assert calls == []
    free_memory.release_after_packing(large)
    assert calls == [0]
    monkeypatch.setattr(free_memory, "_find_trim", lambda: None)
    free_memory.release_after_packing(large)
