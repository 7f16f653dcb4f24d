"""One thread per test process (pytest-xdist runs two), and a torchvision that can be imported."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from sparsedm_compiler.models.optional import mend_torchvision

torch.set_num_threads(1)
mend_torchvision()  # peft and transformers import it on their own
