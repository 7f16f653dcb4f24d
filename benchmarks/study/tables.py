"""The tables of a study, as markdown and JSON, and the page that compares its runs."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from tabulate import tabulate

from sparsedm_compiler.reporting.page import report_page

from .plan import GROUPS, Study

ORDER = ("untrained", "asp", "ste", "sr-ste", "sparsedm", "progressive", "transfer")
Rows = Sequence[Mapping[str, Any]]


def write_tables(study: Study) -> None:
    """methods.json, methods.md and a page per group in the folder of the study."""
    runs = {group: results(study, group) for group in GROUPS}
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
    tables = (methods_table(runs["methods"]), methods_table(runs["long"]))
    text = "\n\n".join((*tables, sweep_table(runs["sweep"]))) + "\n"
    (study.out / "methods.md").write_text(text)
    print(text)
    for group in GROUPS:
        folders = [study.out / group / setting.name for setting in study.settings(group)]
        if found := [folder for folder in folders if (folder / "results.json").exists()]:
            report_page(found, study.out / f"{group}.html")


def results(study: Study, group: str) -> list[dict[str, Any]]:
    """What every finished run of a group came to."""
    found = []
    for setting in study.settings(group):
        folder = study.out / group / setting.name
        if (folder / "results.json").exists():
            found.append(
                {
                    "method": setting.method,
                    "pattern": setting.pattern,
                    "seed": setting.seed,
                    **setting.options,
                    **summary(folder),
                }
            )
    return found


def summary(folder: Any) -> dict[str, Any]:
    """Losses, distance, flips and time of the run in ``folder``."""
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


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and, of several values, half their range."""
    if not values:
        return ""
    half = (max(values) - min(values)) / 2
    mean = statistics.fmean(values)
    return f"{mean:.{digits}f}" + (f" ±{half:.{digits}f}" if len(values) > 1 else "")


def methods_table(runs: Rows) -> str:
    """Held-out loss and Fréchet distance, a line per method and a column per pattern."""
    patterns = list(dict.fromkeys(run["pattern"] for run in runs if run["pattern"]))
    parts = []
    for title, key, digits in (("held-out loss", "loss", 4), ("FD", "distance", 2)):
        dense = spread([run[key] for run in runs if run["method"] == "dense"], digits)
        body = [
            [method]
            + [
                spread(
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
        ]
        head = [f"{title} (dense {dense})", *patterns]
        parts.append(tabulate(body, head, tablefmt="github", disable_numparse=True))
    return "\n\n".join(parts)


def sweep_table(runs: Rows) -> str:
    """A line per setting of the sweep."""
    names = ("sr_ste_lambda", "sr_ste_form", "beta", "lr", "images")
    body = [
        [run["pattern"], *(run.get(name, "") for name in names), run["loss"], run["last_flips"]]
        for run in runs
    ]
    head = ("pattern", *names, "held-out loss", "last flip rate")
    formats = ("", "g", "", "g", "g", "", ".5f", ".2e")
    return tabulate(body, head, tablefmt="github", floatfmt=formats)
