"""``FinetuneConfig``: every option of ``finetune``, checked and frozen."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ..errors import ConfigError

SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True, slots=True)
class FinetuneConfig:
    """How to train a student; optimizer, lambda and EMA default to the paper's CIFAR10 recipe.

    ``images``: how many to train on, epochs and all, rounded up to whole batches. ``batch_size``:
    unused where the data come in batches of their own. ``alpha``, ``beta``: weights of the loss
    against the true noise and against the teacher's. ``lr`` rises linearly over
    ``warmup_images``, then follows ``schedule``. ``sr_ste_lambda``, ``sr_ste_form``: of SR-STE
    (``sr_ste``); 0 is plain STE. ``ema_decay``: per step, ``min(ema_decay, (1 + n) / (10 + n))``
    after n steps; None keeps no average. ``max_grad_norm``: clips the gradient of the loss.
    ``held_out_every``: images between two held-out losses, besides the first and the last.
    """

    images: int = 128_000
    batch_size: int = 128
    alpha: float = 1.0
    beta: float = 0.1
    lr: float = 2e-4
    weight_decay: float = 0.03
    betas: tuple[float, float] = (0.99, 0.999)
    warmup_images: int = 0
    schedule: str = "cosine"
    sr_ste_lambda: float = 2e-4
    sr_ste_form: str = "paper"
    ema_decay: float | None = 0.9999
    max_grad_norm: float | None = None
    held_out_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("images", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} of a fine-tune is not >= 1")
        for name in ("alpha", "beta", "lr", "weight_decay", "warmup_images", "sr_ste_lambda"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} {getattr(self, name)} of a fine-tune is not >= 0")
        if self.schedule not in SCHEDULES:
            known = " nor ".join(map(repr, SCHEDULES))
            raise ConfigError(f"schedule {self.schedule!r} is neither {known}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay {self.ema_decay} is not in [0, 1); None keeps no average")
        for name in ("max_grad_norm", "held_out_every"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"{name} {getattr(self, name)} is not > 0; None switches it off")

    def having(self, options: dict[str, Any]) -> FinetuneConfig:
        """This config with ``options`` in place of its fields. Raises ConfigError.

        >>> FinetuneConfig().having({"lr": 1e-3}).lr
        0.001
        """
        known = [field.name for field in fields(self)]
        for name in options:
            if name not in known:
                raise ConfigError(f"finetune has no option {name!r}; it has {', '.join(known)}")
        return replace(self, **options)

    def lr_scale(self, seen: int, batch: int) -> float:
        """The share of ``lr`` for the step that takes the images seen to ``seen + batch``.

        >>> config = FinetuneConfig(images=1000, warmup_images=200)
        >>> [round(config.lr_scale(seen, 100), 2) for seen in (0, 100, 200, 600, 900)]
        [0.5, 1.0, 1.0, 0.5, 0.04]
        """
        if seen < self.warmup_images:
            return min(1.0, (seen + batch) / self.warmup_images)
        if self.schedule == "constant":
            return 1.0
        span = max(self.images - self.warmup_images, 1)
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (seen - self.warmup_images) / span))

    def held_out_due(self, before: int, seen: int) -> bool:
        """Whether the step from ``before`` to ``seen`` images calls for a held-out loss."""
        every = self.held_out_every or math.inf
        return seen >= self.images or seen // every != before // every

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return "finetune " + " ".join(f"{name}={value}" for name, value in self.as_dict().items())
