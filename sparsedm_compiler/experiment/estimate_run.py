"""The memory and the disk that a run will need, for ``sparsedm finetune --dry-run``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .. import SparseDMError
from ..data.row_cache import RowCache
from ..evaluate.process_group import own_share
from ..progress import format_bytes
from ..train.memory import MemoryEstimate, estimate_memory, list_pruned_names
from ..train.teacher_cache import DTYPES, count_positions
from .opened_run import OpenedRun, make_call, report_run_macs
from .run_config import RunConfig
from .training_inputs import is_taught_by_cache, make_run_inputs


def estimate_run_memory(config: RunConfig, opened: OpenedRun) -> MemoryEstimate:
    """Returns the memory of one process of a run. Raises SparseDMError where it is not known."""
    train, model = config.train, opened.teacher
    pruned: set[str] = set()
    if train.sparse:
        pruned = list_pruned_names(model, report_run_macs(model, config, opened.inputs))
    taught = train.teacher != "none" and train.beta > 0
    taught = taught and not is_taught_by_cache(config, make_run_inputs(config, opened), model)
    call, processes = partial(make_call, model, opened.inputs), own_share()[1]
    return estimate_memory(model, train, call, pruned=pruned, taught=taught, processes=processes)


def describe_needs(config: RunConfig, opened: OpenedRun) -> list[str]:
    """Returns lines that say what a run needs of the memory, and of the disk for its teacher."""
    try:
        text = f"{estimate_run_memory(config, opened)} (computed, of one process)"
    except (SparseDMError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        text = f"not known: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    lines = [f"memory     {text}"]
    if config.train.teacher_cache is not None:
        total = count_positions(config.train)
        dtype = DTYPES[config.train.teacher_dtype]
        folder, shape = Path(config.train.teacher_cache), opened.inputs.data.shape
        cache = RowCache(folder, {}, dtype, shape, total=total)
        size = format_bytes(cache.count_bytes(total))
        lines.append(
            f"teacher    outputs for {total:,} images in {config.train.teacher_cache}, {size}"
        )
    return lines
