"""``SLOW``: the tests that take seconds each; ``make test-quick`` leaves them out.

Of every big matrix the quick tier keeps a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
INDUCTOR = ("inductor",)
DIFFUSERS = r"\[(unet|dit|sd3|flux|pixart|wan)"
SLOW: Mapping[str, tuple[str, ...]] = {
    # Captures of diffusers models; of the battery a row of uvit stays.
    "compiler/test_battery.py": (r"\[(?!uvit\]|uvit-sparse\])",),
    "compiler/test_dynamo_backend.py": (DIFFUSERS, "import"),
    "compiler/test_diffusers_lines.py": (
        "cache",
        "option_of",
        "pretrained",
        "pipeline",
        "controlnet",
    ),
    "compiler/test_merge_lora.py": ("",),
    "compiler/test_pipelines.py": ("",),
    "compiler/test_other_libraries.py": ("",),
    "compiler/test_read_guard.py": ("fused", "quantization", "failed_is_as_it_was", "block"),
    "compiler/test_recompile.py": ("unet", "adapter"),
    "compiler/test_saved_weights.py": ("pretrained",),
    "compiler/test_sparse_method.py": ("autoencoder", "compiled_by_the_user"),
    "diffusers/test_plugin.py": (
        *("reloaded", "policy", "first_call", "folded", "zeros", "mapping", "two_models", "disk"),
        *("sharded", "casts", "training", "attached"),
    ),
    "diffusion/test_predict.py": (DIFFUSERS, "import"),
    "experiment/test_distil_recipes.py": (r"\[",),
    "test_docs.py": ("site",),
    "test_study_figures.py": ("all_six",),
    "test_study_structural.py": ("smaller_model",),
    "test_study_timed.py": ("whole_results",),
    "test_zoo.py": (r"\[(?!uvit\]|unet_condition\])",),
    # Inductor: a C++ compiler for every graph. One row stays, in test_guarded_forward.py.
    "autotune/test_select_kernel.py": INDUCTOR,
    "backends/cpu/test_ops.py": INDUCTOR,
    "backends/cuda/test_situations.py": (
        "inductor",
        r"\[(?!cpu-2:4)",
        "copies_updates",
        "autocast",
        "finalize",
    ),
    "backends/cusparselt/test_models.py": INDUCTOR,
    "backends/cusparselt/test_quantized.py": INDUCTOR,
    "backends/cusparselt/test_training.py": INDUCTOR,
    "backends/vnm/test_ops.py": INDUCTOR,
    "backends/wgmma/test_training.py": (*INDUCTOR, "interpret", "commits"),
    "compiler/test_freeze_masks.py": (*INDUCTOR, "ddp"),
    "compiler/test_graph_breaks.py": INDUCTOR,
    "compiler/test_guarded_forward.py": (
        r"inductor.*\[train\]",
        "environment",
        "instances_of_one_class",
    ),
    "masks/test_mask_ste.py": INDUCTOR,
    "oneshot/test_permutation.py": (r"\[(unet|dit)-",),
    "passes/rewrite/test_round_rows.py": INDUCTOR,
    "test_fresh_install.py": ("",),
    "test_readme.py": ("",),
    # Builds of kernels, and code for cards that are not here.
    "backends/cpu/test_build.py": ("",),
    "backends/cpu/test_neon.py": ("",),
    "backends/cuda/test_compiling.py": ("",),
    "backends/cuda/test_nvrtc.py": (r"\[",),
    "backends/vnm/test_kernel.py": (r"emulator.*\[(?!128:2:16)", r"activation\[(?!gelu\])"),
    # Another pytest or another Python, several processes, a browser.
    "backends/cuda/test_quantize.py": ("interpret",),
    "backends/gather/test_ops.py": ("interpret",),
    "cli/test_commands.py": ("python_m", "closed_pipe"),
    "cli/test_sample.py": ("two_processes",),
    "data/test_open_data.py": ("optional_package",),
    "data/test_rowfile.py": ("two_writers",),
    "evaluate/test_frechet.py": ("fresh_process",),
    "export/test_export_onnx.py": ("diffusion_model",),
    "export/test_package.py": ("when_opened",),
    "evaluate/test_process_group.py": ("",),
    "masks/test_triton_mask.py": ("interpret",),
    "reporting/test_charts.py": (r"\[light\]",),
    "reporting/test_page.py": ("browser", "screenshot", "charts_by_pattern"),
    "test_gpu_benchmark.py": ("rehears", "report_can_be", "process_is_stopped"),
    "test_gpu_sections.py": ("",),
    "test_layout.py": ("core_dependencies", "no_triton"),
    "train/test_core_install.py": ("",),
    "train/test_distributed.py": ("",),
    "train/test_folder_lock.py": ("held_by_a_process",),
    "train/test_optimizers.py": ("run_by",),
    "train/test_sharded_blocks.py": ("",),
    "train/test_teacher_cache.py": ("two_processes",),
    "train/test_sr_ste.py": ("two_processes",),
    "train/test_step_clock.py": ("leaves_compiling",),
    # Whole runs and whole models.
    "cli/test_bench.py": ("ratios", "speedup"),
    "cli/test_finetune.py": ("trains_scores",),
    "evaluate/test_inception.py": ("",),
    "examples/test_count_macs.py": ("published", "as_a_program"),
    "examples/test_demo.py": ("",),
    "examples/test_diffusers_end_to_end.py": ("",),
    "examples/test_encode_latents.py": ("",),
    "experiment/test_resuming.py": ("",),
    "experiment/test_run.py": ("",),
    "models/test_presets.py": (r"published.*\[(?!uvit)", "importing"),
    "masks/test_block_training.py": (r"finetune.*\[(?!asp)",),
    "masks/test_transposable_training.py": (r"finetune.*\[(?!asp)",),
    "train/test_kill.py": ("",),
    "train/test_methods.py": (
        "flip_rate",
        "different_losses",
        "transfer",
        "progressive",
        "by_the_teacher",
    ),
    "train/test_precision.py": (r"\[", "twice"),
    "train/test_run_log.py": ("curves_png", "tensorboard", "mean_losses", "ema_at_fixed"),
    "train/test_resume.py": ("",),
}
"""By file below this folder: what the names of its slow tests hold, as regular expressions.

