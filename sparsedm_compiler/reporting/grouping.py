"""Groups of runs that differ in their seed alone, and the options that differ between runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError, PatternError
from ..patterns import Pattern
from .run_record import RunRecord

SEED_DEPENDENT = ("seed", "train.seed", "sample.seed", "out")
"""Options that may differ between the seeds of one experiment."""
ABSENT = "-"


@dataclass(frozen=True, slots=True)
class SeedGroup:
    """Runs, by name, that differ in nothing but their seeds."""

    runs: Mapping[str, RunRecord]

    @property
    def first(self) -> RunRecord:
        """The first run, for the values that all of them share."""
        return next(iter(self.runs.values()))


def name_runs(runs: Sequence[RunRecord]) -> dict[str, RunRecord]:
    """Returns the runs by name, preceded by parent folders where names would be equal.

    Raises DataError for no run, and for the same folder twice.
    """
    if not runs:
        raise DataError("there is no run to report on: name the folder of at least one")
    folders = [run.folder.resolve() for run in runs]
    if twice := [str(path) for path in dict.fromkeys(folders) if folders.count(path) > 1]:
        raise DataError(f"the run {twice[0]} is named twice")
    names, depth = [run.name for run in runs], 1
    while len(set(names)) < len(names):
        depth += 1
        names = [
            "/".join(folder.parts[-depth:]) if names.count(name) > 1 else name
            for name, folder in zip(names, folders, strict=True)
        ]
    return dict(zip(names, runs, strict=True))


def group_runs(runs: Mapping[str, RunRecord]) -> list[SeedGroup]:
    """Groups finished runs that differ in their seed alone; every other run is a group of one."""
    groups: dict[str, dict[str, RunRecord]] = {}
    for name, run in runs.items():
        options = flatten_options(run.config)
        shared = {option: value for option, value in options if option not in SEED_DEPENDENT}
        key = json.dumps([run.method, run.pattern, shared], default=str, sort_keys=True)
        if not run.finished or run.seed in {member.seed for member in groups.get(key, {}).values()}:
            key += name
        groups.setdefault(key, {})[name] = run
    return [SeedGroup(members) for members in groups.values()]


def sort_by_pattern(groups: Sequence[SeedGroup]) -> list[SeedGroup]:
    """Returns the groups from dense to sparse; groups of one pattern keep their order."""
    return sorted(groups, key=lambda group: make_sort_key(group.first.pattern))


def make_sort_key(text: str | None) -> tuple[float, int, str]:
    """Returns the sort key of a pattern: by density from dense on, then by rows that share a mask.

    Text that is no pattern sorts last.
    """
    try:
        pattern = Pattern.parse(text or "1:1")
    except PatternError:
        return (0.0, 0, str(text))
    return (-float(pattern.density), pattern.height, str(pattern))


def flatten_options(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every option by its dotted name, with its value.

    >>> dict(flatten_options({"model": "uvit", "train": {"lr": 0.1, "betas": [0.9, 0.99]}}))
    {'model': 'uvit', 'train.lr': 0.1, 'train.betas': [0.9, 0.99]}
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from flatten_options(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def find_differences(runs: Mapping[str, RunRecord]) -> dict[str, dict[str, str]]:
    """Returns the options that are not equal in all runs: option -> run -> value as text.

    The output folder is left out.
    """
    texts = {
        name: {option: format_value(value) for option, value in flatten_options(run.config)}
        for name, run in runs.items()
    }
    options = dict.fromkeys(option for values in texts.values() for option in values)
    table = {
        option: {name: values.get(option, ABSENT) for name, values in texts.items()}
        for option in options
        if option != "out"
    }
    return {option: values for option, values in table.items() if len({*values.values()}) > 1}


def format_value(value: Any) -> str:
    """Returns an option's value as text.

    >>> format_value("2:4"), format_value([0.9, 0.99]), format_value(None)
    ('2:4', '0.9, 0.99', 'none')
    """
    if value is None:
        return "none"
    return ", ".join(map(format_value, value)) if isinstance(value, list) else str(value)
