"""``read_log``: the lines a run wrote while it trained, as values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import DataError


@dataclass(frozen=True, slots=True)
class Trained:
    """The line of a step: after ``images``, with the loss it had and the lr it took.

    ``flip_rate``: the share of the mask that changed since the line before, None where nothing is
    masked. ``images_per_second``: since the line before.
    """

    images: int
    loss: float
    lr: float
    noise_loss: float | None = None
    teacher_loss: float | None = None
    grad_norm: float | None = None
    flip_rate: float | None = None
    images_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """The held-out losses after ``images``: of the student and of its average (None without)."""

    images: int
    held_out: float
    held_out_ema: float | None = None


Entry = Trained | Held


def read_log(path: str | Path) -> tuple[Entry, ...]:
    """The entries of a log.jsonl in the order of their images; () for an empty file.

    A last line that the end of the process tore is left out. Where a resumed run went back to a
    checkpoint, the lines it wrote anew replace the old ones.
    Raises DataError, with file and line, for any other line that is no entry.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    entries: list[Entry] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            append(entries, parsed(json.loads(line)))
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(f"{path}:{number} is no line of a training log: {error}") from error
    return tuple(entries)


def parsed(line: Any) -> Entry:
    """The entry that a line's JSON holds; other fields are passed over. Raises ValueError."""
    if not isinstance(line, Mapping):
        raise ValueError(f"{line!r} is not an object")
    kind: type[Entry] = Held if "held_out" in line else Trained
    for field in fields(kind):
        optional = field.default is not MISSING
        value = line.get(field.name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number or (optional and value is None)):
            raise ValueError(f"{field.name!r} is {value!r}, not a number")
    return kind(**{field.name: line.get(field.name) for field in fields(kind)})  # type: ignore[arg-type]


def append(entries: list[Entry], entry: Entry) -> None:
    """Put ``entry`` at the end, after dropping what it replaces: all of its kind from there on."""
    beside = []
    while entries and entries[-1].images >= entry.images:
        last = entries.pop()
        if last.images == entry.images and type(last) is not type(entry):
            beside.append(last)
    entries += [*reversed(beside), entry]
