"""Whether the options of a fine-tune that concern its masks go together."""

from __future__ import annotations

from typing import Protocol

from ..errors import ConfigError


class MaskOptions(Protocol):
    """The options of ``FinetuneConfig`` that decide on masks; see there for each."""

    @property
    def method(self) -> str: ...
    @property
    def sparse(self) -> bool: ...
    @property
    def only(self) -> str: ...
    @property
    def shard(self) -> bool: ...
    @property
    def static_mask(self) -> bool: ...
    @property
    def start(self) -> str: ...
    @property
    def freeze(self) -> float | None: ...
    @property
    def mask_every(self) -> int: ...
    @property
    def score(self) -> str: ...
    @property
    def soft_threshold(self) -> bool: ...


def holds_masks(config: MaskOptions) -> bool:
    """Returns whether masks are chosen between steps, and not in every forward."""
    return config.mask_every > 1 or config.score != "magnitude"


def chooses_masks(config: MaskOptions) -> bool:
    """Returns whether a run decides on masks itself, beyond what the student's calls compute."""
    settled = config.static_mask or config.freeze is not None or config.start != "given"
    return settled or config.soft_threshold or holds_masks(config)


def check_mask_options(config: MaskOptions) -> None:
    """Raises ConfigError for options of masks that are out of range or do not go together."""
    if config.freeze is not None and config.freeze > 1:
        raise ConfigError(f"freeze {config.freeze} is not a share, in (0, 1]")
    used = {
        "static_mask=True": config.static_mask,
        "mask_every": config.mask_every > 1,
        "score 'saliency'": config.score != "magnitude",
        "shard=True": config.shard,
    }
    others = [name for name, wanted in used.items() if wanted]
    if config.soft_threshold and others:
        raise ConfigError(f"soft_threshold=True does not go with {' and '.join(others)}")
    if config.start != "given" and config.shard:
        raise ConfigError(
            f"start {config.start!r} needs whole weights, not shard=True; prune the model first: "
            "sparsedm prune"
        )
    if config.only == "lora" and chooses_masks(config) and not config.static_mask:
        raise ConfigError("only='lora' trains adapters: it has no masks to start, freeze or hold")
    if chooses_masks(config) and not config.sparse:
        raise ConfigError(f"method {config.method!r} has no masks to start, freeze or hold")
