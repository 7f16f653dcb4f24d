"""Each guard against a silent dense run, beyond the battery's situations."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from tests.compiler.nets import Chain, X, assert_chain
from tests.oracle import OPTIONS, assert_same, hand_masked, oracle_of


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.c(torch.relu(self.b(self.a(x)))) * scale


def student_of(net: nn.Module | None = None, **options: Any) -> nn.Module:
    return sdm.compile(net or Net(), "2:4", **{"backend": "eager", **options})


def test_instances_of_one_class_with_many_shapes_all_run_masked() -> None:
    """Past Dynamo's own limit of 8 graphs per code object, all of them still run masked."""
    for number in range(9):
        torch.manual_seed(number)
        student = student_of()
        x = torch.randn(number + 1, 8)
        assert_same(student(x), oracle_of(student)(x))
    ranks = [(*[2] * rank, 8) for rank in range(1, 10)]  # a graph each: more than Dynamo's 8
    for shape in [*ranks, *[(rows, 8) for rows in range(1, 11)]]:
        x = torch.randn(shape)
        assert_same(student(x), oracle_of(student)(x))


def test_calls_with_many_python_scalars_stay_masked() -> None:
    student, x = student_of(), torch.randn(2, 8)
    for step in range(12):
        assert_same(student(x, scale=float(step)), hand_masked_out(student, x, float(step)))


def test_decisions_of_the_first_capture_when_captured_again_hold() -> None:
    """In a later graph another layer is the last one; what is pruned stays the same."""

    class Deeper(Net):
        def forward(self, x: Tensor, *, deeper: bool = False) -> Tensor:
            x = self.c(torch.relu(self.b(self.a(x))))
            return self.b(x) if deeper else x

    student, x = student_of(Deeper()), torch.randn(2, 8)
    assert sdm.explain(student, x).masked == ("b.weight",)
    assert_same(student(x, deeper=True), oracle_of(student)(x, deeper=True))
    assert sdm.explain(student).masked == ("b.weight",)


def hand_masked_out(student: nn.Module, x: Tensor, scale: float) -> Tensor:
    out = oracle_of(student)(x, scale=scale)
    assert isinstance(out, Tensor)
    return out


def test_calls_at_the_recompile_limit_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsedm_compiler.graph import dynamo_settings

    for key in ("recompile_limit", "accumulated_recompile_limit"):
        monkeypatch.setitem(dynamo_settings.SETTINGS, key, 2)
    student = student_of()
    for dims in (1, 2):
        student(torch.randn(*[1] * dims, 8))
    with pytest.raises(sdm.DenseRunError, match="more shapes and settings than it may"):
        student(torch.randn(1, 1, 1, 8))


