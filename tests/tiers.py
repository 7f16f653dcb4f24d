"""``SLOW``: the tests that take seconds each; ``make test-quick`` leaves them out.

Of every big matrix the quick tier keeps a row. A test is slow by its file and by what its name,
with the parameters in brackets, holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

TESTS = Path(__file__).parent
SLOW: tuple[tuple[str, str], ...] = (
    # Captures of diffusers models; of the battery a row of uvit stays.
    ("compiler/test_battery.py", r"\[(?!uvit\]|uvit-sparse\])"),
    ("compiler/test_dynamo_backend.py", r"\[(?!uvit\]).*\]|import"),
    ("compiler/test_pipelines.py", ""),
    ("diffusion/test_predict.py", r"\[(unet|dit|sd3|flux|pixart|wan)|import"),
    ("test_zoo.py", r"\[(?!uvit\]|unet_condition\])"),
    # Inductor: a C++ compiler for every graph. One row stays, in compiler/test_guarded_forward.py.
    ("autotune/test_select_kernel.py", "inductor"),
    ("backends/cpu/test_ops.py", "inductor"),
    ("backends/cuda/test_situations.py", r"inductor|\[(?!cpu-2:4)"),
    ("backends/cusparselt/test_models.py", "inductor"),
    ("backends/cusparselt/test_quantized.py", "inductor"),
    ("backends/cusparselt/test_training.py", "inductor"),
    ("backends/vnm/test_ops.py", "inductor"),
    ("compiler/test_graph_breaks.py", "inductor"),
    ("compiler/test_guarded_forward.py", r"inductor.*\[train\]|environment"),
    ("masks/test_mask_ste.py", "inductor"),
    ("test_readme.py", ""),
    # Builds of kernels and code for cards that are not here.
    ("backends/cpu/test_build.py", ""),
    ("backends/cuda/test_compiling.py", ""),
    ("backends/cuda/test_nvrtc.py", r"\["),
    # Another pytest or another Python, several processes, a browser.
    ("backends/gather/test_ops.py", "interpret"),
    ("cli/test_commands.py", "program|reader"),
    ("cli/test_sample.py", "two_processes"),
    ("data/test_open_data.py", "import"),
    ("evaluate/test_frechet.py", "process"),
    ("evaluate/test_process_group.py", ""),
    ("masks/test_triton_mask.py", "interpret"),
    ("models/test_presets.py", "import"),
    ("reporting/test_page.py", "browser|screenshot"),
    ("test_gpu_benchmark.py", "rehears|report_can_be|process_is_stopped"),
    ("test_layout.py", "core_dependencies|no_triton"),
    ("train/test_distributed.py", ""),
    ("train/test_sr_ste.py", "two_processes"),
    # Whole runs.
    ("cli/test_bench.py", "ratios|json|speed"),
    ("cli/test_finetune.py", "to_the_score"),
    ("evaluate/test_inception.py", ""),
    ("examples/test_count_macs.py", "published|program"),
    ("examples/test_demo.py", ""),
    ("examples/test_encode_latents.py", ""),
    ("experiment/test_run.py", ""),
    ("models/test_presets.py", r"published.*\[(?!uvit)"),
    ("train/test_kill.py", ""),
    ("train/test_methods.py", "masks_move|end_apart|transfer|progressive"),
    ("train/test_precision.py", r"\["),
    ("train/test_resume.py", ""),
)


def is_slow(file: str, name: str) -> bool:
    """True for a test that the quick tier leaves out; ``file`` is below this folder."""
    return any(file == slow and re.search(pattern, name) for slow, pattern in SLOW)


def unmatched(tests: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Returns the rows of SLOW that match none of all tests, as after a renaming."""
    known = list(tests)
    return [
        (slow, pattern)
        for slow, pattern in SLOW
        if not any(file == slow and re.search(pattern, name) for file, name in known)
    ]
