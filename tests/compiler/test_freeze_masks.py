"""Frozen masks: they stay, pruned weights are zero, and gradients reach kept weights alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import sparsedm_compiler as sdm
from sparsedm_compiler import ConfigError, MaskError
from sparsedm_compiler.graph.capture import KEY
from tests.compiler.nets import Chain, X, compiled_chain
from tests.group import run_group
from tests.oracle import assert_same, brute_mask, gradients

PRUNED = ("b.weight", "c.weight")


class Tied(Chain):
    """A weight under two names, one of them in a checkpointed part."""

    def __init__(self) -> None:
        super().__init__()
        self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.c, self.b(self.a(x)), use_reentrant=False)
        return self.d(x)


class Broken(Chain):
    """A model that no single graph holds."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x))
        if x.sum().item() > 1e9:
            x = -x
        return self.d(self.multiply(x))

    @torch._dynamo.disable
    def multiply(self, x: Tensor) -> Tensor:
        return self.c(x)


def frozen_chain(
    model: nn.Module | None = None, **options: Any
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Returns a model with frozen masks, and the masks."""
    torch.manual_seed(0)
    student = sdm.compile(model or Chain(), "2:4", **{"backend": "eager", **options})
    student(X)
    masks = {
        name: brute_mask(weight, pattern)
        for name, (weight, pattern) in sdm.masked_parameters(student).items()
    }
    assert sdm.freeze_masks(student) == (*masks,)
    return student, masks


def masked_copy(student: nn.Module, masks: dict[str, Tensor], like: nn.Module) -> nn.Module:
    """Returns a plain model with the student's weights, multiplied by masks."""
    like.load_state_dict(student.state_dict())
    with torch.no_grad():
        for name, mask in masks.items():
            like.get_parameter(name).mul_(mask)
    return like


def stir(student: nn.Module) -> None:
    """Gives every weight values of which other masks would follow."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in student.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_freeze_masks_keeps_the_output_and_masks_gradients(backend: str) -> None:
    student, masks = frozen_chain(backend=backend)
    assert {*masks} == {*PRUNED}
    plain = masked_copy(student, masks, Chain())
    assert_same(student(X), plain(X), tolerance=1e-6)
    ours, theirs = gradients(student, ((X,), {})), gradients(plain, ((X,), {}))
    for name, gradient in ours.items():
        mask = masks.get(name, torch.ones_like(gradient).bool())
        assert_same(gradient, theirs[name] * mask, tolerance=1e-5)
        assert not student.get_parameter(name)[~mask].any()
        assert student.get_parameter(name)[mask].all()


@pytest.mark.parametrize("model", [Tied, Broken])
def test_frozen_masks_hold_in_tied_checkpointed_and_uncaptured_layers(model: type[Chain]) -> None:
    student, masks = frozen_chain(model())
    stir(student)
    plain = masked_copy(student, masks, model())
    assert_same(student(X), plain(X))
    ours, theirs = gradients(student, ((X,), {})), gradients(plain, ((X,), {}))
    for name, mask in masks.items():
        assert_same(ours[name], theirs[name] * mask)
    assert sdm.explain(student).eager == (() if model is Tied else ("c.weight",))


def test_frozen_masks_do_not_follow_the_weights() -> None:
    student, masks = frozen_chain()
    stir(student)
    plain = masked_copy(student, masks, Chain())
    assert_same(student(X), plain(X))
    sdm.unfreeze_masks(student)
    assert sdm.explain(student).frozen == ()
    assert (student(X) - plain(X)).abs().max() > 0.1


def test_freeze_masks_a_second_time_keeps_masks_and_graphs() -> None:
    student, masks = frozen_chain()
    student(X)
    ours = student.__dict__[KEY]
    entry = ours.entry
    stir(student)
    assert sdm.freeze_masks(student) == PRUNED
    assert student.__dict__[KEY] is ours
    assert ours.entry is entry
    for name, mask in masks.items():
        assert_same(student.get_parameter(name).detach().ne(0), mask)


def test_freeze_masks_compiles_once_more() -> None:
    compiled = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compiled.append(len(inputs))
        return gm.forward

    student = sdm.compile(Chain(), "2:4", backend=backend)
    for _ in range(2):
        student(X).sum().backward()
    sdm.freeze_masks(student)
    for _ in range(3):
        student(X).sum().backward()
    assert compiled == [9, 11]


def test_frozen_masks_with_dynamic_sizes_under_inductors_front_end() -> None:
    student, masks = frozen_chain(backend="aot_eager")
    plain = masked_copy(student, masks, Chain())
    for count in (2, 3, 5, 7):
        x = torch.randn(count, 16)
        assert_same(student(x), plain(x), tolerance=1e-6)


class Wrapper:
    """An optimizer around another, with a state of its own (ZeroRedundancyOptimizer)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.optim, self.state = torch.optim.AdamW(*args, **kwargs), dict[Any, Any]()
        self.zero_grad, self.step = self.optim.zero_grad, self.optim.step


@pytest.mark.parametrize("kind", [torch.optim.AdamW, Wrapper])
@pytest.mark.parametrize("given", [True, False])
def test_freeze_masks_with_momentum_keeps_pruned_weights_zero_where_the_optimizer_is_given(
    given: bool, kind: Any
) -> None:
    student = compiled_chain()
    optimizer = kind(student.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        student(X).square().sum().backward()
        optimizer.step()

    step()
    student(X).sum().backward()
    sdm.freeze_masks(student, optimizer=optimizer if given else None)
    masks = {name: student.get_parameter(name).detach().ne(0) for name in PRUNED}
    assert not any(student.get_parameter(name).grad[~mask].any() for name, mask in masks.items())
    for _ in range(3):
        step()
    drift = sum(int(student.get_parameter(n)[~mask].count_nonzero()) for n, mask in masks.items())
    assert (drift == 0) == given
    assert_same(student(X), masked_copy(student, masks, Chain())(X))


def test_copies_of_a_frozen_student_are_frozen_and_share_the_masks() -> None:
    student, masks = frozen_chain()
    twin = copy.deepcopy(student)
    stir(twin)
    assert sdm.explain(twin).frozen == PRUNED
    assert_same(twin(X), masked_copy(twin, masks, Chain())(X))
    pairs = [model.__dict__[KEY].frozen.get("b.weight", X.device) for model in (student, twin)]
    assert pairs[0] is pairs[1]


@pytest.mark.parametrize("called", ["never", "once", "frozen"])
def test_freeze_masks_like_a_student_gives_an_earlier_copy_the_same_masks(called: str) -> None:
    student = compiled_chain()
    if called != "never":
        student(X)
    ema = torch.optim.swa_utils.AveragedModel(student)
    if called == "frozen":
        sdm.freeze_masks(ema)
    stir(student)
    student(X)
    sdm.freeze_masks(student)
    masks = {name: student.get_parameter(name).detach().ne(0) for name in PRUNED}
    assert sdm.freeze_masks(ema, like=student) == tuple(f"module.{name}" for name in PRUNED)
    for name, mask in masks.items():
        assert not ema.module.get_parameter(name)[~mask].any()
    stir(ema)
    assert_same(ema(X), masked_copy(ema.module, masks, Chain())(X))
    ours = ema.module.__dict__[KEY]
    sdm.freeze_masks(ema, like=student)
    assert ema.module.__dict__[KEY] is ours


def test_freeze_masks_like_another_model_raises() -> None:
    student, _ = frozen_chain()
    with pytest.raises(ConfigError, match="not a copy of this Chain whose masks are frozen"):
        sdm.freeze_masks(student, like=compiled_chain())
    with pytest.raises(ConfigError, match="like= is a Tied, not a copy of this Chain"):
        sdm.freeze_masks(student, like=frozen_chain(Tied())[0])


def test_frozen_student_inside_wrappers_is_frozen() -> None:
    student = compiled_chain()
    outer = torch.compile(nn.Sequential(student), backend="eager")
    outer(X)
    names = tuple(f"_orig_mod.0.{name}" for name in PRUNED)
    assert sdm.freeze_masks(outer) == names
    assert sdm.explain(outer).frozen == names
    masks = {name: student.get_parameter(name).detach().ne(0) for name in PRUNED}
    stir(student)
    assert_same(outer(X), masked_copy(student, masks, Chain())(X))


@pytest.mark.parametrize("zeros", [False, True])
def test_frozen_masks_are_saved_and_loaded(zeros: bool, tmp_path: Path) -> None:
    student, masks = frozen_chain()
    stir(student)
    if zeros:  # of kept weights: zeros alone do not tell the mask any more
        with torch.no_grad():
            student.b.weight[:, ::3] = 0
    sdm.save(student, tmp_path / "student")
    tensors = load_file(tmp_path / "student")
    assert {*tensors} - {*Chain().state_dict()} == ({"b.weight.sparsedm_mask"} if zeros else set())
    for name, mask in masks.items():
        assert not tensors[name][~mask].any()
    loaded = sdm.load(tmp_path / "student", Chain(), backend="eager")
    assert sdm.explain(loaded).frozen == PRUNED
    assert_same(loaded(X), student(X))
    stir(loaded)
    assert_same(loaded(X), masked_copy(loaded, masks, Chain())(X))


def test_save_of_frozen_masks_of_tied_weights_writes_them_once(tmp_path: Path) -> None:
    student, masks = frozen_chain(Tied())
    stir(student)
    sdm.save(student, tmp_path / "student")
    assert not load_file(tmp_path / "student")["b.weight"][~masks["b.weight"]].any()
    loaded = sdm.load(tmp_path / "student", Tied(), backend="eager")
    assert loaded.b.weight is loaded.c.weight
    assert_same(loaded(X), student(X))


def test_compile_for_inference_and_apply_masks_write_frozen_masks_into_the_weights() -> None:
    student, masks = frozen_chain()
    stir(student)
    plain = masked_copy(student, masks, Chain())
    with torch.no_grad():
        for kernels in ("dense", "sparse"):
            fast = sdm.compile(student, mode="infer", backend="eager", kernels={"*": kernels})
            assert_same(fast(X), plain(X), tolerance=1e-5)
    again = sdm.compile(student, backend="aot_eager")
    assert sdm.explain(again).frozen == PRUNED
    sdm.apply_masks(student)
    for name, parameter in plain.named_parameters():
        assert_same(student.get_parameter(name), parameter)


def test_repattern_drops_frozen_masks() -> None:
    student, _ = frozen_chain()
    sdm.repattern(student, "1:4")
    student(X)
    assert sdm.explain(student).frozen == ()


def test_explain_says_how_many_masks_are_frozen() -> None:
    student, _ = frozen_chain()
    assert "mode 'train', 2 of the masks frozen, compiled by" in str(sdm.explain(student))
    assert "frozen" not in str(sdm.explain(compiled_chain()))


def test_freeze_masks_of_a_model_without_masks_raises() -> None:
    with pytest.raises(ConfigError, match="was not compiled"):
        sdm.freeze_masks(Chain())
    with pytest.raises(ConfigError, match="has chosen no weights yet: call it once first"):
        sdm.freeze_masks(compiled_chain())
    fast = compiled_chain("infer")
    with torch.no_grad():
        fast(X)
    with pytest.raises(ConfigError, match="is folded for inference, where masks do not change"):
        sdm.freeze_masks(fast)
    student = compiled_chain()
    student(X)
    with torch.no_grad():
        student.c.weight[0, 0] = torch.nan
    with pytest.raises(MaskError, match=r"'c\.weight' holds 1 NaN"):
        sdm.freeze_masks(student)


def freeze_in_a_group(rank: int, folder: Path) -> None:
    """Both processes freeze inside DDP; their gradients are averaged, and masked."""
    student = compiled_chain()
    student(X)
    wrapped = DistributedDataParallel(student)
    wrapped(X).sum().backward()
    assert sdm.freeze_masks(wrapped) == tuple(f"module.{name}" for name in PRUNED)
    student.zero_grad()
    wrapped(X + rank).sum().backward()
    torch.save({name: w.grad for name, w in student.named_parameters()}, folder / f"{rank}.pt")


def test_freeze_masks_in_ddp_gives_averaged_masked_gradients(tmp_path: Path) -> None:
    run_group(freeze_in_a_group, tmp_path)
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    student = compiled_chain()
    student(X)
    sdm.freeze_masks(student)
    (0.5 * (student(X).sum() + student(X + 1).sum())).backward()
    for name, gradient in ours.items():
        assert_same(gradient, theirs[name])
        assert_same(gradient, student.get_parameter(name).grad, tolerance=1e-5)
        assert not gradient[student.get_parameter(name) == 0].any()
