"""``sparsedm report``: finished and unfinished runs on one HTML page."""

from __future__ import annotations

import argparse

from .job import Job, writable

ABOUT = """\
compare training runs on one HTML page

The page needs nothing but itself: a table (losses, scores, MACs, speed; several seeds of one
experiment as mean and standard deviation), the curves, the samples and what differs between the
configurations. A run that is still going is shown as far as it is."""
EXAMPLE = "  sparsedm report runs/dense runs/sparse-seed* --out report.html"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a training run")
    parser.add_argument("--out", default="report.html", help="the page to write (report.html)")


def prepare(options: argparse.Namespace) -> Job:
    """Read every run. Raises SparseDMError."""
    from ..reporting.grouping import named
    from ..reporting.page import report_page
    from ..reporting.run_record import read_run

    runs = named([read_run(folder) for folder in options.runs])
    out = writable(options.out)

    def run() -> None:
        report_page(options.runs, out)
        print(f"wrote {out}")

    lines = [
        f"{name}: {run.kind}, seed {run.seed}, {run.images:,} images"
        + ("" if run.finished else ", unfinished")
        for name, run in runs.items()
    ]
    return Job((*lines, f"would write {out}"), run)
