"""``FinetuneConfig``: every option of ``finetune``, checked and frozen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ..errors import ConfigError, suggest
from .methods import TEACHERS, method_of

CHOICES: Mapping[str, tuple[str, ...]] = {
    "schedule": ("cosine", "constant"),
    "objective": ("eps", "v", "x0", "flow"),
    "levels": ("uniform", "logit-normal"),
    "mixed_precision": ("no", "bf16", "fp16"),
    "teacher": TEACHERS,
}
NOT_NEGATIVE = ("images", "alpha", "beta", "lr", "weight_decay", "warmup_images", "sr_ste_lambda")
POSITIVE = ("batch_size", "accumulation", "keep")
OPTIONAL = ("max_grad_norm", "held_out_every", "save_every", "log_every", "sample_every")
FREE = ("keep", "workers", "save_every", "sample_every")
"""Options a resumed run may change: what is written and how fast, not what is learnt."""


@dataclass(frozen=True, slots=True)
class FinetuneConfig:
    """How to train a student; optimizer, lambda and EMA default to the paper's CIFAR10 recipe.

    What and how long. ``method``: one of METHODS; ``FinetuneConfig.create`` starts from its
    options. ``images``: how many to train on, epochs and all, rounded up to whole batches.
    ``batch_size``: images per optimizer step, over all processes and ``accumulation`` parts; unused
    where the data come in batches of their own.

    Loss. ``objective``: what the models predict: "eps" the noise, "v" the velocity, "x0" the image,
    "flow" noise minus image (flow matching). ``levels``: how noise levels are drawn, "logit-normal"
    for flow matching alone. ``alpha``, ``beta``: weights of the loss against the truth and against
    the teacher. ``teacher``: "given", "none", or "previous": the student of the stage before.

    Masks. ``sr_ste_lambda``, ``sr_ste_form``: of SR-STE (``sr_ste``); 0 is plain STE.
    ``static_mask``: the first mask for ever. ``staged``: pass through ``stages`` (patterns, each
    for an equal share of the images; none: those of ``stages_towards``).

    Steps. ``lr`` rises linearly over ``warmup_images``, then follows ``schedule``. ``ema_decay``:
    per step, ``min(ema_decay, (1 + n) / (10 + n))`` after n steps; None keeps no average.
    ``max_grad_norm``: clips the gradient of the loss. ``mixed_precision``: "bf16" or "fp16" casts
    under autocast, parameters stay what they are. ``shard``: FSDP2, a share of every parameter,
    gradient and optimizer state per process.

    Data. ``flip``: mirror every other image. ``drop_condition``: share of images that lose their
    condition, for classifier-free guidance; they get ``null_label``, or zeros in place of text.
    ``workers``: processes that load data. ``seed``: of order, noise, flips, drops and dropout.

    Records, in images (None: never; ``log_every`` None: 50 batches, fewer in short runs).
    ``held_out_every``: besides the first and the last. ``keep``: checkpoints besides the best.
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
    sr_ste_lambda: float = 2e-4
    sr_ste_form: str = "paper"
    static_mask: bool = False
    staged: bool = False
    stages: tuple[str, ...] = ()
    lr: float = 2e-4
    weight_decay: float = 0.03
    betas: tuple[float, float] = (0.99, 0.999)
    warmup_images: int = 0
    schedule: str = "cosine"
    ema_decay: float | None = 0.9999
    max_grad_norm: float | None = None
    mixed_precision: str = "no"
    shard: bool = False
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
        method_of(self.method)
        for name in (*NOT_NEGATIVE, *POSITIVE, *OPTIONAL, "drop_condition", "workers"):
            self._check_number(name)
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                options = ", ".join(map(repr, known[:-1])) + f" nor {known[-1]!r}"
                raise ConfigError(f"{name} {getattr(self, name)!r} is neither {options}")
        if self.images == 0 and self.method != "untrained":
            raise ConfigError("images 0 of a fine-tune is not >= 1; method='untrained' trains none")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay {self.ema_decay} is not in [0, 1); None keeps no average")
        if self.drop_condition > 1:
            raise ConfigError(f"drop_condition {self.drop_condition} is not a share, in [0, 1]")
        if self.levels != "uniform" and self.objective != "flow":
            raise ConfigError(f"levels {self.levels!r} are for objective 'flow' alone")
        if self.shard and (self.teacher == "previous" or self.mixed_precision == "fp16"):
            raise ConfigError("shard=True goes with neither teacher 'previous' nor fp16; use bf16")
        if self.teacher == "previous" and not self.staged:
            raise ConfigError("teacher 'previous' is the student of the stage before: staged=True")

    def _check_number(self, name: str) -> None:
        """Raise ConfigError where that option is no finite number of its range."""
        value = getattr(self, name)
        if value is None and name in OPTIONAL:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{name} {value!r} of a fine-tune is not a number")
        if name in OPTIONAL and not value > 0:
            raise ConfigError(f"{name} {value} is not > 0; None switches it off")
        if name in POSITIVE and value < 1:
            raise ConfigError(f"{name} {value} of a fine-tune is not >= 1")
        if not 0 <= value < math.inf:
            raise ConfigError(f"{name} {value} of a fine-tune is not >= 0")

    @staticmethod
    def create(method: str = "sparsedm", **options: Any) -> FinetuneConfig:
        """The config of a method, with ``options`` in place of its own. Raises ConfigError.

        >>> FinetuneConfig.create("ste", lr=1e-3).beta
        0.0
        """
        return FinetuneConfig().with_options({"method": method, **options})

    def with_options(self, options: Mapping[str, Any]) -> FinetuneConfig:
        """This config with ``options`` in place of its fields; a method brings its own options.

        Raises ConfigError.

        >>> FinetuneConfig().with_options({"lr": 1e-3}).lr
        0.001
        """
        known = [field.name for field in fields(self)]
        for name in options:
            if name not in known:
                hint = suggest(name, known, "it has")
                raise ConfigError(f"finetune has no option {name!r}; {hint}")
        theirs = method_of(options["method"]).options if "method" in options else {}
        lists = {name: tuple(v) for name, v in options.items() if isinstance(v, list)}
        return replace(self, **{**theirs, **options, **lists})

    @property
    def sparse(self) -> bool:
        """Whether its method runs the student masked at all."""
        return method_of(self.method).sparse

    def lr_scale(self, seen: int, batch: int, images: int | None = None) -> float:
        """The share of ``lr`` for the step that takes the images seen to ``seen + batch``.

        ``images``: of the run, or of a stage whose rate starts anew.

        >>> config = FinetuneConfig(images=1000, warmup_images=200)
        >>> [round(config.lr_scale(seen, 100), 2) for seen in (0, 100, 200, 600, 900)]
        [0.5, 1.0, 1.0, 0.5, 0.04]
        """
        if seen < self.warmup_images:
            return min(1.0, (seen + batch) / self.warmup_images)
        if self.schedule == "constant":
            return 1.0
        span = max((self.images if images is None else images) - self.warmup_images, 1)
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (seen - self.warmup_images) / span))

    def due(self, every: int | None, before: int, seen: int) -> bool:
        """Whether the step from ``before`` to ``seen`` images passes a multiple of ``every``.

        The last step of the run does, whatever ``every`` is.
        """
        return seen >= self.images or (every is not None and seen // every != before // every)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def __str__(self) -> str:
        return "finetune " + " ".join(f"{name}={value}" for name, value in self.as_dict().items())
