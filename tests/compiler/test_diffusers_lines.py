"""Ordinary lines of diffusers around a compiled model: offloading, caches, options, checkpoints.

Each runs as the hand-masked oracle, to the bit, or raises an error of ours with the way out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.compiler import folded_weights
from sparsedm_compiler.graph.capture import KEY
from sparsedm_compiler.models.presets import from_diffusers
from tests.compiler.nets import (
    UNET,
    Chain,
    X,
    assert_masked,
    compiled_chain,
    compiled_unet,
    run_unet,
)
from tests.oracle import OPTIONS, assert_same, brute_mask, hand_masked, masked_patterns
from tests.zoo import FAMILIES, Family, fill_zeros, sample_of

modes = pytest.mark.parametrize("mode", ["train", "infer"])
orders = pytest.mark.parametrize("order", ["before", "after"])
"""Whether a line comes before or after the first call of the model."""

CPU = torch.device("cpu")
FLUX: Family = next(family for family in FAMILIES if family.name == "flux")
STEPS = 4


def small_flux() -> nn.Module:
    """Returns a Flux with one block of each kind: captures in pieces are slow."""
    config = {
        "in_channels": 8,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 1,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (2, 2, 4),
    }
    torch.manual_seed(0)
    return fill_zeros(from_diffusers("FluxTransformer2DModel", config)).eval()


@torch.no_grad()
def sample_flux(model: Any, steps: int = STEPS) -> Tensor:
    """Returns the predictions at consecutive timesteps, through which a cache carries state."""
    call, outs = FLUX.inputs(model), []
    for step in range(steps):
        args, kwargs = FLUX.at(call, torch.tensor([0.9 - 0.1 * step]))
        with model.cache_context("cond"):
            outs.append(sample_of(model(*args, **kwargs)))
    return torch.stack(outs)


CACHES: dict[str, Callable[[], Any]] = {
    "first_block": lambda: diffusers.FirstBlockCacheConfig(threshold=0.5),
    "pab": lambda: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: 500,
    ),
    "taylorseer": lambda: diffusers.TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=1
    ),
    "magcache": lambda: diffusers.MagCacheConfig(
        threshold=0.3, max_skip_steps=2, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS
    ),
}
"""FasterCache is left out: diffusers 0.42.1 fails with it on the plain model."""


@pytest.mark.parametrize(
    ("name", "order", "mode"),
    [
        ("first_block", "after", "train"),
        ("magcache", "before", "infer"),
        ("pab", "before", "train"),
        ("pab", "after", "infer"),
        ("taylorseer", "after", "train"),
    ],
)  # of those that leave out blocks, and of those that keep results of layers, every order and mode
def test_cache_when_enabled_holds_values_of_the_masked_model(
    name: str, order: str, mode: str
) -> None:
    student = sdm.compile(small_flux(), "2:4", backend="eager", **OPTIONS[mode])
    if order == "after":
        sample_flux(student, 1)
    student.enable_cache(CACHES[name]())
    outs = sample_flux(student)
    masked, dense = hand_masked(small_flux(), masked_patterns(student)), small_flux()
    uncached = sample_flux(masked)
    for model in (masked, dense):
        model.enable_cache(CACHES[name]())
    assert_same(outs, sample_flux(masked))
    assert not torch.equal(outs, uncached)  # the cache was used
    assert not torch.equal(outs, sample_flux(dense))


class Blocks(nn.Module):
    """Blocks of the same shapes, which group offloading moves one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.last(x)
        return out


@modes
@orders
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading_when_blocks_have_one_shape_runs_masked(
    kind: str, mode: str, order: str
) -> None:
    def create() -> nn.Module:
        torch.manual_seed(0)
        return Blocks()

    student = sdm.compile(create(), "2:4", backend="eager", **OPTIONS[mode])
    if order == "after":
        student(X)
    apply_group_offloading(
        student,
        onload_device=CPU,
        offload_device=CPU,
        offload_type=kind,
        num_blocks_per_group=1 if kind == "block_level" else None,
    )
    outs = [student(X) for _ in range(2)]
    patterns = masked_patterns(student)
    assert patterns.keys() == {f"blocks.{i}.{j}.weight" for i in (0, 1) for j in (0, 2)}
    for out in outs:
        assert_same(out, hand_masked(create(), patterns)(X))


