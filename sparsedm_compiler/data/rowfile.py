"""safetensors a few rows at a time: ``RowFile`` writes them, ``Rows`` reads them."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import DataError

KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls the types that are read and written here."""
_TYPES = {kind: dtype for dtype, kind in KINDS.items()}


@dataclass(frozen=True, slots=True)
class Rows:
    """A tensor ``shape`` of type ``kind`` in the file at ``path``, from byte ``start`` on.

    ``readable``: whether it has rows, of a type among KINDS.
    """

    path: Path
    kind: str
    shape: tuple[int, ...]
    start: int

    @property
    def readable(self) -> bool:
        return self.kind in _TYPES and len(self.shape) > 0 and 0 not in self.shape

    def at(self, index: Tensor) -> Tensor:
        """The rows at ``index`` [B], copied from the disk. Raises DataError where it fails."""
        dtype, shape = _TYPES[self.kind], torch.Size(self.shape[1:])
        sizes = self.shape[0], _row_bytes(dtype, shape)
        try:
            # Mapped read-only: torch's own mapping may be refused for files beyond the memory.
            mapped = np.memmap(self.path, np.uint8, "r", self.start, sizes)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {self.path}: {error}") from error
        found = torch.from_numpy(np.asarray(mapped[index.numpy()]).reshape(-1))
        return found.view(dtype).reshape(len(index), *shape)


def stored(path: Path) -> tuple[dict[str, Rows], dict[str, str]]:
    """The tensors of a safetensors file by name, none read yet, and its metadata.

    Raises DataError where it is no such file, or one that is cut off.
    """
    try:
        with safe_open(path, framework="np") as file:
            notes = file.metadata() or {}
        with path.open("rb") as plain:
            (length,) = struct.unpack("<Q", plain.read(8))
            header = json.loads(plain.read(length))
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read {path} as safetensors: {error}") from error
    found = {}
    for name in sorted(header.keys() - {"__metadata__"}):
        entry = header[name]
        start = 8 + length + entry["data_offsets"][0]
        found[name] = Rows(path, entry["dtype"], tuple(entry["shape"]), start)
    return found, notes


class RowFile:
    """Writes tensors [count, ...] block by block of rows into one safetensors file at ``path``.

    The first block fixes names, shapes and types. The file appears when the ``with`` block ends
    well and every row was written, and replaces what was there; otherwise nothing is left.
    """

    def __init__(self, path: Path, count: int, metadata: Mapping[str, str]) -> None:
        self.path = path
        self.count = count
        self.metadata = dict(metadata)
        self.done = 0
        self._layout: dict[str, tuple[torch.dtype, torch.Size]] = {}
        self._start: dict[str, int] = {}
        self._part = path.with_name(f".{path.name}.{os.getpid()}.part")

    def __enter__(self) -> RowFile:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = self._part.open("wb")
        except OSError as error:
            raise DataError(f"cannot write {self.path}: {error}") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._file.close()
            if kind is None and self.done != self.count:
                raise DataError(f"{self.path}: {self.done} of {self.count} rows were written")
            if kind is None:
                os.replace(self._part, self.path)
        except OSError as problem:
            raise DataError(f"cannot write {self.path}: {problem}") from problem
        finally:
            self._part.unlink(missing_ok=True)

    def write(self, rows: Mapping[str, Tensor]) -> None:
        """Append one block of rows, equally many of every tensor."""
        layout = {name: (each.dtype, each.shape[1:]) for name, each in rows.items()}
        if not self._layout:
            self._lay_out(layout)
        lengths = {len(each) for each in rows.values()}
        if layout != self._layout or len(lengths) != 1:
            raise DataError(f"{self.path}: rows of {layout} do not go on {self._layout}")
        try:
            for name, each in rows.items():
                self._file.seek(self._start[name] + self.done * _row_bytes(*layout[name]))
                plain = each.cpu().contiguous().flatten()
                self._file.write(plain.view(torch.uint8).numpy().tobytes())
        except OSError as error:
            raise DataError(f"cannot write {self.path}: {error}") from error
        self.done += lengths.pop()

    def _lay_out(self, layout: dict[str, tuple[torch.dtype, torch.Size]]) -> None:
        """Write the header: wide types first, so that every tensor is aligned."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt", **self.metadata}}
        end = 0
        for name in sorted(layout, key=lambda name: (-layout[name][0].itemsize, name)):
            dtype, shape = layout[name]
            if dtype not in KINDS:
                raise DataError(f"{self.path}: {name} of type {dtype} cannot be written")
            start, end = end, end + self.count * _row_bytes(dtype, shape)
            place = {"data_offsets": [start, end], "shape": [self.count, *shape]}
            entries[name] = {"dtype": KINDS[dtype], **place}
            self._start[name] = start
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        self._file.write(struct.pack("<Q", len(header)) + header)
        self._start = {name: at + self._file.tell() for name, at in self._start.items()}
        self._layout = layout


def _row_bytes(dtype: torch.dtype, shape: torch.Size) -> int:
    return dtype.itemsize * math.prod(shape)
