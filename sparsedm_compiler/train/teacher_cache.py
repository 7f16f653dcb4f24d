"""The outputs of a teacher on the disk, by the position of their images in the run.

Image k of a run has its order, noise, level, flip and dropped condition from (seed, k). So the
teacher's output for it depends on k, and on what ``describe_teaching`` lists, and on no option of
the student: every run with the same of those reads what the first one wrote.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import ConfigError, DataError, pattern_of
from ..data import ImageData
from ..data.row_cache import RowCache, get_free_bytes, read_cache
from ..diffusion import predict
from ..diffusion.condition import Condition, move, move_condition, take_rows
from ..evaluate.process_group import raising_together
from ..progress import announce, format_bytes
from .batches import check_batch, index_data
from .checkpoint import is_compiled
from .finetune_config import FinetuneConfig
from .fingerprints import (
    Fingerprint,
    Fingerprints,
    fingerprint_condition,
    fingerprint_data,
    fingerprint_values,
    fingerprint_weights,
    list_differences,
    to_json,
)
from .run_inputs import RunInputs
from .state import Run

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The values of ``FinetuneConfig.teacher_dtype``."""
TEACHER = ("teacher", "teacher settings")
"""What a record says of the teacher, which a run without one takes from there."""
TOLERANCE = 1e-3
"""The most that a kept output may differ, as a share of its mean square."""
OPTIONS = (
    *("seed", "objective", "levels", "flip", "drop_condition", "null_label"),
    *("mixed_precision", "teacher_dtype"),
)
"""The options that a teacher's output depends on."""


def open_teacher_cache(run: Run, progress: bool) -> RowCache | None:
    """Opens the cache that the options name, and reserves its place on the disk.

    Every process calls it. Raises ConfigError where the cache holds outputs of another teacher,
    other data or options, where it does not fit on the disk, and without a teacher where it does
    not hold all outputs of the run; DataError where it cannot be read or written.
    """
    if run.config.teacher_cache is None:
        return None
    folder, first = Path(run.config.teacher_cache), run.progress.seen
    config, inputs, teacher = run.config, run.inputs, run.first_teacher
    with raising_together(), announce("opening the teacher cache"):
        about = describe_teaching(config, inputs, teacher)
        cache = find_cache(folder, config, inputs, about)
    total = count_positions(config)
    with raising_together():
        if teacher is None and (missing := cache.count_missing(first, total)):
            raise ConfigError(
                f"the teacher cache {folder} lacks {missing:,} of the {total - first:,} outputs "
                "that are due: give the teacher, which computes them"
            )
        if teacher is not None and run.process.is_main:
            check_room(cache, total, progress)
            cache.claim()
    run.process.wait_for_all()
    with raising_together():
        cache = find_cache(folder, config, inputs, about)  # another run may have been first
        if teacher is not None and run.process.is_main:
            cache.reserve(total)
    run.process.wait_for_all()
    return cache


