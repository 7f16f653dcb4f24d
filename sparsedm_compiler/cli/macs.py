"""``sparsedm macs``: the MACs of diffusion models, dense and at N:M sparsity."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from ..patterns import Pattern
from ..reports import CONVENTION, MacsReport
from .job import Job
from .options import add_model_options, model_options

if TYPE_CHECKING:
    from ..models.loading import ModelWithInputs

ABOUT = """\
count the MACs of models, dense and pruned, without their weights

MODEL is a preset (--list prints them), a diffusers config (the JSON file or its directory), or a
function of yours that returns a model, (model, args) or (model, args, kwargs)."""
EXAMPLE = """\
  sparsedm macs --model uvit-cifar10-small --pattern 2:4 --pattern 1:8
  sparsedm macs --model path/to/unet --per-layer
  sparsedm macs --model package.module:function --inputs 1x3x32x32,1 --json"""


@dataclass(frozen=True, slots=True)
class Count:
    """The reports of one model, per pattern."""

    model: str
    reports: Mapping[str, MacsReport]

    @property
    def dense(self) -> int:
        """conv+linear MACs before pruning."""
        return next(iter(self.reports.values())).dense

    @property
    def attention(self) -> int:
        """QK+AV MACs."""
        return next(iter(self.reports.values())).attention


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", action="append", help="what to count; repeat for more rows")
    what.add_argument("--list", action="store_true", help="print the presets and stop")
    add("--pattern", action="append", help="n:m keeps n of m; repeat for more columns (2:4)")
    add("--policy", default="structural", help="which layers stay dense: structural, uvit or all")
    add("--batch", type=int, help="samples in the batch (1)")
    add("--inputs", help="shapes for a function that returns just a model: 1x3x32x32,1,1:int64")
    add("--per-layer", action="store_true", help="one line per layer as well")
    add("--json", action="store_true", help="print JSON and nothing else")
    add_model_options(parser)


def prepare(options: argparse.Namespace) -> Job:
    """Make the models, on the meta device where possible. Raises SparseDMError."""
    if options.list:
        return Job(("would print the presets",), print_presets)
    from ..config import CompileConfig
    from ..models.loading import open_with_inputs

    patterns = [Pattern.parse(text) for text in options.pattern or ["2:4"]]
    CompileConfig.create(patterns[0], policy=options.policy)
    names = [*dict.fromkeys(options.model)]
    given = {"options": model_options(options), "batch": options.batch, "inputs": options.inputs}
    if options.dry_run:
        for name in names:
            open_with_inputs(name, **given)

    def run() -> None:
        counts = [count(name, open_with_inputs(name, **given), patterns, options) for name in names]
        if options.json:
            found = [as_json(entry, options) for entry in counts]
            print(json.dumps(found[0] if len(found) == 1 else found, indent=2))
        else:
            print("\n\n".join(tables(counts, options.per_layer)))

    at = ", ".join(map(str, patterns))
    return Job(tuple(f"would count {name} at {at}" for name in names), run)


def print_presets() -> None:
    """One line per preset."""
    from ..models import PRESETS

    print(tabulate([(name, entry.about) for name, entry in PRESETS.items()], tablefmt="plain"))


def count(
    name: str, called: ModelWithInputs, patterns: Sequence[Pattern], options: argparse.Namespace
) -> Count:
    """The MACs of the model of that name at every pattern. Raises SparseDMError."""
    from ..compiler.counting import count_macs

    model, args, kwargs = called
    reports = {
        str(pattern): count_macs(model, *args, pattern=pattern, policy=options.policy, **kwargs)
        for pattern in patterns
    }
    return Count(name, reports)


def as_json(entry: Count, options: argparse.Namespace) -> dict[str, Any]:
    """Plain values; "pattern" and "sparse" on top where there is one pattern."""
    patterns: dict[str, dict[str, Any]] = {
        text: {"sparse": report.sparse, "ratio": round(report.dense / max(report.sparse, 1), 4)}
        for text, report in entry.reports.items()
    }
    if options.per_layer:
        for text, report in entry.reports.items():
            patterns[text]["rows"] = report.as_dict()["rows"]
    shortcut: dict[str, Any] = {}
    if len(patterns) == 1:
        text, only = next(iter(patterns.items()))
        shortcut = {"pattern": text, "sparse": only["sparse"]}
    return {
        "model": entry.model,
        "policy": options.policy,
        "batch": options.batch or 1,
        "convention": CONVENTION,
        "dense": entry.dense,
        "attention": entry.attention,
        **shortcut,
        "patterns": patterns,
    }


def tables(counts: Sequence[Count], per_layer: bool) -> list[str]:
    """Per model its layers (if asked), then the totals, then what was counted."""
    parts = [f"{entry.model}\n{layers(entry)}" for entry in counts] if per_layer else []
    names = list(counts[0].reports)
    heads = [head for name in names for head in (f"{name} conv+linear", "ratio")]
    body = [
        [entry.model, f"{entry.dense:,}", f"{entry.attention:,}"]
        + [
            cell
            for report in entry.reports.values()
            for cell in (f"{report.sparse:,}", f"{report.dense / max(report.sparse, 1):.2f}x")
        ]
        for entry in counts
    ]
    headers = ["model", "dense conv+linear", "attention QK+AV", *heads]
    return [*parts, aligned(body, headers, text=1), CONVENTION]


def layers(entry: Count) -> str:
    """One line per call of a weight or of attention, with the reason where it stays dense."""
    body = []
    for rows in zip(*(report.rows for report in entry.reports.values()), strict=True):
        first = rows[0]
        why = dict(zip(entry.reports, (row.refusal or "" for row in rows), strict=True))
        reasons = set(why.values())
        note = (
            next(iter(reasons))
            if len(reasons) == 1
            else "; ".join(f"{pattern}: {reason}" for pattern, reason in why.items() if reason)
        )
        sparse = [f"{row.sparse:,}" for row in rows]
        shape = "x".join(map(str, first.shape))
        body.append([first.name, first.op, shape, f"{first.dense:,}", *sparse, note])
    headers = ["layer", "op", "weight", "dense MACs", *entry.reports, "stays dense because"]
    return aligned(body, headers, text=3, last_text=True)


def aligned(
    body: Sequence[Sequence[str]], headers: Sequence[str], *, text: int, last_text: bool = False
) -> str:
    """A table whose first ``text`` columns, and perhaps the last, are words; the rest numbers."""
    numbers = len(headers) - text - last_text
    align = ["left"] * text + ["right"] * numbers + ["left"] * last_text
    return tabulate(body, headers, colalign=align, disable_numparse=True)