@modes
@orders
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float8_e4m3fn])
@torch.no_grad()
def test_layerwise_casting_when_it_stores_weights_in_fewer_bits_keeps_them_latent(
    storage: torch.dtype, mode: str, order: str
) -> None:
    def cast(model: nn.Module) -> nn.Module:
        apply_layerwise_casting(model, storage_dtype=storage, compute_dtype=torch.float32)
        return model

    student = compiled_chain(mode)
    if order == "after":
        student(X)
    latent = student.b.weight.clone()
    cast(student)
    outs = [student(X) for _ in range(2)]
    assert student.b.weight.dtype == storage
    assert_same(student.b.weight.float(), latent.to(storage).float())  # not masked for good
    torch.manual_seed(0)
    oracle = Chain()
    for name, pattern in masked_patterns(student).items():
        weight = oracle.get_parameter(name)
        rounded = weight.to(storage).float()
        weight.copy_(rounded * brute_mask(rounded, pattern))
    expected = cast(oracle)(X)
    for out in outs:
        assert_same(out, expected)
    assert student.b.weight.dtype == storage
    state = student.state_dict()["b.weight"].float()
    rounded = latent.to(storage).float()
    kept = brute_mask(rounded, "2:4") if mode == "infer" else torch.ones_like(rounded)
    assert_same(state, rounded * kept)


