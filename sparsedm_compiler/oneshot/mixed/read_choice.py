"""Reading of the file of a ``PatternChoice``, whose values are checked one by one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...config import POLICIES
from ...errors import ConfigError, PatternError
from ...patterns import Pattern

UNITS = ("MACs", "ms")
SCORES = ("output", "layer", "taylor")
KEYS = frozenset(
    (
        *("pattern", "keep_dense", "overrides", "policy"),
        *("unit", "budget", "cost", "fixed", "score", "error", "layers"),
    )
)
LAYER_KEYS = frozenset(("weight", "pattern", "errors", "costs"))


def read_choice(path: Path) -> dict[str, Any]:
    """Reads the file that ``PatternChoice.save`` writes. Raises ConfigError where it is damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error
    try:
        check_choice(values)
    except (ConfigError, PatternError) as error:
        raise ConfigError(f"{path} is no choice of patterns: {error}") from error
    return dict(values)


def check_choice(values: Any) -> None:
    """Raises ConfigError or PatternError unless ``values`` are those of a choice."""
    check_keys(values, KEYS, "it")
    check_text(values["unit"], UNITS, "unit")
    check_text(values["score"], SCORES, "score")
    check_text(values["policy"], POLICIES, "policy")
    for name in ("budget", "cost", "fixed", "error"):
        check_number(values[name], name)
    dense, layers = values["keep_dense"], values["layers"]
    if not isinstance(dense, list) or not all(isinstance(glob, str) for glob in dense):
        raise ConfigError(f"keep_dense {dense!r} is no list of names")
    if not isinstance(layers, list) or not layers:
        raise ConfigError("layers is no list of weights")
    for row in layers:
        check_layer(row)
    names = [row["weight"] for row in layers]
    if len({*names}) < len(names):
        raise ConfigError("a weight stands in layers twice")
    check_pattern(values["pattern"], "pattern")
    cost = values["fixed"] + sum(row["costs"][row["pattern"]] for row in layers)
    if not math.isclose(cost, values["cost"], rel_tol=1e-9):
        raise ConfigError(f"its layers cost {cost:,.6g} together, not {values['cost']:,.6g}")


def check_layer(row: Any) -> None:
    """Raises ConfigError or PatternError unless ``row`` is that of a weight."""
    check_keys(row, LAYER_KEYS, "a layer")
    name = row["weight"]
    if not isinstance(name, str):
        raise ConfigError(f"weight {name!r} is no name")
    for part in ("errors", "costs"):
        if not isinstance(row[part], Mapping):
            raise ConfigError(f"{part} of {name} are no numbers by pattern")
        for text, number in row[part].items():
            check_pattern(text, f"a pattern of {name}")
            check_number(number, f"{part} of {name} at {text}")
    check_pattern(row["pattern"], f"the pattern of {name}")
    if row["errors"].keys() != row["costs"].keys() or row["pattern"] not in row["errors"]:
        raise ConfigError(f"errors and costs of {name} are not of the same patterns, or lack its")


def check_keys(values: Any, keys: frozenset[str], owner: str) -> None:
    """Raises ConfigError unless ``values`` is a mapping of just those keys."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{owner} is a {type(values).__name__}")
    if missing := sorted(keys - values.keys()):
        raise ConfigError(f"{owner} lacks {', '.join(missing)}")
    if unknown := sorted(values.keys() - keys):
        raise ConfigError(f"{owner} has {', '.join(unknown)}, which no choice has")


def check_text(value: Any, known: tuple[str, ...], name: str) -> None:
    """Raises ConfigError unless ``value`` is one of the known words."""
    if value not in known:
        raise ConfigError(f"{name} {value!r} is none of {', '.join(known)}")


def check_number(value: Any, name: str) -> None:
    """Raises ConfigError unless ``value`` is a finite number >= 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ConfigError(f"{name} {value!r} is no number >= 0")


def check_pattern(value: Any, name: str) -> None:
    """Raises ConfigError or PatternError unless ``value`` is the text of a pattern."""
    if not isinstance(value, str):
        raise ConfigError(f"{name} {value!r} is no pattern")
    Pattern.parse(value)
