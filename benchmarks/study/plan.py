"""The runs of the study of methods: one teacher, then many students of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from sparsedm_compiler.data import ImageData, open_data
from sparsedm_compiler.models import UViT

GROUPS = ("methods", "long", "sweep", "blocks", "settled", "tuned", "tuned-long")
"""Every method at every pattern; some with more images; one option at a time; block patterns; masks
that begin with OBS and settle; every method at the learning rates of its pattern, and some of them
with more images."""

METHODS = ("sparsedm", "ste", "sr-ste", "asp", "progressive", "transfer")
PATTERNS = ("2:4", "1:4", "1:8", "2:4x4", "1:4x4", "1:8x4")
BLOCKS = ("2:4", "1:2@32x8", "1:4", "1:4@32x8", "1:2@32x8+2:4")
"""Block patterns, each beside the per-row pattern of its density."""
SETTLED = ("2:4", "1:4", "1:8")
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
    tuned: tuple[str, ...] = tuple(RATES)
    judge_epochs: int = 6


SMALL = Budget(240_000, 6_400, 4, 400, 600, 10)
QUICK = Budget(
    512, 128, 2, 64, 40, 4, (0,), 32, 2, ("2:4", "1:4x4"), BLOCKS[1::3], ("1:4",), ("1:8",), 1
)


@dataclass(frozen=True, slots=True)
class Setting:
    """One student, in the table ``group``, trained with ``options`` of FinetuneConfig."""

    group: str
    method: str
    pattern: str | None
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        extra = [f"{key}={value}" for key, value in self.options.items()]
        parts = [self.method, self.pattern or "dense", f"seed{self.seed}", *extra]
        return "-".join(parts).replace(":", "_").replace("[", "").replace("]", "").replace(" ", "")


@dataclass(frozen=True, slots=True)
class Study:
    """The images, the output folder and the budget of a study.

    ``teacher``: weights of the dense model (.safetensors); None trains it first.
    """

    data: str
    held_out: str
    size: int | None
    out: Path
    budget: Budget
    teacher: Path | None = None

    @property
    def teacher_weights(self) -> Path:
        """The path of the trained dense model."""
        return self.teacher or self.out / "teacher" / "student.safetensors"

    def open_training_data(self) -> ImageData:
        """Opens the training images."""
        return open_data(self.data, size=self.size)

    def open_test_data(self, limit: int | None = None) -> ImageData:
        """Opens the held-out images, at most ``limit``."""
        return open_data(self.held_out, size=self.size, limit=limit)

    def make_model(self) -> nn.Module:
        """Makes the dense U-ViT with random weights; its last class stands for "no class"."""
        data = self.open_training_data()
        assert data.classes is not None, "the study needs labelled images"
        return UViT(
            img_size=data.shape[-1],
            patch_size=2,
            in_chans=data.shape[0],
            embed_dim=self.budget.width,
            depth=self.budget.depth,
            num_heads=4,
            num_classes=data.classes + 1,
            mlp_time_embed=True,
            pos_std=0.5,
        )

    def make_common_options(self) -> dict[str, Any]:
        """Returns the options that all runs share."""
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
        images = {} if setting.method == "untrained" else {"images": self.budget.images}
        ema = {} if setting.method == "untrained" else {"ema_decay": 0.98}
        return {
            **self.make_common_options(),
            "method": setting.method,
            "batch_size": 32,
            "lr": 5e-4,
            **ema,
            **images,
            **setting.options,
            "seed": setting.seed,
        }

    def list_settings(self, group: str) -> Iterator[Setting]:
        """Yields the students of a group, seed after seed."""
        if group == "methods":
            for seed in self.budget.seeds:
                yield Setting(group, "dense", None, seed)
                for pattern in self.budget.patterns:
                    if seed == self.budget.seeds[0]:
                        yield Setting(group, "untrained", pattern, seed)
                    for method in METHODS:
                        yield Setting(group, method, pattern, seed)
        elif group == "long":
            yield from self.list_long_runs()
        elif group == "blocks":
            yield from self.list_block_runs()
        elif group == "settled":
            yield from self.list_settled_runs()
        elif group.startswith("tuned"):
            yield from self.list_tuned_runs(group)
        else:
            yield from self.list_sweep()

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

    def list_sweep(self) -> Iterator[Setting]:
        """Yields single changes to STE with a teacher, at 1:4 and 1:8; then longer runs."""
        changes: tuple[dict[str, Any], ...] = (
            {},
            {"sr_ste_lambda": 1e-5},
            {"sr_ste_lambda": 2e-4},
            {"sr_ste_lambda": 1e-2, "sr_ste_form": "decoupled"},
            {"sr_ste_lambda": 1.0, "sr_ste_form": "decoupled"},
            {"beta": 0.0},
            {"beta": 1.0},
            {"lr": 2e-4},
            {"lr": 1e-3},
            {"lr": 2e-3},
        )
        for pattern in ("1:4", "1:8"):
            for change in changes:
                yield self._make_sweep_setting(pattern, change)
        images = self.budget.images * self.budget.long
        for lam in (0.0, 2e-4):
            for lr in (5e-4, 1e-3):
                yield self._make_sweep_setting(
                    "1:8", {"sr_ste_lambda": lam, "lr": lr, "images": images}
                )

    def _make_sweep_setting(self, pattern: str, change: Mapping[str, Any]) -> Setting:
        options = {"sr_ste_lambda": 0.0, **change}
        return Setting("sweep", "sparsedm", pattern, self.budget.seeds[0], options)
