"""Tables and lines for people."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tabulate import tabulate

from .facts import Choice, Decision, note

_OURS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


def user_line() -> str:
    """The innermost line on the stack that is neither torch's nor ours, as "file:line: code"."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith((*_OURS, "<")):
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return "an unknown line"


def break_line(error: Exception) -> str:
    """Dynamo's reason for a graph break in one line, with the user's line that caused it."""
    text = str(error)
    frames = re.findall(r'File "(.+?)", line (\d+), in .*\n\s+(.+)', text)
    theirs = [frame for frame in frames if not frame[0].startswith(_OURS)]
    place = " (at {}:{}: {})".format(*theirs[-1]) if theirs else ""
    return text.strip().splitlines()[0] + place


@dataclass(frozen=True, slots=True)
class Explanation:
    """What became of every weight of a compiled model; ``str()`` is a table.

    ``rows``: one Decision per weight. ``masked``: names of the parameters that run masked.
    ``choices``: in mode "infer" the kernel of each folded weight, for each shape it has met.
    ``mode``, ``inner``: as compiled. ``broken``: why the model runs as several graphs, or None.
    """

    rows: tuple[Decision, ...]
    masked: tuple[str, ...]
    mode: str
    inner: str
    choices: tuple[Choice, ...] = ()
    broken: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        if not self.rows:
            return "not captured yet: call the model once, or explain(model, *inputs)"
        body = [(row.weight, row.op, "x".join(map(str, row.shape)), note(row)) for row in self.rows]
        table = tabulate(body, ("weight", "op", "shape", "pattern"), disable_numparse=True)
        how = f"{len(self.masked)} of {len(self.rows)} weights masked, mode {self.mode!r}"
        parts = [table, f"{how}, compiled by {self.inner!r}"]
        if self.choices:
            parts += ["", _kernels(self.choices)]
        if self.broken is not None:
            parts.append(f"runs as several graphs: {self.broken}")
        return "\n".join(parts)


def _kernels(choices: tuple[Choice, ...]) -> str:
    body = [
        (
            choice.weight,
            " ".join("x".join(map(str, shape)) for shape in choice.inputs),
            choice.kernel,
            choice.dense_ms,
            choice.sparse_ms,
            choice.reason,
        )
        for choice in choices
    ]
    headers = ("weight", "input", "kernel", "dense ms", "sparse ms", "why")
    table = tabulate(body, headers, floatfmt=".3f", disable_numparse=[0, 1, 2, 5])
    if not any(choice.run_bytes for choice in choices):  # nothing is folded in training
        return table
    sizes = {choice.weight: (choice.dense_bytes, choice.run_bytes) for choice in choices}
    dense, run = (sum(column) / 2**20 for column in zip(*sizes.values(), strict=True))
    return f"{table}\nfolded weights: {dense:.2f} MiB dense, {run:.2f} MiB as they run"
