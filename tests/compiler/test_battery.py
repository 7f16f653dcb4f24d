"""Law 1: a model from ``compile`` runs its masks, whatever is done to it, or raises.

Every situation against the hand-masked oracle, to the bit: the inner compiler is "eager", so that
the same kernels run on the same values. One family meets every situation in every mode. Each of the
others meets every mode, and in one mode each situation that its own forward decides: calls,
gradients, shapes and flags, precision, checkpointing. Situations that concern any module (copies,
hooks, updates, an outer compile) meet a model of diffusers too, by preference one with a trait of
its own that the situation touches.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.graph.recorded_run import record_run
from sparsedm_compiler.passes import find_recorded_sites, mark_prunable
from tests.oracle import (
    OPTIONS,
    ROUNDING,
    assert_gradients,
    assert_same,
    gradients,
    hand_masked,
    masked_patterns,
    oracle_of,
)
from tests.zoo import FAMILIES, Call, Family, sample_of

MODES = ("train", "infer", "sparse")
IN_FULL = "uvit"
"""The family that meets every situation in every mode."""

families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def choose(*names: str) -> list[Family]:
    return [family for family in FAMILIES if family.name in names]


def situation(number: int, *others: str) -> pytest.MarkDecorator:
    """Parametrizes a test by (family, mode): all modes for ``IN_FULL``, one each for the others.

    Args:
        number: Turns the modes of the others, so that over the situations of all families each
            family meets each mode.
        others: The other families that meet the situation, for a trait of theirs. With none
            named, all do: their own forward decides.
    """
    turned = {
        family.name: MODES[(i + number) % 3]
        for i, family in enumerate(family for family in FAMILIES if family.name != IN_FULL)
        if not others or family.name in others
    }
    rows = [
        pytest.param(family, mode, id=f"{family.name}-{mode}")
        for family in FAMILIES
        for mode in MODES
        if family.name == IN_FULL or turned.get(family.name) == mode
    ]
    return pytest.mark.parametrize(("family", "mode"), rows)


def compiled(family: Family, mode: str = "train", pattern: str = "2:4") -> nn.Module:
    return sdm.compile(family.build(), pattern, backend="eager", **OPTIONS[mode])


@torch.no_grad()
def run(model: nn.Module | Callable[..., Any], call: Call) -> Tensor:
    return sample_of(model(*call[0], **call[1]))


def check(
    model: nn.Module,
    call: Call,
    runs: Any = None,
    *,
    mode: str = "train",
    half: bool = False,
    dense: nn.Module | None = None,
) -> None:
    """The model (called through ``runs``) gives its oracle's output, and not the dense one.

    ``dense``: the dense model; None for one of the model's own parameters.
    """
    out = run(model if runs is None else runs, call)
    tolerance = 2**-5 if half and mode == "sparse" else ROUNDING[mode]
    assert_same(out, run(oracle_of(model), call), tolerance=tolerance)
    kernels = {choice.kernel for choice in sdm.explain(model).choices}
    assert ("cpu_free" in kernels) == (mode == "sparse")
    assert not torch.equal(out, run(dense or hand_masked(model, {}), call))


@torch.no_grad()
def assert_decided_as_in_pieces(student: nn.Module, dense: nn.Module, call: Call) -> None:
    """One graph decides on every weight as the eager run would that decides for several graphs."""
    sites = find_recorded_sites(record_run(dense, *call[0], **call[1]))
    rows = mark_prunable(sites, student._sparsedm.config)
    assert student._sparsedm.decisions == {row.weight: row for row in rows}
    refusals = {row.refusal for row in rows}
    assert {"first op of the graph", "last op of the graph"} <= refusals


@situation(0)
def test_plain_call_matches_oracle_and_leaves_class_and_state_alone(
    family: Family, mode: str
) -> None:
    dense, call = family.build(), family.inputs(family.build())
    before = copy.deepcopy(dense.state_dict())
    student = sdm.compile(dense, "2:4", backend="eager", **OPTIONS[mode])
    check(student, call, mode=mode)
    assert_decided_as_in_pieces(student, dense, call)
    assert type(student) is type(dense)
    assert list(student.state_dict()) == list(before)
    latent = before if mode == "train" else oracle_of(student).state_dict()
    for name, tensor in student.state_dict().items():
        assert_same(tensor, latent[name])
        assert_same(dense.state_dict()[name], before[name])
    assert_same(run(dense, call), run(family.build(), call))


@families
def test_gradients_of_every_parameter_in_training_match_oracle(family: Family) -> None:
    student, call = compiled(family), family.inputs(family.build(), 2)
    run(student, call)
    assert_gradients(student, oracle_of(student), call, family.unread)


@situation(2)
def test_calls_with_other_shapes_timesteps_and_flags_match_oracle(
    family: Family, mode: str
) -> None:
    """A size changes with the batch, and a flag with the kind of timestep: a capture fewer each."""
    student = compiled(family, mode)
    call = family.inputs(student, 1)
    check(student, call, mode=mode)
    check(student, family.inputs(student, 3, size=family.second_size), mode=mode)
    check(student, family.at(call, torch.tensor([7], dtype=torch.long)), mode=mode)
    if family.return_dict:
        call = call[0], {**call[1], "return_dict": False}
    if family.int_timestep:
        for timestep in (3, 5) if family.name == IN_FULL else (3,):
            check(student, family.at(call, timestep), mode=mode)
    elif family.return_dict:
        check(student, call, mode=mode)


@situation(0, "dit")  # draws random numbers in train()
def test_calls_when_train_and_eval_toggle_match_oracle(family: Family, mode: str) -> None:
    student = compiled(family, mode)
    call = family.inputs(student, 2)
    for training in (True, False, True):
        student.train(training)
        run(student, call)
        oracle = oracle_of(student)
        torch.manual_seed(3)
        ours = run(student, call)
        torch.manual_seed(3)
        assert_same(ours, run(oracle, call), tolerance=ROUNDING[mode])


@situation(1)
def test_calls_under_autocast_and_in_bfloat16_match_oracle(family: Family, mode: str) -> None:
    student = compiled(family, mode)
    call = family.inputs(student)
    # DiT uses two weights twice. Autocast casts a parameter once and so adds its two gradients in
    # bfloat16; a masked weight is no parameter, its gradients are added in float32.
    tolerance = 2**-7 if family.name == "dit" else 0.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(student, call, mode=mode, half=True)
        if mode == "train":
            assert_gradients(student, oracle_of(student), call, family.unread, tolerance=tolerance)
    student.to(torch.bfloat16)
    cast = lambda x: x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
    half = torch.utils._pytree.tree_map(cast, call)
    out = run(student, half)
    assert out.dtype == torch.bfloat16
    # In mode "infer" the pruned weights have become zero before the cast.
    check(student, half, mode=mode, half=True, dense=family.build().to(torch.bfloat16))
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}


@situation(0, "dit")
def test_copies_with_changed_weights_mask_their_own(family: Family, mode: str) -> None:
    """deepcopy, AveragedModel and torch.save: the copy masks its own weights, called or not."""
    student = compiled(family, mode)
    call = family.inputs(student)
    early = copy.deepcopy(student)
    run(student, call)
    file = io.BytesIO()
    torch.save(student, file)
    file.seek(0)
    averaged = torch.optim.swa_utils.AveragedModel(student)
    copies = [early, copy.deepcopy(student), averaged.module, torch.load(file, weights_only=False)]
    for twin in copies:
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(1.5).roll(1)
        check(twin, call, mode=mode)
        assert masked_patterns(twin) == masked_patterns(student)
    check(student, call, mode=mode)
    assert_same(run(averaged, call), run(averaged.module, call))


@situation(1, "dit")
def test_calls_inside_an_outer_torch_compile_match_oracle(family: Family, mode: str) -> None:
    student = compiled(family, mode)
    call = family.inputs(student)
    run(student, call)
    check(student, call, torch.compile(student, backend="eager"), mode=mode)
    check(
        student, call, torch.compile(lambda *a, **k: student(*a, **k), backend="eager"), mode=mode
    )
    student.compile(backend="eager")
    check(student, call, mode=mode)


@situation(2, "unet")  # its first masked weight is of a convolution
def test_weights_when_updated_are_masked_by_the_next_call(family: Family, mode: str) -> None:
    student = compiled(family, mode)
    call = family.inputs(student)
    check(student, call, mode=mode)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    check(student, call, mode=mode)
    student.load_state_dict(family.build(seed=1).state_dict())
    check(student, call, mode=mode)
    name = next(iter(masked_patterns(student)))
    layer = student.get_submodule(name.rpartition(".")[0])
    layer.weight = nn.Parameter(torch.randn_like(layer.weight), requires_grad=mode == "train")
    check(student, call, mode=mode)


@situation(0, "dit")
def test_hooks_when_added_after_compile_run(family: Family, mode: str) -> None:
    student = compiled(family, mode)
    call = family.inputs(student)
    before = run(student, call)
    oracle = oracle_of(student)
    name = next(iter(masked_patterns(student))).rpartition(".")[0]
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, args, out: out * 2)
        for model in (student, oracle)
    ]
    after = run(student, call)
    assert_same(after, run(oracle, call), tolerance=ROUNDING[mode])
    assert not torch.equal(after, before)
    for handle in handles:
        handle.remove()
    assert_same(run(student, call), before)


@situation(1, "dit")
def test_lora_adapters_when_added_after_compile_stay_dense(family: Family, mode: str) -> None:
    import peft

    student = compiled(family, mode)
    call = family.inputs(student)
    run(student, call)
    oracle, patterns = oracle_of(student), masked_patterns(student)
    linear = [name for name in patterns if student.get_parameter(name).dim() == 2]
    config = peft.LoraConfig(
        r=4, target_modules=[linear[-1].removesuffix(".weight")], init_lora_weights=False
    )
    torch.manual_seed(0)
    peft.inject_adapter_in_model(config, student)
    torch.manual_seed(0)
    peft.inject_adapter_in_model(config, oracle)
    out = run(student, call)
    assert_same(out, run(oracle, call), tolerance=ROUNDING[mode])
    wrapped = {name.replace(".base_layer.", ".") for name in masked_patterns(student)}
    assert wrapped == set(patterns)
    adapters = [row for row in sdm.explain(student).rows if "lora" in row.weight]
    assert adapters
    assert all("added to the model after compile()" in str(row.refusal) for row in adapters)


@families
def test_gradients_under_gradient_checkpointing_match_oracle(family: Family) -> None:
    if not family.checkpointing:
        pytest.skip("the family has no gradient checkpointing")
    student = compiled(family)
    call = family.inputs(student)
    run(student, call)
    student.enable_gradient_checkpointing()
    student.train()
    oracle = oracle_of(student)
    assert_gradients(student, oracle, call, family.unread)
    if family.name != IN_FULL:  # gradients without it are those of another test
        return
    student.disable_gradient_checkpointing()
    plain, again = gradients(student, call), gradients(oracle, call)
    for name, gradient in plain.items():
        assert_same(gradient, again[name])


@situation(2, "wan")  # keeps modules in float32
def test_student_when_saved_and_loaded_gives_the_same_output(
    family: Family, mode: str, tmp_path: Any
) -> None:
    student = compiled(family, mode)
    call = family.inputs(student)
    check(student, call, mode=mode)
    sdm.save(student, tmp_path / "student.safetensors")
    loaded = sdm.load(tmp_path / "student.safetensors", family.build(seed=5), backend="eager")
    assert_same(run(loaded, call), run(student, call))
    assert masked_patterns(loaded) == masked_patterns(student)
    assert sdm.explain(loaded).rows == sdm.explain(student).rows
    if family.name != "uvit":
        student.save_pretrained(tmp_path / "diffusers")
        plain = type(student).from_pretrained(tmp_path / "diffusers").eval()
        for name, tensor in plain.state_dict().items():
            assert_same(tensor, student.state_dict()[name])
        again = sdm.compile(plain, "2:4", backend="eager", **OPTIONS[mode])
        # Weights mapped from a file lie otherwise in memory, and matrix products round otherwise.
        assert_same(run(again, call), run(student, call), tolerance=1e-5)


@pytest.mark.parametrize(
    "family", choose("uvit", "unet", "sd3"), ids=lambda family: family.name
)  # sd3 has parameters without a gradient
def test_gradients_under_ddp_with_many_buckets_match_oracle(family: Family, tmp_path: Any) -> None:
    student = compiled(family)
    call = family.inputs(student)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(
            student, bucket_cap_mb=0.001, find_unused_parameters=bool(family.unread)
        )
        run(wrapped, call)
        ours = gradients(wrapped, call)
        theirs = gradients(oracle_of(student), call)
    finally:
        torch.distributed.destroy_process_group()
    assert len(ours) >= len(list(student.parameters())) - len(family.unread)
    for name, gradient in theirs.items():
        assert_same(ours[f"module.{name}"], gradient)


@situation(0, "dit")
def test_calls_under_force_eager_raise_and_then_recover(family: Family, mode: str) -> None:
    student = compiled(family, mode)
    call = family.inputs(student)
    with torch.compiler.set_stance("force_eager"), pytest.raises(sdm.DenseRunError):
        run(student, call)
    check(student, call, mode=mode)
    with torch.compiler.set_stance("force_eager"), pytest.raises(sdm.DenseRunError):
        run(student, call)
    check(student, call, mode=mode)


def test_rotation_over_all_situations_meets_every_mode() -> None:
    met = [
        (name, *row.id.rsplit("-", 1))
        for name, test in globals().items()
        for mark in getattr(test, "pytestmark", [])
        if mark.args[0] == ("family", "mode")
        for row in mark.args[1]
    ]
    assert {(family, mode) for _, family, mode in met} == {
        (family.name, mode) for family in FAMILIES for mode in MODES
    }
    for name in {name for name, _, _ in met}:
        ours = {(family, mode) for test, family, mode in met if test == name}
        assert {mode for family, mode in ours if family == IN_FULL} == {*MODES}
        assert {family for family, _ in ours} > {IN_FULL}
