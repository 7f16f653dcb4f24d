"""``torch.compile(model, backend="sparsedm")``, found through the entry point."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import sparsedm_compiler as sdm
from tests.oracle import assert_same, gradients, hand_masked
from tests.zoo import FAMILIES, Family, sample_of

families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def chosen(model: nn.Module, call: Any) -> dict[str, str]:
    """The weights ``compile`` would prune, which the entry point must prune too."""
    student = sdm.compile(model, "2:4", backend="eager")
    with torch.no_grad():
        student(*call[0], **call[1])
    return {name: str(pattern) for name, (_, pattern) in sdm.masked_parameters(student).items()}


@families
def test_dynamo_backend_by_its_entry_point_prunes_the_weights_of_compile(family: Family) -> None:
    torch._dynamo.reset()
    model = family.build()
    call = family.inputs(model, 2)
    oracle = hand_masked(model, chosen(model, call))
    options = {"pattern": "2:4", "backend": "eager"}
    pinned = {**options, "kernels": {"*": "dense"}}
    fast = torch.compile(model, backend="sparsedm", options=pinned)
    with torch.no_grad():
        assert_same(sample_of(fast(*call[0], **call[1])), sample_of(oracle(*call[0], **call[1])))
    student = torch.compile(model, backend="sparsedm", options={**options, "mode": "train"})
    ours, theirs = gradients(student, call), gradients(oracle, call)
    assert {name.removeprefix("_orig_mod.") for name in ours} == theirs.keys()
    for name, gradient in theirs.items():
        assert_same(ours[f"_orig_mod.{name}"], gradient)


def test_dynamo_backend_without_an_import_of_the_package_is_discovered() -> None:
    code = (
        "import torch\n"
        "net = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])\n"
        "options = {'pattern': '1:8', 'backend': 'eager'}\n"
        "fast = torch.compile(net, backend='sparsedm', options=options)\n"
        "x = torch.randn(2, 8)\n"
        "with torch.no_grad(): print(torch.equal(fast(x), net(x)))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_folded_weights_when_changed_are_folded_again() -> None:
    torch._dynamo.reset()
    net = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    fast = torch.compile(net, backend="sparsedm", options={"pattern": "2:4", "backend": "eager"})
    x = torch.randn(2, 8)
    with torch.no_grad():
        for _ in range(2):
            assert_same(fast(x), hand_masked(net, {"1.weight": "2:4"})(x))
            net[1].weight.mul_(-1).add_(0.1)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"finalize": True}, "option 'finalize' is none of pattern"),
        ({"pattern": "5:4"}, "pattern '5:4'"),
        ({"pattern": "2:4", "depth": 3}, "option 'depth' is none of pattern"),
        ({"pattern": "2:4", "mode": "fast"}, "mode 'fast'"),
    ],
)
def test_dynamo_backend_with_bad_options_raises(options: dict[str, Any] | None, error: str) -> None:
    torch._dynamo.reset()
    net = nn.Linear(8, 8)
    fast = torch.compile(net, backend="sparsedm", options=options)
    with torch.no_grad(), pytest.raises(Exception, match=error) as raised:
        fast(torch.randn(1, 8))
    assert isinstance(raised.value.inner_exception, sdm.SparseDMError)


def test_dynamo_backend_without_a_pattern_on_a_dense_model_warns() -> None:
    torch._dynamo.reset()
    fast = torch.compile(nn.Linear(8, 8), backend="sparsedm")
    with torch.no_grad(), pytest.warns(UserWarning, match="satisfies an N:M pattern"):
        fast(torch.randn(1, 8))


def test_dynamo_backend_when_training_through_folded_weights_raises() -> None:
    torch._dynamo.reset()
    net = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    fast = torch.compile(net, backend="sparsedm", options={"pattern": "2:4", "backend": "eager"})
    with pytest.raises(sdm.DenseRunError, match="asks for a gradient"):
        fast(torch.randn(1, 8))
