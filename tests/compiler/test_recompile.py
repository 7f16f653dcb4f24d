"""A model that is compiled again prunes the same weights, unless the caller changes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import sparsedm_compiler as sdm
from tests.compiler.nets import Chain, X, assert_chain, compiled_chain, compiled_unet, run_unet
from tests.oracle import OPTIONS, assert_same, masked_patterns, oracle_of

INFER: dict[str, Any] = {"backend": "eager", **OPTIONS["infer"]}


@pytest.mark.parametrize(
    "options",
    [
        {"keep_dense": ["b"]},
        {"overrides": {"b": "1:4"}},
        {"policy": "all"},
        {"keep_dense": lambda name: "b" in name},
    ],
)
@pytest.mark.parametrize("pattern", ["2:4", None])
def test_student_when_compiled_for_inference_keeps_its_decisions(
    options: dict[str, Any], pattern: str | None
) -> None:
    student = compiled_chain(**options)
    out = student(X)
    fast = sdm.compile(student, pattern, **INFER)
    assert_same(fast(X), out)
    assert masked_patterns(fast) == masked_patterns(student) != masked_patterns(default())


def default() -> nn.Module:
    """Returns a Chain compiled without options, and called."""
    student = compiled_chain()
    student(X)
    return student


@pytest.mark.parametrize(
    ("options", "pattern"),
    [({"keep_dense": ["mid_block"]}, None), ({"overrides": {"mid_block": "1:4"}}, "2:4")],
)
def test_unet_when_compiled_for_inference_keeps_its_decisions(
    options: dict[str, Any], pattern: str | None
) -> None:
    student = compiled_unet(**options)
    out = run_unet(student)
    fast = sdm.compile(student, pattern, **INFER)
    assert_same(run_unet(fast), out)
    assert masked_patterns(fast) == masked_patterns(student)


def test_adapter_when_added_before_compiling_again_stays_dense() -> None:
    import peft

    student = compiled_unet()
    run_unet(student)
    config = peft.LoraConfig(target_modules=["to_q"], r=4, init_lora_weights=False)
    adapted = peft.inject_adapter_in_model(config, student)
    out = run_unet(adapted)
    fast = sdm.compile(adapted, "2:4", **INFER)
    assert_same(run_unet(fast), out)
    assert not any("lora" in name for name in masked_patterns(fast))


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"pattern": "1:4"}, "pattern 2:4 became 1:4"),
        ({"keep_dense": ["c"]}, r"keep_dense \('b',\) became \('c',\)"),
        ({"overrides": {"c": "1:4"}}, r"overrides \(\) became \('c=1:4',\)"),
        ({"policy": "all"}, "policy structural became all"),
    ],
)
def test_student_when_compiled_with_another_choice_is_told_what_changes(
    options: dict[str, Any], change: str
) -> None:
    student = compiled_chain(keep_dense=["b"])
    student(X)
    with pytest.warns(UserWarning, match=change):
        fast = sdm.compile(student, **{"pattern": "2:4", **INFER, **options})
    assert_chain(fast)
    assert masked_patterns(fast) != masked_patterns(student)


def finalized() -> nn.Module:
    fast = compiled_chain("sparse", finalize=True)
    fast(X)
    fast(X)
    assert fast._sparsedm.weights.packed
    return fast


@pytest.mark.parametrize("way", ["infer", "train"])
@pytest.mark.parametrize("inplace", [False, True])
def test_finalized_model_when_compiled_again_has_its_weights_back(way: str, inplace: bool) -> None:
    fast = finalized()
    expected = fast(X)
    again = sdm.compile(fast, "2:4", backend="eager", inplace=inplace, **OPTIONS[way])
    assert_same(again(X), expected, tolerance=1e-5)
    assert bool(again.b.weight.isfinite().all())
    if not inplace:
        assert_same(fast(X), expected)


def test_finalized_model_when_it_loads_weights_folds_and_finalizes_them() -> None:
    fast = finalized()
    expected = fast(X)
    fast.load_state_dict(fast.state_dict())
    assert_same(fast(X), expected, tolerance=1e-5)
    torch.manual_seed(1)
    other = Chain()
    fast.load_state_dict(other.state_dict())
    plain = sdm.compile(other, "2:4", **INFER)
    for _ in range(2):
        assert_same(fast(X), plain(X), tolerance=1e-5)
    assert fast._sparsedm.weights.packed


def test_adapter_when_merged_into_a_finalized_model_gets_its_weights_back() -> None:
    import peft

    fast = finalized()
    masked = {name: p.clone() for name, p in fast.state_dict().items()}
    config = peft.LoraConfig(target_modules=["b"], r=2, init_lora_weights=False)
    adapted = peft.inject_adapter_in_model(config, fast)
    adapted.b.merge()
    delta = adapted.b.get_delta_weight("default")
    merged = adapted.b.base_layer.weight
    assert_same(merged, masked["b.weight"] + delta, tolerance=1e-6)
    assert_same(adapted.c.weight.detach()[0, :2].isnan(), torch.tensor([True, True]))
    plain = Chain()
    plain.load_state_dict({**masked, "b.weight": merged})
    expected = sdm.compile(plain, "2:4", **INFER)(X)
    for _ in range(2):
        assert_same(adapted(X), expected, tolerance=1e-5)
    assert set(fast._sparsedm.weights.packed) == {"b.weight", "c.weight"}


def test_weights_when_pruned_by_torch_say_how_to_go_on() -> None:
    net = Chain()
    prune.l1_unstructured(net.b, "weight", 0.5)
    net(X).sum().backward()
    with pytest.raises(sdm.ConfigError, match=r"'b' was pruned by torch.nn.utils.prune.*remove"):
        sdm.compile(net, "2:4", backend="eager")
    prune.remove(net.b, "weight")
    assert_chain(sdm.compile(net, "2:4", backend="eager"))


def test_weights_when_normed_by_old_hooks_say_how_to_go_on() -> None:
    net = Chain()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(net.b)
    net(X).sum().backward()
    with pytest.raises(sdm.ConfigError, match=r"'b' has the old weight_norm.*remove_weight_norm"):
        sdm.compile(net, "2:4", backend="eager")
    nn.utils.remove_weight_norm(net.b)
    assert_chain(sdm.compile(net, "2:4", backend="eager"))


def test_weights_when_all_are_parametrized_say_how_to_go_on() -> None:
    net = Chain()
    for layer in (net.a, net.b, net.c, net.d):
        parametrizations.weight_norm(layer)
    student = sdm.compile(net, "2:4", backend="eager")
    with pytest.raises(sdm.ConfigError, match="remove_parametrizations"):
        student(X)
    for layer in (net.a, net.b, net.c, net.d):
        nn.utils.parametrize.remove_parametrizations(layer, "weight")
    again = sdm.compile(net, "2:4", backend="eager")
    assert_same(again(X), oracle_of(again)(X))


class Counting(Chain):
    """Counts its calls."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x)


def test_counter_of_calls_is_no_reason_to_compile_anew() -> None:
    student = sdm.compile(Counting(), "2:4", backend="eager")
    for _ in range(3):
        student(X)
    graphs = student._sparsedm.entry._graphs
    for _ in range(4):
        student(X)
    assert student.calls == 7
    assert student._sparsedm.entry._graphs == graphs
