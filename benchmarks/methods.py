"""Which way of training an N:M student is best, at one small budget, over seeds.

    python benchmarks/methods.py --data train.npz --held-out test.npz --size 16 --out out/methods

Trains a small dense U-ViT on the images (any that ``sparsedm_compiler.data.open_data`` opens; or
takes the trained one that --teacher names, such as study/cifar16_teacher.safetensors), then every
method at every pattern and seed from that one teacher, for the same number of images; some with
four times the images; a sweep of lambda, beta and learning rate; and block patterns such as
1:2@32x8 beside per-row ones of their density (--only blocks), starts from OBS with masks that
freeze at half of the images (--only settled), and every method at the learning rates that suit its
pattern, beside obs-distill (--only tuned, --only tuned-long). Every run has its own folder and is
resumed by the same command. Samples are scored by the Fréchet distance on a small classifier of the
same images, "FD-SmallResNet", which is no FID. Writes methods.json, methods.md and a page that
compares the runs of each group.

--jobs N runs so many side by side, one thread each. --quick is a few minutes on bundled digits.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from study.plan import GROUPS, QUICK, SMALL, Study
from study.run import run_study


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="digits", help="training images, as open_data names them")
    add("--held-out", default="digits:test", help="held-out images")
    add("--teacher", type=Path, help="weights of the dense model; trained first if left out")
    add("--size", type=int, help="side the images are resized to")
    add("--out", type=Path, default=Path("out/methods"))
    add("--jobs", type=int, default=1)
    add("--quick", action="store_true", help="a few minutes on digits, of no quality")
    parts = ("teacher", *GROUPS, "report")
    add("--only", action="append", choices=parts, help="a part alone; repeat for more")
    options = parser.parse_args(arguments)
    budget = QUICK if options.quick else SMALL
    study = Study(
        options.data, options.held_out, options.size, options.out, budget, options.teacher
    )
    return run_study(study, options.jobs, options.only)


if __name__ == "__main__":
    sys.exit(main())
