"""The runs of the study of methods: one teacher, then many students of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsedm_compiler.data import ImageData, open_data
from sparsedm_compiler.diffusion.image_batches import CHUNK
from sparsedm_compiler.experiment.recipes import find_recipe
from sparsedm_compiler.models import PRESETS, UViT

from .more_runs import TIMED, list_baseline_runs, list_sweep, list_timed_runs
from .setting import Setting

GROUPS = ("methods", "long", "sweep", "blocks", "settled", "tuned", "tuned-long", "baselines")
"""Every method at every pattern; some with more images; one option at a time; block patterns; masks
that begin with OBS and settle; every method at the learning rates of its pattern, and some of them
with more images; smaller dense models of equal MACs."""

METHODS = ("sparsedm", "ste", "sr-ste", "asp", "progressive", "transfer")
PATTERNS = ("2:4", "1:4", "1:8", "2:4x4", "1:4x4", "1:8x4")
BLOCKS = ("2:4", "1:2@32x8", "1:4", "1:4@32x8", "1:2@32x8+2:4")
"""Block patterns, each beside the per-row pattern of its density."""
SETTLED = ("2:4", "1:4", "1:8")
SMALLER = ("diff-pruning", "narrow", "narrow-long")
"""Dense models of a pattern's MACs, see baselines.py; "long" sees the teacher's images too."""
RATIOS = ("32:32", "31:32", "15:16", "7:8", "3:4", "2:4", "1:4", "1:8", "1:16", "1:32")
"""The ratios of the paper's figures."""
OF_METHODS = ("alpha", "beta", "sr_ste_lambda")
"""Options of a recipe that belong to one method, and would change what the others are."""
RATES: Mapping[str, tuple[float, ...]] = {
    "2:4": (1e-3, 2e-3),
    "1:4": (2e-3, 4e-3),
    "1:8": (4e-3, 8e-3),
    "1:2@32x8": (2e-3, 4e-3),
    "32:2:8": (4e-3, 8e-3),
}
"""Learning rates to try with a pattern: the more it prunes, the higher the best one."""
TUNED = ("asp", "ste", "sr-ste", "sparsedm", "obs-distill")


@dataclass(frozen=True, slots=True)
class Budget:
    """The size of the study: images, model, samples; a long run has ``long`` times the images."""

    teacher_images: int
    images: int
    long: int
    held_out: int
    samples: int
    steps: int
    seeds: tuple[int, ...] = (0, 1)
    width: int = 96
    depth: int = 5
    patterns: tuple[str, ...] = PATTERNS
    blocks: tuple[str, ...] = BLOCKS
    settled: tuple[str, ...] = SETTLED
    ratios: tuple[str, ...] = RATIOS
    tuned: tuple[str, ...] = tuple(RATES)
    judge_epochs: int = 6
    preset: str | None = None
    """The name of the model, which has no classes; None makes a U-ViT with ``width``."""


SMALL = Budget(240_000, 6_400, 4, 400, 600, 10)
QUICK = Budget(
    teacher_images=512,
    images=128,
    long=2,
    held_out=64,
    samples=40,
    steps=4,
    seeds=(0,),
    width=32,
    depth=2,
    patterns=("2:4", "1:4x4"),
    blocks=BLOCKS[1::3],
    settled=("1:4",),
    tuned=("1:8",),
    ratios=("32:32", "1:4", "1:8"),
    judge_epochs=1,
)

LARGE = Budget(
    teacher_images=0,  # the time decides
    images=0,
    long=1,
    held_out=400,
    samples=2000,
    steps=20,
    seeds=(0,),
    blocks=("1:2@64x16", "64:2:8"),
    preset="uvit-cifar10-small",
)


