"""What people run beside sparsity: caches, merged tokens, few steps, float8, attention backends.

Each runs as the hand-masked oracle under the same line. More caches are in test_diffusers_lines.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import diffusers
import pytest
import torch
from diffusers import CacheMixin, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.models import UViT
from sparsedm_compiler.models.uvit import Block
from tests.compiler.nets import UNET, Chain, X
from tests.compiler.test_diffusers_lines import FLUX, latents_of, pipeline_of, small_flux
from tests.oracle import OPTIONS, ROUNDING, assert_same, brute_mask, hand_masked, masked_patterns
from tests.zoo import FAMILIES, Family, sample_of

UVIT: Family = next(family for family in FAMILIES if family.name == "uvit")
STEPS = 4


@torch.no_grad()
def sample(model: Any, family: Family) -> Tensor:
    """Returns the predictions at consecutive timesteps, through which a cache carries state."""
    call = family.inputs(family.build(), batch=2)
    cached = isinstance(model, CacheMixin)
    outs = []
    for step in range(STEPS):
        args, kwargs = family.at(call, torch.tensor([900 - 100 * step] * 2))
        with model.cache_context("cond") if cached else nullcontext():
            outs.append(sample_of(model(*args, **kwargs)))
    return torch.stack(outs)


def compare(
    family: Family, change: Callable[[nn.Module], object], mode: str, order: str
) -> nn.Module:
    """Asserts that a student runs as its oracle where both are changed, and that it matters.

    ``order``: whether the student is changed "before" or "after" its first call.
    """
    student = sdm.compile(family.build(), "2:4", backend="eager", **OPTIONS[mode])
    if order == "after":
        sample(student, family)
    change(student)
    out = sample(student, family)
    oracle, dense = hand_masked(family.build(), masked_patterns(student)), family.build()
    plain = sample(oracle, family)
    for model in (oracle, dense):
        change(model)
    assert_same(out, sample(oracle, family), tolerance=ROUNDING[mode])
    assert not torch.allclose(out, plain, atol=ROUNDING[mode])
    assert not torch.allclose(out, sample(dense, family), atol=1e-4)
    return student


class CachedUViT(UViT, CacheMixin):
    """A U-ViT with the caches of diffusers."""


class CachedUNet(UNet2DConditionModel, CacheMixin):
    """A UNet with the caches of diffusers."""


def predict_outputs(model: nn.Module) -> None:
    """Enables TaylorSeer on the layers of a U-ViT, by their names."""
    model.__class__ = CachedUViT
    config = diffusers.TaylorSeerCacheConfig(
        cache_interval=3,
        disable_cache_before_step=1,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r".*(blocks\.\d+|mid_block)\.(attn|mlp)"],
    )
    model.enable_cache(config)  # type: ignore[operator]


def broadcast_attention(model: nn.Module) -> None:
    """Enables pyramid attention broadcast on the attention of a UNet."""
    model.__class__ = CachedUNet
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: 500,
    )
    model.enable_cache(config)  # type: ignore[operator]


def test_cache_on_a_uvit_holds_values_of_the_masked_model() -> None:
    compare(UVIT, predict_outputs, "infer", "after")


class Layers(nn.Module, CacheMixin):
    """Layers in a loop, and no product beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Chain() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x * 2


@pytest.mark.parametrize("mode", ["infer", "train"])
@torch.no_grad()
def test_cache_that_skips_every_layer_of_a_loop_holds_values_of_the_masked_model(
    mode: str,
) -> None:
    """TorchDynamo compiles nothing of such a call."""
    torch.manual_seed(0)
    student = sdm.compile(Layers(), "2:4", policy="all", backend="eager", **OPTIONS[mode])
    student(X)
    oracle = hand_masked(student, masked_patterns(student))
    outs = []
    for model in (student, oracle):
        model.enable_cache(
            diffusers.TaylorSeerCacheConfig(
                cache_interval=3,
                disable_cache_before_step=1,
                taylor_factors_dtype=torch.float32,
                cache_identifiers=[r"layers\.\d+"],
            )
        )
        with model.cache_context("cond"):
            outs.append(torch.stack([model(X + step) for step in range(STEPS)]))
    assert_same(*outs, tolerance=ROUNDING[mode])
    with torch.compiler.set_stance("force_eager"), student.cache_context("cond"):
        student(X)


def test_cache_on_a_unet_holds_values_of_the_masked_model_and_compiles_once() -> None:
    """Its hooks count steps, by which each of them would be a graph of its own."""
    student = compare(UNET, broadcast_attention, "infer", "after")
    counts = count_graphs()
    sample(student, UNET)
    assert count_graphs() == counts


