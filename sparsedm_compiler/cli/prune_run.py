"""The work of ``sparsedm prune``: calibrate, choose patterns, permute, prune, measure and write."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .job import write_json

if TYPE_CHECKING:
    from torch import nn

    from .. import CalibrationBatch
    from ..data import ImageData
    from ..diffusion.objective import NoiseScheduler
    from .open_student import ModelSource

STUDENT, REPORT = "student.safetensors", "report.json"
PERMUTATION, PATTERNS = "permutation.json", "patterns.json"
PERMUTE_SCORES = {"obs": "wanda", "wanda": "wanda", "magnitude": "magnitude"}
"""The score that channels are permuted by, by the method that then prunes."""


@dataclass(frozen=True, slots=True)
class PruneRun:
    """One run of the command, with everything checked.

    Attributes:
        options: Its options.
        source: The dense model.
        pattern: The pattern of most weights, or whose cost --mixed keeps to.
        choice: The options that choose the weights, as ``compile`` takes them.
        folder: Where results are written.
        data: Images to calibrate with.
        held_out: Images to measure the loss on; None measures none.
        objective: What the model predicts.
        scheduler: The schedule of its noise; None for the default one.
    """

    options: argparse.Namespace
    source: ModelSource
    pattern: str
    choice: dict[str, Any]
    folder: Path
    data: ImageData
    held_out: ImageData | None
    objective: str
    scheduler: NoiseScheduler | None

    def run(self) -> None:
        """Prunes the model, and writes the student and the reports."""
        model = self.source.open()
        self.print_loss("dense", model)
        batches = self.make_batches(model)
        pattern, choice = self.pattern, self.choice
        if self.options.mixed is not None and self.options.pattern is not None:
            pattern, choice = self.choose_mixed(model, batches)
        if self.options.permute:
            self.permute(model, pattern, choice, batches)
        self.prune(model, pattern, choice, batches)

    def print_loss(self, name: str, model: nn.Module) -> None:
        """Measures and prints the held-out loss, where there are images for it."""
        from .. import held_out_loss

        if self.held_out is not None:
            loss = held_out_loss(
                model, self.held_out, objective=self.objective, scheduler=self.scheduler
            )
            print(f"{name}: held-out loss {loss:.4f}", flush=True)

    def make_batches(self, model: nn.Module) -> list[CalibrationBatch]:
        """Returns the calls of the model that it is calibrated with."""
        from .. import make_calibration_batches

        return make_calibration_batches(
            model,
            self.data,
            images=self.options.images,
            batch_size=self.options.batch_size,
            objective=self.objective,
            scheduler=self.scheduler,
            timestep_weights=self.options.timestep_weights,
            seed=self.options.seed,
        )

    def choose_mixed(
        self, model: nn.Module, batches: list[CalibrationBatch]
    ) -> tuple[str, dict[str, Any]]:
        """Chooses the pattern of every layer; returns the usual one, and all other options."""
        from .. import choose_patterns

        budget: dict[str, Any] = {
            "milliseconds" if self.options.budget == "time" else "macs": self.pattern
        }
        mixed = choose_patterns(
            model,
            self.options.mixed.split(","),
            batches,
            keep_dense=self.choice["keep_dense"],
            policy=self.choice["policy"],
            method=self.options.method,
            memory=get_memory(self.options),
            **budget,
        )
        print(mixed)
        mixed.save(self.folder / PATTERNS)
        return mixed.pattern, mixed.options

    def permute(
        self,
        model: nn.Module,
        pattern: str,
        choice: dict[str, Any],
        batches: list[CalibrationBatch],
    ) -> None:
        """Permutes the channels of the model, and writes the report."""
        from .. import permute_channels

        score = PERMUTE_SCORES[self.options.method]
        permutation = permute_channels(model, pattern, batches, score=score, **choice)
        print(permutation)
        write_json(str(self.folder / PERMUTATION), permutation.to_dict())

    def prune(
        self,
        model: nn.Module,
        pattern: str,
        choice: dict[str, Any],
        batches: list[CalibrationBatch],
    ) -> None:
        """Prunes the model, and writes the student and the report."""
        import torch

        from .. import compile, prune_one_shot, save

        report = prune_one_shot(
            model,
            pattern,
            batches,
            method=self.options.method,
            damping=self.options.damping,
            passes=self.options.passes,
            memory=get_memory(self.options),
            out=self.folder,
            **choice,
        )
        student = compile(model, pattern, backend=self.options.backend, **choice)
        with torch.no_grad():
            student(*batches[0].args, **batches[0].kwargs)
        print(report)
        self.print_loss(self.options.method, student)
        save(student, self.folder / STUDENT)
        write_json(str(self.folder / REPORT), report.to_dict())
        print(f"wrote {self.folder / STUDENT}")


def get_memory(options: argparse.Namespace) -> int:
    """Returns the bytes that Hessians may take."""
    return int(options.memory * (1 << 30))