def count_positions(config: FinetuneConfig) -> int:
    """Returns how many images the steps of a run see, the last batch whole."""
    return -(-config.images // config.batch_size) * config.batch_size


def check_room(cache: RowCache, total: int, progress: bool) -> None:
    """Says how much of the disk the cache takes. Raises ConfigError where so much is not free."""
    size, new = cache.count_bytes(total), cache.count_unreserved_bytes(total)
    if progress:
        missing = cache.count_missing(0, total)
        tqdm.write(
            f"teacher cache {cache.folder}: outputs for {total:,} images, {format_bytes(size)}; "
            f"{total - missing:,} are there"
        )
    free = get_free_bytes(cache.folder)
    if new > free:
        raise ConfigError(
            f"the teacher cache {cache.folder} needs {format_bytes(new)} more for {total:,} images "
            f"in {str(cache.dtype).removeprefix('torch.')}, and {format_bytes(free)} are free: "
            "choose another folder, fewer images, or teacher_dtype 'bf16'"
        )


def find_cache(
    folder: Path, config: FinetuneConfig, inputs: RunInputs, about: Fingerprints
) -> RowCache:
    """Returns the cache in ``folder``, or a new one that is not written yet.

    ``about``: what ``describe_teaching`` returns. Raises ConfigError where it holds other outputs,
    or there is none and no teacher either.
    """
    cache, taught = read_cache(folder), TEACHER[0] in about
    if cache is None and not taught:
        raise ConfigError(f"the teacher cache {folder} is empty: give the teacher, which fills it")
    if cache is None:
        record = {name: to_json(value) for name, value in about.items()}
        shape, total = find_output_shape(inputs), count_positions(config)
        return RowCache(folder, record, DTYPES[config.teacher_dtype], shape, total=total)
    try:
        theirs = {name: Fingerprint(**value) for name, value in cache.about.items()}
    except TypeError as error:
        raise DataError(f"the record of {folder} is damaged: {error}; remove {folder}") from error
    if not taught:
        about = {name: theirs[name] for name in TEACHER if name in theirs} | dict(about)
    if differences := list_differences(theirs, about):
        raise ConfigError(
            f"the teacher cache {folder} holds outputs with {'; '.join(differences)}: choose "
            "another folder, or remove that one"
        )
    return cache


def describe_teaching(
    config: FinetuneConfig, inputs: RunInputs, teacher: nn.Module | None
) -> dict[str, Fingerprint]:
    """Returns the fingerprints of all that a teacher's outputs depend on, by name.

    Raises ConfigError for data that may differ from one reading to the next.
    """
    data = inputs.data
    tensors = isinstance(data, Tensor) or (
        isinstance(data, tuple) and all(isinstance(part, Tensor) for part in data)
    )
    if not tensors and not isinstance(data, ImageData):
        raise ConfigError(
            f"a teacher cache needs data that are the same at every reading, tensors or an "
            f"ImageData; a {type(data).__name__} may draw images at random"
        )
    prints, known = dict[str, Fingerprint](), inputs.known
    if teacher is not None:
        prints["teacher"] = known.get("teacher") or fingerprint_weights(teacher)
        if settings := list_settings(teacher):
            prints["teacher settings"] = fingerprint_option(settings)
    prints["data"] = known.get("data") or fingerprint_data(data)
    if inputs.null is not None:
        prints["null"] = fingerprint_condition(inputs.null)
    if inputs.scheduler is not None:
        prints["scheduler"] = fingerprint_values(inputs.scheduler, dict(inputs.scheduler.config))
    return prints | {name: fingerprint_option(getattr(config, name)) for name in OPTIONS}


def list_settings(teacher: nn.Module) -> dict[str, Any]:
    """Returns what decides a teacher's outputs beside its weights, as far as it can be told.

    That is the pattern of a compiled model, and the config of one of diffusers.
    """
    config: Mapping[str, Any] = vars(teacher).get("_internal_dict", {})
    settings = {name: value for name, value in sorted(config.items()) if name[0] != "_"}
    return settings | ({"pattern": str(pattern_of(teacher))} if is_compiled(teacher) else {})


def fingerprint_option(value: Any) -> Fingerprint:
    """Returns the fingerprint of an option's value."""
    return Fingerprint(repr(value), hashlib.sha256(repr(value).encode()).hexdigest())


def find_output_shape(inputs: RunInputs) -> tuple[int, ...]:
    """Returns the shape of one output, which is that of an image."""
    indexed = index_data(inputs.data)
    assert indexed is not None, "describe_teaching has checked the data"
    return tuple(check_batch(indexed[1]([0]))[0].shape[1:])


def replace_teacher_print(prints: Fingerprints, folder: str) -> Fingerprints:
    """Returns the fingerprints of a run whose teacher is known by its cached outputs alone.

    They are those of the run that had the teacher, so that either resumes the other.
    """
    cache = read_cache(Path(folder))
    if cache is None or "teacher" not in cache.about:
        return prints
    kept = {name: value for name, value in prints.items() if name != "student"}
    return {**kept, "teacher": Fingerprint(**cache.about["teacher"])}


def get_teacher_output(
    run: Run, first: int, x: Tensor, t: Tensor, y: Condition | None
) -> Tensor | None:
    """Returns the teacher's prediction for images from position ``first`` on; None without one.

    It is read where it was kept, else computed, rounded to ``teacher_dtype`` and kept. ``x``: in
    float32, whatever the student takes.
    """
    cache = run.teacher_cache
    kept = None if cache is None else cache.read(first, len(x))
    if kept is not None:
        if run.teacher is not None and not run.teacher_compared:
            condition = None if y is None else take_rows(y, range(1))
            compare_output(run, kept[:1].to(x.device), x[:1], t[:1], condition)
        return move(kept, x.device)
    if run.teacher is None:
        if cache is not None:
            raise ConfigError(
                f"the teacher cache {cache.folder} has lost outputs from image {first:,} on: give "
                "the teacher, which computes them again"
            )
        return None
    taught = compute_teacher_output(run, run.teacher, x, t, y).to(DTYPES[run.config.teacher_dtype])
    if cache is not None:
        cache.write(first, taught)
    return taught


def compute_teacher_output(
    run: Run, teacher: nn.Module, x: Tensor, t: Tensor, y: Condition | None
) -> Tensor:
    """Returns the prediction of a teacher, which gets its inputs in its own dtype."""
    like = next(teacher.parameters(), run.process.like)
    if like.dtype not in DTYPES.values():  # stored in 8 bits, or wider than the student
        like = run.process.like
    condition = None if y is None else move_condition(y, like)
    with torch.no_grad(), run.process.autocast():
        return predict(teacher, x.to(like), t, condition)


def compare_output(run: Run, kept: Tensor, x: Tensor, t: Tensor, y: Condition | None) -> None:
    """Raises ConfigError where the teacher computes something else than is kept for one image.

    Its weights are those of the record, but its code may have changed, or a plain attribute.
    """
    assert run.teacher is not None
    assert run.teacher_cache is not None
    taught = compute_teacher_output(run, run.teacher, x, t, y).double()
    run.teacher_compared = True
    if bool((taught - kept).square().mean() > TOLERANCE * taught.square().mean()):
        raise ConfigError(
            f"the teacher cache {run.teacher_cache.folder} holds other outputs than this teacher "
            "computes, whose weights are the same: its code or an attribute has changed; choose "
            "another folder, or remove that one"
        )
