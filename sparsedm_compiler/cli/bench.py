"""``sparsedm bench``: how many times faster a model runs pruned than dense, here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from ..patterns import Pattern
from .job import Job
from .options import add_backend, add_device, add_model_options, device_of, model_options

if TYPE_CHECKING:
    from torch import nn

    from ..autotune.timer import Samples

ABOUT = """\
measure how much faster a model runs pruned than dense on this machine

Dense and every pattern run in turns in this process under the same compiler, each round in
another order; a number is the median of the rounds' ratios, with its quartiles. Weights are
random: the time of a kernel does not depend on their values. Absolute times are not told, they
mean little on a shared machine. The folder of a training run stands for its model, pruned as the
run pruned it; the ratio is then noted in its results.json, for sparsedm report."""
EXAMPLE = """\
  sparsedm bench uvit-cifar10-small --pattern 2:4 1:8 --batch 8
  sparsedm bench runs/first --threads 1
  sparsedm bench path/to/unet --pattern 2:4 --backend eager --json"""
ROUNDS = 11


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="as in sparsedm macs, or the folder of a training run")
    add("--pattern", nargs="+", help="patterns to compare (2:4; of a run: its own)")
    add("--policy", help="which layers stay dense: structural, uvit or all (structural)")
    add("--batch", type=int, help="samples in the batch (1)")
    add("--inputs", help="shapes of one call, for a model of an unknown class")
    add("--rounds", type=int, default=ROUNDS, help=f"rounds to measure ({ROUNDS})")
    add("--threads", type=int, help="threads torch may use (as many as it likes)")
    add("--json", action="store_true", help="print JSON and nothing else")
    add_backend(parser)
    add_device(parser)
    add_model_options(parser)


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured: a model by ``name`` and ``options``, pruned by ``prune`` to ``patterns``.

    ``results``: the results.json that is told the ratio, None without a run.
    """

    name: str
    options: Mapping[str, Any]
    patterns: Sequence[str]
    prune: Mapping[str, Any]
    results: Path | None = None


def subject_of(options: argparse.Namespace) -> Subject:
    """The model and the patterns that were asked for. Raises ConfigError and PatternError."""
    from ..config import CompileConfig
    from ..errors import ConfigError
    from .open_student import read_run_config

    folder, own = Path(options.model), model_options(options)
    asked = [*dict.fromkeys(str(Pattern.parse(text)) for text in options.pattern or ())]
    prune = {} if options.policy is None else {"policy": options.policy}
    if not (folder / "run.json").exists():
        found = Subject(options.model, own, asked or ["2:4"], prune)
    else:
        from ..experiment.run import get_pruning_options

        run = read_run_config(folder / "run.json")
        if not run.train.sparse:
            raise ConfigError(f"{folder} trained a dense model, so there is nothing to compare")
        patterns = asked or [str(Pattern.parse(run.prune.pattern))]
        as_run = not asked and not prune and not own
        results = folder / "results.json" if as_run else None
        given = {**run.model.options, **own}
        found = Subject(
            run.model.name, given, patterns, {**get_pruning_options(run), **prune}, results
        )
    CompileConfig.create(found.patterns[0], **found.prune)
    return found


def prepare(options: argparse.Namespace) -> Job:
    """Check the request; with --dry-run make the model too. Raises SparseDMError."""
    from ..compiler.inner_backend import resolve_backend
    from ..errors import ConfigError
    from ..models.loading import open_with_inputs

    subject = subject_of(options)
    for name, value in (("rounds", options.rounds), ("threads", options.threads)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value} is not >= 1")
    backend, device = resolve_backend(options.backend), device_of(options)
    given = {"options": subject.options, "batch": options.batch, "inputs": options.inputs}
    if options.dry_run:
        open_with_inputs(subject.name, **given)

    def run() -> None:
        import torch

        if options.threads is not None:
            torch.set_num_threads(options.threads)
        model, args, kwargs = open_with_inputs(subject.name, device=device, **given)
        calls = candidates(model.eval(), subject, backend)
        with torch.no_grad():
            found = measured(calls, lambda call: call(*args, **kwargs), options.rounds)
        show(found, subject, options, backend)
        if subject.results is not None and subject.results.exists():
            note(subject.results, ratios_of(found, subject.patterns), options.batch or 1)

    compared = f"dense with {', '.join(subject.patterns)} on {device}, compiled by {backend}"
    return Job((f"would compare {options.model}, {compared}, {options.rounds} rounds",), run)


