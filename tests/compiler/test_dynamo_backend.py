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


def test_dynamo_backend_when_training_through_folded_weights_raises_before_it_measures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr("sparsedm_compiler.compiler.dynamo_backend.plan_weights", None)
    net = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    fast = torch.compile(net, backend="sparsedm", options={"pattern": "2:4", "backend": "eager"})
    with pytest.raises(sdm.DenseRunError, match="asks for a gradient"):
        fast(torch.randn(1, 8))
    monkeypatch.undo()
    x = torch.randn(1, 8)
    with torch.no_grad():
        assert_same(fast(x), hand_masked(net, {"1.weight": "2:4"})(x))


def test_dynamo_backend_at_the_last_graph_of_a_function_warns() -> None:
    torch._dynamo.reset()
    net = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    options = {"pattern": "2:4", "backend": "eager"}
    fast = torch.compile(net, backend="sparsedm", options=options)
    oracle = hand_masked(net, {"1.weight": "2:4"})
    shapes = [torch.randn(*[2] * rank, 8) for rank in range(1, 5)]  # a graph each
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=4):
        for x in shapes[:3]:
            assert_same(fast(x), oracle(x))
        with pytest.warns(UserWarning, match=r"this is graph 4 .* at the next new shape it runs"):
            assert_same(fast(shapes[3]), oracle(shapes[3]))
        x = torch.randn(*[2] * 5, 8)
        assert_same(fast(x), net(x))  # what the warning tells of


def test_dynamo_backend_where_the_graph_breaks_warns() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.c(self.b(self.a(x)))
            torch._dynamo.graph_break()
            return self.d(x)  # type: ignore[no-any-return]

    torch._dynamo.reset()
    options = {"pattern": "2:4", "backend": "eager"}
    fast = torch.compile(Broken(), backend="sparsedm", options=options)
    dense = "no weight of this graph is pruned to 2:4, so it runs dense: d.weight"
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match=dense),
        pytest.warns(UserWarning, match="breaks into several graphs"),
    ):
        fast(torch.randn(1, 8))


def test_dynamo_backend_where_no_weight_fits_warns() -> None:
    torch._dynamo.reset()
    net = nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)])
    options = {"pattern": "2:4", "backend": "eager"}
    fast = torch.compile(net, backend="sparsedm", options=options)
    with torch.no_grad(), pytest.warns(UserWarning, match="no weight of this graph is pruned"):
        fast(torch.randn(1, 6))
