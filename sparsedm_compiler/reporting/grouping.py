"""Which runs belong together, and what differs between them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError, PatternError
from ..patterns import Pattern
from .run_record import RunRecord

PRIVATE = ("seed", "train.seed", "sample.seed", "out")
"""Options in which two seeds of one experiment may differ."""
ABSENT = "-"


@dataclass(frozen=True, slots=True)
class Group:
    """Runs, by name, that differ in nothing but their seeds."""

    runs: Mapping[str, RunRecord]

    @property
    def first(self) -> RunRecord:
        """One of them, for what they share."""
        return next(iter(self.runs.values()))


def named(runs: Sequence[RunRecord]) -> dict[str, RunRecord]:
    """The runs by name, with as much of their folder in front as tells them apart.

    Raises DataError for no run, and for one that is there twice.
    """
    if not runs:
        raise DataError("there is no run to report on: name the folder of at least one")
    places = [run.folder.resolve() for run in runs]
    if twice := [str(place) for place in dict.fromkeys(places) if places.count(place) > 1]:
        raise DataError(f"the run {twice[0]} is named twice")
    names, depth = [run.name for run in runs], 1
    while len(set(names)) < len(names):
        depth += 1
        names = [
            "/".join(place.parts[-depth:]) if names.count(name) > 1 else name
            for name, place in zip(names, places, strict=True)
        ]
    return dict(zip(names, runs, strict=True))


def grouped(runs: Mapping[str, RunRecord]) -> list[Group]:
    """Finished runs with all but their seed in common together, every other alone, in order."""
    found: dict[str, dict[str, RunRecord]] = {}
    for name, run in runs.items():
        shared = {option: value for option, value in flat(run.config) if option not in PRIVATE}
        key = json.dumps([run.method, run.pattern, shared], default=str, sort_keys=True)
        if not run.finished or run.seed in {each.seed for each in found.get(key, {}).values()}:
            key += name
        found.setdefault(key, {})[name] = run
    return [Group(members) for members in found.values()]


def by_pattern(groups: Sequence[Group]) -> list[Group]:
    """The groups from dense to sparse; in their order where the pattern is the same."""
    return sorted(groups, key=lambda group: rank(group.first.pattern))


def rank(pattern: str | None) -> tuple[float, int, str]:
    """Where a pattern stands: dense first, then by what is kept, then by rows that share it."""
    try:
        found = Pattern.parse(pattern or "1:1")
    except PatternError:
        return (0.0, 0, str(pattern))
    return (-float(found.density), found.height, str(found))


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every option by its dotted name, with its value.

    >>> dict(flat({"model": "uvit", "train": {"lr": 0.1, "betas": [0.9, 0.99]}}))
    {'model': 'uvit', 'train.lr': 0.1, 'train.betas': [0.9, 0.99]}
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def differing(runs: Mapping[str, RunRecord]) -> dict[str, dict[str, str]]:
    """Options, but for the folder, that are not the same in all runs: option -> run -> value."""
    texts = {name: {o: text(v) for o, v in flat(run.config)} for name, run in runs.items()}
    options = dict.fromkeys(o for found in texts.values() for o in found if o != "out")
    table = {o: {name: found.get(o, ABSENT) for name, found in texts.items()} for o in options}
    return {option: values for option, values in table.items() if len({*values.values()}) > 1}


def text(value: Any) -> str:
    """An option's value for people.

    >>> text("2:4"), text([0.9, 0.99]), text(None)
    ('2:4', '0.9, 0.99', 'none')
    """
    if value is None:
        return "none"
    return ", ".join(map(text, value)) if isinstance(value, list) else str(value)
