"""Run folders as ``train`` leaves them, written by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MACHINE = {"torch": "2.13.0", "device": "cpu", "threads": 1, "processes": 1}
FD = {
    "metric": "FD",
    "value": 1.25,
    "network": "DigitsCNN",
    "count": 360,
    "reference_count": 1437,
    "sampler": "DPMSolverMultistepScheduler 20 steps",
}


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def make_log(images: int, *, loss: float = 0.1, masked: bool = True) -> list[dict[str, Any]]:
    """A log of 60 steps with six held-out losses."""
    entries: list[dict[str, Any]] = []
    for number in range(60):
        seen, left = images * (number + 1) // 60, math.exp(-number / 8)
        step = {"images": seen, "loss": loss + left + 0.01 * (number % 3), "lr": 1e-3 * left}
        flips = {"flip_rate": 0.02 * left if masked else None, "images_per_second": 100.0}
        entries.append(
            {**step, **flips, "noise_loss": loss, "teacher_loss": None, "grad_norm": 1.0}
        )
        if number % 10 == 9:
            held = {"held_out": loss + left / 2, "held_out_ema": loss + left / 3}
            entries.append({"images": seen, **held})
    return entries


def make_config(*, method: str, pattern: str | None, seed: int, **train: Any) -> dict[str, Any]:
    options = {"method": method, "images": 64_000, "seed": seed, "lr": 1e-3, "betas": [0.9, 0.99]}
    return {
        "model": {"name": "UViT", "options": {"depth": 4}},
        "prune": {"pattern": pattern or "2:4"},
        "train": {**options, **train},
        "sample": {"seed": 0},
        "out": f"runs/{method}{seed}",
    }


def write_config(folder: Path, values: dict[str, Any]) -> None:
    write_json(folder / "run.json", values)
    write_json(folder / "config.json", values["train"])


def write_grid(path: Path, colour: tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0.2, 1, 160 * 60 * 3).reshape(60, 160, 3) * colour
    Image.fromarray(ramp.astype(np.uint8)).save(path)


def write_unfinished_run(
    folder: Path, *, method: str = "sparsedm", pattern: str | None = "2:4", seed: int = 0
) -> Path:
    """A run that was killed after a fifth of its images, in the middle of a line."""
    write_config(folder, make_config(method=method, pattern=pattern, seed=seed))
    text = "".join(json.dumps(line) + "\n" for line in make_log(12_800))
    (folder / "log.jsonl").write_text(text + '{"images": 12')
    return folder


def write_run(
    folder: Path,
    *,
    method: str = "sparsedm",
    pattern: str | None = "2:4",
    seed: int = 0,
    train: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A finished run; ``changes``: of its results."""
    values = make_config(method=method, pattern=pattern, seed=seed, **(train or {}))
    write_config(folder, values)
    write_grid(folder / "samples" / "000000032000.png", (250, 250, 250))
    write_grid(folder / "samples" / "000000064000.png", (90 + 40 * seed, 140, 220))
    log = make_log(64_000, masked=pattern is not None)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    sparse = {None: 10_703_616, "2:4": 5_376_768}.get(pattern, 2_713_344)
    held = {"images": 64_000, "student": 0.08 + 0.01 * seed, "ema": 0.07 + 0.01 * seed}
    results = {
        "version": 1,
        "name": folder.name,
        "method": method,
        "pattern": pattern,
        "seed": seed,
        "images": 64_000,
        "seconds": 640.0,
        "images_per_second": 100.0 + seed,
        "config": values["train"],
        "held_out": [{"images": 0, "student": 0.9, "ema": 0.9}, held],
        "losses": {"images": [64, 128], "loss": [0.5, 0.25]},
        "macs": {"dense": 10_703_616, "sparse": sparse, "attention": 98_304},
        "scores": [{**FD, "value": 1.25 + seed}],
        "speed": None,
        "samples": "samples/000000064000.png",
        "machine": MACHINE,
        "complete": True,
        **changes,
    }
    write_json(folder / "results.json", results)
    return folder
