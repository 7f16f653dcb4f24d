"""The folder of a run: who may write there, and whether it holds the same run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .. import CheckpointError, ConfigError, DataError
from ..evaluate.process_group import own_share, raising_together
from .checkpoint import list_checkpoints, replace_text
from .finetune_config import FinetuneConfig
from .fingerprints import RECORD, Fingerprints, format_record, list_differences, read_record
from .folder_lock import lock_folder
from .option_checks import MAY_DIFFER
from .run_inputs import RunInputs

CONFIG, RESULTS, WHOLE = "config.json", "results.json", "run.json"
WRITTEN = (CONFIG, WHOLE, RECORD, "log.jsonl", "curves.png", "tensorboard", "samples")
"""Everything that a run writes before its first checkpoint."""


def is_begun(folder: Path) -> bool:
    """Returns whether the folder holds a run that can be resumed, or is finished."""
    return bool(list_checkpoints(folder)) or (folder / RESULTS).exists()


@contextmanager
def hold_folder(folder: Path, config: FinetuneConfig, inputs: RunInputs) -> Iterator[None]:
    """Keeps the folder for this run alone during the block; every process of the run calls it.

    The main process locks it. Raises ConfigError, before anything is written, where the folder is
    locked or holds another run. A run that is refused before its first checkpoint leaves nothing.
    """
    main = own_share()[0] == 0
    with ExitStack() as stack:
        with raising_together():
            if main:
                check_folder(folder, config, inputs)
                stack.enter_context(lock_folder(folder))
                check_folder(folder, config, inputs)  # another process may have begun one
        try:
            yield
        except (ConfigError, DataError):
            if main and not is_begun(folder):
                remove_traces(folder)
            raise


def remove_traces(folder: Path) -> None:
    """Removes everything that a run without checkpoints has written."""
    for name in WRITTEN:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_folder(folder: Path, config: FinetuneConfig, inputs: RunInputs) -> None:
    """Raises ConfigError where the folder holds a run of other options or inputs.

    Raises CheckpointError for damaged files. Writes nothing.
    """
    if not is_begun(folder):
        return
    if (folder / WHOLE).exists() and WHOLE not in inputs.settings:
        raise ConfigError(
            f"{folder} holds a run of a whole configuration: resume it by sparsedm finetune "
            f"--config {folder / WHOLE}, or choose another folder"
        )
    file, ours = folder / CONFIG, config.as_dict()
    try:
        # An option that came after the folder was made is one that its run did not set.
        theirs = FinetuneConfig().as_dict() | json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}; remove {folder}") from error
    wrong = [n for n in ours if n not in MAY_DIFFER and theirs[n] != ours[n]]
    refuse(folder, [f"{name} {theirs[name]!r}, not {ours[name]!r}" for name in wrong])
    check_record(folder, inputs.prints)


def check_record(folder: Path, prints: Fingerprints) -> None:
    """Raises ConfigError where the folder holds a run of other data or weights."""
    record = read_record(folder)
    if record is None:
        raise ConfigError(
            f"{folder} holds a run that does not say which data and weights it was made from: "
            "choose another folder, or remove that one"
        )
    refuse(folder, list_differences(record, prints))


def refuse(folder: Path, differences: list[str]) -> None:
    """Raises ConfigError with the differences of a folder's run to this one, if there are any."""
    if differences:
        raise ConfigError(
            f"{folder} holds a run with {'; '.join(differences)}: resume it with its own options "
            "and inputs, choose another folder, or remove that one"
        )


def write_settings(folder: Path, config: FinetuneConfig, inputs: RunInputs) -> None:
    """Writes options and inputs into the folder, by which the run can be resumed."""
    texts = {CONFIG: json.dumps(config.as_dict(), indent=2) + "\n"}
    texts |= {RECORD: format_record(inputs.prints), **inputs.settings}
    for name, text in texts.items():
        replace_text(folder / name, text)
