"""``CompileConfig``: every option of ``compile``, checked and frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from .errors import ConfigError
from .patterns import Pattern

MODES = ("train", "infer")
POLICIES = ("structural", "uvit", "all")
AUTOTUNE = ("measure", "table")
GRAPHS = "inductor-graphs"
"""The inner compiler that is Inductor with CUDA graphs, torch.compile's mode "reduce-overhead"."""

Backend = str | Callable[..., Any]
"""What compiles the rewritten graph: "auto", GRAPHS, a torch.compile backend's name, or a backend.
"""


_sparse_kernels: list[str] = []


def register_kernel_names(names: Iterable[str]) -> None:
    """Makes ``kernels=`` and ``exclude_kernels=`` know sparse kernels, after those known before.

    Raises:
        ConfigError: A kernel of that name is known already.
    """
    names = tuple(names)
    for name in names:
        if name in list_kernels():
            raise ConfigError(f"there is a kernel {name!r} already; give the new one its own name")
    _sparse_kernels.extend(names)


def unregister_kernel_names(names: Iterable[str]) -> None:
    """Makes ``kernels=`` and ``exclude_kernels=`` forget sparse kernels."""
    for name in names:
        _sparse_kernels.remove(name)


def list_kernels() -> tuple[str, ...]:
    """Returns all that ``kernels=`` may ask for a weight.

    "auto" is the fastest measured, "sparse" any sparse kernel; the others are kernels by name.
    """
    return ("auto", "dense", "sparse", *_sparse_kernels)


