"""A layer that holds a pruned weight raises where it is called outside of the model's calls."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.compiler.read_guard import GuardedHooks, OutsideCallHook
from tests.compiler.nets import (
    UNET,
    Chain,
    X,
    assert_chain,
    compiled_chain,
    compiled_unet,
    run_unet,
)
from tests.oracle import (
    OPTIONS,
    assert_gradients,
    assert_same,
    hand_masked,
    masked_patterns,
    oracle_of,
)


def test_layer_when_called_on_its_own_raises_before_and_after_the_first_call() -> None:
    student = compiled_chain()
    with pytest.raises(sdm.DenseRunError, match=r"'b' would run dense, at .*allow_dense"):
        student.b(X)
    assert_chain(student)
    for pruned in (student.b, student.c):
        with pytest.raises(sdm.DenseRunError, match="outside of the calls of the compiled Chain"):
            pruned(X)
    assert_same(student.a(X), nn.functional.linear(X, student.a.weight, student.a.bias))
    with sdm.allow_dense():
        assert_same(student.b(X), nn.functional.linear(X, student.b.weight, student.b.bias))
        assert_chain(student)
    with pytest.raises(sdm.DenseRunError):
        student.b(X)
    assert_chain(student)


def test_layer_when_the_call_of_the_model_failed_is_guarded_again() -> None:
    student = compiled_chain()
    with pytest.raises(Exception, match=r"shape|dim|size"):
        student(torch.randn(2, 5))
    with pytest.raises(sdm.DenseRunError):
        student.b(X)
    assert_chain(student)


def test_model_when_a_call_failed_is_as_it_was() -> None:
    student = compiled_unet()
    text = torch.randn(1, 6, 16)
    for sample, words in (
        (torch.randn(4, 8, 8), text),  # without a batch
        (torch.randn(1, 5, 8, 8), text),
        (torch.randn(1, 4, 8, 8), torch.randn(1, 6, 17)),
    ):
        with pytest.raises(Exception, match=r".") as raised:
            student(sample, 1, encoder_hidden_states=words)
        assert not isinstance(raised.value, sdm.SparseDMError)
        assert sdm.explain(student).broken is None
        assert not student._sparsedm.decisions
    assert_same(run_unet(student), run_unet(oracle_of(student)))
    assert sdm.explain(student).eager == ()


def test_block_when_called_on_its_own_raises() -> None:
    student = compiled_unet()
    run_unet(student)
    block = student.mid_block
    args = (torch.randn(1, 16, 4, 4), torch.randn(1, 64))
    with pytest.raises(sdm.DenseRunError, match="mid_block"):
        block(*args, encoder_hidden_states=torch.randn(1, 6, 16))


def test_copies_when_whole_guard_themselves_and_when_in_part_are_plain() -> None:
    student = compiled_chain()
    student(X)
    part = copy.deepcopy(student.b)
    assert_same(part(X), nn.functional.linear(X, part.weight, part.bias))
    whole = copy.deepcopy(student)
    with pytest.raises(sdm.DenseRunError):
        whole.b(X)
    assert_chain(whole)
    with torch.no_grad():
        whole.b.weight.mul_(-1)
    assert_chain(whole)
    file = io.BytesIO()
    torch.save(student, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert_chain(loaded)
    with pytest.raises(sdm.DenseRunError):
        loaded.b(X)
    again = sdm.compile(part, "2:4", policy="all", backend="eager")
    assert not any(isinstance(hook, OutsideCallHook) for hook in again._forward_pre_hooks.values())
    assert_same(again(X), oracle_of(again)(X))


def test_analyses_when_of_a_compiled_model_are_those_of_the_plain_one() -> None:
    for called in (False, True):
        student = compiled_chain()
        if called:
            student(X)
        report = sdm.count_macs(student, X, pattern="1:4")
        assert report == sdm.count_macs(Chain(), X, pattern="1:4")
        assert sdm.topology(student, X) == sdm.topology(Chain(), X)
        with pytest.raises(sdm.DenseRunError):
            student.b(X)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tracer_when_it_goes_by_the_class_raises() -> None:
    student = compiled_chain()
    student(X)
    traced = torch.fx.symbolic_trace(student)
    with pytest.raises(sdm.DenseRunError):
        traced(X)
    with pytest.raises(sdm.CaptureError, match=r"torch\.jit\.trace cannot trace Chain"):
        torch.jit.trace(student, X)


class OwnCheckpoint(torch.autograd.Function):
    """Runs a function again in the backward, as the code of latent diffusion and ADM does."""

    @staticmethod
    def forward(ctx: Any, run: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.run, ctx.x, ctx.parameters = run, x, parameters
        with torch.no_grad():
            return run(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_(True)
            out = ctx.run(x)
        return (None, *torch.autograd.grad(out, (x, *ctx.parameters), grad))


class Checkpointed(Chain):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def middle(self, x: Tensor) -> Tensor:
        return x + self.c(torch.tanh(self.b(x)))

    def _inside(self, x: Tensor) -> Tensor:
        return x + self.c(torch.tanh(self.b(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.kind.startswith("own"):
            weights = (*self.b.parameters(), *self.c.parameters())
            run = self.middle if self.kind == "own, of a method" else self._inside
            x = OwnCheckpoint.apply(run, x, *weights)
        else:
            again = torch.utils.checkpoint.checkpoint(
                self.middle, x, use_reentrant=self.kind == "reentrant"
            )
            x = again
        return self.d(x)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["own", "own, of a method", "plain", "reentrant"])
def test_checkpoint_when_it_runs_a_block_again_is_masked_or_raises(kind: str) -> None:
    student = sdm.compile(Checkpointed(kind), "2:4", backend="eager")
    if not kind.startswith("re"):
        with torch.no_grad():
            assert_same(student(X), oracle_of(student)(X))
        assert set(masked_patterns(student)) == {"b.weight", "c.weight"}
    if kind == "own":
        with pytest.raises(sdm.DenseRunError, match=r"in the backward: .*Function OwnCheck"):
            student(X)
    else:
        assert_same(student(X), oracle_of(student)(X))
        assert_gradients(student, oracle_of(student), ((X,), {}))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantized tensor")
def test_quantization_when_after_pruning_raises() -> None:
    student = compiled_unet()
    run_unet(student)
    quantized = torch.ao.quantization.quantize_dynamic(student, {nn.Linear})
    with pytest.raises(sdm.DenseRunError, match="was pruned and has left the model"):
        run_unet(quantized)


@pytest.mark.parametrize("called_before", [False, True])
def test_fused_projections_when_after_compile_raise(called_before: bool) -> None:
    student = compiled_unet()
    if called_before:
        run_unet(student)
    student.fuse_qkv_projections()
    with pytest.raises(sdm.DenseRunError, match=r"to_qkv\.weight'.* runs in its place"):
        run_unet(student)
    student.unfuse_qkv_projections()
    assert_same(run_unet(student), run_unet(oracle_of(student)))
    dense = UNET.build()
    dense.fuse_qkv_projections()
    before = sdm.compile(dense, "2:4", backend="eager")
    run_unet(before)
    assert any("to_qkv" in name for name in sdm.explain(before).masked)


def test_guard_when_the_model_is_called_changes_no_hooks_of_its_layers() -> None:
    """Its time is measured by ``python benchmarks/read_guard.py``, not here."""

    class WatchedHooks(GuardedHooks):
        def __setitem__(self, key: int, hook: Any) -> None:
            raise AssertionError(f"{key} was put in")

        def __delitem__(self, key: int) -> None:
            raise AssertionError(f"{key} was taken out")

        pop = __delitem__  # type: ignore[assignment]

    student = compiled_chain()
    student(X)
    for layer in (student.b, student.c):
        layer._forward_pre_hooks.__class__ = WatchedHooks
        assert layer._forward_pre_hooks
        assert len(layer._forward_pre_hooks) == len(layer._forward_pre_hooks.values()) == 1
    assert not student.a._forward_pre_hooks
    with student._sparsedm.guard:
        assert not student.b._forward_pre_hooks
        assert not student.b._forward_pre_hooks.items()
        assert len(student.b._forward_pre_hooks) == 0
    assert_chain(student)
    with pytest.raises(sdm.DenseRunError):
        student.b(X)


def double(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Doubles the input of a layer: a forward pre-hook."""
    return (args[0] * 2,)


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_hooks_when_registered_before_or_after_compile_run_once_and_can_be_removed(
    mode: str,
) -> None:
    model = Chain()
    before = model.b.register_forward_pre_hook(double)
    student = sdm.compile(model, "2:4", backend="eager", inplace=True, **OPTIONS[mode])
    plain = Chain()

    def check(b: int, c: int) -> None:
        out = student(X)
        plain.load_state_dict(student.state_dict())
        masked = hand_masked(plain, masked_patterns(student))
        middle = masked.c(c * torch.relu(masked.b(b * masked.a(X))))
        assert_same(out, masked.d(middle))
        for layer in (student.b, student.c):
            with pytest.raises(sdm.DenseRunError):
                layer(X)

    with torch.no_grad():
        check(2, 1)
        after = student.c.register_forward_pre_hook(double)
        check(2, 2)
        again = student.b.register_forward_pre_hook(double, prepend=True)
        check(4, 2)
        before.remove()
        check(2, 2)
        after.remove()
        check(2, 1)
        again.remove()
        check(1, 1)


