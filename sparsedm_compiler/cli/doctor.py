"""``sparsedm doctor``: shows this machine, which kernels run on it, and why the others do not."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..progress import announce
from .job import DONE, FAILED, STDOUT, Job, check_writable, write_json

if TYPE_CHECKING:
    from .machine_report import CacheReport, FamilyReport, MachineReport

ABOUT = """\
show this machine, which sparse kernels run on it, and why the others do not

For bug reports: versions, CPU, compiler, cards and libraries; every kernel with the patterns that
it takes; the folder where kernels and timings are kept; optional packages. CPU kernels that were
never built here are built, which takes seconds. Of the environment only variables that change
which kernels run are shown, and ~ stands for your home folder.

exit status: 0 at least one sparse kernel runs here; 1 none does."""
EXAMPLE = """\
  sparsedm doctor
  sparsedm doctor --json machine.json"""
WIDTH = 18


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    about = "write the same as JSON to FILE; without FILE, or with -, print JSON only"
    parser.add_argument("--json", nargs="?", const=STDOUT, metavar="FILE", help=about)


def prepare(options: argparse.Namespace) -> Job:
    """Checks the request, without importing torch. Raises ConfigError."""
    if options.json is not None and options.json != STDOUT:
        check_writable(options.json)

    def run() -> int:
        from .inspect_machine import hide_home, inspect_machine

        with announce("looking at this machine"):
            report = inspect_machine()
        if options.json != STDOUT:
            print(hide_home("\n".join(format_report(report))))
        if options.json is not None:
            values = {**asdict(report), "runs_sparse": report.runs_sparse}
            write_json(options.json, hide_home(values))
        return DONE if report.runs_sparse else FAILED

    return Job(("would look at this machine, and build the CPU kernels if need be",), run)


def format_report(report: MachineReport) -> Iterator[str]:
    """Yields the report as lines."""
    yield from format_rows("machine", dict(list_machine(report)))
    yield "\nkernels, in the order in which they are tried, with the patterns they take"
    for family in report.families:
        yield from format_family(family)
    if report.families:
        yield "  (a pattern that implies one of these, as '2:4t' implies '2:4', runs by them too)"
    else:
        yield "  none could be imported"
    yield "\nkernels and timings on disk"
    yield from format_cache(report.cache)
    yield from format_rows("\noptional packages", dict(list_extras(report)))
    if report.environment:
        yield from format_rows("\nenvironment", report.environment)
    if report.problems:
        yield "\nproblems"
        yield from (f"  {problem}" for problem in report.problems)
    kernels = ", ".join(
        name for family in report.families if family.runs for name in family.kernels
    )
    yield f"\nruns here: {kernels or 'no sparse kernel; pruned weights run masked dense'}"


def format_rows(title: str, rows: dict[str, str]) -> Iterator[str]:
    """Yields a title, and a line for every row."""
    yield title
    yield from (f"  {name:{WIDTH}} {value}" for name, value in rows.items())


def list_machine(report: MachineReport) -> Iterator[tuple[str, str]]:
    """Yields the rows on versions, CPU, cards and libraries."""
    versions = {name: version or "not installed" for name, version in report.versions.items()}
    torch = versions.pop("torch")
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    yield "torch", f"{torch}, built for {report.torch_build}" if report.torch_build else torch
    yield "system", report.system
    model, cores = report.cpu.get("model", "unknown"), report.cpu["cores"]
    threads = report.cpu.get("threads")
    yield "CPU", f"{model}, " + (f"{threads} of " if threads else "") + f"{cores} threads"
    for number, card in enumerate(report.cards):
        facts = f"{card.name}, compute capability {card.capability}, {card.memory_gib:g} GiB"
        yield f"card {number}", f"{facts}, {card.multiprocessors} multiprocessors"
    if not report.cards:
        yield "card", "none that torch can use"
    yield "NVIDIA driver", report.driver or "not there (by nvidia-smi)"
    for name, version in report.libraries.items():
        yield name, version or "not there"


def format_family(family: FamilyReport) -> Iterator[str]:
    """Yields the lines on one family of kernels."""
    verdict = "yes" if family.runs else "no"
    reason = "" if family.runs else f": {family.reason}"
    yield f"  {verdict:3} {', '.join(family.kernels)} ({family.device}){reason}"
    yield f"      {'; '.join(family.patterns.values())}"
    if family.note:
        yield f"      {family.note}"


def format_cache(cache: CacheReport | None) -> Iterator[str]:
    """Yields the lines on the cache."""
    if cache is None:
        yield "  the folder cannot be read"
        return
    parts = ", ".join(f"{count} in {part}" for part, count in cache.parts.items())
    access = "can be written" if cache.writable else "cannot be written"
    size = f"{cache.files} files, {cache.megabytes:g} MB" + (f" ({parts})" if parts else "")
    yield f"  {cache.folder}: {size}; it {access}"
    if cache.folder != cache.preferred:
        yield f"  in the place of {cache.preferred}, which cannot be written"
    yield "  SPARSEDM_CACHE=FOLDER moves it; to clear it, delete the folder: all is made again"


def list_extras(report: MachineReport) -> Iterator[tuple[str, str]]:
    """Yields a row for every extra: its packages, and the line for pip where some are missing."""
    for extra, packages in report.extras.items():
        there = [f"{name} {version}" for name, version in packages.items() if version]
        missing = [name for name, version in packages.items() if not version]
        install = f'missing: {", ".join(missing)}: pip install "sparsedm-compiler[{extra}]"'
        yield extra, "; ".join([*filter(None, [", ".join(there)]), *([install] if missing else [])])
