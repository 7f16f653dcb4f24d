"""Layers of a student that are wrapped, compiled, computed anew or saved apart from it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

import sparsedm_compiler as sdm
from tests.compiler.nets import Chain, X, compiled_chain
from tests.oracle import (
    OPTIONS,
    ROUNDING,
    assert_same,
    brute_mask,
    hand_masked,
    masked_patterns,
    oracle_of,
)

modes = pytest.mark.parametrize("mode", ["train", "infer"])
orders = pytest.mark.parametrize("order", ["before", "after"])
"""Whether a line comes before or after the first call of the student."""


class Adapter(nn.Module):
    """A layer with one of low rank beside it, in code that wraps layers by hand."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.linear = layer
        self.down, self.up = nn.Linear(16, 4), nn.Linear(4, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.up(self.down(x))  # type: ignore[no-any-return]


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "by hand": Adapter,
    "in a sequence": nn.Sequential,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
}


@modes
@orders
@pytest.mark.parametrize("kind", WRAPPERS)
def test_layer_when_wrapped_after_compile_raises(kind: str, order: str, mode: str) -> None:
    student = compiled_chain(mode)
    if order == "after":
        student(X)
    student.b = WRAPPERS[kind](student.b)
    for model in (student, copy.deepcopy(student)):
        with pytest.raises(sdm.DenseRunError, match=r"'b\.weight' is to be pruned, .*as 'b\."):
            model(X)


@modes
@orders
@pytest.mark.parametrize("wrap", [torch.compile, checkpoint_wrapper], ids=["compile", "checkpoint"])
def test_layer_when_wrapped_by_torch_runs_masked(wrap: Any, order: str, mode: str) -> None:
    student = compiled_chain(mode)
    if order == "after":
        student(X)
    student.b, student.c = wrap(student.b), wrap(student.c)
    assert_same(student(X), oracle_of(student)(X))
    assert len(masked_patterns(student)) == 2


class Sampler(nn.Module):
    """A model in a holder whose method calls it time and again."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).square().mean()  # type: ignore[no-any-return]

    @torch.no_grad()
    def sample(self, x: Tensor) -> Tensor:
        for _ in range(8):
            x = x - 0.1 * self.model(x)
        return x


class Decorated(Chain):
    """Compiles its own forward."""

    forward = torch.compile(Chain.forward)  # type: ignore[assignment]


@modes
@orders
@pytest.mark.parametrize("kind", ["compiled", "without breaks", "decorated", "in place"])
def test_method_that_loops_over_a_compiled_model_runs_masked(
    kind: str, order: str, mode: str
) -> None:
    torch.manual_seed(0)
    model: Any = Decorated() if kind == "decorated" else Chain()
    if kind == "in place":
        model.compile()
    elif kind != "decorated":
        model = torch.compile(model, fullgraph=kind == "without breaks")
    holder = Sampler(model)
    student = sdm.compile(holder, "2:4", backend="eager", **OPTIONS[mode])
    if order == "after":
        student(X)
    masked = hand_masked(holder, masked_patterns(student)) if order == "after" else None
    out = student.sample(X)
    masked = masked or hand_masked(holder, masked_patterns(student))
    assert_same(out, masked.sample(X), tolerance=1e-6)
    assert not torch.allclose(out, holder.sample(X), atol=1e-3)


class Disabled(Chain):
    """Calls a compiled part where TorchDynamo sees nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.part = torch.compile(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)))

    @torch.compiler.disable
    def run_part(self, x: Tensor) -> Tensor:
        return self.part(x)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.run_part(x))


@modes
def test_compiled_part_outside_of_every_graph_runs_masked(mode: str) -> None:
    student = sdm.compile(Disabled(), "2:4", backend="eager", **OPTIONS[mode])
    out = student(X)
    assert any("part" in name for name in masked_patterns(student))
    assert_same(out, oracle_of(student)(X), tolerance=1e-6)


class Product(torch.autograd.Function):
    """A product with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.mT @ x


class Split(torch.autograd.Function):
    """The same in torch's other form."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        return nn.functional.linear(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    backward = Product.backward


class Raw(nn.Module):
    """Reads a parameter of its own, where a backward in Python reads it again."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(16, 16))

    def run(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        if self.kind != "checkpoint":
            function = Product if self.kind == "function" else Split
            return function.apply(x, self.weight)  # type: ignore
        return torch.utils.checkpoint.checkpoint(self.run, x, use_reentrant=False)  # type: ignore


@modes
@pytest.mark.parametrize(
    ("kind", "by"),
    [("function", "Function Product"), ("split", "Function Split"), ("checkpoint", "checkpoint")],
)
def test_weight_that_a_backward_in_python_reads_raises(kind: str, by: str, mode: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), Raw(kind), nn.Linear(16, 16))
    student = sdm.compile(net, "2:4", backend="eager", **OPTIONS[mode])
    with torch.no_grad():
        assert_same(student(X), oracle_of(student)(X))
    for _ in range(2):
        with pytest.raises(sdm.DenseRunError, match=f"read dense in the backward: .*{by} at .*py"):
            student(X.clone().requires_grad_())


class Projecting(nn.Module):
    """Has a public method that multiplies by a parameter of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        self.middle = nn.Parameter(torch.randn(16, 16))

    def project(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.middle)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.project(self.first(x)))  # type: ignore[no-any-return]