def test_hooks_when_the_model_is_copied_or_saved_go_with_it() -> None:
    student = compiled_chain()
    student.b.register_forward_pre_hook(double)
    student(X)
    file = io.BytesIO()
    torch.save(student, file)
    file.seek(0)
    for other in (copy.deepcopy(student), torch.load(file, weights_only=False)):
        assert_same(other(X), student(X))
        assert [*other.b._forward_pre_hooks.values()].count(double) == 1
        with pytest.raises(sdm.DenseRunError):
            other.b(X)
    part = copy.deepcopy(student.b)
    assert [*part._forward_pre_hooks.values()] == [double]
    assert_same(part(X), nn.functional.linear(X * 2, part.weight, part.bias))


@pytest.mark.parametrize("called_before", [False, True])
def test_layer_when_an_outer_compilation_takes_it_alone_raises(called_before: bool) -> None:
    student = compiled_chain()
    if called_before:
        student(X)
    alone = torch.compile(student.b, backend="eager")
    inside = torch.compile(lambda x: student.b(x) + 1, backend="eager")
    for run in (alone, inside):
        with pytest.raises(sdm.DenseRunError, match="'b' would run dense"):
            run(X)
        with sdm.allow_dense():
            run(X)
        with pytest.raises(sdm.DenseRunError, match="'b' would run dense"):
            run(X)
    whole = torch.compile(lambda x: student.b(x) + 1, backend="eager", fullgraph=True)
    with pytest.raises(
        Exception, match="a layer of a sparsedm model was called outside of its calls"
    ):
        whole(X)
    assert_chain(student)