def count_graphs() -> int:
    """Returns how many graphs TorchDynamo has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def halve(tokens: Tensor) -> Tensor:
    """Returns the means of neighbouring tokens: [B, L, D] -> [B, L // 2, D]."""
    pairs = tokens[:, : tokens.shape[1] // 2 * 2]
    return pairs.reshape(tokens.shape[0], -1, 2, tokens.shape[2]).mean(2)


def double(tokens: Tensor, like: Tensor) -> Tensor:
    """Returns every token twice, and those of ``like`` that ``halve`` left out."""
    return torch.cat([tokens.repeat_interleave(2, 1), like[:, tokens.shape[1] * 2 :]], 1)


class MergedBlock(Block):
    """A block of a U-ViT on half of its tokens."""

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        return double(super().forward(halve(x), None if skip is None else halve(skip)), x)


class MergedTransformerBlock(BasicTransformerBlock):
    """A block of a UNet on half of its tokens."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return double(super().forward(halve(hidden_states), *args, **kwargs), hidden_states)


def merge_tokens(model: nn.Module) -> None:
    """Exchanges the classes of blocks, as tomesd does, and watches the input by a hook."""
    classes = {Block: MergedBlock, BasicTransformerBlock: MergedTransformerBlock}
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
    if isinstance(model, UNet2DConditionModel):
        model.register_forward_pre_hook(lambda module, args: setattr(module, "size", args[0].shape))


def split_tokens(model: nn.Module) -> None:
    """Undoes ``merge_tokens``."""
    classes = {MergedBlock: Block, MergedTransformerBlock: BasicTransformerBlock}
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
    model._forward_pre_hooks.clear()


@pytest.mark.parametrize(
    ("family", "mode", "order"),
    [(UVIT, "train", "after"), (UVIT, "sparse", "after"), (UNET, "infer", "before")],
    ids=lambda value: value.name if isinstance(value, Family) else value,
)
def test_tokens_when_merged_run_through_masked_layers(
    family: Family, mode: str, order: str
) -> None:
    student = compare(family, merge_tokens, mode, order)
    split_tokens(student)
    oracle = hand_masked(family.build(), masked_patterns(student))
    assert_same(sample(student, family), sample(oracle, family), tolerance=ROUNDING[mode])


def test_pipeline_of_few_lcm_steps_runs_masked() -> None:
    def latents(unet: nn.Module) -> Tensor:
        pipeline = pipeline_of(unet)
        pipeline.scheduler = diffusers.LCMScheduler(100, original_inference_steps=50)
        return latents_of(pipeline)

    student = sdm.compile(UNET.build(), "2:4", backend="eager")
    out = latents(student)
    assert_same(out, latents(hand_masked(UNET.build(), masked_patterns(student))))
    assert not torch.equal(out, latents(UNET.build()))


def test_four_steps_along_a_flow_run_masked() -> None:
    def flow(model: nn.Module) -> Tensor:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(4)
        (x, *_), kwargs = UVIT.inputs(model)
        with torch.no_grad():
            for step in scheduler.timesteps:
                velocity = model(x, step.expand(1), **kwargs)
                x = scheduler.step(velocity, step, x).prev_sample
        return x

    student = sdm.compile(UVIT.build(), "2:4", backend="eager", **OPTIONS["sparse"])
    out = flow(student)
    oracle = hand_masked(UVIT.build(), masked_patterns(student))
    assert_same(out, flow(oracle), tolerance=ROUNDING["sparse"])
    assert not torch.allclose(out, flow(UVIT.build()), atol=1e-4)


class CastChain(diffusers.ModelMixin):
    """Layers in a model of diffusers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = Chain()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def test_model_that_stores_its_weights_in_float8_masks_what_they_are_cast_to() -> None:
    student: Any = sdm.compile(CastChain(), "2:4", backend="eager", **OPTIONS["infer"])
    oracle = CastChain()
    for model in (student, oracle):
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with torch.no_grad():
        out = student(X)
        for name, pattern in masked_patterns(student).items():
            weight = oracle.get_parameter(name)
            assert weight.dtype == torch.float8_e4m3fn
            weight.copy_(weight.float() * brute_mask(weight.float(), pattern))
        assert_same(out, oracle(X))


def test_attention_backend_when_set_is_used_beside_masked_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One backend doubles its result here, so that it cannot be mistaken for another."""
    doubled, backends = AttentionBackendName._NATIVE_MATH, _AttentionBackendRegistry._backends
    attend = backends[doubled]
    monkeypatch.setitem(backends, doubled, lambda *args, **kwargs: 2 * attend(*args, **kwargs))
    student: Any = sdm.compile(small_flux(), "2:4", backend="eager", **OPTIONS["infer"])
    oracle: Any = None
    outs = []
    for name in ("native", "_native_math", "_native_flash"):
        for model in (student, oracle) if oracle is not None else (student,):
            model.set_attention_backend(name)
        args, kwargs = FLUX.inputs(student)
        with torch.no_grad():
            outs.append(sample_of(student(*args, **kwargs)))
            if oracle is None:
                oracle = hand_masked(small_flux(), masked_patterns(student))
                oracle.set_attention_backend(name)
            assert_same(outs[-1], sample_of(oracle(*args, **kwargs)))
    student.reset_attention_backend()
    assert not torch.allclose(outs[1], outs[0], atol=1e-4)
    assert_same(outs[2], outs[0], tolerance=1e-5)