@dataclass(frozen=True, slots=True)
class CompileConfig:
    """Every option of ``compile`` but ``inplace``, checked and frozen.

    Attributes:
        pattern: What weights are pruned to. None prunes nothing but what ``overrides`` name,
            which then are the weights whose values satisfy a pattern already.
        mode: One of ``MODES``.
        keep_dense: Globs over module and parameter names, or (until ``bind``) a predicate over
            parameter names.
        overrides: (glob, pattern) pairs; the first match wins.
        policy: One of ``POLICIES``.
        backend: What compiles the rewritten graph.
        kernels: (glob, one of ``list_kernels()``) pairs; the first match wins.
        exclude_kernels: Kernels that are not to be used; for mode "infer".
        autotune: One of ``AUTOTUNE``; for mode "infer".
        autotune_seconds: The most seconds to spend on measuring kernels; for mode "infer".
        finalize: Whether only packed weights are kept; for mode "infer".
        regional: Whether Inductor compiles blocks that are repeated once for all of them.
    """

    pattern: Pattern | None
    mode: str = "train"
    keep_dense: tuple[str, ...] | Callable[[str], bool] = ()
    overrides: tuple[tuple[str, Pattern], ...] = ()
    policy: str = "structural"
    backend: Backend = "auto"
    kernels: tuple[tuple[str, str], ...] = ()
    exclude_kernels: tuple[str, ...] = ()
    autotune: str = "measure"
    autotune_seconds: float = 60.0
    finalize: bool = False
    regional: bool = False

    @staticmethod
    def create(pattern: str | Pattern | None, **options: Any) -> CompileConfig:
        """Returns the checked configuration of options in the form that ``compile`` takes.

        Args:
            pattern: A pattern or its text; None to detect patterns.
            **options: Any other attribute of this class; those left out have their defaults.

        Raises:
            PatternError: If a pattern is misspelled.
            ConfigError: For an unknown option, or a value that fits nothing.
        """
        names = [option.name for option in fields(CompileConfig)]
        for name in options:
            if name not in names:
                raise ConfigError(f"option {name!r} is none of {', '.join(names)}")
        parsed = None if pattern is None else Pattern.parse(pattern)
        values = {name: _NORMALIZE.get(name, _keep)(value) for name, value in options.items()}
        config = CompileConfig(parsed, **values)
        config.check()
        if pattern is None and config.overrides:
            raise _need_pattern()
        return config

    def check(self) -> None:
        """Raises ConfigError for values that fit nothing, or not each other."""
        choices = (
            (self.mode, "mode", MODES),
            (self.policy, "policy", POLICIES),
            (self.autotune, "autotune", AUTOTUNE),
        )
        for value, name, allowed in choices:
            if value not in allowed:
                raise ConfigError(f"{name} {value!r} is neither {' nor '.join(map(repr, allowed))}")
        for kernel in (*(kernel for _, kernel in self.kernels), *self.exclude_kernels):
            if kernel not in list_kernels():
                raise ConfigError(f"kernel {kernel!r} is none of {', '.join(list_kernels())}")
        if self.pattern is None and self.mode != "infer":
            raise _need_pattern()
        if self.finalize and self.mode != "infer":
            raise ConfigError("finalize=True drops the dense weights: it needs mode='infer'")

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON: all that concerns the model, nothing of the machine."""
        return {
            "pattern": None if self.pattern is None else str(self.pattern),
            "mode": self.mode,
            "policy": self.policy,
            "keep_dense": list(self.dense_globs),
            "overrides": {glob: str(pattern) for glob, pattern in self.overrides},
            "kernels": dict(self.kernels),
            "exclude_kernels": list(self.exclude_kernels),
            "finalize": self.finalize,
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any], *, backend: Backend = "auto") -> CompileConfig:
        """Returns the configuration that ``to_dict`` wrote.

        Raises:
            PatternError: If a pattern is misspelled.
            ConfigError: If a value fits nothing or an option is unknown.
            KeyError: If ``values`` are not those of a configuration.
        """
        options = dict(values)
        pattern, overrides = options.pop("pattern"), options.pop("overrides")
        config = CompileConfig.create(pattern, backend=backend, **options)
        # Detected patterns are overrides without a pattern, which ``create`` refuses from a user.
        return replace(config, overrides=_parse_overrides(overrides))

    def find_kernel(self, weight: str) -> str:
        """Returns what the user pinned to run this weight: of ``list_kernels()``."""
        return next((kernel for glob, kernel in self.kernels if matches(glob, (weight,))), "auto")

    @property
    def dense_globs(self) -> tuple[str, ...]:
        """``keep_dense`` of a bound configuration."""
        assert isinstance(self.keep_dense, tuple)
        return self.keep_dense

    def bind(self, parameters: Iterable[tuple[str, ...]]) -> CompileConfig:
        """Returns a copy for a model with these parameter names.

        The ``keep_dense`` predicate is evaluated, and every glob must match a parameter
        (ConfigError otherwise).
        """
        parameters = tuple(parameters)
        config = self.evaluate_predicate(parameters)
        globs = [("keep_dense", glob) for glob in config.dense_globs]
        globs += [("overrides", glob) for glob, _ in self.overrides]
        globs += [("kernels", glob) for glob, _ in self.kernels]
        for option, glob in globs:
            if not any(matches(glob, names) for names in parameters):
                known = sorted({names[0].rpartition(".")[0] or names[0] for names in parameters})
                near = get_close_matches(glob, known, n=3, cutoff=0.3) or known[:3]
                raise ConfigError(
                    f"{option} {glob!r} names no parameter of the model; near it: {', '.join(near)}"
                )
        return config

    def evaluate_predicate(self, parameters: Iterable[tuple[str, ...]]) -> CompileConfig:
        """Returns a copy in which the names that ``keep_dense`` accepts replace the predicate."""
        if isinstance(self.keep_dense, tuple):
            return self
        accepted = (name for names in parameters for name in names if self.keep_dense(name))
        return replace(self, keep_dense=tuple(accepted))


def _keep(value: Any) -> Any:
    return value


def _parse_globs(value: Any) -> Any:
    """Returns a tuple of globs; a predicate passes through. Raises ConfigError."""
    globs = (value,) if isinstance(value, str) else value if callable(value) else tuple(value)
    if not callable(globs) and not all(isinstance(glob, str) for glob in globs):
        raise ConfigError(f"keep_dense {globs!r} is not made of names and globs")
    return globs


def _parse_overrides(value: Mapping[str, str | Pattern] | None) -> tuple[tuple[str, Pattern], ...]:
    return tuple((glob, Pattern.parse(text)) for glob, text in (value or {}).items())


def _parse_names(value: str | Iterable[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _parse_kernels(value: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    return tuple((value or {}).items())


_NORMALIZE: Mapping[str, Callable[[Any], Any]] = {
    "keep_dense": _parse_globs,
    "overrides": _parse_overrides,
    "kernels": _parse_kernels,
    "exclude_kernels": _parse_names,
    "autotune_seconds": float,
}
"""From what a user may give to what ``CompileConfig`` holds, for options where they differ."""


def _need_pattern() -> ConfigError:
    return ConfigError(
        "without a pattern, the one the weights already satisfy is looked for, which is "
        "for mode='infer' and no overrides; else give one, e.g. pattern='2:4'"
    )


def matches(glob: str, names: Iterable[str]) -> bool:
    """Returns whether the glob names one of these parameters, or a module around it.

    >>> matches("blocks.*.attn", ["blocks.3.attn.qkv.weight"])
    True
    """
    for name in names:
        parts = name.split(".")
        if any(fnmatchcase(".".join(parts[:end]), glob) for end in range(1, len(parts) + 1)):
            return True
    return False
