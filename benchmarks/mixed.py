"""What a channel permutation and mixed patterns do to a model's held-out loss, at equal MACs.

    python benchmarks/mixed.py --data train.npz --held-out test.npz --size 16 \
        --teacher benchmarks/study/cifar16_teacher.safetensors --out out/mixed

The model and data of the study of methods (benchmarks/methods.py). ``--part loss``: pruned in one
shot. ``--part train``: fine-tuned with asp from OBS, as the runs "settled" of the study. ``--part
time``: mixed against uniform at equal measured time, on a machine that does nothing else. Writes
mixed.json; rows that are there already are not computed again.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from study.command_line import make_parser, open_study
from study.plan import SMALL, Setting, Study
from study.run import load_teacher
from tabulate import tabulate
from torch import nn

import sparsedm_compiler as sdm
from sparsedm_compiler.autotune.side_by_side import sample_in_turns
from sparsedm_compiler.train import finetune

PATTERNS = ("2:4", "1:4", "1:8")
CANDIDATES = ("1:1", "3:4", "2:4", "1:4", "1:8", "1:16")
TIMED = ("2:4", "1:4", "1:8", "1:16")
LOSS = (
    "magnitude",
    "magnitude, permuted",
    "obs",
    "obs, permuted",
    "obs, permuted by wanda",
    "obs, mixed",
    "obs, mixed by layer error",
    "obs, mixed by taylor",
    "obs, mixed, permuted",
)
TRAIN = ("obs", "obs, permuted", "obs, mixed", "obs, mixed, permuted")
ROUNDS = 100


class Bench:
    """The study's model and data, and the choices of patterns that are measured once."""

    def __init__(self, study: Study) -> None:
        self.study = study
        data = study.open_training_data()
        self.images = data.fetch(range(512))
        self.teacher = load_teacher(study)
        self.batches = sdm.make_calibration_batches(self.teacher, self.images)
        self.choices: dict[str, sdm.PatternChoice] = {}

    def count_macs(self, pattern: str, **options: Any) -> int:
        """Returns the MACs of one image's call, in convolutions and linear layers."""
        batch = self.batches[0]
        report = sdm.count_macs(
            self.teacher, *batch.args, pattern=pattern, **options, **batch.kwargs
        )
        return report.sparse

    def choose(self, pattern: str, score: str) -> sdm.PatternChoice:
        """Returns the mixed patterns at the MACs of a pattern."""
        if score not in self.choices:
            self.choices[score] = sdm.choose_patterns(
                self.teacher, CANDIDATES, self.batches, macs="2:4", score=score, progress=False
            )
        return self.choices[score].within(self.count_macs(pattern))

    def prepare(self, label: str, pattern: str) -> tuple[nn.Module, str, dict[str, Any]]:
        """Returns a dense model, permuted if the label says so, its pattern and other options."""
        model, options = load_teacher(self.study), dict[str, Any]()
        if "mixed" in label:
            by = {"by layer error": "layer", "by taylor": "taylor"}
            score = next((by[words] for words in by if words in label), "output")
            choice = self.choose(pattern, score)
            pattern, options = choice.pattern, choice.options
        if "permuted" in label:
            score = "wanda" if "wanda" in label else "magnitude"
            report = sdm.permute_channels(
                model, pattern, self.batches, score=score, progress=False, **options
            )
            options |= {"report": report}
        return model, pattern, options

    def measure_loss(self, label: str, pattern: str) -> dict[str, Any]:
        """Returns the held-out loss of a model that is pruned in one shot."""
        model, base, options = self.prepare(label, pattern)
        permutation = options.pop("report", None)
        method = label.split(",")[0]
        report = sdm.prune_one_shot(
            model, base, self.batches, method=method, progress=False, **options
        )
        student = sdm.compile(model, base, backend="eager", **options)
        loss = sdm.held_out_loss(student, self.study.open_held_out())
        row = {"loss": loss, "mean_error": report.mean_error}
        row["kept_energy"] = sum(r.kept_energy for r in report.rows) / len(report.rows)
        row["macs"] = self.count_macs(base, **options)
        row["patterns"] = {r.weight: r.pattern for r in report.rows}
        if permutation is not None:
            row["permutation"] = permutation.to_dict()
        return row

    def measure_training(self, label: str, pattern: str) -> dict[str, Any]:
        """Returns the held-out loss after a fine-tune with asp from OBS."""
        model, base, options = self.prepare(label, pattern)
        options.pop("report", None)
        setting = Setting("settled", "asp", base, 0, {"lr": 2e-3, "start": "obs"})
        student = sdm.compile(model, base, backend="eager", **options)
        result = finetune(
            student,
            self.teacher,
            self.study.open_training_data(),
            held_out=self.study.open_held_out(),
            progress=False,
            **self.study.make_student_options(setting),
        )
        return {"loss": result.held_out[-1].final, "macs": self.count_macs(base, **options)}

    def measure_time(self, label: str, pattern: str) -> dict[str, Any]:
        """Returns times of a call and held-out losses, uniform and mixed at equal measured time."""
        batch = self.batches[0]
        if "time" not in self.choices:
            self.choices["time"] = sdm.choose_patterns(
                self.teacher,
                TIMED,
                self.batches,
                milliseconds="2:4",
                autotune_seconds=120.0,
                progress=False,
            )
        known = self.choices["time"]
        choice = known.within(sum(row.costs[pattern] for row in known.rows))
        rows: dict[str, Any] = {"choice": choice.to_dict()}
        calls: dict[str, Callable[[], Any]] = {}
        for name, base, chosen in (
            ("dense", None, {}),
            ("uniform", pattern, {}),
            ("mixed", choice.pattern, choice.options),
        ):
            model = load_teacher(self.study).eval()
            if base is None:
                run: Any = torch.compile(model)
            else:
                sdm.prune_one_shot(model, base, self.batches, progress=False, **chosen)
                student = sdm.compile(model, base, backend="eager", **chosen)
                rows[f"{name} loss"] = sdm.held_out_loss(student, self.study.open_held_out())
                run = sdm.compile(model, base, mode="infer", **chosen)
            calls[name] = lambda run=run: run(*batch.args, **batch.kwargs)
        with torch.no_grad():
            samples = sample_in_turns(calls, rounds=ROUNDS, again=True)
        return rows | {f"{name} ms": 1e3 * median(own.wall) for name, own in samples.items()}


