"""Held masks and soft thresholds: what a call computes, its gradients, copies, files, freezing."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler import ConfigError, MaskError, Pattern, PatternError
from sparsedm_compiler.compiler.held_masks import HeldMasks
from sparsedm_compiler.masks.held_mask import compute_scale, project_softly
from tests.compiler.nets import Chain, X, compiled_chain
from tests.oracle import brute_mask

NAMES = ("b.weight", "c.weight")


class Broken(Chain):
    """A chain that no single graph holds."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.b(self.a(x)))
        torch._dynamo.graph_break()
        out: Tensor = self.d(self.c(h))
        return out


def make_student(kind: type[Chain] = Chain, **options: str) -> nn.Module:
    torch.manual_seed(0)
    student = sdm.compile(kind(), "2:4", **{"backend": "eager", **options})
    with torch.no_grad():
        student(X)
    return student


def run_plain(student: nn.Module, weights: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and the gradients of its squares, of the plain model with these weights."""
    plain = Chain()
    plain.load_state_dict(student.state_dict())
    for name, weight in weights.items():
        plain.get_parameter(name).data = weight
    out = plain(X)
    out.square().sum().backward()
    return out.detach(), {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}


def assert_runs(student: nn.Module, weights: dict[str, Tensor]) -> None:
    """Asserts that a student computes with these weights, and passes gradients straight through."""
    student.zero_grad()
    out = student(X)
    out.square().sum().backward()
    expected, grads = run_plain(student, weights)
    assert torch.equal(out, expected)
    for name, grad in grads.items():
        assert torch.equal(student.get_parameter(name).grad, grad), name


def flip(student: nn.Module) -> None:
    """Changes the masked weights so that their masks change."""
    with torch.no_grad():
        for name in NAMES:
            weight = student.get_parameter(name)
            weight.copy_(weight.roll(1, 1) * 1.5)


@pytest.mark.parametrize("kind", [Chain, Broken])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_held_masks_stay_while_weights_change_until_they_are_held_again(
    kind: type[Chain], backend: str
) -> None:
    student = make_student(kind, backend=backend)
    before = {name: brute_mask(student.get_parameter(name), "2:4") for name in NAMES}
    assert sdm.hold_masks(student) == NAMES
    for _ in range(2):
        assert_runs(student, {n: student.get_parameter(n) * before[n] for n in NAMES})
        flip(student)
    now = {name: brute_mask(student.get_parameter(name), "2:4") for name in NAMES}
    assert not torch.equal(now["b.weight"], before["b.weight"])
    assert torch.equal(sdm.get_masks(student)["b.weight"], before["b.weight"])
    sdm.hold_masks(student)
    assert_runs(student, {n: student.get_parameter(n) * now[n] for n in NAMES})


def test_held_masks_that_are_held_again_need_no_new_graph() -> None:
    from torch._dynamo.utils import counters

    student = make_student()
    sdm.hold_masks(student)
    student(X)
    counters.clear()
    flip(student)
    sdm.hold_masks(student)
    student(X)
    assert counters["stats"]["unique_graphs"] == 0


def test_held_masks_may_be_chosen_by_the_caller() -> None:
    student = make_student()
    masks = {n: brute_mask(student.get_parameter(n).flip(1), "2:4") for n in NAMES}
    sdm.hold_masks(student, masks)
    for mask in sdm.get_masks(student, fixed=True).values():
        mask.zero_()  # a copy
    assert_runs(student, {n: student.get_parameter(n) * masks[n] for n in NAMES})
    with pytest.raises(MaskError, match=r"the mask of 'c\.weight' is missing"):
        sdm.hold_masks(student, {"b.weight": masks["b.weight"]})
    with pytest.raises(MaskError, match=r"is \[16, 16\] of torch.float32, not a bool tensor"):
        sdm.hold_masks(student, {n: m.float() for n, m in masks.items()})


def test_a_copy_holds_masks_of_its_own() -> None:
    student = make_student()
    sdm.hold_masks(student)
    before = sdm.get_masks(student)
    for twin in (copy.deepcopy(student), sdm.compile(student, "2:4", backend="eager")):
        flip(twin)
        sdm.hold_masks(twin)
        assert torch.equal(sdm.get_masks(student)["b.weight"], before["b.weight"])
        assert not torch.equal(sdm.get_masks(twin)["b.weight"], before["b.weight"])


def test_unfreezing_held_masks_computes_them_anew() -> None:
    student = make_student()
    sdm.hold_masks(student)
    flip(student)
    sdm.unfreeze_masks(student)
    masks = {n: brute_mask(student.get_parameter(n), "2:4") for n in NAMES}
    assert_runs(student, {n: student.get_parameter(n) * masks[n] for n in NAMES})
    assert sdm.get_masks(student, fixed=True) == {}


@pytest.mark.parametrize("end", ["freeze", "infer", "apply"])
def test_held_masks_decide_what_is_pruned_for_good(end: str) -> None:
    student = make_student()
    sdm.hold_masks(student)
    masks = sdm.get_masks(student)
    flip(student)
    expected = {n: student.get_parameter(n).detach() * masks[n] for n in NAMES}
    if end == "freeze":
        sdm.freeze_masks(student)
        assert sdm.explain(student).frozen == NAMES
        with pytest.raises(ConfigError, match="are frozen: unfreeze_masks"):
            sdm.hold_masks(student)
    elif end == "infer":
        student = sdm.compile(student, mode="infer", kernels={"*": "dense"}, backend="eager")
    else:
        sdm.apply_masks(student)
    assert torch.equal(student(X), run_plain(student, expected)[0])
    for name in NAMES:
        assert torch.equal(student.get_parameter(name), expected[name])


def test_saved_held_masks_are_computed_anew(tmp_path: Path) -> None:
    student = make_student()
    sdm.hold_masks(student)
    flip(student)
    sdm.save(student, tmp_path / "a.safetensors")
    again = sdm.load(tmp_path / "a.safetensors", Chain(), backend="eager")
    assert torch.equal(again.b.weight, student.b.weight)
    again(X)
    assert not torch.equal(sdm.get_masks(again)["b.weight"], sdm.get_masks(student)["b.weight"])


def test_holding_masks_of_an_uncalled_or_folded_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="call it once first"):
        sdm.hold_masks(compiled_chain())
    with pytest.raises(ConfigError, match="folded for inference"):
        sdm.soften_masks(compiled_chain("infer"))


def soften_by_hand(weight: Tensor, n: int, m: int) -> Tensor:
    """S(w) of S-STE, group after group."""
    soft = torch.zeros_like(weight)
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], m):
            group = weight[row, start : start + m]
            order = group.abs().argsort(descending=True)
            limit = group[order[n]].abs() if n < m else torch.zeros(())
            for k in order[:n]:
                soft[row, start + k] = group[k].sign() * (group[k].abs() - limit)
    return soft


@pytest.mark.parametrize("text", ["2:4", "1:8", "3:4"])
def test_soft_threshold_equals_its_definition_and_scale_the_least_squares(text: str) -> None:
    pattern = Pattern.parse(text)
    weight = torch.randn(6, 16)
    soft = soften_by_hand(weight, pattern.n, pattern.m)
    torch.testing.assert_close(project_softly(weight, pattern), soft)
    scale = float(compute_scale(weight, pattern))
    errors = [
        float((weight - beta * soft).square().sum()) for beta in (scale, 0.99 * scale, 1.01 * scale)
    ]
    assert errors[0] == min(errors)
    assert scale > 1
    assert float(compute_scale(torch.zeros(2, 16), pattern)) == 1


@pytest.mark.parametrize("kind", [Chain, Broken])
def test_softened_student_runs_by_a_fixed_scale(kind: type[Chain]) -> None:
    student = make_student(kind)
    scales = sdm.soften_masks(student)
    assert [*scales] == [*NAMES]
    for _ in range(2):
        soft = {
            n: project_softly(student.get_parameter(n), Pattern.parse("2:4")) * scales[n]
            for n in NAMES
        }
        assert_runs(student, soft)
        flip(student)
    again = make_student(kind)
    assert sdm.soften_masks(again, scales) == scales
    with pytest.raises(ConfigError, match=r"lack 'c\.weight'"):
        sdm.soften_masks(again, {"b.weight": 1.0})


@pytest.mark.parametrize("end", ["freeze", "infer", "apply"])
def test_softened_weights_are_written_where_masks_are_kept_for_good(end: str) -> None:
    student = make_student()
    sdm.soften_masks(student)
    out = student(X).detach()
    if end == "freeze":
        sdm.freeze_masks(student)
    elif end == "infer":
        student = sdm.compile(student, mode="infer", kernels={"*": "dense"}, backend="eager")
    else:
        sdm.apply_masks(student)
    assert torch.equal(student(X), out)
    plain = Chain()
    plain.load_state_dict(student.state_dict())
    assert torch.equal(plain(X), out)


def test_softened_students_are_copied_saved_and_loaded(tmp_path: Path) -> None:
    student = make_student()
    scales = sdm.soften_masks(student)
    flip(student)
    out = student(X)
    sdm.save(student, tmp_path / "a.safetensors")
    again = sdm.load(tmp_path / "a.safetensors", Chain(), backend="eager")
    assert torch.equal(again(X), out)
    assert torch.equal(again.b.weight, student.b.weight)  # the latent weights
    assert torch.equal(copy.deepcopy(student)(X), out)
    assert sdm.soften_masks(again) != scales


def test_softening_another_pattern_than_a_per_row_one_is_refused() -> None:
    torch.manual_seed(0)
    student = sdm.compile(Chain(), "2:4x2", backend="eager")
    student(X)
    with pytest.raises(PatternError, match="for per-row masks such as '2:4', not for '2:4x2'"):
        sdm.soften_masks(student)


def test_held_masks_are_written_on_every_device_that_reads_them() -> None:
    here, there = torch.ones(4, 4, dtype=torch.bool), torch.device("meta")
    masks = HeldMasks({"w": here})
    elsewhere = HeldMasks({"w": here})
    other = here.clone()
    elsewhere._elsewhere["w", torch.device("cuda", 0)] = other  # as a graph made there reads it
    for held in (masks, elsewhere):
        assert held.get("w", here.device) is here
        assert held.get("w", there) is here
        assert held.get("none", here.device) is None
    elsewhere.write({"w": torch.zeros(4, 4, dtype=torch.bool)})
    assert not here.any()
    assert not other.any()
    assert elsewhere.get("w", torch.device("cuda", 0)) is other
    assert elsewhere.get("w", here.device) is here