@orders
def test_layerwise_casting_keeps_no_folded_form_and_folds_once_a_call(
    order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is stored in fewer bits would else lie in memory a second time, in many."""
    student = compiled_chain("infer", kernels={"*": "dense"})
    with torch.no_grad():
        if order == "after":
            student(X)
        apply_layerwise_casting(student, storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        for _ in range(3):
            student(X)
        folds, own = [], folded_weights.fold_weight
        monkeypatch.setattr(
            folded_weights, "fold_weight", lambda *args: folds.append(args) or own(*args)
        )
        student(X)
    assert [args[-1] for args in folds] == ["b.weight", "c.weight"]
    assert len(student.__dict__[KEY].weights) == 0


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "casting": lambda model: apply_layerwise_casting(
        model, storage_dtype=torch.bfloat16, compute_dtype=torch.float32
    ),
    "offloading": lambda model: apply_group_offloading(
        model, onload_device=CPU, offload_device=CPU, offload_type="leaf_level"
    ),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_copy_of_a_model_with_hooks_of_diffusers_is_refused(kind: str, tmp_path: Path) -> None:
    """A copy's hooks would call the layers of the model that it was made from."""
    model = Chain()
    student = compiled_chain()
    student(X)
    sdm.save(student, tmp_path / "s")
    for hooked in (model, student):
        HOOKS[kind](hooked)
    for make in (
        lambda: sdm.compile(model, "2:4"),
        lambda: sdm.compile(student, mode="infer"),
        lambda: sdm.load(tmp_path / "s", model),
    ):
        with pytest.raises(sdm.ConfigError, match=r"has hooks of diffusers .*inplace=True"):
            make()


def test_cache_when_enabled_before_compile_asks_for_inplace_and_then_runs_masked() -> None:
    model: Any = small_flux()
    model.enable_cache(CACHES["pab"]())
    with pytest.raises(sdm.ConfigError, match=r"attn' has hooks of diffusers .*inplace=True"):
        sdm.compile(model, "2:4")
    kept = sdm.compile(model, "2:4", backend="eager", inplace=True)
    outs = sample_flux(kept, 2)
    oracle: Any = hand_masked(small_flux(), masked_patterns(kept))
    oracle.enable_cache(CACHES["pab"]())
    assert_same(outs, sample_flux(oracle, 2))


def pipeline_of(unet: nn.Module) -> Any:
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(10, steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents_of(pipeline: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(2, 1, 6, 16, generator=generator)
    latents = pipeline(
        prompt_embeds=words[0],
        negative_prompt_embeds=words[1],
        num_inference_steps=2,
        height=8,
        width=8,
        generator=generator,
        output_type="latent",
    ).images
    assert isinstance(latents, Tensor)
    return latents


@modes
def test_pipeline_when_offloaded_to_the_cpu_runs_masked(mode: str) -> None:
    student = compiled_unet(mode)
    pipeline = pipeline_of(student)
    pipeline.enable_model_cpu_offload(device="cpu")
    latents = latents_of(pipeline)
    assert_same(
        latents, latents_of(pipeline_of(hand_masked(UNET.build(), masked_patterns(student))))
    )
    assert not torch.equal(latents, latents_of(pipeline_of(UNET.build())))


def slice_attention(model: Any) -> None:
    model.set_attention_slice("max")


def enable_freeu(model: Any) -> None:
    model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


@pytest.mark.parametrize(
    ("option", "order", "mode"),
    [(slice_attention, "before", "train"), (enable_freeu, "after", "infer")],
)
def test_option_of_a_unet_when_set_runs_masked(option: Any, order: str, mode: str) -> None:
    student = compiled_unet(mode)
    if order == "after":
        run_unet(student)
    option(student)
    out = run_unet(student)
    oracle, dense = hand_masked(UNET.build(), masked_patterns(student)), UNET.build()
    plain = run_unet(oracle)
    for model in (oracle, dense):
        option(model)
    assert_same(out, run_unet(oracle))
    assert not torch.equal(out, plain)  # the option was used
    assert not torch.equal(out, run_unet(dense))


def build_controlnet() -> nn.Module:
    torch.manual_seed(1)
    model = diffusers.ControlNetModel.from_unet(
        UNET.build(), conditioning_embedding_out_channels=(8, 8)
    )
    return fill_zeros(model).eval()


@torch.no_grad()
def control_unet(unet: Any, controlnet: Any) -> Tensor:
    args, kwargs = UNET.inputs(UNET.build())
    picture = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    down, mid = controlnet(*args, **kwargs, controlnet_cond=picture, return_dict=False)
    return sample_of(
        unet(
            *args, **kwargs, down_block_additional_residuals=down, mid_block_additional_residual=mid
        )
    )


@modes
def test_controlnet_when_compiled_steers_a_compiled_unet(mode: str) -> None:
    unet = compiled_unet(mode)
    controlnet = sdm.compile(build_controlnet(), "2:4", backend="eager", **OPTIONS[mode])
    out = control_unet(unet, controlnet)
    masked_unet = hand_masked(UNET.build(), masked_patterns(unet))
    masked_net = hand_masked(build_controlnet(), masked_patterns(controlnet))
    assert_same(out, control_unet(masked_unet, masked_net))
    assert not torch.equal(out, run_unet(masked_unet))
    assert not torch.equal(out, control_unet(masked_unet, build_controlnet()))


@modes
def test_pretrained_folder_when_saved_by_a_student_reloads_as_a_plain_model(
    mode: str, tmp_path: Path
) -> None:
    """In mode "infer" its weights are masked; in mode "train" they are the latent ones."""
    student = compiled_unet(mode)
    out = run_unet(student)
    assert_masked(student, out)
    student.save_pretrained(tmp_path)
    plain = type(student).from_pretrained(tmp_path)
    if mode == "infer":
        assert_same(run_unet(plain), out)
    else:
        assert_same(run_unet(plain), run_unet(UNET.build()))
        again = sdm.compile(plain, "2:4", backend="eager")
        assert_same(run_unet(again), out)
