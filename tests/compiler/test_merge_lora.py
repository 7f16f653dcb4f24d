"""Adapters on a pruned base: trained, saved, and merged so that the pattern stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.compiler.held_masks import SoftMasks
from sparsedm_compiler.graph.names import strip_adapter_prefix
from tests.compiler.nets import Chain, X, compiled_chain, compiled_unet, run_unet
from tests.diffusers.cases import run, small_unet
from tests.oracle import OPTIONS, assert_same, brute_mask, masked_patterns, oracle_of

modes = pytest.mark.parametrize("mode", ["train", "infer"])
LORA: dict[str, Any] = {"target_modules": ["b", "c"], "r": 4, "init_lora_weights": False}


def adapted_chain(mode: str = "train", **options: Any) -> Any:
    """Returns a called student with adapters on both pruned layers, b and c."""
    student = compiled_chain(mode)
    student(X)
    torch.manual_seed(2)
    return peft.inject_adapter_in_model(peft.LoraConfig(**{**LORA, **options}), student)


def sums(student: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns (masked weight, adapter) of both layers, by the definition of LoRA."""
    parts = {}
    for name in ("b", "c"):
        layer = student.get_submodule(name)
        weight = layer.base_layer.weight.detach()
        delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        parts[name] = weight * brute_mask(weight, "2:4"), delta.detach() * layer.scaling["default"]
    return parts


@modes
def test_adapter_when_merged_gives_the_pruned_sum_and_the_share_that_was_lost(mode: str) -> None:
    student = adapted_chain(mode)
    parts = sums(student)
    report = sdm.merge_lora(student)
    for row in report.rows:
        weight, delta = parts[row.weight.split(".")[0]]
        total = weight + delta
        kept = total * brute_mask(total, "2:4")
        assert_same(student.get_parameter(row.weight).detach(), kept)
        assert str(row.pattern) == "2:4"
        assert row.delta == pytest.approx(float(delta.norm() / weight.norm()))
        assert row.dropped == pytest.approx(float((total - kept).norm() / delta.norm()))
        assert 0 < row.dropped < 1
    assert [row.weight for row in report.rows] == ["b.weight", "c.weight"]
    assert "dropped / adapter" in str(report)
    assert not any("lora" in name for name, _ in student.named_parameters())
    assert masked_patterns(student).keys() == {"b.weight", "c.weight"}
    assert_same(student(X), oracle_of(student)(X))


def test_adapter_when_merged_into_kept_masks_changes_no_place() -> None:
    student = adapted_chain()
    parts = sums(student)
    rows = {row.weight: row for row in sdm.merge_lora(student, keep_masks=True).rows}
    for name, (weight, delta) in parts.items():
        mask = weight != 0
        assert_same(student.get_parameter(f"{name}.weight").detach(), (weight + delta) * mask)
        assert rows[f"{name}.weight"].dropped == pytest.approx(
            float((delta * ~mask).norm() / delta.norm())
        )


def test_adapter_when_merged_into_frozen_masks_keeps_them() -> None:
    student = adapted_chain()
    sdm.freeze_masks(student)
    parts = sums(student)
    cpu = torch.device("cpu")
    frozen = {name: student._sparsedm.frozen.get(name, cpu) for name in ("b.weight", "c.weight")}
    sdm.merge_lora(student)
    for name, (weight, delta) in parts.items():
        merged = student.get_parameter(f"{name}.weight").detach()
        assert_same(merged, (weight + delta) * frozen[f"{name}.weight"])
    assert_same(student(X), oracle_of(student)(X))


def test_small_adapter_when_merged_runs_as_it_ran_beside_the_weight() -> None:
    """Within the masks of the base, nothing is lost, and the output is the same."""
    student = adapted_chain()
    with torch.no_grad():
        for name, (weight, _) in sums(student).items():
            layer = student.get_submodule(name)
            layer.lora_B["default"].weight.zero_()
            row = int(weight[:, 0].abs().argmax())  # of which the mask keeps the first column
            layer.lora_A["default"].weight.zero_()[0, 0] = 1e-3
            layer.lora_B["default"].weight[row, 0] = 1
    before = student(X)
    report = sdm.merge_lora(student)
    assert [row.dropped for row in report.rows] == [0.0, 0.0]
    assert_same(student(X), before, tolerance=1e-6)


def test_merged_student_trains_on() -> None:
    student = adapted_chain()
    sdm.merge_lora(student)
    student.requires_grad_(True)
    student(X).square().sum().backward()
    assert student.b.weight.grad is not None
    assert student.b.weight.grad.count_nonzero()


