"""The folder of a training run, finished or not, as one frozen value."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..evaluate.score import Score, ScoreKey
from .run_log_format import HeldOutEntry, LogEntry, StepEntry, read_log

VERSION = 1
FILES = ("run.json", "config.json", "results.json")
"""The whole configuration (where ``run`` made the folder), that of the training, the results."""
REAL_IMAGES = "real.png"
"""The grid of real images, to judge samples by (where ``run`` made the folder)."""


@dataclass(frozen=True, slots=True)
class Macs:
    """MACs of one forward.

    Attributes:
        dense: Of convolutions and linear layers, before pruning.
        sparse: The same, after pruning.
        attention: Of attention, which are in neither.
    """

    dense: int
    sparse: int
    attention: int


@dataclass(frozen=True, slots=True)
class Speedup:
    """How many times faster the pruned model ran than a dense one.

    Attributes:
        ratio: The speed of the pruned model over that of ``baseline``.
        baseline: The dense model, its compiler, batch and machine, as text.
    """

    ratio: float
    baseline: str


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A training run as its folder describes it.

    Attributes:
        folder: The folder.
        name: The name of the run.
        method: The training method, "?" where unknown.
        pattern: The sparsity pattern, None for a dense run.
        seed: The seed of the training.
        images: Images trained on so far.
        finished: Whether the results have been written.
        config: The whole configuration, nested as in its file.
        log: The entries of its log.
        goal: Images to train on in total, None where unknown.
        held_out: The last held-out losses, None before the first.
        scores: The scores of its samples.
        macs: The MACs of its model, None before they were counted.
        speedup: The measured speed-up, None where it was not measured.
        images_per_second: The training speed, None where unknown.
        compile_seconds: Time spent compiling the training step, None where unknown.
        samples: The newest sample grid, None where there is none.
        real_images: A grid of real images, None where there is none.
        machine: The versions and the hardware it ran on.
    """

    folder: Path
    name: str
    method: str
    pattern: str | None
    seed: int
    images: int
    finished: bool
    config: Mapping[str, Any] = field(repr=False)
    log: tuple[LogEntry, ...] = field(repr=False)
    goal: int | None = None
    held_out: HeldOutEntry | None = None
    scores: tuple[Score, ...] = ()
    macs: Macs | None = None
    speedup: Speedup | None = None
    images_per_second: float | None = None
    compile_seconds: float | None = None
    samples: Path | None = None
    real_images: Path | None = None
    machine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The method, with the pattern where there is one."""
        return self.method if self.pattern is None else f"{self.method} {self.pattern}"

    def find_score(self, key: ScoreKey) -> float | None:
        """Returns the value of its score with that key, None where it has none."""
        return next((score.value for score in self.scores if score.key == key), None)


def read_run(folder: str | Path) -> RunRecord:
    """Reads the folder of a training run, finished or not.

    Args:
        folder: The folder that ``finetune`` or ``sparsedm finetune`` wrote.

    Returns:
        The run as its files describe it.

    Raises:
        DataError: There is no such folder, it holds no run, or one of its files is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder of a run: there is no such folder")
    whole, train, results = (read_json_object(folder / name) for name in FILES)
    log = read_log(folder / "log.jsonl") if (folder / "log.jsonl").exists() else ()
    config = whole if whole is not None else train
    if config is None and results is None and not log:
        raise DataError(f"{folder} is no run: it has neither {', '.join(FILES)} nor log.jsonl")
    if results is None:
        return describe_unfinished(folder, config or {}, log)
    if results.get("version") != VERSION:
        raise DataError(
            f"{folder / 'results.json'} has format version {results.get('version')!r}, "
            f"this package reads {VERSION}"
        )
    try:
        record = describe_finished(folder, config, results, log)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{folder / 'results.json'} is damaged: {error!r}") from error
    scored = whole is None or results.get("complete", False)
    return replace(record, finished=bool(scored))


