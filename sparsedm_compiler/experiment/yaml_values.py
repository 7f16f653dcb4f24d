"""YAML and JSON files, read into plain values and frozen dataclasses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ..errors import ConfigError, suggest

T = TypeVar("T")


def parse_yaml(text: str, where: str) -> Any:
    """Parses YAML (or JSON) text. Raises ConfigError that names ``where`` it comes from.

    JSON needs no PyYAML.

    >>> parse_yaml("{pattern: 2:4, lr: 1e-3}", "a test")
    {'pattern': '2:4', 'lr': 0.001}
    """
    try:
        return json.loads(text, parse_constant=refuse_constant)
    except ValueError:
        from .yaml_loader import load_yaml

        return load_yaml(text, where)


def refuse_constant(name: str) -> NoReturn:
    """Raises ValueError for NaN and Infinity, which Python's JSON has and YAML reads as text."""
    raise ValueError(name)


def read_mapping(path: Path) -> dict[str, Any]:
    """Reads a YAML or JSON file that holds a mapping. Raises ConfigError."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}, not sections such as train:")
    return values


def assign(values: dict[str, Any], assignment: str) -> None:
    """Carries out "section.name=value" in ``values``; the value is YAML. Raises ConfigError.

    >>> values = {"train": {"lr": 1.0}}
    >>> assign(values, "train.betas=[0.9, 0.99]"); values
    {'train': {'lr': 1.0, 'betas': [0.9, 0.99]}}
    """
    name, equals, text = assignment.partition("=")
    path = name.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"{assignment!r} is not section.name=value, e.g. train.lr=1e-3")
    inner = values
    for part in path[:-1]:
        inner = inner.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{assignment!r} looks into {part}, which is {inner!r}")
    inner[path[-1]] = parse_yaml(text, f"the value of {name}")


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``above`` on top of ``below``, section by section.

    >>> merge({"train": {"lr": 1, "seed": 2}}, {"train": {"lr": 3}})
    {'train': {'lr': 3, 'seed': 2}}
    """
    values = dict(below)
    for name, value in above.items():
        inner = values.get(name)
        both = isinstance(inner, Mapping) and isinstance(value, Mapping)
        values[name] = merge(inner, value) if both else value  # type: ignore[arg-type]
    return values


def build(cls: type[T], values: Any, where: str) -> T:
    """Returns ``cls(**values)``, lists as tuples. Raises ConfigError for unknown names."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} is {values!r}, not names and values")
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ConfigError(f"{where} has no {name!r}; {suggest(str(name), known, 'it has')}")
    lists = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    try:
        return cls(**lists)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error
