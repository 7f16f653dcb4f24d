"""A section is a list of cases; a case gives rows, each more complete than the one before."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Tell = Callable[[str], None]
"""Notes what is tried next, so that it is known, and left out, should the process die of it."""

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison. ``run`` yields its row, again and again as there is more in it."""

    key: str
    run: Callable[[Tell], Iterator[Row]]


@dataclass(frozen=True, slots=True)
class Read:
    """What a log says.

    ``done``: keys of the cases that need not be begun again: they ended, or nobody knows what they
    died of. ``tried``: what the processes that died were trying, by their last notes. ``stopped``:
    where the time was up, "" if all cases were tried.
    """

    rows: dict[str, Row]
    failed: dict[str, str]
    done: tuple[str, ...]
    tried: tuple[str, ...]
    stopped: str


def read(log: Path) -> Read:
    """The log of a section's processes, as far as it goes."""
    rows: dict[str, Row] = {}
    failed: dict[str, str] = {}
    done: list[str] = []
    tried: list[str] = []
    last, note, stopped = "", "", ""
    for line in log.read_text().splitlines() if log.exists() else ():
        entry = _parse(line)
        if "begin" in entry:
            last, note, stopped = entry["begin"], "", ""
        if "note" in entry:
            note = entry["note"]
        if "row" in entry:
            rows[entry["key"]] = entry["row"]
        if "failed" in entry:
            failed[entry["key"]] = entry["failed"]
        if "died" in entry:
            failed[last or "the process"] = f"{entry['died']}, while trying {note or 'nothing yet'}"
            tried += [note] if note else []
            done += [] if note else [last]
        if "stopped" in entry:
            stopped = entry["stopped"] or f"during {last}, {note or 'at its beginning'}"
        if "end" in entry or "died" in entry:
            done += [entry["end"]] if "end" in entry else []
            last, note = "", ""
    return Read(rows, failed, tuple(done), tuple(tried), stopped)


def write(log: Path, **entry: str) -> None:
    """Add a line to the log of a process that is no more."""
    with log.open("a") as file:
        file.write("\n" + json.dumps(entry) + "\n")


def _parse(line: str) -> Row:
    """The entry of a line; nothing for one that was cut short."""
    try:
        entry: Row = json.loads(line)
    except ValueError:
        return {}
    return entry


def format_error(error: BaseException) -> str:
    """The error with the lines of ours that led to it, named from the root of the repository."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(str(ROOT))][-3:]
    places = [f"{Path(f.filename).relative_to(ROOT)}:{f.lineno}" for f in ours]
    said = " ".join(str(error).split())[:600].replace(str(ROOT), "").replace(sys.prefix, "")
    return f"{type(error).__name__}: {said} ({' > '.join(places)})"
