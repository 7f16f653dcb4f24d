"""What a run writes for people while it trains: log.jsonl, TensorBoard, curves.png, samples."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import CheckpointError, ConfigError, masked_parameters
from ..reporting.charts import save_curves
from ..reporting.run_log_format import HeldOutEntry, LogEntry, StepEntry, read_log
from .checkpoint import unwritable, write_whole
from .fsdp import mask_here

LOG = "log.jsonl"


@dataclass(frozen=True, slots=True)
class Flips:
    """Masks that changed: the share of all masked weights, and the density by parameter name."""

    rate: float | None
    density: Mapping[str, float]


class MaskWatch:
    """How much the masks of ``model`` change from one look to the next; sharded, the rows here."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._last: dict[str, Tensor] = {}

    @torch.no_grad()
    def look(self) -> Flips:
        """The changes since the last look; a rate of None at the first, or with no masks."""
        try:
            weights = masked_parameters(self.model)
        except ConfigError:
            return Flips(None, {})
        now = {name: mask_here(weight, p) for name, (weight, p) in weights.items()}
        known = [name for name in now if name in self._last]
        changed = sum(int((now[name] != self._last[name]).sum()) for name in known)
        total = sum(now[name].numel() for name in known)
        self._last = now
        density = {name: mask.float().mean().item() for name, mask in now.items()}
        return Flips(changed / total if total else None, density)


class Logbook:
    """The records of one run in ``folder``, going on after ``seen`` images."""

    def __init__(self, folder: Path, seen: int) -> None:
        self.folder = folder
        before = read_log(folder / LOG) if (folder / LOG).exists() else ()
        self.entries: list[LogEntry] = [entry for entry in before if entry.images <= seen]
        write_whole(folder / LOG, "".join(line(entry) for entry in self.entries))
        self._file = (folder / LOG).open("a", encoding="utf-8")
        self._board = board(folder, seen)
        self._since = (time.perf_counter(), seen)

    def trained(self, images: int, means: Sequence[float], **values: float | None) -> None:
        """Write the mean losses (total, noise, teacher) up to ``images``, and other values."""
        now, (then, before) = time.perf_counter(), self._since
        self._since = (now, images)
        loss, noise, teacher = means
        speed = (images - before) / max(now - then, 1e-9)
        self._write(
            StepEntry(
                images=images,
                loss=loss,
                noise_loss=noise,
                teacher_loss=teacher,
                images_per_second=round(speed, 2),
                **values,  # type: ignore[arg-type]
            )
        )

    def held_out(self, images: int, student: float, ema: float | None) -> None:
        """Write the held-out losses after ``images``, and draw the curves anew."""
        if not any(isinstance(e, HeldOutEntry) and e.images == images for e in self.entries):
            self._write(HeldOutEntry(images, student, ema))
        self.curves()

    def density(self, images: int, density: Mapping[str, float]) -> None:
        """Write the kept share of every masked weight, for TensorBoard alone."""
        if self._board is not None:
            for name, value in density.items():
                self._board.add_scalar(f"density/{name}", value, images)

    def curves(self) -> None:
        """Draw curves.png."""
        if self.entries:
            save_curves(self.folder / "curves.png", {self.folder.name: self.entries})

    def close(self) -> None:
        """Draw the curves and let go of the files."""
        self.curves()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _write(self, entry: LogEntry) -> None:
        self.entries.append(entry)
        try:
            self._file.write(line(entry))
            self._file.flush()
        except OSError as error:
            raise CheckpointError(unwritable(self.folder / LOG, error)) from error
        if self._board is not None:
            for name, value in asdict(entry).items():
                if name != "images" and value is not None:
                    self._board.add_scalar(f"train/{name}", value, entry.images)


def line(entry: LogEntry) -> str:
    """The line of log.jsonl for ``entry``."""
    return json.dumps(asdict(entry)) + "\n"


def board(folder: Path, seen: int) -> Any:
    """A TensorBoard writer that overwrites what came after ``seen``; None if not installed."""
    if find_spec("tensorboard") is None:
        return None
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=seen + 1 if seen else None)