def test_recompile_limit_of_one_instance_when_reached_leaves_others_running(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sparsedm_compiler.graph import dynamo_settings

    for key in ("recompile_limit", "accumulated_recompile_limit"):
        monkeypatch.setitem(dynamo_settings.SETTINGS, key, 2)
    for _ in range(5):
        student, x = student_of(), torch.randn(1, 8)
        assert_same(student(x), oracle_of(student)(x))


def test_call_with_dynamo_disabled_by_the_environment_raises() -> None:
    code = (
        "import torch, sparsedm_compiler as sdm\n"
        "net = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])\n"
        "try:\n"
        "    sdm.compile(net, '2:4', backend='eager')(torch.randn(1, 8))\n"
        "except sdm.DenseRunError as error:\n"
        "    print('raised:', error)\n"
    )
    environment = {"TORCHDYNAMO_DISABLE": "1", "PATH": "/usr/bin:/bin"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("raised: Sequential ran without its masks")


def test_failed_compile_with_suppress_errors_still_raises() -> None:
    def failing(gm: Any, inputs: Any) -> Any:
        raise RuntimeError("no such kernel")

    student = student_of(backend=failing)
    with torch._dynamo.config.patch(suppress_errors=True), pytest.raises(Exception, match="kernel"):
        student(torch.randn(1, 8))


def test_calls_under_dispatch_modes_run_masked_or_raise() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    student, x = student_of(), torch.randn(1, 8)
    expected = student(x)
    try:
        with FlopCounterMode(display=False):
            out = student(x)
    except sdm.DenseRunError:
        return
    assert_same(out, expected)


def test_outer_fullgraph_compile_of_the_student_runs_masked() -> None:
    x = torch.randn(1, 8)
    for _ in range(12):  # more than Dynamo's limit of graphs per code object
        student = student_of()
        outer = torch.compile(student, backend="eager", fullgraph=True)
        assert_same(outer(x), oracle_of(student)(x))


def test_outer_fullgraph_compile_of_a_caller_raises_with_advice() -> None:
    student = student_of()
    outer = torch.compile(lambda x: student(x) + 1, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="leave out fullgraph=True"):
        outer(torch.randn(1, 8))


def test_student_when_called_from_threads_runs_masked() -> None:
    student, x = student_of(), torch.randn(2, 8)
    student(x)
    expected, outs = oracle_of(student)(x), []
    threads = [threading.Thread(target=lambda: outs.append(student(x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outs) == 4
    for out in outs:
        assert_same(out, expected)


def test_gradient_through_folded_weights_when_requested_raises() -> None:
    folded = student_of(**OPTIONS["infer"])
    x = torch.randn(2, 8)
    assert not folded(x).requires_grad
    folded.requires_grad_(True)
    with pytest.raises(sdm.DenseRunError, match="asks for a gradient"):
        folded(x)
    with torch.no_grad():
        assert_same(folded(x), oracle_of(folded)(x))


def test_functional_call_with_other_weights_masks_those() -> None:
    student, x = student_of(), torch.randn(2, 8)
    student(x)
    torch.manual_seed(1)
    other = Net()
    swapped = torch.func.functional_call(student, dict(other.named_parameters()), (x,))
    patterns = {name: p for name, (_, p) in sdm.masked_parameters(student).items()}
    assert_same(swapped, hand_masked(other, patterns)(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_weights_with_nan_or_infinity_are_named_in_the_error(value: float, mode: str) -> None:
    net = Net()
    with torch.no_grad():
        net.b.weight[3, 5] = value
    with pytest.raises(sdm.MaskError, match=r"'b\.weight' holds NaN or Inf"):
        student_of(net, **OPTIONS[mode])(torch.randn(1, 8))


def test_student_when_compiled_again_has_the_new_pattern() -> None:
    student, x = student_of(), torch.randn(2, 8)
    student(x)
    with pytest.warns(UserWarning, match="pattern 2:4 became 1:4"):
        sparser = sdm.compile(student, "1:4", backend="eager", **OPTIONS["infer"])
    out = sparser(x)
    assert {str(p) for _, p in sdm.masked_parameters(sparser).values()} == {"1:4"}
    assert_same(out, oracle_of(sparser)(x))
    assert {str(p) for _, p in sdm.masked_parameters(student).values()} == {"2:4"}
    assert_same(student(x), oracle_of(student)(x))


def test_compile_with_inplace_changes_the_model_itself() -> None:
    net = Net()
    assert sdm.compile(net, "2:4", inplace=True, backend="eager") is net
    net(torch.randn(1, 8))
    assert sdm.explain(net).masked == ("b.weight",)


def test_forward_set_on_the_instance_when_compiled_is_kept() -> None:
    net = Net()
    own = net.forward
    net.forward = lambda x: own(x) + 1  # type: ignore[method-assign]
    x = torch.randn(2, 8)
    student = sdm.compile(net, "2:4", inplace=True, backend="eager")
    out = student(x)
    assert_same(out, oracle_of(student)(x) + 1)


def test_signature_of_a_compiled_model_is_its_forwards() -> None:
    assert inspect.signature(student_of().forward) == inspect.signature(Net().forward)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"pattern": "4:2"}, r"pattern '4:2' is not 'n:m' with 0 < n <= m"),
        ({"pattern": "half"}, r"pattern 'half' is not 'n:m'"),
        ({"mode": "fast"}, r"mode 'fast' is neither 'train' nor 'infer'"),
        ({"policy": "none"}, r"policy 'none' is neither 'structural' nor 'uvit' nor 'all'"),
        ({"backend": "inducter"}, r"backend 'inducter' is no torch.compile backend"),
        ({"backend": "sparsedm"}, r"backend 'sparsedm' is no torch.compile backend"),
        ({"keep_dense": [3]}, r"keep_dense \(3,\) is not made of names"),
    ],
)
def test_compile_with_bad_options_raises(options: dict[str, Any], error: str) -> None:
    with pytest.raises(sdm.SparseDMError, match=error):
        sdm.compile(Net(), **{"pattern": "2:4", **options})


def test_compile_of_unsupported_models_raises() -> None:
    with pytest.raises(sdm.ConfigError, match="Module, not a function"):
        sdm.compile(lambda x: x, "2:4")  # type: ignore[type-var]
    with pytest.raises(sdm.ConfigError, match="OptimizedModule wraps the model"):
        sdm.compile(torch.compile(Net()), "2:4")
    with pytest.raises(sdm.ConfigError, match="was not compiled"):
        sdm.explain(Net())


def test_explain_before_and_after_the_first_call_says_what_is_masked() -> None:
    student = student_of()
    assert "not captured yet" in str(sdm.explain(student))
    shown = str(sdm.explain(student, torch.randn(1, 8)))
    assert "dense: first op of the graph" in shown
    assert "1 of 3 weights masked, mode 'train', compiled by 'eager'" in shown


def test_default_backend_without_a_cpp_compiler_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsedm_compiler.compiler import inner_backend

    for compiler, expected in (("c++", "inductor"), (None, "eager")):
        monkeypatch.setattr(inner_backend, "find_compiler", lambda compiler=compiler: compiler)
        assert inner_backend.resolve_backend("auto") == expected


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_student_with_inductor_agrees_with_the_oracle(mode: str) -> None:
    student = student_of(backend="inductor", **OPTIONS[mode])
    x = torch.randn(4, 8)
    out = student(x)
    oracle = oracle_of(student)
    assert_same(out, oracle(x), tolerance=1e-6)  # sums of 8 products in another order
    if mode == "train":
        out.square().sum().backward()
        oracle(x).square().sum().backward()
        for (name, ours), theirs in zip(
            student.named_parameters(), oracle.parameters(), strict=True
        ):
            assert ours.grad is not None, name
            assert_same(ours.grad, theirs.grad, tolerance=1e-5)


class Normed(Chain):
    """A Chain with a layer that holds no pruned weight, and one without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(16), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.act(self.norm(self.b(self.a(x))))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["b", "norm", "act"])
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_hook_when_it_comes_or_goes_between_calls_is_run_or_not(mode: str, name: str) -> None:
    student = sdm.compile(Normed(), "2:4", backend="eager", **OPTIONS[mode])
    layer = student.get_submodule(name)
    runs: list[str] = []

    def count(kind: str, into: int = 1) -> None:
        runs.clear()
        with torch.no_grad():
            student(X)
        assert runs == [kind] * into

    count("none", 0)
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
        for _ in range(2):
            handle = register(lambda *_: runs.append("hook"))
            count("hook")
            handle.remove()
            count("none", 0)


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_layer_when_replaced_by_one_that_has_a_hook_runs_the_hook(mode: str) -> None:
    other = nn.LayerNorm(16).requires_grad_(mode == "train")  # as those of the student
    other.register_forward_hook(lambda module, args, out: out * 2)
    student = sdm.compile(Normed(), "2:4", backend="eager", **OPTIONS[mode])
    with torch.no_grad():
        for _ in range(3):
            student(X)
        student.norm = other
        assert_same(student(X), oracle_of(student)(X))


class Alternating(Chain):
    """Multiplies by powers of a negative number, as wavelets do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (-1) ** torch.arange(x.shape[-1])


def test_powers_of_a_negative_number_have_both_signs() -> None:
    assert_chain(sdm.compile(Alternating(), "2:4", backend="eager"))
