"""The tables of a study, as markdown and JSON, and the page that compares its runs."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from sparsedm_compiler.reporting import report_page

from .plan import GROUPS, Study

ORDER = ("untrained", "asp", "ste", "sr-ste", "sparsedm", "obs-distill", "progressive", "transfer")
Rows = Sequence[Mapping[str, Any]]


def write_tables(study: Study) -> None:
    """Writes methods.json, methods.md and a page per group into the folder of the study."""
    runs = {group: read_results(study, group) for group in GROUPS}
    machine = f"torch {torch.__version__}, one thread per run, {platform.machine()}"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    facts = {
        "data": study.data.rpartition("/")[2],
        "size": study.size,
        "budget": asdict(study.budget),
        "judge": json.loads((study.out / "judge.json").read_text()),
        "teacher": study.teacher_weights.name,
        "machine": machine,
        "commit": commit,
    }
    values = {**facts, **runs}
    (study.out / "methods.json").write_text(json.dumps(values, indent=1) + "\n")
    groups = [group for group in ("methods", "long", "blocks") if runs[group]]
    tables = [format_methods(runs[group]) for group in groups]
    if runs["settled"]:
        tables.append(format_settled(runs["settled"]))
    tables += [format_tuned(runs[group]) for group in ("tuned", "tuned-long") if runs[group]]
    text = "\n\n".join((*tables, format_sweep(runs["sweep"]))) + "\n"
    (study.out / "methods.md").write_text(text)
    print(text)
    for group in GROUPS:
        folders = [study.out / group / setting.name for setting in study.list_settings(group)]
        if finished := [folder for folder in folders if (folder / "results.json").exists()]:
            report_page(finished, study.out / f"{group}.html")


def read_results(study: Study, group: str) -> list[dict[str, Any]]:
    """Returns the settings and the results of every finished run of a group."""
    rows = []
    for setting in study.list_settings(group):
        folder = study.out / group / setting.name
        if (folder / "results.json").exists():
            rows.append(
                {
                    "method": setting.method,
                    "pattern": setting.pattern,
                    "seed": setting.seed,
                    **setting.options,
                    **summarize_run(folder),
                }
            )
    return rows


def summarize_run(folder: Path) -> dict[str, Any]:
    """Returns losses, distance, flips and time of the run in ``folder``."""
    values = json.loads((folder / "results.json").read_text())
    held = values["held_out"][-1]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    flips = [line["flip_rate"] for line in lines if line.get("flip_rate") is not None]
    distances = [score["value"] for score in values["scores"] if score["metric"] == "FD"]
    return {
        "student": held["student"],
        "loss": held["student"] if held["ema"] is None else held["ema"],
        "distance": distances[0] if distances else None,
        "last_flips": flips[-1] if flips else None,
        "images": values["images"],
        "seconds": values["seconds"],
    }


def format_spread(values: Sequence[float], digits: int) -> str:
    """Returns the mean and, of several values, half their range."""
    if not values:
        return ""
    half = (max(values) - min(values)) / 2
    mean = statistics.fmean(values)
    return f"{mean:.{digits}f}" + (f" ±{half:.{digits}f}" if len(values) > 1 else "")


def format_methods(runs: Rows) -> str:
    """Returns held-out losses and Fréchet distances, a line per method, a column per pattern."""
    patterns = list(dict.fromkeys(run["pattern"] for run in runs if run["pattern"]))
    parts = []
    for title, key, digits in (("held-out loss", "loss", 4), ("FD", "distance", 2)):
        dense = format_spread([run[key] for run in runs if run["method"] == "dense"], digits)
        body = [
            [method]
            + [
                format_spread(
                    [
                        run[key]
                        for run in runs
                        if run["method"] == method and run["pattern"] == pattern
                    ],
                    digits,
                )
                for pattern in patterns
            ]
            for method in ORDER
            if any(run["method"] == method for run in runs)
        ]
        head = [f"{title} (dense {dense})", *patterns]
        parts.append(tabulate(body, head, tablefmt="github", disable_numparse=True))
    return "\n\n".join(parts)


def format_settled(runs: Rows) -> str:
    """Returns held-out losses, a line per method with its start and its freeze."""
    lines: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        extras = (f", {name} {run[name]}" for name in ("start", "freeze") if name in run)
        line = lines.setdefault(run["method"] + "".join(extras), {})
        line.setdefault(run["pattern"] or "", []).append(run["loss"])
    dense = format_spread(lines.pop("dense", {}).get("", []), 4)
    patterns = list(dict.fromkeys(pattern for line in lines.values() for pattern in line))
    body = [
        [name, *(format_spread(line.get(pattern, []), 4) for pattern in patterns)]
        for name, line in lines.items()
    ]
    head = [f"held-out loss (dense {dense})", *patterns]
    return tabulate(body, head, tablefmt="github", disable_numparse=True)


def format_tuned(runs: Rows) -> str:
    """Returns held-out losses, each method at its best learning rate, which follows the loss."""
    cells: dict[str, dict[str, dict[float, list[float]]]] = {}
    for run in runs:
        rates = cells.setdefault(run["method"], {}).setdefault(run["pattern"] or "", {})
        rates.setdefault(run["lr"], []).append(run["loss"])
    best = {
        method: {pattern: format_best(rates) for pattern, rates in line.items()}
        for method, line in cells.items()
    }
    patterns = list(dict.fromkeys(run["pattern"] for run in runs if run["pattern"]))
    body = [
        [method, *(best[method].get(pattern, "") for pattern in patterns)]
        for method in ORDER
        if method in best
    ]
    dense = best.get("dense", {}).get("", "")
    head = [f"held-out loss (dense {dense})", *patterns]
    return tabulate(body, head, tablefmt="github", disable_numparse=True)


def format_best(rates: Mapping[float, Sequence[float]]) -> str:
    """Returns the lowest mean of the learning rates that most seeds have run, and its rate."""
    most = max(len(values) for values in rates.values())
    whole = {rate: values for rate, values in rates.items() if len(values) == most}
    rate = min(whole, key=lambda rate: statistics.fmean(whole[rate]))
    return f"{format_spread(whole[rate], 4)} at {rate:g}"


def format_sweep(runs: Rows) -> str:
    """Returns a table with a line per setting of the sweep."""
    names = ("sr_ste_lambda", "sr_ste_form", "beta", "lr", "images")
    body = [
        [run["pattern"], *(run.get(name, "") for name in names), run["loss"], run["last_flips"]]
        for run in runs
    ]
    head = ("pattern", *names, "held-out loss", "last flip rate")
    formats = ("", "g", "", "g", "g", "", ".5f", ".2e")
    return tabulate(body, head, tablefmt="github", floatfmt=formats)
