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

import os
import sys
from dataclasses import replace

os.environ.setdefault("OMP_NUM_THREADS", "1")

from study.command_line import make_parser, open_study
from study.figure_runs import list_figure_settings
from study.figures import write_figures
from study.plan import QUICK, SMALL
from study.run import prepare_study, run_settings


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, train what is missing and draw."""
    parser = make_parser(__doc__ or "", "out/figures")
    add = parser.add_argument
    add("--jobs", type=int, default=1)
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where models train")
    add("--quick", action="store_true", help="a few minutes on digits, of no quality")
    add("--draw", action="store_true", help="draw what has run, and train nothing")
    options = parser.parse_args(arguments)
    budget = QUICK if options.quick else SMALL
    study = open_study(options, budget)
    study = replace(study, device=options.device)
    failed = 0
    if not options.draw:
        prepare_study(study)
        failed = run_settings(study, list_figure_settings(study), options.jobs)
    write_figures(study)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
