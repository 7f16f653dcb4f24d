"""A student inside diffusers pipelines, saved and loaded with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import sparsedm_compiler as sdm
from tests.oracle import OPTIONS, assert_same, hand_masked, masked_patterns, oracle_of
from tests.zoo import FAMILIES

ZOO = {family.name: family for family in FAMILIES}


def student_of(name: str, mode: str) -> nn.Module:
    return sdm.compile(ZOO[name].build(), "2:4", **OPTIONS[mode], backend="eager")


def ddpm_image(unet: nn.Module) -> torch.Tensor:
    pipeline = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(10))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(num_inference_steps=3, generator=generator, output_type="np").images
    return torch.from_numpy(images)


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_ddpm_pipeline_with_a_student_matches_oracle(mode: str) -> None:
    student = student_of("unet", mode)
    image = ddpm_image(student)
    assert_same(image, ddpm_image(oracle_of(student)))
    assert not torch.equal(image, ddpm_image(hand_masked(student, {})))


def text_to_latent(unet: nn.Module) -> torch.Tensor:
    """Stable Diffusion with guidance, from given embeddings: the VAE and text encoder stay out."""
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(10, steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(2, 1, 6, 16, generator=generator)
    kwargs: dict[str, Any] = {"prompt_embeds": words[0], "negative_prompt_embeds": words[1]}
    latents = pipeline(
        **kwargs,
        num_inference_steps=3,
        height=8,
        width=8,
        output_type="latent",
        generator=generator,
    ).images
    assert isinstance(latents, torch.Tensor)
    return latents


def test_stable_diffusion_pipeline_with_guidance_matches_oracle() -> None:
    student = student_of("unet_condition", "train")
    latents = text_to_latent(student)
    assert_same(latents, text_to_latent(oracle_of(student)))


def test_pipeline_with_a_student_when_saved_holds_the_plain_model(tmp_path: Path) -> None:
    student = student_of("unet", "train")
    image = ddpm_image(student)
    pipeline = diffusers.DDPMPipeline(student, diffusers.DDPMScheduler(10))
    pipeline.save_pretrained(tmp_path)
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path).unet
    assert type(loaded) is type(student)
    again = sdm.compile(loaded, "2:4", backend="eager")
    assert_same(ddpm_image(again), image)
    assert masked_patterns(again) == masked_patterns(student)
