"""All that a short run imports, once for the processes that are forked from this one.

Imports take a process longer than the run itself does. Tests of imports start Python anew.
"""

from __future__ import annotations

import gc

import accelerate  # noqa: F401
import torch._dynamo.backends.inductor
import torch._dynamo.repro.after_dynamo
import torch._inductor.compile_fx
import torch.distributed.fsdp
import torch.distributed.tensor.experimental
import torch.export._trace
import torch.utils.tensorboard  # noqa: F401
from diffusers import DDPMScheduler  # noqa: F401

import sparsedm_compiler.cli
import sparsedm_compiler.experiment.run
import sparsedm_compiler.train.loop  # noqa: F401
from sparsedm_compiler.optional_deps import mend_torchvision

mend_torchvision()
import torchvision  # noqa: E402, F401

gc.set_threshold(20_000, 20, 50)  # as in tests/conftest.py
gc.collect()
gc.freeze()  # what was imported stays: no forked process looks through it again