def test_adapter_of_a_dense_layer_and_a_bias_are_merged_whole() -> None:
    student = adapted_chain(target_modules=["a"], lora_bias=True)
    torch.manual_seed(0)
    before = student(X)
    (row,) = sdm.merge_lora(student).rows
    assert (row.weight, row.pattern, row.dropped) == ("a.weight", None, 0.0)
    assert_same(student(X), before, tolerance=1e-6)


@modes
def test_peft_model_and_convolutions_are_merged(mode: str) -> None:
    student = sdm.compile(small_unet(), "2:4", backend="eager", **OPTIONS[mode])
    with torch.no_grad():
        run(student)
        config = peft.LoraConfig(r=2, target_modules=["conv1"], init_lora_weights=False)
        wrapper = peft.get_peft_model(student, config)
        report = sdm.merge_lora(wrapper)
        assert len(report.rows) == 5
        assert {str(row.pattern) for row in report.rows} == {"2:4"}
        assert_same(run(student), run(oracle_of(student)))


def test_adapter_of_a_diffusers_model_is_merged_and_leaves_no_trace() -> None:
    student = compiled_unet()
    run_unet(student)
    names = {*student.state_dict()}
    config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    student.add_adapter(config)
    report = sdm.merge_lora(student)
    assert {*student.state_dict()} == names
    student.add_adapter(config)  # which diffusers refuses where one of that name is left
    assert len(sdm.merge_lora(student).rows) == len(report.rows) > 1
    assert_same(run_unet(student), run_unet(oracle_of(student)))


@pytest.mark.parametrize("mode", [*OPTIONS])
def test_adapter_alone_trains_on_a_frozen_base(mode: str) -> None:
    student = adapted_chain(mode)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("lora_" in name)
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    base = student.b.base_layer.weight.detach().clone()
    oracle = oracle_of(student)
    oracle(X).square().mean().backward()
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    first = student(X).square().mean()
    first.backward()
    for name, parameter in trained.items():  # also through the kernel of the layer behind
        expected = oracle.get_parameter(name).grad
        assert_same(parameter.grad, expected, tolerance=1e-5)
        assert expected.count_nonzero()
    optimizer.step()
    assert student(X).square().mean() < first
    assert_same(student.b.base_layer.weight.detach(), base)


@pytest.mark.parametrize("end", ["unload", "merge"])
def test_student_whose_adapters_are_gone_is_saved_and_loads(end: str, tmp_path: Path) -> None:
    student = compiled_chain()
    wrapper = peft.get_peft_model(student, peft.LoraConfig(**LORA))
    wrapper(X)
    if end == "unload":
        wrapper.unload()
    else:
        sdm.merge_lora(student)
        assert not any("lora" in row.weight for row in sdm.explain(student).rows)
    sdm.save(student, tmp_path / "s")
    loaded = sdm.load(tmp_path / "s", Chain(), backend="eager")
    assert_same(loaded(X), student(X))


def test_merge_of_what_cannot_be_merged_is_refused_and_changes_nothing() -> None:
    with pytest.raises(sdm.ConfigError, match="was not compiled"):
        sdm.merge_lora(nn.Linear(4, 4))
    student = compiled_chain("train")
    with pytest.raises(sdm.ConfigError, match="has chosen no weights yet"):
        sdm.merge_lora(student)
    student(X)
    with pytest.raises(sdm.ConfigError, match="has no adapter of PEFT"):
        sdm.merge_lora(student)
    student = adapted_chain()
    state = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    student.b.merge()
    with pytest.raises(sdm.ConfigError, match="'b' cannot be merged: it is merged already"):
        sdm.merge_lora(student)
    student.b.unmerge()
    student.c.enable_adapters(False)
    with pytest.raises(sdm.ConfigError, match="'c' cannot be merged: it is disabled"):
        sdm.merge_lora(student)
    student.c.enable_adapters(True)
    with torch.no_grad():
        broken = student.c.lora_B["default"].weight
        broken[0, 0] = torch.nan
    with pytest.raises(sdm.ConfigError, match="'c' cannot be merged: NaNs detected"):
        sdm.merge_lora(student)
    for name, tensor in student.state_dict().items():
        if "lora_B" not in name:
            assert_same(tensor, state[name], tolerance=1e-6)  # unmerge rounds
    assert not student.b.merged


def test_merge_into_soft_thresholds_is_refused() -> None:
    student = adapted_chain()
    scales = {name: torch.ones(1) for name in ("b.weight", "c.weight")}
    patterns = dict.fromkeys(scales, sdm.Pattern.parse("2:4"))
    student._sparsedm.frozen = SoftMasks(scales, patterns)
    with pytest.raises(sdm.ConfigError, match="has soft thresholds"):
        sdm.merge_lora(student)