@modes
@orders
def test_method_of_a_models_own_parameter_runs_masked(order: str, mode: str) -> None:
    torch.manual_seed(0)
    net = Projecting()
    student = sdm.compile(net, "2:4", backend="eager", policy="all", **OPTIONS[mode])
    if order == "after":
        student(X)
    masked = net.middle.detach() * brute_mask(net.middle.detach(), "2:4")
    assert_same(student.project(X), nn.functional.linear(X, masked), tolerance=ROUNDING[mode])


@pytest.mark.parametrize("finalize", [False, True])
def test_part_when_saved_and_loaded_alone_holds_masked_weights(finalize: bool) -> None:
    torch.manual_seed(0)
    student = sdm.compile(
        Sampler(Chain()), "2:4", backend="eager", **OPTIONS["sparse"], finalize=finalize
    )
    for _ in range(2):
        out = student(X)
    whole = student.state_dict()
    for model in (student, copy.deepcopy(student)):
        part = model.model.state_dict()
        assert all(torch.equal(value, whole[f"model.{name}"]) for name, value in part.items())
    assert (part["b.weight"] == 0).float().mean() == 0.5
    student.model.load_state_dict({name: 2 * value for name, value in part.items()})
    assert not torch.allclose(student(X), out)
    assert torch.equal(student.model.state_dict()["b.weight"], 2 * part["b.weight"])
    plain = Sampler(Chain())
    plain.model.load_state_dict(student.model.state_dict())
    assert_same(student(X), plain(X), tolerance=ROUNDING["sparse"])


class Branch(nn.Module):
    """A model around a part that others may share."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.first, self.trunk, self.last = nn.Linear(16, 16), trunk, nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.trunk(self.first(x)))  # type: ignore[no-any-return]


def test_students_that_share_a_part_run_masked_each() -> None:
    torch.manual_seed(0)
    trunk = Chain()
    students = [sdm.compile(Branch(trunk), "2:4", inplace=True, backend="eager") for _ in range(2)]
    for student in (*reversed(students), *students):
        out = student(X)
        plain = Branch(copy.deepcopy(trunk))
        plain.first, plain.last = copy.deepcopy(student.first), copy.deepcopy(student.last)
        assert_same(out, hand_masked(plain, masked_patterns(student))(X))
    with pytest.raises(sdm.DenseRunError, match="outside of the calls of the compiled Branch"):
        trunk(X)


def test_model_around_a_compiled_one_says_which_it_is() -> None:
    holder = Branch(compiled_chain())
    with pytest.raises(sdm.ConfigError, match="'trunk' is compiled already"):
        sdm.compile(holder, "2:4", backend="eager")(X)


class Standardized(nn.Linear):
    """Multiplies by what it makes of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True))


def test_model_of_computed_weights_alone_says_so() -> None:
    net = nn.Sequential(*(Standardized(16, 16) for _ in range(4)))
    with pytest.raises(sdm.ConfigError, match="4 of 4 are computed in the forward; only para"):
        sdm.compile(net, "2:4", backend="eager")(X)


class Scaled(nn.Module):
    """Multiplies three times by what it makes of two parameters, and by what it makes of x."""

    def __init__(self, broken: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))
        self.one, self.two = (nn.Parameter(torch.randn(8, 16)) for _ in range(2))
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x))
        if self.broken and len({x.sum().tolist() for _ in range(2)}) > 1:
            x = x + 1
        for _ in range(3):
            x = nn.functional.linear(x, torch.cat([self.two, self.one]) / 4)
        attended = nn.functional.linear(x, x @ self.c.weight)
        return self.c(nn.functional.pad(attended, (0, 14)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("broken", [False, True])
def test_explain_names_what_a_weight_is_computed_from(broken: bool) -> None:
    student = sdm.compile(Scaled(broken), "2:4", backend="eager")
    student(X)
    assert (sdm.explain(student).broken is not None) == broken
    rows = {row.weight: row.refusal for row in sdm.explain(student).rows}
    assert rows["from one, two"] == "its weight is computed in the forward, not a parameter"
    assert sum("computed" in str(refusal) for refusal in rows.values()) == 2
