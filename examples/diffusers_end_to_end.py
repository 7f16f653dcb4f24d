"""A diffusers pipeline from a config to an ONNX file, sparse all the way.

    python examples/diffusers_end_to_end.py

Makes a tiny DDPM pipeline with random weights, loads its UNet with a SparseConfig, fine-tunes it on
handwritten digits, saves it and loads it again without an argument, samples, trains a LoRA adapter
with peft and merges it, and exports the result to ONNX, where onnxruntime must equal eager and
every pruned weight must still be 2:4. Needs pip install "sparsedm-compiler[demo,lora,export]".
Writes into out/diffusers; less than a minute on two cores, and --quick less than half of that.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from digits import Digits
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import sparsedm_compiler as sdm

import sparsedm_compiler.diffusers  # isort: skip  # before diffusers and peft: mends torchvision
import diffusers  # isort: skip
import peft  # isort: skip
from sparsedm_compiler.reporting import save_grid

UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (32,),
    "layers_per_block": 1,
    "down_block_types": ("AttnDownBlock2D",),
    "up_block_types": ("AttnUpBlock2D",),
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
TOLERANCE = 1e-4


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs every step and returns what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/diffusers"))
    parser.add_argument("--quick", action="store_true", help="few steps: samples of no quality")
    options = parser.parse_args(argv)
    steps, draws = (8, 4) if options.quick else (120, 25)
    out: Path = options.out
    torch.manual_seed(0)
    images = Digits.load().train[0]

    make_pipeline().save_pretrained(out / "dense")
    student = load_sparse(out / "dense" / "unet")
    first, last = train(student, images, steps=steps, lr=2e-3)
    print(f"fine-tuned on digits: loss {first:.3f} -> {last:.3f}")

    student.eval().save_pretrained(out / "sparse" / "unet")
    again = diffusers.UNet2DModel.from_pretrained(out / "sparse" / "unet")
    sdm.compile(again, backend="eager", inplace=True)  # else Inductor would take half a minute
    call = torch.randn(2, 1, 8, 8), torch.tensor([10, 900])
    with torch.no_grad():
        assert torch.equal(again(*call).sample, student(*call).sample)
    print(f"reloaded without an argument:\n{sdm.explain(again)}")

    adapt(again, images, steps=max(2, steps // 4))
    report = sdm.merge_lora(again)
    print(f"adapter trained and merged, the pattern kept:\n{report}")
    save_grid(out / "samples.png", {"2:4": draw(again, draws)})

    exported = sdm.export_onnx(again.eval(), call, out / "unet.onnx", dynamic_batch=True)
    difference = compare_with_onnxruntime(again, out / "unet.onnx")
    pruned = [row for row in exported.rows if row.declared is not None]
    assert all(row.fits and row.tensor_cores for row in pruned)
    assert difference < TOLERANCE
    print(f"{len(pruned)} weights of {out / 'unet.onnx'} are 2:4; {difference:.1e} from eager")
    return {"losses": (first, last), "pruned": len(pruned), "difference": difference}


def make_pipeline() -> diffusers.DDPMPipeline:
    """Returns a pipeline with random weights, as a stand-in for one from the Hub."""
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000)
    return diffusers.DDPMPipeline(diffusers.UNet2DModel(**UNET), scheduler)


def load_sparse(folder: Path) -> Any:
    """Loads a UNet as diffusers does, pruned to 2:4 and ready to be trained."""
    config = sdm.SparseConfig("2:4", mode="train", backend="eager")
    return diffusers.UNet2DModel.from_pretrained(folder, quantization_config=config)


def train(model: nn.Module, images: Tensor, *, steps: int, lr: float) -> tuple[float, float]:
    """Trains what requires a gradient to predict noise; returns the mean loss at both ends."""
    noise_schedule = diffusers.DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    model.train()
    for _ in range(steps):
        batch = images[torch.randint(len(images), (32,))]
        noise, times = torch.randn_like(batch), torch.randint(1000, (len(batch),))
        noisy = noise_schedule.add_noise(batch, noise, times)
        loss = mse_loss(model(noisy, times).sample, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    end = max(1, steps // 8)
    return sum(losses[:end]) / end, sum(losses[-end:]) / end


def adapt(model: Any, images: Tensor, *, steps: int) -> None:
    """Adds a LoRA adapter to the attention of a model and trains it alone."""
    targets = ["to_q", "to_k", "to_v"]
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=targets), model)
    train(model, images, steps=steps, lr=1e-3)


@torch.no_grad()
def draw(model: Any, count: int) -> Tensor:
    """Returns samples of a model: [count, 1, 8, 8] in [-1, 1]."""
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(20)
    x = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t).sample, t, x).prev_sample
    return x.clamp(-1, 1)


def compare_with_onnxruntime(model: Any, path: Path) -> float:
    """Returns the largest difference between a model and its file, at another batch size."""
    sample, times = torch.randn(3, 1, 8, 8), torch.tensor([1, 500, 999])
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    (ours,) = session.run(None, dict(zip(names, (sample.numpy(), times.numpy()), strict=True)))
    with torch.no_grad():
        expected = model(sample, times).sample
    return (torch.from_numpy(ours) - expected).abs().max().item()


if __name__ == "__main__":
    main()
