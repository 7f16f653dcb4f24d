"""Prunes a dense U-ViT of handwritten digits, fine-tunes it, and compares samples and scores.

    python examples/demo.py

Loads the small teacher committed beside this script, prunes it to 2:4 and to 1:4, and fine-tunes
each against the teacher. Writes out/demo/samples.png, results.md and results.json. About five
minutes on two cores; --quick runs the same path in seconds, with samples of no quality.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # else a busy machine takes 10 times as long

import diffusers
import torch
from digits import (
    CLASSES,
    TEACHER,
    Digits,
    DigitsCNN,
    digits_uvit,
    measure_agreement,
    train_judge,
)
from safetensors.torch import load_file
from tabulate import tabulate
from torch import Tensor, nn
from train_teacher import TEACHER_IMAGES, train_teacher

import sparsedm_compiler as sdm
from sparsedm_compiler.diffusion import sample, sampler_name
from sparsedm_compiler.evaluate import frechet_score
from sparsedm_compiler.models import UViT
from sparsedm_compiler.reporting import save_grid

RECIPES: Mapping[str, Mapping[str, float]] = {
    "2:4": {"sr_ste_lambda": 2e-4},
    "1:4": {"sr_ste_lambda": 0.0},
}
"""SR-STE's lambda per pattern; under Adam a large one freezes the mask, which costs at 1:4."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The amount of work that the demo does."""

    teacher_images: int = TEACHER_IMAGES
    images: int = 1000 * 64
    samples: int = 360
    steps: int = 20
    judge_epochs: int = 30
    draws: int = 16

    @staticmethod
    def quick() -> Budget:
        """Returns a budget that is just enough to run every line."""
        return Budget(128, images=3 * 64, samples=20, steps=2, judge_epochs=1, draws=1)


@dataclass(frozen=True, slots=True)
class Row:
    """One model of the results table; ``seconds``: of its fine-tune, compiling included."""

    name: str
    macs: int
    loss: float
    distance: float
    agreement: float
    seconds: float = 0.0
    images: Tensor = field(repr=False, default_factory=lambda: torch.empty(0))


class Judge:
    """Measures models under equal conditions: same noise, same labels, same real images."""

    def __init__(self, digits: Digits, network: DigitsCNN, budget: Budget, seed: int) -> None:
        self.digits, self.network, self.budget, self.seed = digits, network, budget, seed
        self.labels = torch.arange(budget.samples) % CLASSES
        self.scheduler = diffusers.DPMSolverMultistepScheduler()
        self.sampler = sampler_name(self.scheduler, budget.steps)

    def measure(self, name: str, model: nn.Module, macs: int, seconds: float = 0.0) -> Row:
        """Samples and scores ``model``; returns its row of the table."""
        images = sample(
            model,
            self.scheduler,
            shape=(self.budget.samples, 1, 8, 8),
            steps=self.budget.steps,
            seed=self.seed,
            labels=self.labels,
            batch_size=self.budget.samples,
        )
        held = self.digits.test
        loss = sdm.held_out_loss(
            model, held, draws=self.budget.draws, seed=self.seed, batch_size=len(held[0])
        )
        agreement = measure_agreement(self.network, images, self.labels)
        return Row(name, macs, loss, self.measure_distance(images), agreement, seconds, images)

    def measure_distance(self, images: Tensor) -> float:
        """Returns the Fréchet distance of ``images`` to the held-out digits, by the classifier."""
        return frechet_score(
            self.network.features,
            images.clamp(-1, 1),
            self.digits.test[0],
            name="DigitsCNN",
            sampler=self.sampler,
        ).value

    def measure_floor(self) -> float:
        """Returns the distance of as many real training digits, about the best of any sample."""
        return self.measure_distance(self.digits.train[0][: self.budget.samples])