def candidates(model: nn.Module, subject: Subject, backend: str) -> dict[str, Callable[..., Any]]:
    """The dense model and the pruned ones under one compiler; Inductor also at its best, frozen."""
    import copy

    import torch

    from ..compiler.api import compile

    if backend == "eager":
        found: dict[str, Callable[..., Any]] = {"dense, eager": model}
    else:
        found = {f"dense, {backend}": torch.compile(copy.deepcopy(model), backend=backend)}
    if backend == "inductor" and next(model.parameters()).device.type == "cpu":
        frozen = torch.compile(copy.deepcopy(model), options={"freezing": True})
        found["dense, inductor frozen"] = frozen
    for pattern in subject.patterns:
        found[pattern] = compile(model, pattern, mode="infer", backend=backend, **subject.prune)
    return found


def measured(
    calls: Mapping[str, Callable[..., Any]], call: Callable[..., Any], rounds: int
) -> dict[str, Samples]:
    """The seconds of every candidate, taken in turns."""
    from functools import partial

    from ..autotune.timer import interleaved

    return interleaved({name: partial(call, each) for name, each in calls.items()}, rounds=rounds)


def ratios_of(
    found: Mapping[str, Samples], patterns: Sequence[str]
) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Quartiles of how many times faster each pattern is than each dense candidate."""
    from ..autotune.timer import ratio

    dense = [name for name in found if name not in patterns]
    return {
        text: {name: ratio(found[name].wall, found[text].wall) for name in dense}
        for text in patterns
    }


def note(results: Path, ratios: Mapping[str, Mapping[str, Any]], batch: int) -> None:
    """Write into a run's results how many times faster it is than the fastest dense model."""
    from ..autotune.timer import machine
    from ..backends.processor import read_cpu_name
    from ..train.checkpoint import replace_text

    (found,) = ratios.values()
    name, (_, middle, _) = min(found.items(), key=lambda item: item[1][1])
    about = named({"processor": read_cpu_name(), **machine()}).rpartition(", load")[0]
    values = json.loads(results.read_text(encoding="utf-8"))
    values["speed"] = {"ratio": middle, "baseline": f"{name}, batch {batch}, {about}"}
    replace_text(results, json.dumps(values, indent=1) + "\n")


def show(
    found: Mapping[str, Samples], subject: Subject, options: argparse.Namespace, backend: str
) -> None:
    """Print the ratios as a table, or as JSON."""
    from ..autotune.timer import machine, spread
    from ..backends.processor import read_cpu_name

    ratios = ratios_of(found, subject.patterns)
    dense = [*next(iter(ratios.values()))]
    about = {"processor": read_cpu_name(), **machine()}
    if options.json:
        asked = {"model": options.model, "batch": options.batch or 1, "prune": subject.prune}
        facts = {**asked, "backend": backend, "rounds": options.rounds, "machine": about}
        print(json.dumps({**facts, "times_faster": ratios}, indent=2))
        return
    body = [[text, *(spread(ratios[text][name]) for name in dense)] for text in subject.patterns]
    print(f"{options.model}, batch {options.batch or 1}: times faster than")
    print(tabulate(body, ["pattern", *dense], disable_numparse=True))
    print(f"medians of {options.rounds} rounds [quartiles]; {named(about)}")


def named(about: Mapping[str, Any]) -> str:
    """The machine in words."""
    place = about["gpu"] or f"{about['processor']}, {about['cpu']}"
    return (
        f"{place}, {about['threads']} of {about['cores']} threads, torch {about['torch']}, "
        f"load {about['load'][0]:.1f}"
    )
