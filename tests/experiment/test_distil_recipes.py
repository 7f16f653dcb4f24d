"""The recipes for big models, on tiny models of the same classes with conditions from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparsedm_compiler.experiment import estimate_run, opened_run
from sparsedm_compiler.experiment.estimate_run import describe_needs, estimate_run_memory
from sparsedm_compiler.experiment.inputs import unpack_latents
from sparsedm_compiler.experiment.opened_run import open_run
from sparsedm_compiler.experiment.run import make_student
from sparsedm_compiler.experiment.run_config import RunConfig
from sparsedm_compiler.experiment.training_inputs import is_taught_by_cache, make_run_inputs
from sparsedm_compiler.models import open_with_inputs
from sparsedm_compiler.train.finetuning import train_run

COUNT = 4
UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
}
TINY: dict[str, dict[str, Any]] = {
    "sd15": {
        **UNET,
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "sdxl": {
        **UNET,
        "attention_head_dim": (1, 2),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1),
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 32,
    },
    "dit-xl-2": {
        "sample_size": 8,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_embeds_ada_norm": 1000,
    },
    "sd3-medium": {
        "sample_size": 8,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": 8,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 8,
        "pos_embed_max_size": 8,
    },
    "flux1": {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 8,
        "pooled_projection_dim": 8,
        "axes_dims_rope": (4, 4, 8),
    },
}


def write_data(path: Path, name: str) -> None:
    """Latents and conditions of a model's own shapes, as a user has them on the disk."""
    model, args, kwargs = open_with_inputs(name, options=TINY[name], device="cpu", batch=COUNT)
    image = args[0]
    if name == "flux1":
        image = torch.randn(COUNT, 16, 16)
        kwargs["img_ids"], kwargs["txt_ids"] = torch.zeros(16, 3), torch.zeros(5, 3)
        kwargs["encoder_hidden_states"] = torch.randn(COUNT, 5, 8)
    tensors: dict[str, Any] = {"latents": image}
    if len(args) > 2:
        kwargs = {"encoder_hidden_states": args[2], **kwargs}
    for key, value in kwargs.items():
        if key == "class_labels":
            tensors["labels"] = value
        elif isinstance(value, dict):
            tensors |= {f"condition.{key}.{inner}": part for inner, part in value.items()}
        elif key != "timestep":
            shaped = value.expand(COUNT, *value.shape) if key.endswith("_ids") else value
            tensors[f"condition.{key}"] = shaped
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    save_file(model.state_dict(), path.with_name("dense.safetensors"))


@pytest.mark.parametrize("name", TINY)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_recipe_of_a_big_model_trains_a_tiny_one_and_states_its_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, reports = opened_run.report_run_macs, []

    def report_once(*inputs: Any) -> Any:
        reports[:] = reports or [own(*inputs)]
        return reports[0]

    for module in (opened_run, estimate_run):  # counting takes seconds
        monkeypatch.setattr(module, "report_run_macs", report_once)
    write_data(tmp_path / "data.safetensors", name)
    small = {"images": COUNT, "batch_size": COUNT, "accumulation": 2, "warmup_images": 0}
    config = RunConfig.create(
        {
            "recipe": name,
            "model": {"options": TINY[name], "weights": str(tmp_path / "dense.safetensors")},
            "data": {"train": str(tmp_path / "data.safetensors")},
            "prune": {"backend": "eager"},
            "train": {**small, "teacher_cache": str(tmp_path / "cache")},
            "out": str(tmp_path / "run"),
        }
    )
    opened = open_run(config, torch.device("cpu"))
    memory = estimate_run_memory(config, opened)
    assert memory.teacher == memory.weights >= memory.ema > 0
    assert (memory.recomputed > 0) == config.train.gradient_checkpointing
    lines = describe_needs(config, opened)
    assert "weights" in lines[0]
    assert "activations" in lines[0]
    assert f"outputs for {COUNT} images" in lines[1]
    inputs = make_run_inputs(config, opened)
    student = make_student(opened.teacher, config)
    result = train_run(student, opened.teacher, config.train, inputs, progress=False)
    assert len(result.losses) == 1
    assert is_taught_by_cache(config, inputs, opened.teacher)
    assert estimate_run_memory(config, opened).teacher == 0
    assert make_student(opened.teacher, config, alone=True) is opened.teacher


def test_packed_latents_are_unpacked_as_flux_packs_them() -> None:
    latents = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    packed = latents.view(2, 3, 2, 2, 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 4, 12)
    assert torch.equal(unpack_latents(packed), latents)
    assert unpack_latents(latents) is latents
