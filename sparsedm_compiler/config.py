"""``Config``: every option of ``compile``, checked and frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError
from .pattern import Pattern

MODES = ("train", "infer")
POLICIES = ("structural", "uvit")

KeepDense = tuple[str, ...] | Callable[[str], bool]
"""Globs over module and parameter names, or a predicate over parameter names."""

Inner = str | Callable[..., Any]
"""What compiles the rewritten graph: "auto", a torch.compile backend's name, or a backend."""


@dataclass(frozen=True, slots=True)
class Config:
    """What to prune to which pattern, and what compiles the result."""

    pattern: Pattern
    mode: str = "train"
    keep_dense: KeepDense = ()
    overrides: tuple[tuple[str, Pattern], ...] = ()
    policy: str = "structural"
    inner: Inner = "auto"

    @staticmethod
    def of(
        pattern: str | Pattern,
        *,
        mode: str = "train",
        keep_dense: str | Iterable[str] | Callable[[str], bool] = (),
        overrides: Mapping[str, str | Pattern] | None = None,
        policy: str = "structural",
        inner: Inner = "auto",
    ) -> Config:
        """The checked Config of these options. Raises PatternError, ConfigError."""
        for value, name, allowed in ((mode, "mode", MODES), (policy, "policy", POLICIES)):
            if value not in allowed:
                raise ConfigError(f"{name} {value!r} is neither {' nor '.join(map(repr, allowed))}")
        if isinstance(keep_dense, str):
            keep_dense = (keep_dense,)
        dense = keep_dense if callable(keep_dense) else tuple(keep_dense)
        if not callable(dense) and not all(isinstance(glob, str) for glob in dense):
            raise ConfigError(f"keep_dense {dense!r} is not made of names and globs")
        chosen = tuple((glob, Pattern.parse(text)) for glob, text in (overrides or {}).items())
        return Config(Pattern.parse(pattern), mode, dense, chosen, policy, inner)