def describe_finished(
    folder: Path,
    config: Mapping[str, Any] | None,
    results: Mapping[str, Any],
    log: Sequence[LogEntry],
) -> RunRecord:
    """Returns the record of a run with ``results``. Raises KeyError and others for damaged ones."""
    held_out = [
        HeldOutEntry(losses["images"], losses["student"], losses["ema"])
        for losses in results["held_out"]
    ]
    macs, speed, samples = results["macs"], results["speed"], results["samples"]
    return RunRecord(
        folder=folder,
        name=str(results["name"]) or folder.name,
        method=str(results["method"]),
        pattern=results["pattern"],
        seed=int(results["seed"]),
        images=int(results["images"]),
        finished=True,
        config=results["config"] if config is None else config,
        log=tuple(log) or rebuild_log(results, held_out),
        goal=int(results["images"]),
        held_out=held_out[-1] if held_out else None,
        scores=tuple(read_score(score) for score in results["scores"]),
        macs=None if macs is None else Macs(macs["dense"], macs["sparse"], macs["attention"]),
        speedup=None if speed is None else Speedup(float(speed["ratio"]), str(speed["baseline"])),
        images_per_second=float(results["images_per_second"]),
        compile_seconds=results.get("compile_seconds"),
        samples=find_last_grid(folder) if samples is None else folder / samples,
        real_images=find_real_images(folder),
        machine=dict(results["machine"]),
    )


def describe_unfinished(
    folder: Path, config: Mapping[str, Any], log: Sequence[LogEntry]
) -> RunRecord:
    """Returns the record of a run without results, from its config and its log."""
    steps = [entry for entry in log if isinstance(entry, StepEntry)]
    held_out = [entry for entry in log if isinstance(entry, HeldOutEntry)]
    goal, method = look_up_option(config, "images"), look_up_option(config, "method")
    pattern = None if method == "dense" else look_up_option(config, "pattern")
    return RunRecord(
        folder=folder,
        name=folder.name,
        method=str(method or "?"),
        pattern=None if pattern is None else str(pattern),
        seed=int(look_up_option(config, "seed") or 0),
        images=max((entry.images for entry in log), default=0),
        finished=False,
        config=config,
        log=tuple(log),
        goal=None if goal is None else int(goal),
        held_out=held_out[-1] if held_out else None,
        images_per_second=steps[-1].images_per_second if steps else None,
        samples=find_last_grid(folder),
        real_images=find_real_images(folder),
    )


def read_score(values: Mapping[str, Any]) -> Score:
    """Returns the score in ``values`` of results.json. Raises KeyError where a field is missing."""
    required = ("value", "network", "count", "reference_count", "sampler", "metric")
    return Score(**{name: values[name] for name in required}, spread=values.get("spread"))


def look_up_option(config: Mapping[str, Any], name: str) -> Any:
    """Returns an option of the training, of the pruning or of the run; None where it is not set."""
    for part in (config.get("train"), config.get("prune"), config):
        if isinstance(part, Mapping) and name in part:
            return part[name]
    return None


def rebuild_log(
    results: Mapping[str, Any], held_out: Sequence[HeldOutEntry]
) -> tuple[LogEntry, ...]:
    """Returns the log of a run that kept none, from its results; learning rates are NaN."""
    losses = results["losses"]
    steps: list[LogEntry] = [
        StepEntry(images, loss, float("nan"))
        for images, loss in zip(losses["images"], losses["loss"], strict=True)
    ]
    return (*steps, *held_out)


def find_last_grid(folder: Path) -> Path | None:
    """Returns the newest sample grid in the folder of a run, None where there is none."""
    return max((folder / "samples").glob("*.png"), default=None)


def find_real_images(folder: Path) -> Path | None:
    """Returns the grid of real images in the folder of a run, None where there is none."""
    return path if (path := folder / REAL_IMAGES).exists() else None


def read_json_object(path: Path) -> dict[str, Any] | None:
    """Reads the JSON object at ``path``; None where there is no file. Raises DataError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} holds no JSON object")
    return values
