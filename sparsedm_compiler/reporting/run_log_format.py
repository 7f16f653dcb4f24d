"""The lines of a training run's log.jsonl, and how they are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import DataError


@dataclass(frozen=True, slots=True)
class StepEntry:
    """A line of the log about the training steps since the line before.

    Attributes:
        images: Images trained on so far.
        loss: The mean loss.
        lr: The learning rate of the last step.
        noise_loss: The mean of the denoising term, None where unknown.
        teacher_loss: The mean of the distillation term, None without a teacher.
        grad_norm: The norm of the last gradient, None where unknown.
        flip_rate: The share of the mask that changed, None where nothing is masked.
        images_per_second: The training speed.
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
class HeldOutEntry:
    """A line of the log about the held-out loss.

    Attributes:
        images: Images trained on so far.
        held_out: The held-out loss of the student.
        held_out_ema: The held-out loss of its EMA, None without one.
    """

    images: int
    held_out: float
    held_out_ema: float | None = None


LogEntry = StepEntry | HeldOutEntry


def read_log(path: str | Path) -> tuple[LogEntry, ...]:
    """Reads the log.jsonl of a training run.

    Fields that the entries do not have are ignored. A last line without its end, as a killed
    process leaves it, is ignored as well. Where a resumed run went back to a checkpoint, its new
    lines replace the old ones.

    Args:
        path: The log.

    Returns:
        The entries in the order of their images; none for an empty file.

    Raises:
        DataError: The file cannot be read, or a line (named by its number) is no entry.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    entries: list[LogEntry] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            append_entry(entries, parse_entry(json.loads(line)))
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(f"{path}:{number} is no line of a training log: {error}") from error
    return tuple(entries)


def parse_entry(line: Any) -> LogEntry:
    """Returns the entry in a line's JSON; other fields are ignored. Raises ValueError."""
    if not isinstance(line, Mapping):
        raise ValueError(f"{line!r} is not an object")
    kind: type[LogEntry] = HeldOutEntry if "held_out" in line else StepEntry
    for field in fields(kind):
        optional = field.default is not MISSING
        value = line.get(field.name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number or (optional and value is None)):
            raise ValueError(f"{field.name!r} is {value!r}, not a number")
    return kind(**{field.name: line.get(field.name) for field in fields(kind)})  # type: ignore[arg-type]


def append_entry(entries: list[LogEntry], entry: LogEntry) -> None:
    """Appends ``entry`` after dropping the entries it replaces: all of its kind from there on."""
    beside = []
    while entries and entries[-1].images >= entry.images:
        last = entries.pop()
        if last.images == entry.images and type(last) is not type(entry):
            beside.append(last)
    entries += [*reversed(beside), entry]
