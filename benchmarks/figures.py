"""The paper's figures at a small scale, with the runs behind them.

    python benchmarks/figures.py --data train.npz --held-out test.npz --size 16 \\
        --teacher benchmarks/study/cifar16_teacher.safetensors --out out/figures --jobs 2

Trains what is missing (each run has its own folder and is resumed by the same command), then draws
(a) loss and Fréchet distance over the ten ratios, (b) masks switched in stages, (c) sparsedm beside
Diff-Pruning and narrow models over MACs, (d) learning curves beside STE, (e) ratios by method, (f)
untrained masks, STE and sparsedm. Diff-Pruning needs torch-pruning (extra "structural").

--quick is a few minutes on bundled digits, of no quality.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from study.figure_runs import list_figure_settings
from study.figures import write_figures
from study.plan import QUICK, SMALL, Study
from study.run import prepare_study, run_settings


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, train what is missing and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="digits", help="training images, as open_data names them")
    add("--held-out", default="digits:test", help="held-out images")
    add("--teacher", type=Path, help="weights of the dense model; trained first if left out")
    add("--size", type=int, help="side the images are resized to")
    add("--out", type=Path, default=Path("out/figures"))
    add("--jobs", type=int, default=1)
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where models train")
    add("--quick", action="store_true", help="a few minutes on digits, of no quality")
    add("--draw", action="store_true", help="draw what has run, and train nothing")
    options = parser.parse_args(arguments)
    budget = QUICK if options.quick else SMALL
    study = Study(
        options.data, options.held_out, options.size, options.out, budget, options.teacher
    )
    study = replace(study, device=options.device)
    failed = 0
    if not options.draw:
        prepare_study(study)
        failed = run_settings(study, list_figure_settings(study), options.jobs)
    write_figures(study)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
