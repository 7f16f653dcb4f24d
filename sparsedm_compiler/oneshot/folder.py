"""The folder of a one-shot run: each layer is kept as it is finished, and the run is resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..fileio import replace_atomically
from .batches import CalibrationBatch, hash_batches, hash_tensor
from .report import LayerReport

RECORD, LAYERS = "one_shot.json", "layers"
VERSION = 1
WEIGHT, BIAS, ROW = "weight", "bias", "sparsedm.one_shot"


class OneShotFolder:
    """The finished layers of one run: safetensors files, with a record of what the run is of."""

    def __init__(self, path: Path, record: Mapping[str, Any]) -> None:
        self.path, self.record = path, {"version": VERSION, **record}
        file = path / RECORD
        if not file.exists():
            with replace_atomically(file, durable=True) as part:
                part.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
            return
        try:
            theirs = json.loads(file.read_text(encoding="utf-8"))
            wrong = [name for name in self.record if theirs.get(name) != self.record[name]]
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{file} is damaged: {error}; remove {path}") from error
        if wrong:
            raise ConfigError(
                f"{path} holds a one-shot run with another {', '.join(wrong)}: resume it with its "
                "own model, data and options, choose another folder, or remove that one"
            )

    def save(self, number: int, tensors: Mapping[str, Tensor], row: LayerReport) -> None:
        """Writes a finished layer, whole or not at all.

        Raises:
            CheckpointError: It cannot be written.
        """
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            with replace_atomically(self._find_file(number), durable=True) as part:
                save_file(own, part, {ROW: json.dumps(row.to_dict())})
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"cannot write {self._find_file(number)}: {error}; the layers before it are whole: "
                "make room and run the same command again"
            ) from error

    def load(self, number: int) -> tuple[dict[str, Tensor], LayerReport] | None:
        """Reads a finished layer; None where it is not finished.

        Raises:
            CheckpointError: The file is damaged.
        """
        file = self._find_file(number)
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                row = LayerReport.from_dict(json.loads((opened.metadata() or {})[ROW]))
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} is damaged: {error!r}; remove it to go on") from error
        return tensors, row

    def _find_file(self, number: int) -> Path:
        return self.path / LAYERS / f"{number:05d}.safetensors"


def fingerprint(model: nn.Module, batches: Sequence[CalibrationBatch]) -> dict[str, str]:
    """Returns hashes of a model's parameters and of calibration batches."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        hash_tensor(digest, tensor)
    return {"model": digest.hexdigest(), "batches": hash_batches(batches)}
