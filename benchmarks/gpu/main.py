"""One command for all that only a GPU can show: the tests marked ``gpu``, then all benchmarks.

    python -m benchmarks.gpu                             # under 8 minutes; writes out/gpu, or $OUT
    python -m benchmarks.gpu --only models               # one section with all of the time
    python -m benchmarks.gpu --report a.json b.json      # tables and charts again, of both together
    python -m benchmarks.gpu --tiny                      # a rehearsal on a CPU, at toy sizes

Sections run in the order of their worth, each in a process of its own, and stop when their share of
the time is up; results.json is whole after every row. The exit code is 1 if anything failed: a
test, a section, a kernel that computes something else. A goal that was missed is no failure.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .case import ROOT, read, write
from .clock import Clock
from .packages import losses, refusal
from .processes import Listener, SilentError, wait_or_stop

SHARES = {
    "tests": 125,
    "models": 135,
    "ops": 85,
    "first_call": 45,
    "training": 45,
    "table": 20,
    "memory": 6,
}
"""Seconds of the time that there is by default."""
_RESTARTS = 6
_LAST_ROW = 20
_AHEAD = 6


def main(arguments: list[str] | None = None) -> int:
    """0: all went well; 1: something failed; 2: nothing can run here."""
    options = parse_arguments(arguments)
    missing = refusal()
    if missing is not None:
        print(missing)
        return 2
    if options.report:
        from .results import load

        results = load(options.report)
        add_losses(results, options.losses)
        write_report(results, options.out or options.report[0].parent)
        return 0
    import torch

    if not options.tiny and not torch.cuda.is_available():
        print("No CUDA GPU here, so there is nothing to measure; --tiny rehearses on a CPU.")
        return 2
    out = options.out or Path(os.environ.get("OUT", "out/gpu"))
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        return run(options, out, Path(scratch))


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, help="where to write (out/gpu, or $OUT where it is set)")
    add("--minutes", type=float, default=7.6, help="for everything (7.6)")
    add("--only", nargs="+", choices=list(SHARES), metavar="SECTION", help=", ".join(SHARES))
    add("--commit", help="what is measured, where this copy is no clone")
    add("--tiny", action="store_true", help="a rehearsal on a CPU, at toy sizes")
    add(
        "--losses",
        type=Path,
        metavar="JSON",
        help="methods.json of make study-gpu, to stand beside",
    )
    add("--report", nargs="+", type=Path, metavar="JSON", help="write the report of these, again")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, out: Path, scratch: Path) -> int:
    """All sections, and the report."""
    from .environment import card, environment
    from .results import empty, list_failures, save

    chosen = {name: share for name, share in SHARES.items() if name in (options.only or SHARES)}
    clock = Clock(options.minutes, chosen)
    for loss in losses():
        print(loss, flush=True)
    arguments = [f"--{key}={value}" for key, value in vars(options).items() if key in _TOLD]
    results = empty(environment(arguments, options.commit), rehearsal=options.tiny)
    runner = Runner(results, out, scratch, options.tiny)
    add_losses(results, options.losses)
    save(results, out / "results.json")
    for name in chosen:
        print(f"== {name}", flush=True)
        if name == "tests":
            runner.tests(clock.until(name))
        else:
            runner.section(name, clock.until(name))
        write_report(results, out)
    results["environment"]["card_afterwards"] = card()
    save(results, out / "results.json")
    write_report(results, out)
    print((out / "summary.md").read_text())
    wrong = list_failures(results)
    print("\n".join(wrong) or "nothing failed")
    return 1 if wrong else 0


_TOLD = ("minutes", "only", "tiny")


class Runner:
    """Runs sections in processes of their own and keeps what they find."""

    def __init__(self, results: dict[str, Any], out: Path, scratch: Path, tiny: bool) -> None:
        self.results, self.out, self.scratch, self.tiny = results, out, scratch, tiny
        self.saved = -1
        self.environment = {**os.environ, "PYTHONPATH": path_with(ROOT)}
        if tiny:  # what is measured there must not be taken for measured here
            self.environment["SPARSEDM_CACHE"] = str(scratch / "cache")

    def tests(self, until: float) -> None:
        """The tests; meanwhile, on the other cores, what can be compiled ahead."""
        from .results import save
        from .testing import run_tests

        parts = 1 if self.tiny else max(1, min(_AHEAD, (os.cpu_count() or 1) // 2))
        ahead = [self.child("warm", until, part, parts) for part in range(parts)]
        try:
            self.results["tests"] = run_tests(self.out, self.scratch, until, self.environment)
        finally:
            for process in ahead:
                wait_or_stop(process, until)
        save(self.results, self.out / "results.json")

    def section(self, name: str, until: float) -> None:
        """One section, begun anew where its process died, without what it died of."""
        start, log = time.time(), self.scratch / f"{name}-0.jsonl"
        for _ in range(_RESTARTS):
            why = self.run_until(self.child(name, until), until, name, log, start)
            if why is None:
                break
            write(log, died=why)
            if time.time() > until:
                break
        self.keep(name, log, start)

    def run_until(
        self, process: subprocess.Popen[bytes], until: float, name: str, log: Path, start: float
    ) -> str | None:
        """Why a section must be begun anew; None where it came to its end, or its time to its."""
        listener = Listener(log)

        def listen() -> None:
            self.keep(name, log, start)
            listener.check()

        try:
            code = wait_or_stop(process, until + _LAST_ROW, listen)
        except SilentError as silent:
            return str(silent)
        if code is None:
            write(log, stopped="")
        return f"the process ended with code {code}" if code else None

    def keep(self, name: str, log: Path, start: float) -> None:
        """Save what a section has found so far."""
        from .results import save, take

        take(self.results, name, read(log), time.time() - start)
        size = log.stat().st_size if log.exists() else 0
        if size != self.saved:
            self.saved = size
            save(self.results, self.out / "results.json")

    def child(
        self, name: str, until: float, part: int = 0, parts: int = 1
    ) -> subprocess.Popen[bytes]:
        """A process that runs a section, or a part of it."""
        log = self.scratch / f"{name}-{part}.jsonl"
        command = [sys.executable, "-m", "benchmarks.gpu.child", name, "--log", str(log)]
        command += ["--until", str(until), "--part", str(part), "--parts", str(parts)]
        command += ["--tiny"] if self.tiny else []
        return subprocess.Popen(command, cwd=ROOT, env=self.environment, start_new_session=True)


def path_with(root: Path) -> str:
    """PYTHONPATH with the repository first."""
    return os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))


def add_losses(results: dict[str, Any], path: Path | None) -> None:
    """Puts the losses of a study by the clock into the results, if a file of them is named."""
    if path is not None:
        from .quality import read_losses

        results["quality"] = [read_losses(path)]


def write_report(results: dict[str, Any], out: Path) -> None:
    """summary.md, and the charts where matplotlib is installed."""
    from .charts import draw
    from .packages import find_absent
    from .summary import summary

    (out / "summary.md").write_text(summary(results))
    if not find_absent(["matplotlib"]):
        draw(results, out)
