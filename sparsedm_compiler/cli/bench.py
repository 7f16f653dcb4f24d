"""``sparsedm bench``: measures the speed-up of pruned models over the dense one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..progress import announce, watch_compilation
from . import bench_layers
from .bench_layers import add_layer_options, check_unused
from .job import STDOUT, Job
from .options import (
    add_backend,
    add_device,
    add_model_options,
    read_model_options,
    select_device,
)

if TYPE_CHECKING:
    from torch import nn

    from ..autotune.side_by_side import Samples

ABOUT = """\
measure how much faster a model runs pruned than dense on this machine

The dense model and every pattern are timed in turns in one process under the same compiler, in a
different order each round; a result is the median of the rounds' ratios, with its quartiles. The
weights are random: the time of a kernel does not depend on their values. Absolute times are not
printed, as they mean little on a shared machine. The folder of a training run stands for its model,
pruned as in that run; the ratio is then stored in its results.json, for sparsedm report.

With --layers in the place of MODEL, linear layers of well-known models are timed instead, in less
than two minutes: a table in Markdown to share, and as JSON to FILE with --json FILE. There the
times of dense are shown, and the rows are printed as they come."""
EXAMPLE = """\
  sparsedm bench uvit-cifar10-small --pattern 2:4 1:8 --batch 8
  sparsedm bench runs/first --threads 1
  sparsedm bench path/to/unet --pattern 2:4 --backend eager --json
  sparsedm bench --layers --json layers.json
  sparsedm bench --layers --pattern 2:4 --pattern 1:8x64 --dtype bf16 --tokens 257"""
ROUNDS = 11
ALL_DENSE = "every layer of the pruned model runs dense"
Quartiles = tuple[float, float, float]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    add = parser.add_argument
    model = "as in sparsedm macs, or the folder of a training run"
    add("model", metavar="MODEL", nargs="?", help=model)
    patterns = "patterns to compare; may be repeated (default: 2:4, or that of the run)"
    add("--pattern", nargs="+", action="extend", help=patterns)
    add("--policy", help="which layers stay dense: structural, uvit or all (structural)")
    add("--batch", type=int, help="samples in the batch (1)")
    add("--inputs", help="shapes of the inputs of one call, for a model class that is not known")
    add("--rounds", type=int, default=ROUNDS, help=f"rounds to measure ({ROUNDS})")
    add("--threads", type=int, help="threads of torch (default: torch decides)")
    json_help = "print JSON only; with --layers and FILE, write JSON to it beside the table"
    add("--json", nargs="?", const=STDOUT, metavar="FILE", help=json_help)
    add_layer_options(parser)
    add_backend(parser)
    add_device(parser)
    add_model_options(parser)


@dataclass(frozen=True, slots=True)
class BenchmarkCase:
    """A model to measure, by ``name`` and ``options``, pruned by ``prune`` to every pattern.

    ``results`` is the results.json that the ratio is stored in, None without a run.
    """

    name: str
    options: Mapping[str, Any]
    patterns: Sequence[str]
    prune: Mapping[str, Any]
    results: Path | None = None


def make_case(options: argparse.Namespace) -> BenchmarkCase:
    """Returns the model and the patterns to measure. Raises ConfigError and PatternError."""
    from ..config import CompileConfig
    from ..errors import ConfigError
    from ..patterns import Pattern
    from .open_student import read_run_config

    folder, fields = Path(options.model), read_model_options(options)
    wanted = [*dict.fromkeys(str(Pattern.parse(text)) for text in options.pattern or ())]
    prune = {} if options.policy is None else {"policy": options.policy}
    if not (folder / "run.json").exists():
        case = BenchmarkCase(options.model, fields, wanted or ["2:4"], prune)
    else:
        from ..experiment.opened_run import get_pruning_options

        run = read_run_config(folder / "run.json")
        if not run.train.sparse:
            raise ConfigError(f"{folder} trained a dense model, so there is nothing to compare")
        patterns = wanted or [str(Pattern.parse(run.prune.pattern))]
        as_run = not wanted and not prune and not fields
        results = folder / "results.json" if as_run else None
        fields = {**run.model.options, **fields}
        prune = {**get_pruning_options(run), **prune}
        case = BenchmarkCase(run.model.name, fields, patterns, prune, results)
    CompileConfig.create(case.patterns[0], **case.prune)
    return case


def prepare(options: argparse.Namespace) -> Job:
    """Checks the request; with --dry-run makes the model too. Raises SparseDMError."""
    if options.model is None and options.json not in (None, STDOUT) and not options.layers:
        options.model, options.json = options.json, STDOUT  # "--json MODEL": there FILE is MODEL
    check_unused(options)
    if options.layers:
        return bench_layers.prepare(options)
    return prepare_model(options)


def prepare_model(options: argparse.Namespace) -> Job:
    """Checks a request for a model. Raises SparseDMError."""
    from ..compiler.inner_backend import resolve_backend
    from ..errors import ConfigError
    from ..models.loading import open_with_inputs

    if options.model is None:
        raise ConfigError("name a MODEL, or --layers for a table of well-known linear layers")
    if options.json not in (None, STDOUT):
        raise ConfigError(f"--json {options.json}: only --layers writes JSON to a file")
    case = make_case(options)
    for name, value in (("rounds", options.rounds), ("threads", options.threads)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value} is not >= 1")
    backend, device = resolve_backend(options.backend), select_device(options)
    settings = {"options": case.options, "batch": options.batch, "inputs": options.inputs}
    if options.dry_run:
        open_with_inputs(case.name, **settings)

    def run() -> None:
        import torch

        from ..autotune.side_by_side import describe_machine
        from ..backends.processor import read_cpu_name

        if options.threads is not None:
            torch.set_num_threads(options.threads)
        model, args, kwargs = open_with_inputs(case.name, device=device, **settings)
        candidates = make_candidates(model.eval(), case, backend)
        with torch.no_grad(), announce("timing all candidates", f"{options.rounds} rounds"):
            times = measure(candidates, lambda call: call(*args, **kwargs), options.rounds)
        dense = [text for text in case.patterns if runs_all_dense(candidates[text])]
        facts = {"processor": read_cpu_name(), **describe_machine(device)}
        print_ratios(times, case, options, backend, facts)
        if not options.json:
            print_dense(dense, compute_ratios(times, case.patterns))
        if case.results is not None and case.results.exists():
            ratios, batch = compute_ratios(times, case.patterns), options.batch or 1
            store_speedup(case.results, ratios, batch, facts, ALL_DENSE if dense else "")

    compared = f"dense with {', '.join(case.patterns)} on {device}, compiled by {backend}"
    return Job((f"would compare {options.model}, {compared}, {options.rounds} rounds",), run)


def make_candidates(
    model: nn.Module, case: BenchmarkCase, backend: str
) -> dict[str, Callable[..., Any]]:
    """Returns the dense and the pruned models under one compiler, by name.

    With Inductor on a CPU there is a second dense model with frozen weights, its fastest form.
    """
    import copy

    import torch

    from ..compiler.api import compile

    candidates: dict[str, Callable[..., Any]] = {}
    if backend == "eager":
        candidates["dense, eager"] = model
    else:
        candidates[f"dense, {backend}"] = torch.compile(copy.deepcopy(model), backend=backend)
    if backend == "inductor" and next(model.parameters()).device.type == "cpu":
        frozen = torch.compile(copy.deepcopy(model), options={"freezing": True})
        candidates["dense, inductor frozen"] = frozen
    for pattern in case.patterns:
        candidates[pattern] = compile(model, pattern, mode="infer", backend=backend, **case.prune)
    return candidates


def measure(
    candidates: Mapping[str, Callable[..., Any]],
    call: Callable[[Callable[..., Any]], object],
    rounds: int,
) -> dict[str, Samples]:
    """Returns the seconds that ``call`` takes with every candidate, timed in turns."""
    from functools import partial

    from ..autotune.side_by_side import sample_in_turns

    calls = {name: partial(call, candidate) for name, candidate in candidates.items()}
    for name, first_call in calls.items():
        with watch_compilation(f"compiling {name}"):
            first_call()
    return sample_in_turns(calls, rounds=rounds)


def compute_ratios(
    times: Mapping[str, Samples], patterns: Sequence[str]
) -> dict[str, dict[str, Quartiles]]:
    """Returns the speed-up of every pattern over every dense candidate, in quartiles."""
    from ..autotune.side_by_side import compute_ratio

    dense = [name for name in times if name not in patterns]
    return {
        text: {name: compute_ratio(times[name].wall, times[text].wall) for name in dense}
        for text in patterns
    }


def runs_all_dense(model: Callable[..., Any]) -> bool:
    """Returns whether a compiled model that was called runs every pruned weight dense."""
    from torch import nn

    from .. import explain

    assert isinstance(model, nn.Module)
    return all(choice.kernel == "dense" for choice in explain(model).choices)


def print_dense(patterns: Sequence[str], ratios: Mapping[str, Mapping[str, Quartiles]]) -> None:
    """Says of each pattern without a sparse kernel what its ratios are then a measure of."""
    for text in patterns:
        worst = min(median for _, median, _ in ratios[text].values())
        cost = (
            f": what is below 1 ({worst:.2f}) is the cost of a call of the pruned model, which no "
            "kernel wins back at this size"
            if worst < 1
            else ""
        )
        print(f"{text}: {ALL_DENSE}, as no sparse kernel was faster or there is none{cost}")


def store_speedup(
    results: Path,
    ratios: Mapping[str, Mapping[str, Quartiles]],
    batch: int,
    facts: Mapping[str, Any],
    note: str = "",
) -> None:
    """Stores the speed-up of a run over the fastest dense model in its results.json, and a note."""
    from ..autotune.side_by_side import format_machine
    from ..train.checkpoint import replace_text

    (own,) = ratios.values()
    name, (_, median, _) = min(own.items(), key=lambda item: item[1][1])
    about = format_machine(facts).rpartition(", load")[0]
    values = json.loads(results.read_text(encoding="utf-8"))
    baseline = f"{name}, batch {batch}, {about}" + (f" ({note})" if note else "")
    values["speed"] = {"ratio": median, "baseline": baseline}
    replace_text(results, json.dumps(values, indent=1) + "\n")


def print_ratios(
    times: Mapping[str, Samples],
    case: BenchmarkCase,
    options: argparse.Namespace,
    backend: str,
    facts: Mapping[str, Any],
) -> None:
    """Prints the ratios as a table, or as JSON."""
    from tabulate import tabulate

    from ..autotune.side_by_side import format_machine, format_ratio

    ratios = compute_ratios(times, case.patterns)
    dense = [*next(iter(ratios.values()))]
    if options.json:
        values = {"model": options.model, "batch": options.batch or 1, "prune": case.prune}
        values |= {"backend": backend, "rounds": options.rounds, "machine": facts}
        print(json.dumps({**values, "times_faster": ratios}, indent=2))
        return
    body = [[text, *(format_ratio(ratios[text][name]) for name in dense)] for text in case.patterns]
    print(f"{options.model}, batch {options.batch or 1}: times faster than")
    print(tabulate(body, ["pattern", *dense], disable_numparse=True))
    print(f"medians of {options.rounds} rounds [quartiles]; {format_machine(facts)}")