def test_merge_into_a_finalized_model_is_refused() -> None:
    student = compiled_chain("sparse", finalize=True)
    with torch.no_grad():
        student(X)
        student(X)
    adapted = peft.inject_adapter_in_model(peft.LoraConfig(**LORA), student)
    with pytest.raises(sdm.ConfigError, match="is finalized"):
        sdm.merge_lora(adapted)


SAVED = {"target_modules": ["b"], "r": 4, "modules_to_save": ["c"], "init_lora_weights": False}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("end", ["PEFT", "merge_lora"])
def test_layer_that_is_trained_whole_beside_adapters_is_pruned_until_it_is_merged(
    order: str, end: str, tmp_path: Path
) -> None:
    student = compiled_chain("train")
    if order == "after":
        student(X)
    wrapper = peft.get_peft_model(student, peft.LoraConfig(**SAVED))
    trained = [p for p in wrapper.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        assert_same(wrapper(X), oracle_of(student)(X))
        wrapper(X).square().mean().backward()
        optimizer.step()
    copied = student.c.modules_to_save["default"].weight
    assert not torch.equal(copied, student.c.original_module.weight)
    out = wrapper(X)
    pruned = copied * brute_mask(copied, "2:4")
    with wrapper.disable_adapter():
        assert_same(student(X), oracle_of(student)(X))
        assert not torch.equal(student(X), out)
    bare = wrapper.merge_and_unload() if end == "PEFT" else student
    if end == "merge_lora":
        sdm.merge_lora(wrapper)
    assert masked_patterns(bare).keys() == {"b.weight", "c.weight"}
    assert bare.c.weight is copied
    assert_same(bare(X), oracle_of(bare)(X))
    assert_same(bare.c.weight * brute_mask(bare.c.weight, "2:4"), pruned)
    sdm.save(bare, tmp_path / "s")
    assert_same(sdm.load(tmp_path / "s", Chain(), backend="eager")(X), bare(X))


def test_layer_that_is_trained_whole_and_disabled_is_not_merged() -> None:
    student = compiled_chain("train")
    student(X)
    wrapper = peft.get_peft_model(student, peft.LoraConfig(**SAVED))
    student.c.enable_adapters(False)
    with pytest.raises(sdm.ConfigError, match=r"copy of 'base_model.model.c' .* is disabled"):
        sdm.merge_lora(wrapper)


DORA = peft.LoraConfig(**LORA, use_dora=True)
HRA = peft.HRAConfig(r=4, target_modules=["c"], init_weights=False)


@pytest.mark.parametrize(
    ("config", "order"),
    [(DORA, "before"), (DORA, "after"), (HRA, "after")],
    ids=["DoRA-before", "DoRA-after", "HRA-after"],
)
def test_adapter_that_reads_the_weight_itself_gets_it_masked(config: Any, order: str) -> None:
    student = compiled_chain("train")
    if order == "after":
        student(X)
    student = peft.inject_adapter_in_model(config, student)
    assert_same(student(X), oracle_of(student)(X))
    masked = {strip_adapter_prefix(name) for name in masked_patterns(student)}
    assert masked == {"b.weight", "c.weight"}


def test_adapter_that_computes_the_weight_before_the_first_call_is_an_error() -> None:
    student = peft.inject_adapter_in_model(HRA, compiled_chain("train"))
    with pytest.raises(sdm.DenseRunError, match=r"'c\.weight' would run dense: the adapter"):
        student(X)


def test_dora_when_masks_were_applied_before_changes_nothing_at_first() -> None:
    student = compiled_chain("train")
    out = student(X)
    sdm.apply_masks(student)
    config = peft.LoraConfig(**{**LORA, "init_lora_weights": True}, use_dora=True)
    assert_same(peft.inject_adapter_in_model(config, student)(X), out)


class Embedding(Chain):
    """A chain that reads a table, which no product multiplies by."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.table(x))


def test_adapter_at_an_embedding_before_the_first_call_leaves_it_dense() -> None:
    student = sdm.compile(Embedding(), "2:4", backend="eager")
    config = peft.LoraConfig(**{**LORA, "target_modules": ["table", "b"]})
    student = peft.inject_adapter_in_model(config, student)
    numbers = torch.arange(5)
    assert_same(student(numbers), oracle_of(student)(numbers))
    assert masked_patterns(student).keys() >= {"b.base_layer.weight", "c.weight"}
