"""Trains the dense teacher of the demo from scratch and saves it beside this script.

    python examples/train_teacher.py

About four minutes on two idle cores. The committed weights came from this command.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # else a busy machine takes 10 times as long

import torch
from digits import TEACHER, Digits, digits_uvit
from safetensors.torch import save_file

import sparsedm_compiler as sdm
from sparsedm_compiler.models import UViT

TEACHER_IMAGES = 4000 * 64


def train_teacher(digits: Digits, *, images: int = TEACHER_IMAGES, seed: int = 0) -> UViT:
    """Trains a U-ViT on the train split: the same loop as a student's, without a teacher."""
    torch.manual_seed(seed)
    result = sdm.finetune(
        digits_uvit(),
        None,
        digits.train,
        held_out=digits.test,
        images=images,
        batch_size=64,
        lr=3e-3,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        sr_ste_lambda=0.0,
        ema_decay=0.995,
        seed=seed,
    )
    first, last = result.held_out[0], result.held_out[-1]
    print(f"held-out loss {first.student:.4f} -> {last.student:.4f}, EMA {last.ema:.4f}")
    return result.ema


def main() -> None:
    """Reads the command line, trains and saves."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=TEACHER_IMAGES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", default=TEACHER, help="where to write the weights")
    options = parser.parse_args()
    teacher = train_teacher(Digits.load(), images=options.images, seed=options.seed)
    save_file(teacher.state_dict(), options.to)
    print(f"saved {options.to}")


if __name__ == "__main__":
    main()
