"""``sparsedm bench``: how many times faster a model runs pruned than dense, here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from ..pattern import Pattern
from .job import Job
from .options import add_device, add_inner, add_model_options, device_of, model_options

if TYPE_CHECKING:
    from torch import nn

    from ..evaluate.timing import Samples

ABOUT = """\
measure how much faster a model runs pruned than dense on this machine

Dense and every pattern run in turns in this process under the same compiler, each round in
another order; a number is the median of the rounds' ratios, with its quartiles. Weights are
random: the time of a kernel does not depend on their values. Absolute times are not told, they
mean little on a shared machine."""
EXAMPLE = """\
  sparsedm bench uvit-cifar10-small --pattern 2:4 1:8 --batch 8
  sparsedm bench path/to/unet --pattern 2:4 --inner eager --json"""
ROUNDS = 11


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="what to measure, as in sparsedm macs")
    add("--pattern", nargs="+", default=["2:4"], help="patterns to compare (2:4)")
    add("--policy", default="structural", help="which layers stay dense: structural, uvit or all")
    add("--batch", type=int, help="samples in the batch (1)")
    add("--inputs", help="shapes of one call, for a model of an unknown class")
    add("--rounds", type=int, default=ROUNDS, help=f"rounds to measure ({ROUNDS})")
    add("--threads", type=int, help="threads torch may use (as many as it likes)")
    add("--json", action="store_true", help="print JSON and nothing else")
    add_inner(parser)
    add_device(parser)
    add_model_options(parser)


def prepare(options: argparse.Namespace) -> Job:
    """Check the request; with --dry-run make the model too. Raises SparseDMError."""
    from ..config import Config
    from ..errors import ConfigError
    from ..lowering import resolve
    from ..models.specs import open_called

    patterns = [*dict.fromkeys(str(Pattern.parse(text)) for text in options.pattern)]
    Config.of(patterns[0], policy=options.policy)
    for name, value in (("rounds", options.rounds), ("threads", options.threads)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value} is not >= 1")
    inner, device = resolve(options.inner), device_of(options)
    given = {"options": model_options(options), "batch": options.batch, "inputs": options.inputs}
    if options.dry_run:
        open_called(options.model, **given)

    def run() -> None:
        import torch

        if options.threads is not None:
            torch.set_num_threads(options.threads)
        model, args, kwargs = open_called(options.model, device=device, **given)
        calls = candidates(model.eval(), patterns, options.policy, inner)
        with torch.no_grad():
            found = measured(calls, lambda call: call(*args, **kwargs), options.rounds)
        show(found, patterns, options, inner)

    compared = f"dense with {', '.join(patterns)} on {device}, compiled by {inner}"
    return Job((f"would compare {options.model}, {compared}, {options.rounds} rounds",), run)


def candidates(
    model: nn.Module, patterns: Sequence[str], policy: str, inner: str
) -> dict[str, Callable[..., Any]]:
    """The dense model and the pruned ones under one compiler; Inductor also at its best, frozen."""
    import copy

    import torch

    from ..compiler import compile

    if inner == "eager":
        found: dict[str, Callable[..., Any]] = {"dense, eager": model}
    else:
        found = {f"dense, {inner}": torch.compile(copy.deepcopy(model), backend=inner)}
    if inner == "inductor" and next(model.parameters()).device.type == "cpu":
        frozen = torch.compile(copy.deepcopy(model), options={"freezing": True})
        found["dense, inductor frozen"] = frozen
    for pattern in patterns:
        found[pattern] = compile(model, pattern, mode="infer", policy=policy, inner=inner)
    return found


def measured(
    calls: Mapping[str, Callable[..., Any]], call: Callable[..., Any], rounds: int
) -> dict[str, Samples]:
    """The seconds of every candidate, taken in turns."""
    from functools import partial

    from ..evaluate.timing import interleaved

    return interleaved({name: partial(call, each) for name, each in calls.items()}, rounds=rounds)


def show(
    found: Mapping[str, Samples],
    patterns: Sequence[str],
    options: argparse.Namespace,
    inner: str,
) -> None:
    """Print the ratios as a table, or as JSON."""
    from ..choose import _cpu
    from ..evaluate.timing import machine, ratio, spread

    dense = [name for name in found if name not in patterns]
    ratios = {
        text: {name: ratio(found[name].wall, found[text].wall) for name in dense}
        for text in patterns
    }
    about = {"processor": _cpu(), **machine()}
    if options.json:
        asked = {"model": options.model, "batch": options.batch or 1, "policy": options.policy}
        facts = {**asked, "inner": inner, "rounds": options.rounds, "machine": about}
        print(json.dumps({**facts, "times_faster": ratios}, indent=2))
        return
    body = [[text, *(spread(ratios[text][name]) for name in dense)] for text in patterns]
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
