"""``sparsedm macs``: counts the MACs of diffusion models, dense and at N:M sparsity."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..progress import announce
from .job import Job
from .options import add_model_options, read_model_options

if TYPE_CHECKING:
    from ..models.loading import ModelWithInputs
    from ..patterns import Pattern
    from ..reports import MacsReport

ABOUT = """\
count the MACs of models, dense and pruned, without their weights

MODEL is a preset (--list prints them), a diffusers config (the JSON file or its directory), or
your own function package.module:function that returns model, (model, args) or
(model, args, kwargs)."""
EXAMPLE = """\
  sparsedm macs --model uvit-cifar10-small --pattern 2:4 --pattern 1:8
  sparsedm macs --model path/to/unet --per-layer
  sparsedm macs --model package.module:function --inputs 1x3x32x32,1 --json"""


@dataclass(frozen=True, slots=True)
class ModelMacs:
    """The MACs of one model: pattern -> report."""

    model: str
    reports: Mapping[str, MacsReport]

    @property
    def dense(self) -> int:
        """MACs of conv and linear layers before pruning."""
        return next(iter(self.reports.values())).dense

    @property
    def attention(self) -> int:
        """MACs of the two products (QK, AV) of attention."""
        return next(iter(self.reports.values())).attention


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    add = parser.add_argument
    models = parser.add_mutually_exclusive_group(required=True)
    models.add_argument("--model", action="append", help="model to count; repeat for more rows")
    models.add_argument("--list", action="store_true", help="print the presets and stop")
    add("--pattern", action="append", help="n:m keeps n of m; repeat for more columns (2:4)")
    add("--policy", default="structural", help="which layers stay dense: structural, uvit or all")
    add("--batch", type=int, help="samples in the batch (1)")
    add("--inputs", help="shapes of the inputs, where MODEL returns no args: 1x3x32x32,1,1:int64")
    add("--per-layer", action="store_true", help="print one line per layer as well")
    add("--json", action="store_true", help="print JSON only")
    add_model_options(parser)


def prepare(options: argparse.Namespace) -> Job:
    """Checks the request; with --dry-run makes the models too. Raises SparseDMError."""
    if options.list:
        return Job(("would print the presets",), print_presets)
    from ..config import CompileConfig
    from ..models.loading import open_with_inputs
    from ..patterns import Pattern

    patterns = [Pattern.parse(text) for text in options.pattern or ["2:4"]]
    CompileConfig.create(patterns[0], policy=options.policy)
    names = [*dict.fromkeys(options.model)]
    fields = read_model_options(options)
    settings = {"options": fields, "batch": options.batch, "inputs": options.inputs}
    if options.dry_run:
        for name in names:
            open_with_inputs(name, **settings)

    def run() -> None:
        counts = [
            count_model(name, open_with_inputs(name, **settings), patterns, options)
            for name in names
        ]
        if options.json:
            values = [make_json(entry, options) for entry in counts]
            print(json.dumps(values[0] if len(values) == 1 else values, indent=2))
        else:
            print("\n\n".join(format_tables(counts, options.per_layer)))

    texts = ", ".join(map(str, patterns))
    return Job(tuple(f"would count {name} at {texts}" for name in names), run)


def print_presets() -> None:
    """Prints one line per preset."""
    from tabulate import tabulate

    from ..models import PRESETS

    print(tabulate([(name, entry.about) for name, entry in PRESETS.items()], tablefmt="plain"))


def count_model(
    name: str, called: ModelWithInputs, patterns: Sequence[Pattern], options: argparse.Namespace
) -> ModelMacs:
    """Counts the MACs of one model at every pattern. Raises SparseDMError."""
    from ..compiler.counting import count_macs

    model, args, kwargs = called
    with announce(f"counting the MACs of {name}"):
        reports = {
            str(pattern): count_macs(model, *args, pattern=pattern, policy=options.policy, **kwargs)
            for pattern in patterns
        }
    return ModelMacs(name, reports)


def make_json(entry: ModelMacs, options: argparse.Namespace) -> dict[str, Any]:
    """Returns plain values; of a single pattern, "pattern" and "sparse" at the top level too."""
    from ..reports import CONVENTION

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


def format_tables(counts: Sequence[ModelMacs], per_layer: bool) -> list[str]:
    """Returns the layers of every model if ``per_layer``, the totals, and the convention."""
    from ..reports import CONVENTION

    parts = [f"{entry.model}\n{format_layers(entry)}" for entry in counts] if per_layer else []
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
    return [*parts, align_table(body, headers, text=1), CONVENTION]


def format_layers(entry: ModelMacs) -> str:
    """Returns a table with one line per call of a weight or of attention.

    A weight that stays dense has the reason in its last column.
    """
    body = []
    for rows in zip(*(report.rows for report in entry.reports.values()), strict=True):
        first = rows[0]
        reasons = dict(zip(entry.reports, (row.refusal or "" for row in rows), strict=True))
        distinct = set(reasons.values())
        note = (
            next(iter(distinct))
            if len(distinct) == 1
            else "; ".join(f"{pattern}: {reason}" for pattern, reason in reasons.items() if reason)
        )
        sparse = [f"{row.sparse:,}" for row in rows]
        shape = "x".join(map(str, first.shape))
        body.append([first.name, first.op, shape, f"{first.dense:,}", *sparse, note])
    headers = ["layer", "op", "weight", "dense MACs", *entry.reports, "stays dense because"]
    return align_table(body, headers, text=3, last_text=True)


def align_table(
    body: Sequence[Sequence[str]], headers: Sequence[str], *, text: int, last_text: bool = False
) -> str:
    """Returns a table; the first ``text`` columns (and the last) are words, the others numbers."""
    from tabulate import tabulate

    numbers = len(headers) - text - last_text
    align = ["left"] * text + ["right"] * numbers + ["left"] * last_text
    return tabulate(body, headers, colalign=align, disable_numparse=True)
