"""YAML and JSON files, read into plain values and frozen dataclasses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..errors import ConfigError, suggest

T = TypeVar("T")

_WHOLE = re.compile(r"[-+]?[0-9][0-9_]*")
_REAL = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan"
)
_NUMBERS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"}


class _Loader(yaml.SafeLoader):
    """A YAML loader with decimal numbers: "2:4" is text (YAML 1.1 reads 124), 1e-3 is a number."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, form) for tag, form in resolvers if tag not in _NUMBERS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


for _tag, _form in (("int", _WHOLE), ("float", _REAL)):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_form.pattern})$"), list("-+.0123456789")
    )


def parse_yaml(text: str, where: str) -> Any:
    """Parses YAML (or JSON) text. Raises ConfigError that names ``where`` it comes from.

    >>> parse_yaml("{pattern: 2:4, lr: 1e-3}", "a test")
    {'pattern': '2:4', 'lr': 0.001}
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


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