def format_table(rows: Mapping[str, Any], part: str) -> str:
    """Returns the table of a part."""
    own = {key: row for key, row in rows.items() if key.startswith(f"{part}/")}
    labels = dict.fromkeys(key.split("/")[1] for key in own)
    patterns = dict.fromkeys(key.split("/")[2] for key in own)
    if part == "time":
        names = [name for row in own.values() for name in row if name != "choice"]
        body = [
            [key.split("/")[2], *(f"{row[name]:.4f}" for name in dict.fromkeys(names))]
            for key, row in own.items()
        ]
        return tabulate(body, ["pattern", *dict.fromkeys(names)], tablefmt="github")
    body = [
        [label]
        + [
            f"{own[key]['loss']:.4f}" if (key := f"{part}/{label}/{pattern}") in own else ""
            for pattern in patterns
        ]
        for label in labels
    ]
    return tabulate(body, [part, *patterns], tablefmt="github", disable_numparse=True)


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line and runs."""
    parser = make_parser(__doc__ or "", "out/mixed", teacher=True)
    add = parser.add_argument
    add("--part", action="append", help="loss, train or time; repeat for more (default: loss)")
    add("--pattern", action="append", help="a pattern; repeat for more (default: all)")
    add("--label", action="append", help="a row alone, e.g. 'obs, mixed'; repeat for more")
    options = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    study = open_study(options, SMALL)
    file = options.out / "mixed.json"
    rows: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    bench = Bench(study)
    measures = {
        "loss": (LOSS, bench.measure_loss),
        "train": (TRAIN, bench.measure_training),
        "time": (("mixed",), bench.measure_time),
    }
    for part in options.part or ["loss"]:
        labels, measure = measures[part]
        for pattern in options.pattern or PATTERNS:
            for label in labels:
                key = f"{part}/{label}/{pattern}"
                if key in rows or (options.label and label not in options.label):
                    continue
                started = time.perf_counter()
                rows[key] = measure(label, pattern)
                seconds = time.perf_counter() - started
                print(f"{key}: {rows[key].get('loss')} ({seconds:.0f} s)", flush=True)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(rows, indent=1) + "\n")
        print(format_table(rows, part))
    return 0


if __name__ == "__main__":
    sys.exit(main())
