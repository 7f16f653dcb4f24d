"""Public methods other than forward run masked, as forward does."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.compiler.sparse_method import find_methods
from tests.compiler.nets import Chain
from tests.oracle import (
    OPTIONS,
    ROUNDING,
    assert_gradients,
    assert_same,
    hand_masked,
    oracle_of,
)
from tests.zoo import fill_zeros

X = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
Z = torch.linspace(-1, 1, 4 * 8 * 8).reshape(1, 4, 8, 8)


def vae() -> nn.Module:
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    return fill_zeros(model).eval()


@torch.no_grad()
def both(model: nn.Module) -> tuple[Tensor, Tensor]:
    return model.encode(X).latent_dist.mean, model.decode(Z).sample  # type: ignore


@pytest.mark.parametrize("mode", ["train", "infer", "sparse"])
@pytest.mark.parametrize("forward_first", [False, True])
def test_autoencoder_when_encoding_and_decoding_runs_masked(mode: str, forward_first: bool) -> None:
    student = sdm.compile(vae(), "2:4", backend="eager", **OPTIONS[mode])
    if forward_first:
        student(X)
    tolerance = 2e-5 if mode == "sparse" else 0.0
    for _ in range(2):
        outs = both(student)
        for ours, masked, dense in zip(outs, both(oracle_of(student)), both(vae()), strict=True):
            assert_same(ours, masked, tolerance=tolerance)
            assert not torch.equal(ours, dense)
    assert len(sdm.explain(student).masked) > 30
    kernels = {choice.kernel for choice in sdm.explain(student).choices}
    assert ("cpu_free" in kernels) == (mode == "sparse")


def test_autoencoder_when_copied_has_methods_of_its_own() -> None:
    student = sdm.compile(vae(), "2:4", backend="eager")
    both(student)
    twin = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    for ours, theirs in zip(both(twin), both(oracle_of(twin)), strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("inplace", [False, True])
def test_methods_when_the_model_is_compiled_again_follow_its_pattern(inplace: bool) -> None:
    x = torch.linspace(-1, 1, 32).reshape(2, 16)
    student = sdm.compile(Sampler(), "2:4", policy="all", backend="eager")
    for name, args in (("features", ()), ("unroll", (9,))):
        assert_same(getattr(student, name)(x, *args), getattr(oracle_of(student), name)(x, *args))
    with pytest.warns(UserWarning, match="pattern 2:4 became 1:4"):
        again = sdm.compile(student, "1:4", backend="eager", inplace=inplace)
    sdm.repattern(student, "1:4")
    for model in (again, student):
        for name, args in (("features", ()), ("unroll", (9,))):
            out = getattr(model, name)(x, *args)
            assert {str(p) for _, p in sdm.masked_parameters(model).values()} == {"1:4"}
            assert_same(out, getattr(oracle_of(model), name)(x, *args))


def test_latent_pipeline_when_its_autoencoder_is_compiled_decodes_masked() -> None:
    def image(model: nn.Module) -> Tensor:
        unet = diffusers.UNet2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=4,
            layers_per_block=1,
        )
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.fill_(0.01)
        pipeline = diffusers.LDMPipeline(model, unet, diffusers.DDIMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images = pipeline(num_inference_steps=1, generator=generator, output_type="np").images
        return torch.from_numpy(images)

    student = sdm.compile(vae(), "2:4", backend="eager")
    ours = image(student)
    assert_same(ours, image(oracle_of(student)))
    assert not torch.equal(ours, image(hand_masked(student, {})))


class Sampler(Chain):
    """A net with methods of every kind around its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def features(self, x: Tensor) -> Tensor:
        self.seen.append("features")
        return torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))))

    def unroll(self, x: Tensor, steps: int) -> Tensor:
        self.seen.append("unroll")
        for _ in range(steps):
            x = x - 0.1 * self.d(self.c(torch.relu(self.b(self.a(x)))))
        return x

    def sample(self, x: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            x = x - 0.1 * self(x)
        return x + 0 * self.a(x)

    def guide(self, x: Tensor) -> Tensor:
        return self(x) + self.a(x)  # type: ignore[no-any-return]

    def last_layer(self) -> nn.Module:
        self.seen.append("last_layer")
        return self.d

    def rescale(self, factor: float) -> None:
        with torch.no_grad():
            self.b.weight.mul_(factor)


def test_methods_when_they_reach_no_layer_are_left_alone() -> None:
    assert find_methods(Sampler()) == [
        *("features", "guide", "last_layer", "rescale", "sample", "unroll"),
    ]
    student = sdm.compile(Sampler(), "2:4", backend="eager")
    assert student.last_layer() is student.d
    before = student.b.weight.clone()
    student.rescale(2.0)
    assert_same(student.b.weight, 2 * before)
    assert student.seen == ["last_layer"]
    assert inspect.signature(student.unroll) == inspect.signature(Sampler().unroll)


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_methods_when_they_loop_or_call_forward_run_masked(mode: str) -> None:
    x = torch.linspace(-1, 1, 32).reshape(2, 16)
    student = sdm.compile(Sampler(), "2:4", policy="all", backend="eager", **OPTIONS[mode])
    for name, args in (("features", ()), ("unroll", (9,)), ("sample", (9,)), ("guide", ())):
        for _ in range(2):
            out = getattr(student, name)(x, *args)
            assert_same(out, getattr(oracle_of(student), name)(x, *args))
        assert not torch.equal(out, getattr(Sampler(), name)(x, *args))
    assert student.seen.count("unroll") == 2  # the trial of the first call left no trace
    captured = {name: getattr(student, name).captured for name in ("features", "unroll", "guide")}
    assert captured == {"features": True, "unroll": False, "guide": False}
    assert set(sdm.explain(student).eager) == {"a.weight", "b.weight", "c.weight", "d.weight"}


class Stepper(Chain):
    """A sampler whose methods yield what it has so far."""

    closed = 0

    @torch.no_grad()
    def progressive(self, x: Tensor, count: int = 3) -> Any:
        try:
            for _ in range(count):
                shift = yield (x := x + self(x) / 2)
                x = x if shift is None else x + shift
        finally:
            Stepper.closed += 1
        return "all"

    def pieces(self, x: Tensor) -> Any:
        yield (x := self.b(self.a(x)))
        try:
            yield self.c(x)
        except ValueError:
            yield self.d(x)

    def endless(self, x: Tensor) -> Any:
        while True:
            yield self.a.bias + x

    def last_piece(self, x: Tensor) -> Tensor:
        return [*self.pieces(x)][-1]  # type: ignore[no-any-return]

    def by_name(self, x: Tensor) -> Tensor:
        return getattr(self, "ab"[1])(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", ["train", "infer", "sparse"])
@pytest.mark.parametrize("forward_first", [False, True])
def test_method_when_a_generator_runs_masked_step_by_step(mode: str, forward_first: bool) -> None:
    x = torch.linspace(-1, 1, 32).reshape(2, 16)
    dense = Stepper()
    student = sdm.compile(dense, "2:4", backend="eager", **OPTIONS[mode])
    if forward_first:
        student(x)
    ours = [*student.pieces(x), *student.progressive(x)]
    oracle = oracle_of(student)
    for out, masked, unmasked in zip(
        ours,
        [*oracle.pieces(x), *oracle.progressive(x)],
        [*dense.pieces(x), *dense.progressive(x)],
        strict=True,
    ):
        assert_same(out, masked, tolerance=ROUNDING[mode])
        assert not torch.equal(out, unmasked)
    if mode == "train":
        unread = {"net.d.weight", "net.d.bias"}
        assert_gradients(Last(student), Last(oracle), ((x,), {}), unread)


class Last(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.last_piece(x) + sum(self.net.pieces(x))  # type: ignore


def test_generator_of_a_method_is_closed_sent_to_and_thrown_into_as_a_plain_one() -> None:
    x = torch.linspace(-1, 1, 32).reshape(2, 16)
    student = sdm.compile(Stepper(), "2:4", backend="eager")
    student(x)
    oracle = oracle_of(student)
    ours, theirs = student.pieces(x), oracle.pieces(x)
    assert_same(next(ours), next(theirs))
    assert_same(student(x), oracle(x))  # between two steps
    with pytest.raises(sdm.DenseRunError, match=r"'b' would run dense.*: it was called outside"):
        student.b(x)
    assert_same(next(ours), next(theirs))
    assert_same(ours.throw(ValueError()), theirs.throw(ValueError()))
    assert [*ours] == []
    ours, theirs = student.progressive(x, 2), oracle.progressive(x, 2)
    assert_same(next(ours), next(theirs))
    assert_same(ours.send(x), theirs.send(x))
    with pytest.raises(StopIteration, match="all"):
        next(ours)
    ours, before = student.progressive(x), Stepper.closed
    next(ours)
    ours.close()
    assert Stepper.closed == before + 1
    assert_same(next(student.endless(x)), next(oracle.endless(x)))


def test_method_that_reaches_a_layer_by_its_name_is_told_so() -> None:
    student = sdm.compile(Stepper(), "2:4", backend="eager")
    x = torch.linspace(-1, 1, 32).reshape(2, 16)
    student(x)
    with pytest.raises(sdm.DenseRunError, match=r"Stepper.by_name does not name the part that"):
        student.by_name(x)


class Staged(Chain):
    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(self.a(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.features(x)))  # type: ignore[no-any-return]


def test_method_when_forward_calls_it_lies_in_forwards_one_graph() -> None:
    x = torch.linspace(-1, 1, 32).reshape(2, 16)
    student = sdm.compile(Staged(), "2:4", backend="eager")
    assert_same(student(x), oracle_of(student)(x))
    assert sdm.explain(student).broken is None
    assert_same(student.features(x), oracle_of(student).features(x))


def test_method_when_trained_through_has_the_oracles_gradients() -> None:
    class Features(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, *steps: Any) -> Tensor:
            return self.net.features(x) + self.net.unroll(x, 6)  # type: ignore

    student = sdm.compile(Sampler(), "2:4", backend="eager")
    x = torch.linspace(-1, 1, 32).reshape(2, 16)
    Features(student)(x)
    assert_gradients(Features(student), Features(oracle_of(student)), ((x,), {}), tolerance=1e-6)


def test_method_when_compiled_by_the_user_runs_masked() -> None:
    torch._dynamo.reset()
    student = sdm.compile(vae(), "2:4", backend="eager")
    student.decode = torch.compile(student.decode, backend="eager")
    with torch.no_grad():
        out = student.decode(Z).sample
        assert_same(out, oracle_of(student).decode(Z).sample)
