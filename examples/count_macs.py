"""Count the MACs of diffusion models, dense and at N:M sparsity, without their weights.

    python examples/count_macs.py --model uvit-cifar10-small --pattern 2:4 --pattern 1:8
    python examples/count_macs.py --model path/to/unet --per-layer
    python examples/count_macs.py --model package.module:factory --inputs 1x3x32x32,1 --json

MODEL is a preset (--list prints them), a diffusers config (the JSON file or its directory), or a
factory of yours that returns a model, (model, args) or (model, args, kwargs).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

import sparsedm_compiler as sdm
from sparsedm_compiler import ConfigError, MacsReport, Pattern, SparseDMError
from sparsedm_compiler.facts import CONVENTION
from sparsedm_compiler.models import PRESETS, example_inputs, preset
from sparsedm_compiler.models.inputs import FEEDS
from sparsedm_compiler.models.presets import Preset

Called = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""A model with the args and kwargs of one forward."""

CALL = "(model, args, kwargs)"
FACTORY_HINT = f"write a function that returns {CALL} and pass --model package.module:function"


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status (2 with one line on stderr: a bad request)."""
    options = parse(argv)
    if options.list:
        print(tabulate([(name, entry.about) for name, entry in PRESETS.items()], tablefmt="plain"))
        return 0
    try:
        patterns = [Pattern.parse(text) for text in options.pattern or ["2:4"]]
        counts = [count(name, patterns, options) for name in dict.fromkeys(options.model)]
    except SparseDMError as error:
        print(f"count_macs: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if options.json:
        found = [as_json(entry, options) for entry in counts]
        print(json.dumps(found[0] if len(found) == 1 else found, indent=2))
    else:
        print("\n\n".join(tables(counts, options.per_layer)))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", action="append", help="what to count; repeat for more rows")
    what.add_argument("--list", action="store_true", help="print the presets and stop")
    add("--pattern", action="append", help="n:m keeps n of m; repeat for more columns (2:4)")
    add("--policy", default="structural", help="which layers stay dense: structural, uvit or all")
    add("--batch", type=int, help="samples in the batch (1)")
    add("--inputs", help="shapes for a factory that returns just a model: 1x3x32x32,1,1:int64")
    add("--per-layer", action="store_true", help="one line per layer as well")
    add("--json", action="store_true", help="print JSON and nothing else")
    return parser.parse_args(argv)


def count(name: str, patterns: Sequence[Pattern], options: argparse.Namespace) -> Count:
    """The MACs of the model of that name at every pattern. Raises SparseDMError."""
    model, args, kwargs = load(name, options.batch, options.inputs)
    reports = {
        str(pattern): sdm.count_macs(model, *args, pattern=pattern, policy=options.policy, **kwargs)
        for pattern in patterns
    }
    return Count(name, reports)


def load(name: str, batch: int | None, inputs: str | None) -> Called:
    """The model and its inputs: a factory's as it makes them, all others on the meta device."""
    if batch is not None and batch < 1:
        raise ConfigError(f"--batch {batch} is not >= 1")
    path = Path(name)
    is_factory = ":" in name and not path.exists()
    if is_factory:
        if batch is not None:
            raise ConfigError(f"--batch is not for factories: {name} and --inputs decide it")
        return from_factory(name, inputs)
    if inputs is not None:
        raise ConfigError(f"--inputs is for factories (package.module:function); {name} is not one")
    if name not in PRESETS and (path.exists() or path.suffix == ".json" or "/" in name):
        return from_config(path, batch or 1)
    return preset(name, batch=batch or 1)


def from_config(path: Path, batch: int) -> Called:
    """The model of a diffusers config file, or of the directory that holds config.json."""
    if (path / "model_index.json").exists():
        raise ConfigError(
            f"{path} is a whole pipeline; name its network's folder, e.g. {path / 'unet'} or "
            f"{path / 'transformer'}"
        )
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    family = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(family, str):
        raise ConfigError(f"{file} is not a diffusers config: it has no _class_name")
    if family not in FEEDS:
        raise ConfigError(
            f"how to call a {family} ({file}) is not known, only {', '.join(FEEDS)}; {FACTORY_HINT}"
        )
    fields = {key: value for key, value in config.items() if not key.startswith("_")}
    with torch.device("meta"):
        model = build(Preset(str(file), family, fields))
    return model, *example_inputs(model, batch=batch)


def build(entry: Preset) -> nn.Module:
    """The model; what its class finds wrong with the config becomes a ConfigError."""
    try:
        return entry.build()
    except SparseDMError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{entry.about} does not make a {entry.family}: {type(error).__name__}: {error}"
        ) from error


def from_factory(name: str, inputs: str | None) -> Called:
    """What package.module:function returns, with inputs of the given shapes if it made none."""
    module, _, attribute = name.partition(":")
    sys.path.insert(0, "")
    try:
        factory = attrgetter(attribute)(import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"cannot import {name!r}: {error}") from error
    finally:
        sys.path.remove("")
    if not callable(factory):
        raise ConfigError(f"{name} is not a function but {factory!r}")
    made = factory()
    model, *call = made if isinstance(made, tuple) else (made,)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name} returned {type(model).__name__} where a model should be")
    if not call:
        if inputs is None:
            raise ConfigError(f"{name} returns no inputs: give --inputs, e.g. 1x3x32x32,1")
        return model, tensors(inputs, model), {}
    if inputs is not None:
        raise ConfigError(f"{name} returns its own inputs: drop --inputs {inputs}")
    args, kwargs = (*call, {})[:2]
    if len(call) > 2 or not isinstance(args, (tuple, list)) or not isinstance(kwargs, dict):
        raise ConfigError(f"{name} returned neither a model, (model, args) nor {CALL}")
    return model, tuple(args), kwargs


def tensors(text: str, model: nn.Module) -> tuple[torch.Tensor, ...]:
    """Zeros of the shapes in "1x3x32x32,1:int64", in the model's dtype unless one is named."""
    weight = next(iter(model.parameters()), torch.empty(0))
    made = []
    for part in text.split(","):
        shape, _, kind = part.strip().partition(":")
        dtype = vars(torch).get(kind) if kind else weight.dtype
        try:
            sizes = [int(size) for size in shape.split("x")]
        except ValueError:
            sizes = [0]
        if min(sizes) < 1 or not isinstance(dtype, torch.dtype):
            raise ConfigError(f"input {part!r} is not a shape like 1x3x32x32 or 1:int64")
        made.append(torch.zeros(sizes, dtype=dtype, device=weight.device))
    return tuple(made)


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


if __name__ == "__main__":
    sys.exit(main())
