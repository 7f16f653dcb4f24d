"""safetensors files, written and read a few rows at a time."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import DataError
from ..fileio import replace_atomically

TYPE_NAMES = {
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
"""Names that safetensors has for the types that are read and written here."""
_TYPES = {name: dtype for dtype, name in TYPE_NAMES.items()}

RowLayout = tuple[torch.dtype, Sequence[int]]
"""Type and shape of one row of a tensor."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor ``shape`` of type ``type_name`` in the file at ``path``, from byte ``start`` on."""

    path: Path
    type_name: str
    shape: tuple[int, ...]
    start: int

    @property
    def readable(self) -> bool:
        """True if it has rows, of a type in ``TYPE_NAMES``."""
        return self.type_name in _TYPES and len(self.shape) > 0 and 0 not in self.shape

    def count_bytes(self, rows: int) -> int:
        """Returns the bytes of so many rows."""
        return rows * count_row_bytes(_TYPES[self.type_name], self.shape[1:])

    def read_rows(self, index: Tensor) -> Tensor:
        """Copies the rows at ``index`` [B] from the disk.

        Raises DataError where the file cannot be read.
        """
        dtype, shape = _TYPES[self.type_name], torch.Size(self.shape[1:])
        sizes = self.shape[0], count_row_bytes(dtype, shape)
        try:
            # Mapped read-only: torch's own mapping may be refused for files beyond the memory.
            mapped = np.memmap(self.path, np.uint8, "r", self.start, sizes)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {self.path}: {error}") from error
        content = torch.from_numpy(np.asarray(mapped[index.numpy()]).reshape(-1))
        return content.view(dtype).reshape(len(index), *shape)


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Reads the header of a safetensors file: its tensors by name, and its metadata.

    No tensor is read. Raises DataError for a file that is no safetensors, or is cut off.
    """
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        with path.open("rb") as plain:
            (length,) = struct.unpack("<Q", plain.read(8))
            header = json.loads(plain.read(length))
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read {path} as safetensors: {error}") from error
    tensors = {}
    for name in sorted(header.keys() - {"__metadata__"}):
        entry = header[name]
        start = 8 + length + entry["data_offsets"][0]
        tensors[name] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]), start)
    return tensors, metadata


class RowFile:
    """A safetensors file of tensors [count, ...] that is written block by block of rows.

    The first block fixes names, shapes and types. When the ``with`` block ends well and every row
    was written, the file replaces the one at ``path``; otherwise nothing is left of it. Several
    processes may write ``path`` at once.
    """

    def __init__(self, path: Path, count: int, metadata: Mapping[str, str]) -> None:
        self.path = path
        self.count = count
        self.metadata = dict(metadata)
        self.done = 0
        self._layout: dict[str, RowLayout] = {}
        self._start: dict[str, int] = {}

    def __enter__(self) -> RowFile:
        try:
            with ExitStack() as stack:
                part = stack.enter_context(replace_atomically(self.path, shared=True))
                self._file: BinaryIO = stack.enter_context(part.open("wb"))
                self._stack = stack.pop_all()
        except OSError as error:
            raise DataError(f"cannot write {self.path}: {error}") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and self.done != self.count:
            with self._stack:
                raise DataError(f"{self.path}: {self.done} of {self.count} rows were written")
        try:
            self._stack.__exit__(kind, error, trace)
        except OSError as problem:
            raise DataError(f"cannot write {self.path}: {problem}") from problem

    def write(self, rows: Mapping[str, Tensor]) -> None:
        """Appends one block of rows, equally many of every tensor.

        Raises DataError where the block does not fit the first one, or the disk fails.
        """
        layout: dict[str, RowLayout] = {
            name: (tensor.dtype, tensor.shape[1:]) for name, tensor in rows.items()
        }
        if not self._layout:
            self._lay_out(layout)
        lengths = {len(tensor) for tensor in rows.values()}
        if layout != self._layout or len(lengths) != 1:
            raise DataError(f"{self.path}: rows of {layout} do not go on {self._layout}")
        try:
            for name, tensor in rows.items():
                self._file.seek(self._start[name] + self.done * count_row_bytes(*layout[name]))
                plain = tensor.cpu().contiguous().flatten()
                self._file.write(plain.view(torch.uint8).numpy().tobytes())
        except OSError as error:
            raise DataError(f"cannot write {self.path}: {error}") from error
        self.done += lengths.pop()

    def _lay_out(self, layout: dict[str, RowLayout]) -> None:
        """Writes the header."""
        header, self._start = make_header(self.count, layout, self.metadata, str(self.path))
        self._file.write(header)
        self._layout = layout


def make_header(
    count: int, layout: Mapping[str, RowLayout], metadata: Mapping[str, str], path: str
) -> tuple[bytes, dict[str, int]]:
    """Returns the header of a file of tensors [count, ...], and where each of them begins.

    Wide types come first, so that every tensor is aligned. ``path``: the file, as errors name it.
    Raises DataError for a type that safetensors does not have.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    start: dict[str, int] = {}
    end = 0
    for name in sorted(layout, key=lambda name: (-layout[name][0].itemsize, name)):
        dtype, shape = layout[name]
        if dtype not in TYPE_NAMES:
            raise DataError(f"{path}: {name} of type {dtype} cannot be written")
        start[name], end = end, end + count * count_row_bytes(dtype, shape)
        entries[name] = {
            "dtype": TYPE_NAMES[dtype],
            "data_offsets": [start[name], end],
            "shape": [count, *shape],
        }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    packed = struct.pack("<Q", len(header)) + header
    return packed, {name: first + len(packed) for name, first in start.items()}


def count_row_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Returns the bytes of one row of that type and shape."""
    return dtype.itemsize * math.prod(shape)
