"""``CompileConfig``: every option of ``compile``, checked and frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from .errors import ConfigError
from .patterns import Pattern

MODES = ("train", "infer")
POLICIES = ("structural", "uvit", "all")
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
    """What to prune to which pattern, and what compiles the result.

    ``keep_dense``: globs over module and parameter names, or (until ``bind``) a predicate over
    parameter names. ``pattern``: None to prune nothing but what ``overrides`` name, which then are
    the weights whose values satisfy a pattern already. ``exclude_kernels``,
    ``autotune_seconds`` and ``finalize`` are for mode "infer".
    """

    pattern: Pattern | None
    mode: str = "train"
    keep_dense: tuple[str, ...] | Callable[[str], bool] = ()
    overrides: tuple[tuple[str, Pattern], ...] = ()
    policy: str = "structural"
    backend: Backend = "auto"
    kernels: tuple[tuple[str, str], ...] = ()
    exclude_kernels: tuple[str, ...] = ()
    autotune_seconds: float = 60.0
    finalize: bool = False

    @staticmethod
    def create(
        pattern: str | Pattern | None,
        *,
        mode: str = "train",
        keep_dense: str | Iterable[str] | Callable[[str], bool] = (),
        overrides: Mapping[str, str | Pattern] | None = None,
        policy: str = "structural",
        backend: Backend = "auto",
        kernels: Mapping[str, str] | None = None,
        exclude_kernels: str | Iterable[str] = (),
        autotune_seconds: float = 60.0,
        finalize: bool = False,
    ) -> CompileConfig:
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
        pinned = tuple((kernels or {}).items())
        exclude_kernels = (
            (exclude_kernels,) if isinstance(exclude_kernels, str) else tuple(exclude_kernels)
        )
        for kernel in (*(kernel for _, kernel in pinned), *exclude_kernels):
            if kernel not in list_kernels():
                raise ConfigError(f"kernel {kernel!r} is none of {', '.join(list_kernels())}")
        if pattern is None and (mode != "infer" or overrides):
            raise ConfigError(
                "without a pattern, the one the weights already satisfy is looked for, which is "
                "for mode='infer' and no overrides; else give one, e.g. pattern='2:4'"
            )
        parsed = None if pattern is None else Pattern.parse(pattern)
        if finalize and mode != "infer":
            raise ConfigError("finalize=True drops the dense weights: it needs mode='infer'")
        return CompileConfig(
            parsed,
            mode,
            dense,
            chosen,
            policy,
            backend,
            pinned,
            exclude_kernels,
            float(autotune_seconds),
            finalize,
        )

    def kernel_of(self, weight: str) -> str:
        """What the user asked to run this weight: one of ``list_kernels``."""
        return next((kernel for glob, kernel in self.kernels if matches(glob, (weight,))), "auto")

    @property
    def dense_globs(self) -> tuple[str, ...]:
        """``keep_dense`` of a bound config."""
        assert isinstance(self.keep_dense, tuple)
        return self.keep_dense

    def bind(self, parameters: Iterable[tuple[str, ...]]) -> CompileConfig:
        """This Config for a model with these parameter names: the predicate asked, globs checked.

        Raises ConfigError for a glob that names nothing.
        """
        parameters = tuple(parameters)
        config = self.evaluate_predicate(parameters)
        globs = [("keep_dense", glob) for glob in config.dense_globs]
        globs += [("overrides", glob) for glob, _ in self.overrides]
        globs += [("kernels", glob) for glob, _ in self.kernels]
        for option, glob in globs:
            if not any(matches(glob, names) for names in parameters):
                known = sorted({names[0].rpartition(".")[0] for names in parameters})
                near = get_close_matches(glob, known, n=3, cutoff=0.3) or known[:3]
                raise ConfigError(
                    f"{option} {glob!r} names no parameter of the model; near it: {', '.join(near)}"
                )
        return config

    def evaluate_predicate(self, parameters: Iterable[tuple[str, ...]]) -> CompileConfig:
        """This Config with the predicate of ``keep_dense`` replaced by the names it chooses."""
        if isinstance(self.keep_dense, tuple):
            return self
        chosen = (name for names in parameters for name in names if self.keep_dense(name))
        return replace(self, keep_dense=tuple(chosen))


def matches(glob: str, names: Iterable[str]) -> bool:
    """Whether the glob names one of these parameters, its module, or a module around it.

    >>> matches("blocks.*.attn", ["blocks.3.attn.qkv.weight"])
    True
    """
    for name in names:
        parts = name.split(".")
        if any(fnmatchcase(".".join(parts[:end]), glob) for end in range(1, len(parts) + 1)):
            return True
    return False
