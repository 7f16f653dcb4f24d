"""``finetune``: trains a student against the truth and its dense teacher (SparseDM, eq. 9 to 14).

Importing this module needs no extra; what ``finetune`` calls needs the extra "train".
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from ..optional_deps import require_extra
from ..progress import show_announcements
from .finetune_config import FinetuneConfig
from .option_checks import check_inputs
from .result import FinetuneResult
from .run_inputs import RunInputs

if TYPE_CHECKING:
    from ..diffusion.condition import Condition
    from ..diffusion.objective import NoiseScheduler
    from .batches import Data
    from .fingerprints import Fingerprints
    from .sample_grids import SampleGrids


def finetune(
    student: nn.Module,
    teacher: nn.Module | None,
    data: Data,
    *,
    config: FinetuneConfig | None = None,
    scheduler: NoiseScheduler | None = None,
    optimizer: Optimizer | str | None = None,
    held_out: Data | None = None,
    null: Condition | None = None,
    sample_grids: SampleGrids | None = None,
    out: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> FinetuneResult:
    """Trains ``student`` in place on ``alpha*|target - s|^2 + beta*|teacher - s|^2``.

    Student and teacher get the same (x_t, t[, condition]); the teacher is only read. The order of
    the data and all noise depend on (seed, position in the data) alone.

    The same call with the same ``out`` resumes a run that was interrupted, exactly (on the CPU to
    the bit); one with another student, teacher, data or options is refused. The folder
    is locked meanwhile. SIGTERM and Ctrl-C save the run and raise StoppedError. Under ``accelerate
    launch`` every process calls this and takes its share of each batch; move the models to the
    process's device first.

    Args:
        student: The model to train, from ``compile(..., mode="train")``, or a plain model for
            method "dense".
        teacher: The dense model to imitate, with parameters of its own. None leaves out the
            teacher's term of the loss.
        data: Images float [n, C, H, W] in [-1, 1]; (images, labels [n]); a map-style Dataset of
            either; or an iterable of batches of either that can be started again.
        config: All options. None is ``FinetuneConfig()``.
        scheduler: A variance-preserving scheduler of diffusers that defines the noise levels.
            None is DDPM with 1000 linear betas; flow matching takes none.
        optimizer: An optimizer over the student's parameters, whose learning rates the schedule
            then scales, or the name of one (``FinetuneConfig.optimizer``). None is that of
            ``config``.
        held_out: Data, of any form that ``data`` may have, whose loss is measured at the start, at
            the end and every ``held_out_every`` images. None measures nothing.
        null: The condition, of one row, that stands for "no condition", for models conditioned on
            text. None is zeros.
        sample_grids: Grids of samples to draw every ``sample_every`` images. None draws none.
        out: A folder for checkpoints, log, curves, sample grids, student.safetensors and
            results.json. None writes nothing.
        progress: Whether the main process shows a progress bar, and says on stderr what else takes
            long (compiling, measuring, sampling).
        **options: Fields of FinetuneConfig by name, on top of ``config``; ``method`` brings its
            own options.

    Returns:
        The losses, held-out losses, timing, and a copy of the student with the EMA weights.

    Raises:
        ConfigError: An option does not exist or does not fit student, teacher or optimizer; the
            folder holds another run, or is being written by another process; or a package of the
            extra "train" is not installed.
        DataError: The data are of the wrong kind, shape or range, hold nothing, or are not what the
            model takes.
        CheckpointError: A checkpoint cannot be written, is damaged, or is of another model.
        StoppedError: The run was stopped by a signal, and has been saved.
        SparseDMError: The loss is NaN or Inf.

    Example:
        >>> import torch, sparsedm_compiler as sdm
        >>> from sparsedm_compiler.models import UViT
        >>> teacher = UViT(img_size=4, in_chans=1, embed_dim=8, depth=2, num_heads=2)
        >>> student = sdm.compile(teacher, pattern="2:4", backend="eager")
        >>> images = torch.randn(16, 1, 4, 4).clamp(-1, 1)
        >>> result = sdm.finetune(
        ...     student, teacher, images, images=32, batch_size=8, progress=False
        ... )
        >>> result.images, len(result.losses)
        (32, 4)
    """
    if isinstance(optimizer, str):
        options, optimizer = {**options, "optimizer": optimizer}, None
    config = (config or FinetuneConfig()).with_options(options)
    folder = None if out is None else Path(out)
    inputs = RunInputs(data, scheduler, held_out, null, sample_grids, folder)
    if folder is not None:
        taught = None if config.teacher == "none" else teacher
        prints = known = fingerprint_inputs(student, taught, inputs, optimizer)
        if teacher is None and config.teacher_cache is not None:
            from .teacher_cache import replace_teacher_print

            prints = replace_teacher_print(prints, config.teacher_cache)
        inputs = replace(inputs, prints=prints, known=known)
    return train_run(student, teacher, config, inputs, optimizer=optimizer, progress=progress)


def fingerprint_inputs(
    student: nn.Module, teacher: nn.Module | None, inputs: RunInputs, optimizer: Optimizer | None
) -> Fingerprints:
    """Returns the fingerprints of everything that ``finetune`` gets, but for its options."""
    with require_extra("finetune", "train"):
        from .fingerprints import (
            fingerprint_condition,
            fingerprint_data,
            fingerprint_models,
            fingerprint_settings,
        )
    prints = {"data": fingerprint_data(inputs.data)}
    if inputs.held_out is not None:
        prints["held_out"] = fingerprint_data(inputs.held_out)
    if inputs.null is not None:
        prints["null"] = fingerprint_condition(inputs.null)
    prints |= fingerprint_models(student, teacher)
    return prints | fingerprint_settings(inputs.scheduler, optimizer)


def train_run(
    student: nn.Module,
    teacher: nn.Module | None,
    config: FinetuneConfig,
    inputs: RunInputs,
    *,
    optimizer: Optimizer | None = None,
    progress: bool = True,
) -> FinetuneResult:
    """Does the work of ``finetune``, with all inputs in one value."""
    check_inputs(config, inputs)
    with require_extra("finetune", "train"):
        from .gradient_checkpointing import checkpointing_gradients, copy_checkpointing
        from .loop import train_to_end
        from .lora import train_selected
        from .session import open_run
    checkpointing = checkpointing_gradients(
        student, config.gradient_checkpointing, by_block=config.shard
    )
    with train_selected(student, config), checkpointing:
        run = open_run(student, teacher, config, inputs, optimizer)
        try:
            with show_announcements(progress and run.process.is_main):
                result = train_to_end(run, progress and run.process.is_main)
        finally:
            run.process.release()
    copy_checkpointing(student, result.ema)
    return result