def make_pruned_rows(
    teacher: UViT, pattern: str, judge: Judge, options: argparse.Namespace
) -> Iterator[Row]:
    """Yields two rows: ``teacher`` pruned to ``pattern``, before and after its fine-tune."""
    example = torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    macs = sdm.count_macs(teacher, *example, pattern=pattern).sparse
    student = sdm.compile(teacher, pattern=pattern, mode="train", backend=options.backend)
    print(f"\n{pattern}: prune the teacher, then fine-tune")
    yield judge.measure(f"{pattern} untrained", student, macs)
    print(sdm.explain(student))
    result = sdm.finetune(
        student,
        teacher,
        judge.digits.train,
        held_out=judge.digits.test,
        held_out_every=judge.budget.images // 4,
        out=options.out / f"{pattern.replace(':', '-')}-{judge.budget.images}-seed{options.seed}",
        images=judge.budget.images,
        batch_size=64,
        lr=2e-3,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        ema_decay=0.995,
        seed=options.seed,
        **RECIPES[pattern],
    )
    student.load_state_dict(result.ema.state_dict())
    sdm.save(student, options.out / f"student-{pattern.replace(':', '-')}.safetensors")
    yield judge.measure(f"{pattern} fine-tuned", student, macs, result.seconds)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the demo, writes its files, and returns the contents of results.json."""
    start, budget = time.perf_counter(), Budget.quick() if options.quick else Budget()
    digits = Digits.load()
    network = train_judge(digits, epochs=budget.judge_epochs)
    judge = Judge(digits, network, budget, options.seed)
    teacher = load_teacher(digits, budget, options)
    example = torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    macs = sdm.count_macs(teacher, *example, pattern="2:4")
    print(macs)
    rows = [judge.measure("dense teacher", teacher, macs.dense)]
    for pattern in RECIPES:
        rows.extend(make_pruned_rows(teacher, pattern, judge, options))
    save_samples(options.out / "samples.png", judge, rows)
    return write_report(options, judge, rows, time.perf_counter() - start)


def load_teacher(digits: Digits, budget: Budget, options: argparse.Namespace) -> UViT:
    """Loads the committed teacher, or trains one if the options say so."""
    if options.train_teacher:
        return train_teacher(digits, images=budget.teacher_images, seed=options.seed)
    teacher = digits_uvit()
    teacher.load_state_dict(load_file(TEACHER))
    return teacher


def save_samples(path: Path, judge: Judge, rows: list[Row]) -> None:
    """Saves a grid: real digits, and two samples per class and model, from the same noise."""
    x, y = judge.digits.test
    order = [image for label in range(CLASSES) for image in (y == label).nonzero()[:2, 0].tolist()]
    drawn = [number for label in range(CLASSES) for number in (label, label + CLASSES)]
    grid = {"real (held out)": x[order], **{row.name: row.images[drawn] for row in rows}}
    save_grid(path, grid, columns=[str(number % CLASSES) for number in drawn], scale=8)


def write_report(
    options: argparse.Namespace, judge: Judge, rows: list[Row], seconds: float
) -> dict[str, Any]:
    """Prints the table, and writes it as markdown and JSON with everything it depends on."""
    network, (x, y) = judge.network, judge.digits.test
    facts = {
        "machine": f"torch {torch.__version__}, {torch.get_num_threads()} threads",
        "seed": options.seed,
        "training images": f"teacher {TEACHER_IMAGES}, students {judge.budget.images} more",
        "sparse graph run by": options.backend,
        "sampler": judge.sampler,
        "samples": judge.budget.samples,
        "held-out digits": len(x),
        "FD-DigitsCNN of real training digits": judge.measure_floor(),
        "DigitsCNN accuracy": measure_agreement(network, x, y),
        "seconds": seconds,
    }
    table = [
        (row.name, f"{row.macs:,}", row.loss, row.distance, row.agreement, row.seconds or "")
        for row in rows
    ]
    headers = ("model", "MACs", "held-out loss", "FD-DigitsCNN", "class agreement", "fine-tune s")
    formats = ("", "", ".4f", ".2f", ".3f", ".0f")
    print("\n" + tabulate(table, headers, floatfmt=formats))
    text = tabulate(table, headers, tablefmt="github", floatfmt=formats)
    notes = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    (options.out / "results.md").write_text(f"{text}\n\n{notes}\n")
    values = {
        **facts,
        "budget": asdict(judge.budget),
        "rows": [{k: v for k, v in asdict(row).items() if k != "images"} for row in rows],
    }
    (options.out / "results.json").write_text(json.dumps(values, indent=2) + "\n")
    print(f"\n{notes}\n\nwrote samples.png, results.md and results.json to {options.out}")
    return values


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Reads the command line and runs the demo."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="seconds, not minutes; no quality")
    parser.add_argument("--train-teacher", action="store_true", help="train the teacher anew")
    parser.add_argument("--backend", default="eager", help="what runs the sparse graph")
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--seed", type=int, default=0)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
