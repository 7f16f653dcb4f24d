"""``sparsedm report``: compares finished and unfinished runs on one HTML page."""

from __future__ import annotations

import argparse

from .job import Job, check_writable

ABOUT = """\
compare training runs on one HTML page

The page is one self-contained file: a table to sort and filter (losses, scores, MACs, speed; the
seeds of one experiment as mean and standard deviation; the best of every pattern marked), the
curves, the samples beside real images, and the options in which the configurations differ.
An unfinished run is shown with its progress so far."""
EXAMPLE = "  sparsedm report runs/dense runs/sparse-seed* --out report.html"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a training run")
    parser.add_argument("--out", default="report.html", help="the page to write (report.html)")


def prepare(options: argparse.Namespace) -> Job:
    """Reads every run. Raises SparseDMError."""
    from ..reporting import read_run, report_page
    from ..reporting.grouping import name_runs

    runs = name_runs([read_run(folder) for folder in options.runs])
    out = check_writable(options.out)

    def run() -> None:
        report_page(options.runs, out)
        print(f"wrote {out}")

    lines = [
        f"{name}: {run.label}, seed {run.seed}, {run.images:,} images"
        + ("" if run.finished else ", unfinished")
        for name, run in runs.items()
    ]
    return Job((*lines, f"would write {out}"), run)