The name of a test is followed by its parameters in brackets.
"""

LONGEST = (
    "train/test_distributed.py",
    "masks/test_triton_mask.py",
    "train/test_kill.py",
    "test_gpu_benchmark.py",
    "experiment/test_run.py",
    "backends/cuda/test_compiling.py",
    "examples/test_diffusers_end_to_end.py",
    "examples/test_demo.py",
    "train/test_sharded_blocks.py",
    "evaluate/test_inception.py",
    "backends/cpu/test_build.py",
    "backends/gather/test_ops.py",
    "backends/cuda/test_quantize.py",
    "train/test_resume.py",
    "compiler/test_battery.py",
    "compiler/test_diffusers_lines.py",
    "backends/cuda/test_situations.py",
    "train/test_methods.py",
    "examples/test_count_macs.py",
    "cli/test_sample.py",
    "compiler/test_sparse_method.py",
    "compiler/test_pipelines.py",
    "evaluate/test_frechet.py",
    "diffusers/test_plugin.py",
)
"""Files that have a test of ten seconds or more: they run first, so that no worker is idle last."""

UNMATCHED = pytest.StashKey[list[str]]()
"""Entries of SLOW that fit no test, where the whole suite was collected."""


def is_slow(file: str, name: str) -> bool:
    """True for a test that the quick tier leaves out."""
    return any(re.search(pattern, name) for pattern in SLOW.get(file, ()))


def unmatched(tests: Iterable[tuple[str, str]]) -> list[str]:
    """Returns the entries of SLOW that fit none of all (file, name), as after a renaming."""
    known = list(tests)
    return [
        f"{slow}: {pattern!r}"
        for slow, patterns in SLOW.items()
        for pattern in patterns
        if not any(file == slow and re.search(pattern, name) for file, name in known)
    ]


def share_out(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Orders tests for two workers, of which each starts with half of the list.

    A worker without work takes tests from the end of the other's. So each half begins with files
    that have slow tests, the longest of LONGEST first: the last minute is for tests of no length.
    The tests of a file stay together, as they share fixtures.
    """
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    slow = {path for path, tests in files.items() if any("slow" in test.keywords for test in tests)}
    rank = {TESTS / file: i for i, file in enumerate(LONGEST)}
    ordered = sorted(files, key=lambda path: (rank.get(path, len(rank)), path not in slow))
    halves: list[list[pytest.Item]] = [[], []]
    for number, path in enumerate(path for path in ordered if path in slow):
        halves[number % 2] += files[path]
    for path in ordered:
        if path not in slow:
            min(halves, key=len).extend(files[path])
    first, second = sorted(halves, key=len, reverse=True)  # its end may begin the other's half
    return first + second
