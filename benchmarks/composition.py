"""Sparsity beside a cache on a CPU: dense, sparse, cache and both, in time and in distance.

    python benchmarks/composition.py --out out/bench/composition.json
    python benchmarks/composition.py --only unet --quick

One image is sampled by DPM-Solver++ from the same noise: by a U-ViT-S with TaylorSeer on the
attention and the MLP of its blocks, and by a small UNet like Stable Diffusion's, with guidance and
pyramid attention broadcast. Dense models run under torch.compile. All four run in turns in one
process; a ratio is the median of the rounds' ratios with its quartiles. Weights are random and
pruned without training, so the distance of sparse says little of a trained student; that of cache
and both to the same model without a cache says what the cache costs.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tabulate import tabulate
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.autotune.side_by_side import (
    compute_ratio,
    describe_machine,
    format_machine,
    format_ratio,
    sample_in_turns,
)
from sparsedm_compiler.backends.processor import read_cpu_name
from sparsedm_compiler.models import UViT
from sparsedm_compiler.optional_deps import import_diffusers

diffusers: Any = import_diffusers(reason="the caches are those of diffusers")

VARIANTS = ("dense", "sparse", "cache", "both")
UNCACHED = {"dense": "dense", "sparse": "sparse", "cache": "dense", "both": "sparse"}
"""The variant with the same weights and no cache, by variant."""


class CachedUViT(UViT, diffusers.CacheMixin):
    """A U-ViT with the caches of diffusers."""


class CachedUNet(diffusers.UNet2DConditionModel, diffusers.CacheMixin):
    """A UNet with the caches of diffusers."""


class Timestep:
    """The timestep that sampling is at, which pyramid attention broadcast asks for."""

    now = 0.0


@dataclass(frozen=True)
class Case:
    """A model to sample from.

    Attributes:
        title: Its name in the table.
        cache: The name of its cache.
        create: Makes it.
        enable: Enables the cache on it.
        shape: Of the noise.
        predict: Calls it with x and a timestep.
    """

    title: str
    cache: str
    create: Callable[[], nn.Module]
    enable: Callable[[Any], None]
    shape: tuple[int, ...]
    predict: Callable[[Any, Tensor, Tensor], Tensor]


def make_uvit(quick: bool) -> Case:
    """Returns U-ViT-S as on CIFAR-10; 4 blocks of it where ``quick``."""

    def create() -> nn.Module:
        return CachedUViT(depth=4 if quick else 12).eval()

    def enable(model: Any) -> None:
        names = [r".*(blocks\.\d+|mid_block)\.(attn|mlp)"]
        config = diffusers.TaylorSeerCacheConfig(
            cache_interval=3,
            disable_cache_before_step=3,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=names,
        )
        model.enable_cache(config)

    def predict(run: Any, x: Tensor, step: Tensor) -> Tensor:
        out: Tensor = run(x, step.expand(1))
        return out

    return Case("U-ViT-S", "TaylorSeer", create, enable, (1, 3, 32, 32), predict)


def make_unet(quick: bool) -> Case:
    """Returns a UNet of two levels with cross-attention; a smaller one where ``quick``."""
    width = 64 if quick else 160
    words = torch.randn(2, 77, 256)

    def create() -> nn.Module:
        return CachedUNet(
            sample_size=32,
            block_out_channels=(width, 2 * width),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=256,
            attention_head_dim=4,
        ).eval()

    def enable(model: Any) -> None:
        config = diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            cross_attention_block_skip_range=3,
            spatial_attention_timestep_skip_range=(100, 900),
            cross_attention_timestep_skip_range=(100, 900),
            current_timestep_callback=lambda: Timestep.now,
        )
        model.enable_cache(config)

    def predict(run: Any, x: Tensor, step: Tensor) -> Tensor:
        out = run(torch.cat([x, x]), step, words, return_dict=False)[0]
        without, with_words = out.chunk(2)
        guided: Tensor = without + 5.0 * (with_words - without)
        return guided

    return Case("SD-like UNet", "pyramid attention", create, enable, (1, 4, 32, 32), predict)


CASES: dict[str, Callable[[bool], Case]] = {"uvit": make_uvit, "unet": make_unet}


def make_sampler(
    case: Case, model: Any, run: Any, steps: int, noise: Tensor
) -> Callable[[], Tensor]:
    """Returns a function that samples one image by ``run``, which calls ``model``."""
    cached = model.is_cache_enabled

    def sample() -> Tensor:
        scheduler = diffusers.DPMSolverMultistepScheduler()
        scheduler.set_timesteps(steps)
        x = noise
        if cached:
            model._reset_stateful_cache()
        for step in scheduler.timesteps:
            Timestep.now = float(step)
            with model.cache_context("sample") if cached else nullcontext():
                prediction = case.predict(run, x, step)
            x = scheduler.step(prediction, step, x).prev_sample
        return x

    return sample


def make_samplers(case: Case, pattern: str, steps: int) -> dict[str, Callable[[], Tensor]]:
    """Returns the four ways to sample one image, from the same weights and noise."""
    torch.manual_seed(0)
    model, noise = case.create(), torch.randn(case.shape)
    samplers = {}
    for name in VARIANTS:
        own: Any = copy.deepcopy(model)
        if UNCACHED[name] == "sparse":
            own = sdm.compile(own, pattern, mode="infer")
        if name in ("cache", "both"):
            case.enable(own)
        run = own if UNCACHED[name] == "sparse" else torch.compile(own)
        samplers[name] = make_sampler(case, own, run, steps, noise)
    return samplers


def measure(case: Case, pattern: str, steps: int, rounds: int) -> list[dict[str, Any]]:
    """Returns a row for each of the four: seconds, ratios to the others, distances."""
    samplers = make_samplers(case, pattern, steps)
    images = {name: sampler() for name, sampler in samplers.items()}  # compiles, too
    samples = sample_in_turns(samplers, rounds=rounds, warmup=1)
    wall = {name: samples[name].wall for name in VARIANTS}
    return [
        {
            "model": case.title,
            "variant": name if UNCACHED[name] == name else f"{name} ({case.cache})",
            "seconds": median(wall[name]),
            "dense over it": compute_ratio(wall["dense"], wall[name]),
            "sparse over it": compute_ratio(wall["sparse"], wall[name]),
            "cache over it": compute_ratio(wall["cache"], wall[name]),
            "distance to dense": distance(images[name], images["dense"]),
            "to itself uncached": distance(images[name], images[UNCACHED[name]]),
        }
        for name in VARIANTS
    ]


def distance(image: Tensor, reference: Tensor) -> float:
    """Returns |image - reference| / |reference|."""
    return float((image - reference).norm() / reference.norm())


def show(rows: list[dict[str, Any]]) -> str:
    """Returns rows as a table in Markdown."""
    body = [
        {
            key: format_ratio(value)
            if isinstance(value, tuple)
            else (f"{value:.3g}" if isinstance(value, float) else value)
            for key, value in row.items()
        }
        for row in rows
    ]
    return tabulate(body, headers="keys", tablefmt="github", disable_numparse=True)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Prints a table, and writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", choices=[*CASES], help="one of the models")
    add("--pattern", default="2:4")
    add("--steps", type=int, default=12, help="denoising steps of an image")
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=1)
    add("--quick", action="store_true", help="smaller models, 6 steps, 2 rounds")
    add("--out", type=Path, default=Path("out/bench/composition.json"))
    options = parser.parse_args(arguments)
    steps, rounds = (6, 2) if options.quick else (options.steps, options.rounds)
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    facts = {"processor": read_cpu_name(), **describe_machine()}
    print(format_machine(facts), flush=True)
    rows: list[dict[str, Any]] = []
    for name in [options.only] if options.only else CASES:
        rows += measure(CASES[name](options.quick), options.pattern, steps, rounds)
        print(f"\n{show(rows)}\n", flush=True)
        torch._dynamo.reset()
    results = {"machine": facts, "argv": sys.argv[1:], "steps": steps, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1))
    print(f"wrote {options.out} in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
