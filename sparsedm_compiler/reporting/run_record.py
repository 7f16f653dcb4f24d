"""``read_run``: a training run's folder, finished or not, as one frozen value."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import DataError
from .run_log_format import Entry, Held, Trained, read_log

VERSION = 1
FILES = ("run.json", "config.json", "results.json")
"""The whole configuration (where ``run`` made the folder), that of the training, the results."""

ScoreKind = tuple[str, str, int, int | None, str]
"""Metric, network, count, reference count, sampler."""


@dataclass(frozen=True, slots=True)
class Scored:
    """One score with everything it is not comparable without.

    ``reference_count``: real images, None where the statistics they came from do not say.
    """

    metric: str
    value: float
    network: str
    count: int
    reference_count: int | None
    sampler: str

    @property
    def kind(self) -> ScoreKind:
        """What two scores must share to be compared."""
        return self.metric, self.network, self.count, self.reference_count, self.sampler


@dataclass(frozen=True, slots=True)
class Macs:
    """MACs of one forward: conv+linear dense and as pruned, and those of attention."""

    dense: int
    sparse: int
    attention: int


@dataclass(frozen=True, slots=True)
class Speed:
    """How many times faster than the ``baseline`` the pruned model is."""

    ratio: float
    baseline: str


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a run's folder tells. ``finished``: whether it has written its results.

    ``pattern``: None where dense. ``goal``: images it is to train on, None if unknown.
    ``held``: its last held-out losses. ``speed``: None where it was not measured.
    ``samples``: its last grid, or None.
    """

    folder: Path
    name: str
    method: str
    pattern: str | None
    seed: int
    images: int
    finished: bool
    config: Mapping[str, Any] = field(repr=False)
    log: tuple[Entry, ...] = field(repr=False)
    goal: int | None = None
    held: Held | None = None
    scores: tuple[Scored, ...] = ()
    macs: Macs | None = None
    speed: Speed | None = None
    images_per_second: float | None = None
    samples: Path | None = None
    machine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Its method, with the pattern where there is one."""
        return self.method if self.pattern is None else f"{self.method} {self.pattern}"

    def score(self, kind: ScoreKind) -> float | None:
        """Its score of that kind, None where it has none."""
        return next((score.value for score in self.scores if score.kind == kind), None)


def read_run(folder: str | Path) -> RunRecord:
    """The run in ``folder``. Raises DataError for a folder that holds none, or a damaged one."""
    place = Path(folder)
    if not place.is_dir():
        raise DataError(f"{place} is no folder of a run: there is no such folder")
    whole, train, results = (read_object(place / name) for name in FILES)
    log = read_log(place / "log.jsonl") if (place / "log.jsonl").exists() else ()
    config = whole if whole is not None else train
    if config is None and results is None and not log:
        raise DataError(f"{place} is no run: it has neither {', '.join(FILES)} nor log.jsonl")
    if results is None:
        return unfinished(place, config or {}, log)
    if results.get("version") != VERSION:
        raise DataError(
            f"{place / 'results.json'} has format version {results.get('version')!r}, "
            f"this package reads {VERSION}"
        )
    try:
        found = finished(place, config, results, log)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{place / 'results.json'} is damaged: {error!r}") from error
    scored = whole is None or results.get("complete", False)
    return replace(found, finished=bool(scored))


def finished(
    place: Path, config: Mapping[str, Any] | None, results: Mapping[str, Any], log: Sequence[Entry]
) -> RunRecord:
    """The run that wrote ``results``."""
    held = [Held(each["images"], each["student"], each["ema"]) for each in results["held_out"]]
    macs, speed, sampled = results["macs"], results["speed"], results["samples"]
    return RunRecord(
        folder=place,
        name=str(results["name"]) or place.name,
        method=str(results["method"]),
        pattern=results["pattern"],
        seed=int(results["seed"]),
        images=int(results["images"]),
        finished=True,
        config=results["config"] if config is None else config,
        log=tuple(log) or logged(results, held),
        goal=int(results["images"]),
        held=held[-1] if held else None,
        scores=tuple(Scored(**{n: s[n] for n in Scored.__slots__}) for s in results["scores"]),
        macs=None if macs is None else Macs(macs["dense"], macs["sparse"], macs["attention"]),
        speed=None if speed is None else Speed(float(speed["ratio"]), str(speed["baseline"])),
        images_per_second=float(results["images_per_second"]),
        samples=last_grid(place) if sampled is None else place / sampled,
        machine=dict(results["machine"]),
    )


def unfinished(place: Path, config: Mapping[str, Any], log: Sequence[Entry]) -> RunRecord:
    """A run that has not ended, as far as its config and its log tell."""
    steps = [entry for entry in log if isinstance(entry, Trained)]
    held = [entry for entry in log if isinstance(entry, Held)]
    goal, method = option(config, "images"), option(config, "method")
    pattern = None if method == "dense" else option(config, "pattern")
    return RunRecord(
        folder=place,
        name=place.name,
        method=str(method or "?"),
        pattern=None if pattern is None else str(pattern),
        seed=int(option(config, "seed") or 0),
        images=max((entry.images for entry in log), default=0),
        finished=False,
        config=config,
        log=tuple(log),
        goal=None if goal is None else int(goal),
        held=held[-1] if held else None,
        images_per_second=steps[-1].images_per_second if steps else None,
        samples=last_grid(place),
    )


def option(config: Mapping[str, Any], name: str) -> Any:
    """An option of the training, of the pruning or of the run; None where there is none."""
    for part in (config.get("train"), config.get("prune"), config):
        if isinstance(part, Mapping) and name in part:
            return part[name]
    return None


def logged(results: Mapping[str, Any], held: Sequence[Held]) -> tuple[Entry, ...]:
    """The curves of a run that kept no log, from its results; no learning rate is known."""
    losses = results["losses"]
    steps: list[Entry] = [
        Trained(images, loss, float("nan"))
        for images, loss in zip(losses["images"], losses["loss"], strict=True)
    ]
    return (*steps, *held)


def last_grid(place: Path) -> Path | None:
    """The newest of the sample grids a run drew."""
    return max((place / "samples").glob("*.png"), default=None)


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object at ``path``, None where there is no file. Raises DataError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no JSON object")
    return found