@dataclass(frozen=True, slots=True)
class Study:
    """The images, the output folder and the budget of a study.

    ``teacher``: weights of the dense model (.safetensors); None trains it first. ``device``,
    ``recipe``: where models are, and the recipe that every run trains by; without one the study
    has options of its own, and classes. ``features``: weights of ResNet-56 to score with.
    """

    data: str
    held_out: str
    size: int | None
    out: Path
    budget: Budget
    teacher: Path | None = None
    device: str = "cpu"
    recipe: str | None = None
    precision: str = "no"
    features: Path | None = None

    @property
    def teacher_weights(self) -> Path:
        """The path of the trained dense model."""
        return self.teacher or self.out / "teacher" / "student.safetensors"

    def open_training_data(self) -> ImageData:
        """Opens the training images."""
        return open_data(self.data, size=self.size, labels=self.recipe is None)

    def open_test_data(self, limit: int | None = None) -> ImageData:
        """Opens the held-out images, at most ``limit``."""
        return open_data(self.held_out, size=self.size, limit=limit, labels=self.recipe is None)

    def open_held_out(self) -> ImageData:
        """Opens the images that held-out losses are measured on."""
        return self.open_test_data(self.budget.held_out)

    def make_model(self, width: int | None = None) -> UViT:
        """Makes a dense U-ViT with random weights; its last class stands for "no class".

        ``width``: None is that of the teacher.
        """
        sizes = self._list_sizes(width or self.budget.width)
        with torch.device(self.device):
            return UViT(**sizes)

    def _list_sizes(self, width: int) -> Mapping[str, Any]:
        """Returns the options of the model's constructor."""
        if self.budget.preset is not None:
            return PRESETS[self.budget.preset].config
        data = self.open_training_data()
        assert data.classes is not None or self.recipe, "the study needs labelled images"
        return {
            "img_size": data.shape[-1],
            "patch_size": 2,
            "in_chans": data.shape[0],
            "embed_dim": width,
            "depth": self.budget.depth,
            "num_heads": 4,
            "num_classes": 0 if data.classes is None else data.classes + 1,
            "mlp_time_embed": True,
            "pos_std": 0.5,
        }

    @property
    def sample_batch(self) -> int:
        """Images that are sampled at once."""
        return CHUNK if self.device == "cpu" else 500

    def make_inputs(self) -> tuple[Tensor, ...]:
        """Returns the inputs of one forward with one image."""
        data = self.open_training_data()
        x = torch.zeros(1, *data.shape), torch.zeros(1)
        inputs = x if data.classes is None else (*x, torch.zeros(1, dtype=torch.long))
        return tuple(tensor.to(self.device) for tensor in inputs)

    def make_common_options(self) -> dict[str, Any]:
        """Returns the options that all runs share."""
        if self.recipe is not None:
            options = find_recipe(self.recipe)["train"]
            kept = {name: options[name] for name in options if name not in OF_METHODS}
            return {**kept, "mixed_precision": self.precision}
        return {
            "batch_size": 64,
            "betas": (0.9, 0.99),
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "flip": True,
            "drop_condition": 0.1,
            "null_label": self.open_training_data().classes,
        }

    def make_teacher_options(self) -> dict[str, Any]:
        """Returns the options of the teacher's own training, from random weights."""
        if self.recipe is not None:
            images = self.budget.teacher_images
            changed = {"images": images, "ema_decay": 0.999, "warmup_images": images // 20}
            changed["save_every"] = max(1, images // 3)  # seconds each
            return {**self.make_common_options(), "method": "dense", **changed}
        return {
            **self.make_common_options(),
            "method": "dense",
            "images": self.budget.teacher_images,
            "lr": 1e-3,
            "warmup_images": min(6400, self.budget.teacher_images // 10),
            "ema_decay": 0.9995,
            "held_out_every": self.budget.teacher_images // 8,
        }

    def make_student_options(self, setting: Setting) -> dict[str, Any]:
        """Returns the options of one student."""
        if setting.method == "narrow-long":
            images = {"images": self.budget.teacher_images + self.budget.images}
            return {**self.make_teacher_options(), **images, "seed": setting.seed}
        images = {} if setting.method == "untrained" else {"images": self.budget.images}
        if self.recipe is not None:
            about = {"method": setting.method, "seed": setting.seed, **images}
            return {**self.make_common_options(), **about, **setting.options}
        ema = {} if setting.method == "untrained" else {"ema_decay": 0.98}
        return {
            **self.make_common_options(),
            "method": "dense" if setting.method in SMALLER else setting.method,
            "batch_size": 32,
            "lr": 5e-4,
            **ema,
            **images,
            **setting.options,
            "seed": setting.seed,
        }

    def list_settings(self, group: str) -> Iterator[Setting]:
        """Yields the students of a group, seed after seed."""
        groups = {
            "methods": self.list_method_runs,
            "long": self.list_long_runs,
            "sweep": lambda: list_sweep(self.budget),
            "blocks": self.list_block_runs,
            "settled": self.list_settled_runs,
            "tuned": lambda: self.list_tuned_runs("tuned"),
            "tuned-long": lambda: self.list_tuned_runs("tuned-long"),
            "baselines": lambda: list_baseline_runs(self.budget),
            TIMED: lambda: list_timed_runs(self.budget),
        }
        return groups[group]()

    def list_method_runs(self) -> Iterator[Setting]:
        """Yields every method at every pattern."""
        for seed in self.budget.seeds:
            yield Setting("methods", "dense", None, seed)
            for pattern in self.budget.patterns:
                if seed == self.budget.seeds[0]:
                    yield Setting("methods", "untrained", pattern, seed)
                for method in METHODS:
                    yield Setting("methods", method, pattern, seed)

    def list_long_runs(self) -> Iterator[Setting]:
        """Yields methods at two patterns, with more images and the sweep's best learning rate."""
        options = {"images": self.budget.images * self.budget.long, "lr": 2e-3}
        for seed in self.budget.seeds:
            yield Setting("long", "dense", None, seed, options)
            for pattern in ("2:4", "1:8"):
                for method in ("asp", "ste", "sr-ste", "sparsedm"):
                    yield Setting("long", method, pattern, seed, options)

    def list_block_runs(self) -> Iterator[Setting]:
        """Yields a few methods at block patterns and at the per-row patterns of their densities."""
        for seed in self.budget.seeds:
            yield Setting("blocks", "dense", None, seed)
            for pattern in self.budget.blocks:
                if seed == self.budget.seeds[0]:
                    yield Setting("blocks", "untrained", pattern, seed)
                for method in ("asp", "ste", "sparsedm"):
                    yield Setting("blocks", method, pattern, seed)

    def list_settled_runs(self) -> Iterator[Setting]:
        """Yields starts from OBS and masks frozen at half of the images, at the best rate."""
        options = {"lr": 2e-3}
        for seed in self.budget.seeds:
            yield Setting("settled", "dense", None, seed, options)
            for pattern in self.budget.settled:
                yield Setting("settled", "asp", pattern, seed, options)
                yield Setting("settled", "asp", pattern, seed, {**options, "start": "obs"})
                yield Setting("settled", "ste", pattern, seed, options)
                yield Setting("settled", "ste", pattern, seed, {**options, "freeze": 0.5})
                both = {**options, "start": "obs", "freeze": 0.5}
                yield Setting("settled", "ste", pattern, seed, both)

    def list_tuned_runs(self, group: str) -> Iterator[Setting]:
        """Yields every method at the rates of its pattern; longer runs of the strongest alone."""
        longer = group == "tuned-long"
        images = {"images": self.budget.images * self.budget.long} if longer else {}
        methods = ("asp", "ste", "obs-distill") if longer else TUNED
        for seed in self.budget.seeds:
            for rate in (5e-4, 1e-3, 2e-3):
                yield Setting(group, "dense", None, seed, {**images, "lr": rate})
            for pattern in self.budget.tuned:
                for rate in RATES[pattern][:1] if longer else RATES[pattern]:
                    for method in methods:
                        yield Setting(group, method, pattern, seed, {**images, "lr": rate})
