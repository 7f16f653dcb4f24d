"""``Stage``: a part of a run with one pattern and one teacher."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .. import ConfigError, Pattern, pattern_of
from .checkpoint import is_compiled
from .finetune_config import FinetuneConfig
from .mask_options import chooses_masks
from .methods import plan_patterns


@dataclass(frozen=True, slots=True)
class Stage:
    """The steps that begin after ``first`` to ``last - 1`` images; pattern None: dense."""

    number: int
    pattern: Pattern | None
    first: int
    last: int


def plan_stages(config: FinetuneConfig, student: nn.Module) -> tuple[Stage, ...]:
    """Returns the stages of a run. Raises ConfigError if method and student do not match."""
    compiled = is_compiled(student)
    if compiled and not config.sparse:
        raise ConfigError(
            f"method {config.method!r} trains a dense model, but this {type(student).__name__} "
            "was compiled to a pattern: give the model itself, or another method"
        )
    masks = config.staged or config.sr_ste_lambda > 0 or chooses_masks(config)
    if masks and not compiled:
        raise ConfigError(
            f"{type(student).__name__} was not compiled, so it has no masks to train "
            f"(method {config.method!r}); first: student = sparsedm_compiler.compile(model, "
            "pattern='2:4'), or method='dense'"
        )
    target = pattern_of(student) if compiled else None
    if target is None or not config.staged:
        return (Stage(0, target, 0, config.images),)
    patterns = tuple(map(Pattern.parse, config.stages)) or plan_patterns(target)
    if patterns[-1] != target:
        raise ConfigError(
            f"the last of the stages {', '.join(map(str, patterns))} is not the student's own "
            f"pattern '{target}'"
        )
    edges = [config.images * k // len(patterns) for k in range(len(patterns) + 1)]
    return tuple(Stage(k, p, edges[k], edges[k + 1]) for k, p in enumerate(patterns))
