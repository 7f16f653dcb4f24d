"""The files a run writes for its user while it trains: log.jsonl, TensorBoard and curves.png."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import CheckpointError, ConfigError, get_masks, masked_parameters
from ..optional_deps import is_installed
from ..reporting.charts import save_curves
from ..reporting.run_log_format import HeldOutEntry, LogEntry, StepEntry, read_log
from .checkpoint import explain_write_error, replace_text
from .fsdp import take_local_mask

LOG = "log.jsonl"


@dataclass(frozen=True, slots=True)
class MaskChanges:
    """How much masks changed: ``rate``, the share of all masked weights, None if not known.

    ``density``: the kept share of each masked weight, by parameter name.
    """

    rate: float | None
    density: Mapping[str, float]


class MaskWatch:
    """The masks of ``model`` at the last ``measure``; if it is sharded, of the local rows."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._last: dict[str, Tensor] = {}

    @torch.no_grad()
    def measure(self) -> MaskChanges:
        """Returns the changes since the last call; at the first, and with no masks, rate None."""
        try:
            weights = masked_parameters(self.model)
        except ConfigError:
            return MaskChanges(None, {})
        fixed = get_masks(self.model, fixed=True)
        now = {n: take_local_mask(fixed.get(n), weight, p) for n, (weight, p) in weights.items()}
        known = [name for name in now if name in self._last]
        changed = sum(int((now[name] != self._last[name]).sum()) for name in known)
        total = sum(now[name].numel() for name in known)
        self._last = now
        density = {name: mask.float().mean().item() for name, mask in now.items()}
        return MaskChanges(changed / total if total else None, density)


class RunLog:
    """The log of one run in ``folder``, continued after ``seen`` images."""

    def __init__(self, folder: Path, seen: int) -> None:
        self.folder = folder
        before = read_log(folder / LOG) if (folder / LOG).exists() else ()
        self.entries: list[LogEntry] = [entry for entry in before if entry.images <= seen]
        replace_text(folder / LOG, "".join(format_entry(entry) for entry in self.entries))
        self._file = (folder / LOG).open("a", encoding="utf-8")
        self._board = open_tensorboard(folder, seen)

    def write_losses(self, images: int, means: Sequence[float], **values: float | None) -> None:
        """Writes the mean losses (total, noise, teacher) up to ``images``, and other values."""
        loss, noise, teacher = means
        self._write(
            StepEntry(
                images=images,
                loss=loss,
                noise_loss=noise,
                teacher_loss=teacher,
                **values,  # type: ignore[arg-type]
            )
        )

    def write_held_out(self, images: int, student: float, ema: float | None) -> None:
        """Writes the held-out losses after ``images``, and draws the curves anew."""
        if not any(isinstance(e, HeldOutEntry) and e.images == images for e in self.entries):
            self._write(HeldOutEntry(images, student, ema))
        self.draw_curves()

    def write_density(self, images: int, density: Mapping[str, float]) -> None:
        """Writes the kept share of every masked weight, for TensorBoard alone."""
        if self._board is not None:
            for name, value in density.items():
                self._board.add_scalar(f"density/{name}", value, images)

    def draw_curves(self) -> None:
        """Draws curves.png."""
        if self.entries:
            save_curves(self.folder / "curves.png", {self.folder.name: self.entries})

    def close(self) -> None:
        """Draws the curves and closes the files."""
        self.draw_curves()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _write(self, entry: LogEntry) -> None:
        self.entries.append(entry)
        try:
            self._file.write(format_entry(entry))
            self._file.flush()
        except OSError as error:
            raise CheckpointError(explain_write_error(self.folder / LOG, error)) from error
        if self._board is not None:
            for name, value in asdict(entry).items():
                if name != "images" and value is not None:
                    self._board.add_scalar(f"train/{name}", value, entry.images)


def format_entry(entry: LogEntry) -> str:
    """Returns the line of log.jsonl for ``entry``."""
    return json.dumps(asdict(entry)) + "\n"


def open_tensorboard(folder: Path, seen: int) -> Any:
    """Returns a TensorBoard writer that overwrites what came after ``seen`` images.

    None if TensorBoard is not installed.
    """
    if not is_installed("tensorboard"):
        return None
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=seen + 1 if seen else None)
