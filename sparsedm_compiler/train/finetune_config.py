"""``FinetuneConfig``: every option of ``finetune``, checked and frozen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, suggest
from .mask_options import check_mask_options
from .methods import find_method
from .option_checks import check_pairs, check_values, make_counts_whole


@dataclass(frozen=True, slots=True)
class FinetuneConfig:
    """All options of a fine-tune; optimizer, lambda and EMA default to the paper's CIFAR10 recipe.

    ``FinetuneConfig.create`` starts from the options of a method. Every count of images is of
    images trained on, epochs and all. Raises ConfigError for values that are out of range or do not
    go together.

    Attributes:
        method: How to train, one of METHODS.
        images: Images to train on, rounded up to whole batches.
        batch_size: Images per optimizer step, over all processes and accumulation steps; unused
            where the data come in batches of their own.
        accumulation: Forward and backward passes per optimizer step and process.
        objective: What the models predict: "eps" the noise, "v" the velocity, "x0" the image,
            "flow" noise minus image (flow matching).
        levels: Distribution of noise levels, "uniform" or, for flow matching alone,
            "logit-normal".
        alpha: Weight of the loss against the truth.
        beta: Weight of the loss against the teacher.
        teacher: "given" is the teacher passed to ``finetune``, "none" no teacher, "previous" the
            student of the stage before.
        teacher_cache: A folder for the teacher's outputs. Each is computed once and then read, also
            by later runs with the same teacher, data and seed, which need no teacher any more once
            all are there. None computes them in every step.
        teacher_dtype: The precision in which the teacher's outputs are used and kept, "fp32",
            "bf16" or "fp16".
        sr_ste_lambda: Lambda of SR-STE (Zhou et al. 2021, see ``sr_ste``); 0 is plain STE.
        sr_ste_form: Form of SR-STE: "paper" adds the decay of pruned weights to the gradient,
            "decoupled" decays the weights themselves by lr * lambda.
        static_mask: Whether the first mask is kept to the end.
        start: The student's weights before the first step: "given" as they are, or pruned in one
            shot by "obs" (SparseGPT, Frantar & Alistarh 2023), "wanda" (Sun et al. 2023) or
            "magnitude" (``prune_one_shot``).
        start_images: Training images that a one-shot start is calibrated with, from the first.
        freeze: The share of the images, in (0, 1], after which masks stay what they are, as
            ASP's do from the start (``freeze_masks``); of a staged run, of its last stage. None
            never freezes them.
        mask_every: Steps between two choices of the masks (``hold_masks``), whose cost falls as
            1/k (as in Hu et al. 2024, ICML); 1 computes them in every forward.
        score: What the kept weights are the largest of: "magnitude" ``|w|``, or "saliency"
            ``w^2 E[g^2]`` with Adam's second moment, the loss of removing w by OBD (LeCun et al.
            1990) with the empirical Fisher information.
        soft_threshold: Whether kept weights are shrunk by the largest pruned magnitude of their
            group, times a fixed scale (S-STE, Hu et al. 2024, NeurIPS; ``soften_masks``); the
            result is written into the weights at the end, or where masks freeze.
        staged: Whether the run passes through ``stages``.
        stages: Patterns, each for an equal share of the images, the last the student's own. Empty:
            those of ``plan_patterns``.
        optimizer: The optimizer, one of OPTIMIZERS: "adamw" of torch, or AdamW of bitsandbytes or
            torchao, whose moments take 8 bits or may leave the card ("paged").
        lr: Peak learning rate.
        weight_decay: Weight decay of AdamW.
        betas: Betas of AdamW.
        warmup_images: Images over which the learning rate rises linearly from 0.
        schedule: Learning rate after the warm-up, "cosine" (down to 0 at the end) or "constant".
        ema_decay: Decay of the EMA per step; after n steps it is
            ``min(ema_decay, (1 + n) / (10 + n))``. None keeps no EMA.
        max_grad_norm: Norm to which the gradient of the loss is clipped; None does not clip.
        mixed_precision: "no", or "bf16" or "fp16" for autocast; parameters keep their dtype.
        gradient_checkpointing: Whether the backward pass computes the activations of each block
            again instead of keeping them: less memory, about a third more time, the same
            gradients.
        shard: Whether each process keeps only a share of every parameter, gradient and optimizer
            state (FSDP2). Repeated blocks are gathered one at a time; those that share weights
            with others stay whole for a step, and so does a diffusers student under checkpointing.
        only: The parameters that train: "all", or "lora", adapters alone beside the frozen sparse
            weights, which they are merged into at the end without leaving the pattern. A student
            without adapters gets some at all its linear layers. SR-STE, which moves the sparse
            weights, is off.
        lora_rank: Rank of those adapters.
        flip: Whether images are mirrored, each with probability 1/2.
        drop_condition: Share of images, in [0, 1], that lose their condition, for classifier-free
            guidance; they get ``null_label``, or zeros in place of text.
        null_label: The class that stands for "no class"; None where there is none.
        workers: Processes that load data; 0 loads in the training process.
        seed: Seed of order, noise, flips, drops and dropout.
        held_out_every: Images between held-out losses, besides the first and the last; None
            measures only those two.
        save_every: Images between checkpoints; None makes ten of them.
        log_every: Images between lines of the log; None is 50 batches, fewer in short runs.
        sample_every: Images between sample grids; None draws none.
        keep: Checkpoints to keep, besides the best.
    """

    method: str = "sparsedm"
    images: int = 128_000
    batch_size: int = 128
    accumulation: int = 1
    objective: str = "eps"
    levels: str = "uniform"
    alpha: float = 1.0
    beta: float = 0.1
    teacher: str = "given"
    teacher_cache: str | None = None
    teacher_dtype: str = "fp32"
    sr_ste_lambda: float = 2e-4
    sr_ste_form: str = "paper"
    static_mask: bool = False
    start: str = "given"
    start_images: int = 512
    freeze: float | None = None
    mask_every: int = 1
    score: str = "magnitude"
    soft_threshold: bool = False
    staged: bool = False
    stages: tuple[str, ...] = ()
    optimizer: str = "adamw"
    lr: float = 2e-4
    weight_decay: float = 0.03
    betas: tuple[float, float] = (0.99, 0.999)
    warmup_images: int = 0
    schedule: str = "cosine"
    ema_decay: float | None = 0.9999
    max_grad_norm: float | None = None
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    shard: bool = False
    only: str = "all"
    lora_rank: int = 16
    flip: bool = False
    drop_condition: float = 0.0
    null_label: int | None = None
    workers: int = 0
    seed: int = 0
    held_out_every: int | None = None
    save_every: int | None = None
    log_every: int | None = None
    sample_every: int | None = None
    keep: int = 2

    def __post_init__(self) -> None:
        find_method(self.method)
        check_values(self)
        check_mask_options(self)
        check_pairs(self)

    @staticmethod
    def create(method: str = "sparsedm", **options: Any) -> FinetuneConfig:
        """Returns the config of a method.

        Args:
            method: One of METHODS.
            **options: Fields of FinetuneConfig by name, in place of the method's own.

        Returns:
            The config; what neither the method nor ``options`` sets has its default.

        Raises:
            ConfigError: There is no such method or option, or a value is out of range.

        Example:
            >>> FinetuneConfig.create("ste", lr=1e-3).beta
            0.0
        """
        return FinetuneConfig().with_options({"method": method, **options})

    def with_options(self, options: Mapping[str, Any]) -> FinetuneConfig:
        """Returns a copy with other options.

        Args:
            options: Values by field name. With "method" come the method's own options; those that
                are named beside it win.

        Returns:
            The new config.

        Raises:
            ConfigError: There is no such method or option, or a value is out of range.

        Example:
            >>> FinetuneConfig().with_options({"lr": 1e-3}).lr
            0.001
        """
        known = [field.name for field in fields(self)]
        for name in options:
            if name not in known:
                hint = suggest(str(name), known, "it has")
                raise ConfigError(f"finetune has no option {name!r}; {hint}")
        theirs = find_method(options["method"]).options if "method" in options else {}
        plain: dict[str, Any] = {
            name: tuple(v) for name, v in options.items() if isinstance(v, list)
        }
        plain |= {name: str(v) for name, v in options.items() if isinstance(v, Path)}
        plain |= make_counts_whole(options)
        return replace(self, **{**theirs, **options, **plain})

    @property
    def sparse(self) -> bool:
        """Whether the method runs the student masked at all."""
        return find_method(self.method).sparse

    def compute_lr_scale(self, seen: int, batch: int, images: int | None = None) -> float:
        """Returns the factor of ``lr`` for one step: linear warm-up, then the schedule.

        Args:
            seen: Images trained on before the step.
            batch: Images of the step.
            images: Images of the whole schedule; None is those of the run.

        Returns:
            A factor in [0, 1].

        Example:
            >>> config = FinetuneConfig(images=1000, warmup_images=200)
            >>> [round(config.compute_lr_scale(seen, 100), 2) for seen in (0, 100, 200, 600, 900)]
            [0.5, 1.0, 1.0, 0.5, 0.04]
        """
        if seen < self.warmup_images:
            return min(1.0, (seen + batch) / self.warmup_images)
        if self.schedule == "constant":
            return 1.0
        span = max((self.images if images is None else images) - self.warmup_images, 1)
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (seen - self.warmup_images) / span))

    def is_due(self, every: int | None, before: int, seen: int) -> bool:
        """Returns whether a step from ``before`` to ``seen`` images passes a multiple of ``every``.

        The last step of the run always does, also with ``every`` None.
        """
        return seen >= self.images or (every is not None and seen // every != before // every)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def __str__(self) -> str:
        """The method, its budget, and every option that the method does not set so by itself."""
        usual, values = FinetuneConfig.create(self.method).as_dict(), self.as_dict()
        named = ("images", "batch_size", "lr")
        shown = [n for n in values if n in named or (n != "method" and values[n] != usual[n])]
        return f"finetune {self.method} " + " ".join(f"{n}={values[n]}" for n in shown)
