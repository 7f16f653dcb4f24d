"""The tables of a study, as markdown and JSON, and the page that compares its runs."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from sparsedm_compiler.backends.processor import read_cpu_name
from sparsedm_compiler.reporting import report_page

from .more_runs import TIMED
from .plan import GROUPS, Study
from .setting import Setting

ORDER = ("untrained", "asp", "ste", "sr-ste", "sparsedm", "obs-distill", "progressive", "transfer")
Rows = Sequence[Mapping[str, Any]]


def write_tables(study: Study, *, pages: bool = True) -> None:
    """Writes methods.json, methods.md and a page per group into the folder of the study."""
    groups = GROUPS if study.recipe is None else (TIMED,)
    runs = {group: read_results(study, group) for group in groups}
    values = {**read_facts(study), **runs}
    (study.out / "methods.json").write_text(json.dumps(values, indent=1) + "\n")
    tables = [FORMATS[group](runs[group]) for group in groups if runs[group]]
    text = "\n\n".join(tables) + "\n"
    (study.out / "methods.md").write_text(text)
    print(text, flush=True)
    for group in groups if pages else ():
        folders = [study.out / group / setting.name for setting in study.list_settings(group)]
        if finished := [folder for folder in folders if (folder / "results.json").exists()]:
            report_page(finished, study.out / f"{group}.html")


def read_facts(study: Study) -> dict[str, Any]:
    """Returns images, budget, classifier, machine and commit, for the head of a JSON file."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    if study.device == "cuda":
        precision = "float32" if study.precision == "no" else study.precision
        machine = f"{torch.cuda.get_device_name()}, {precision}"
    else:
        machine = f"one thread per run, {read_cpu_name()}"
    return {
        "data": study.data.rpartition("/")[2],
        "size": study.size,
        "budget": asdict(study.budget),
        "judge": json.loads((study.out / "judge.json").read_text()),
        "teacher": study.teacher_weights.name,
        "machine": f"torch {torch.__version__}, {machine}",
        "recipe": study.recipe,
        "commit": commit,
    }


def read_results(study: Study, group: str) -> list[dict[str, Any]]:
    """Returns the settings and the results of every finished run of a group."""
    rows = (read_run(study, setting) for setting in study.list_settings(group))
    return [row for row in rows if row is not None]


def read_run(study: Study, setting: Setting) -> dict[str, Any] | None:
    """Returns the setting and the results of a run, None where it has not finished."""
    folder = study.out / setting.group / setting.name
    if not (folder / "results.json").exists():
        return None
    about = {"method": setting.method, "pattern": setting.pattern, "seed": setting.seed}
    return {**about, **setting.options, **summarize_run(folder)}


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
        "macs": (values.get("macs") or {}).get("sparse"),
        "curve": [
            [entry["images"], entry["ema"] or entry["student"]] for entry in values["held_out"]
        ],
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
    return format_lines(runs, "held-out loss", "loss", 4)


def format_timed(runs: Rows) -> str:
    """Returns held-out losses and Fréchet distances, a line per method with start and freeze."""
    parts = (("held-out loss", "loss", 4), ("FD", "distance", 2))
    return "\n\n".join(format_lines(runs, *part) for part in parts)


def format_lines(runs: Rows, title: str, key: str, digits: int) -> str:
    """Returns a value of all runs, a line per method with its start and its freeze."""
    lines: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        line = lines.setdefault(name_run(run), {})
        line.setdefault(run["pattern"] or "", []).append(run[key])
    dense = format_spread(lines.pop("dense", {}).get("", []), digits)
    patterns = list(dict.fromkeys(pattern for line in lines.values() for pattern in line))
    body = [
        [name, *(format_spread(line.get(pattern, []), digits) for pattern in patterns)]
        for name, line in lines.items()
    ]
    head = [f"{title} (dense {dense})", *patterns]
    return tabulate(body, head, tablefmt="github", disable_numparse=True)


def format_baselines(runs: Rows) -> str:
    """Returns a line per run, by the pattern whose MACs it has: MACs, loss, FD, images."""
    patterns = list(dict.fromkeys(run["pattern"] for run in runs))
    body = []
    for pattern in patterns:
        rows = [run for run in runs if run["pattern"] == pattern]
        labels = [name_run(run) for run in rows]
        for label in dict.fromkeys(labels):
            same = [run for run, name in zip(rows, labels, strict=True) if name == label]
            loss = format_spread([run["loss"] for run in same], 4)
            distance = format_spread([run["distance"] for run in same], 2)
            macs, images = f"{same[0]['macs'] / 1e6:.2f} M", f"{same[0]['images']:,}"
            body.append([pattern or "dense", label, macs, images, loss, distance])
    head = ["MACs of", "method", "MACs", "images", "held-out loss", "FD"]
    return tabulate(body, head, tablefmt="github", disable_numparse=True)


def name_run(run: Mapping[str, Any]) -> str:
    """Returns method, start and freeze of a run, in words."""
    extras = (f", {name}={run[name]}" for name in ("start", "freeze") if name in run)
    return run["method"] + "".join(extras)


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


FORMATS: Mapping[str, Callable[[Rows], str]] = {
    "methods": format_methods,
    "long": format_methods,
    "blocks": format_methods,
    "settled": format_settled,
    "tuned": format_tuned,
    "tuned-long": format_tuned,
    "baselines": format_baselines,
    "sweep": format_sweep,
    TIMED: format_timed,
}
"""How the runs of every group are shown."""
