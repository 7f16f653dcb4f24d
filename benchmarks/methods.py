"""Which way of training an N:M student is best, at one small budget, over seeds.

    python benchmarks/methods.py --data train.npz --held-out test.npz --size 16 --out out/methods

Trains a small dense U-ViT on the images (any that ``sparsedm_compiler.data.open_data`` opens; or
takes the trained one that --teacher names, such as study/cifar16_teacher.safetensors), then every
method at every pattern and seed from that one teacher, for the same number of images; some with
four times the images; a sweep of lambda, beta and learning rate; and block patterns such as
1:2@32x8 beside per-row ones of their density (--only blocks), starts from OBS with masks that
freeze at half of the images (--only settled), every method at the learning rates that suit its
pattern, beside obs-distill (--only tuned, --only tuned-long), and smaller dense models of as many
MACs, such as Diff-Pruning's (--only baselines; needs torch-pruning, the extra "structural"). Every
run has its own folder and is resumed by the same command. Samples are scored by the Fréchet
distance on a small classifier of the same images, "FD-SmallResNet", which is no FID. Writes
methods.json, methods.md and a page that compares the runs of each group.

--jobs N runs so many side by side, one thread each. --quick is a few minutes on bundled digits.

    python benchmarks/methods.py --device cuda --data train.npz --held-out test.npz \\
        --features resnet56.th --out out/methods

is a study of its own on one GPU, within --minutes 12: U-ViT-S at 32x32 by the recipe
"cifar10-uvit+short-gpu" (bfloat16; --precision no is float32), from random weights, as many images
for every student as there is time for, the most important first; the same command goes on.
--features are the weights of ResNet-56 to take Fréchet distances on. --minutes 1 --quick rehearses
it on a CPU.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from study.command_line import make_parser, open_study
from study.plan import GROUPS, LARGE, QUICK, SMALL
from study.run import run_study
from study.timed import run_timed

RECIPE = "cifar10-uvit+short-gpu"
MINUTES = 12.0


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and run."""
    parser = make_parser(__doc__ or "", "out/methods")
    add = parser.add_argument
    add("--jobs", type=int, default=1)
    add("--quick", action="store_true", help="a few minutes on digits, of no quality")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--minutes", type=float, help=f"a study by the clock, on one device ({MINUTES:g} on cuda)")
    add("--precision", choices=("bf16", "no"), help="of a study by the clock (bf16 on cuda)")
    add("--features", type=Path, help="weights of ResNet-56 for FD; else a classifier is trained")
    parts = ("teacher", *GROUPS, "report")
    add("--only", action="append", choices=parts, help="a part alone; repeat for more")
    options = parser.parse_args(arguments)
    budget = QUICK if options.quick else SMALL
    study = open_study(options, budget)
    study = replace(study, device=options.device, features=options.features)
    if options.device == "cpu" and options.minutes is None:
        return run_study(study, options.jobs, options.only)
    precision = options.precision or ("bf16" if options.device == "cuda" else "no")
    study = replace(study, budget=QUICK if options.quick else LARGE)
    study = replace(study, recipe=RECIPE, precision=precision)
    return run_timed(study, options.minutes or MINUTES)


if __name__ == "__main__":
    sys.exit(main())
