"""``METHODS``: the ways to train an N:M student, each a set of options of FinetuneConfig."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .. import ConfigError, Pattern

TEACHERS = ("given", "previous", "none")


@dataclass(frozen=True, slots=True)
class Method:
    """A way to train.

    Attributes:
        about: One line that says how it trains, and where it comes from.
        options: The options of FinetuneConfig that it starts from.
        sparse: Whether the student runs masked at all.
    """

    about: str
    options: Mapping[str, Any]
    sparse: bool = True


def _method(about: str, *, sparse: bool = True, **options: Any) -> Method:
    return Method(about, MappingProxyType(options), sparse)


_ALONE: Mapping[str, Any] = {"alpha": 1.0, "beta": 0.0, "teacher": "none"}

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "sparsedm": _method(
            "SR-STE and a dense teacher (SparseDM, eq. 9 to 14)",
            alpha=1.0,
            beta=0.1,
            sr_ste_lambda=2e-4,
        ),
        "ste": _method("straight-through gradients alone", sr_ste_lambda=0.0, **_ALONE),
        "sr-ste": _method("SR-STE without a teacher (Zhou et al. 2021)", **_ALONE),
        "asp": _method(
            "one mask, taken from the dense weights and never changed (Mishra et al. 2021)",
            sr_ste_lambda=0.0,
            static_mask=True,
            **_ALONE,
        ),
        "obs-distill": _method(
            "starts pruned by OBS and learns the dense teacher's outputs alone; masks follow STE "
            "for half of the run (docs/results/methods.md)",
            alpha=0.0,
            beta=1.0,
            sr_ste_lambda=0.0,
            start="obs",
            freeze=0.5,
        ),
        "progressive": _method(
            "the pattern is tightened in stages during one run",
            sr_ste_lambda=0.0,
            staged=True,
            **_ALONE,
        ),
        "transfer": _method(
            "each stage's student starts and teaches the next, sparser one (SparseDM)",
            alpha=1.0,
            beta=0.1,
            sr_ste_lambda=2e-4,
            staged=True,
            teacher="previous",
        ),
        "untrained": _method(
            "the mask alone, no training", images=0, sr_ste_lambda=0.0, ema_decay=None, **_ALONE
        ),
        "dense": _method(
            "no mask at all: what the same budget does for the dense model",
            sparse=False,
            sr_ste_lambda=0.0,
            **_ALONE,
        ),
    }
)
"""Every value of ``FinetuneConfig.method``."""


def find_method(name: str) -> Method:
    """Returns the method of that name. Raises ConfigError with all names if there is none."""
    if not isinstance(name, str) or name not in METHODS:
        raise ConfigError(f"method {name!r} is none of {', '.join(METHODS)}")
    return METHODS[name]


def plan_patterns(pattern: Pattern) -> tuple[Pattern, ...]:
    """Returns the patterns of a staged method: n is halved at every stage, down to ``pattern``.

    Where that leaves one stage alone, half of what ``pattern`` prunes is pruned first.

    >>> [str(stage) for stage in plan_patterns(Pattern.parse("1:8"))]
    ['4:8', '2:8', '1:8']
    >>> [str(stage) for stage in plan_patterns(Pattern.parse("2:4"))]
    ['3:4', '2:4']
    """
    return (*pattern.relaxations(), pattern)
