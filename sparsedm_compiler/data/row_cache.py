"""``RowCache``: rows by position in a folder, written once in any order and by any process.

    cache.json                        what the rows are, their type and shape, rows per part
    000000000000.safetensors          a part: "rows" [n, ...] and "sums" [n], from position 0 on

A part is reserved whole on the disk before anything is written into it. A row counts once its sum,
which is written after it, is the checksum of its content: so neither a killed process nor a power
cut leaves half a row that could be read.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .rowfile import RowLayout, count_row_bytes, make_header, read_header

RECORD = "cache.json"
VERSION = 1
PART_BYTES = 2**28
"""A part takes so much of the disk, or one row."""
ROWS, SUMS = "rows", "sums"
SUM_BYTES = 8


class RowCache:
    """Rows of one type and shape by position; see the module.

    Args:
        folder: The folder; it may exist.
        about: What the rows are, plain values for JSON.
        dtype: Their type.
        shape: Their shape.
        per_part: Rows in a part; None for as many as ``PART_BYTES`` hold, and no more than
            ``total``.
        total: How many rows there will be at first.
    """

    def __init__(
        self,
        folder: Path,
        about: Mapping[str, Any],
        dtype: torch.dtype,
        shape: Sequence[int],
        *,
        per_part: int | None = None,
        total: int = 1,
    ) -> None:
        self.folder = folder
        self.about = dict(about)
        self.dtype, self.shape = dtype, tuple(shape)
        self.row_bytes = count_row_bytes(dtype, self.shape)
        self.per_part = per_part or max(1, min(PART_BYTES // self.row_bytes, total))
        layout: dict[str, RowLayout] = {ROWS: (dtype, self.shape), SUMS: (torch.int64, ())}
        self._header, self._start = make_header(self.per_part, layout, {}, str(folder))
        self._maps: dict[int, tuple[Any, Any]] = {}
        self._claimed = False

    def count_bytes(self, total: int) -> int:
        """Returns the bytes on the disk of the parts that hold the rows before ``total``."""
        return self._count_parts(total) * self.part_bytes

    def count_unreserved_bytes(self, total: int) -> int:
        """Returns how many of ``count_bytes(total)`` are not reserved yet."""
        missing = [n for n in range(self._count_parts(total)) if not self._path(n).exists()]
        return self.part_bytes * len(missing)

    @property
    def part_bytes(self) -> int:
        """The bytes of a part."""
        return len(self._header) + self.per_part * (self.row_bytes + SUM_BYTES)

    def _count_parts(self, total: int) -> int:
        return -(-total // self.per_part)

    def reserve(self, total: int) -> None:
        """Makes the record and the parts for the rows before ``total``, where they are missing.

        Raises DataError where there is no room for them; what this call made is removed then.
        """
        made: list[Path] = []
        try:
            self.claim()
            for part in range(self._count_parts(total)):
                path = self._path(part)
                if not path.exists() and make_once(path, self._write_part):
                    made.append(path)
            self.claim()  # a process that found no room may have removed the record meanwhile
        except OSError as error:
            for path in made:
                path.unlink(missing_ok=True)
            if self._claimed and not any(self.folder.glob("*.safetensors")):
                (self.folder / RECORD).unlink(missing_ok=True)
            with suppress(OSError):
                self.folder.rmdir()
            raise DataError(f"cannot write {self.folder}: {error}") from error

    def claim(self) -> None:
        """Writes the record unless there is one; of several processes that do so at once, one wins.

        Rows are those of the record that is there then, which ``read_cache`` reads. Raises
        DataError where it cannot be written.
        """
        path, content = self.folder / RECORD, self._format_record().encode()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.exists() and make_once(path, lambda file: file.write(content)):
                self._claimed = True
        except OSError as error:
            with suppress(OSError):
                self.folder.rmdir()
            raise DataError(f"cannot write {self.folder}: {error}") from error

    def _format_record(self) -> str:
        values = {
            "version": VERSION,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
            "rows_per_part": self.per_part,
            "about": self.about,
        }
        return json.dumps(values, indent=2) + "\n"

    def _write_part(self, file: BinaryIO) -> None:
        """Writes an empty part."""
        file.write(self._header)
        file.flush()
        reserve_bytes(file.fileno(), self.part_bytes)

    def count_missing(self, first: int, last: int) -> int:
        """Returns how many rows from ``first`` to ``last - 1`` have no sum yet."""
        missing = 0
        for part in range(first // self.per_part, self._count_parts(last)):
            start, stop = part * self.per_part, (part + 1) * self.per_part
            low, high = max(first, start) - start, min(last, stop) - start
            maps = self._open(part)
            missing += high - low if maps is None else int((maps[1][low:high] == 0).sum())
        return missing

    def read(self, first: int, count: int) -> Tensor | None:
        """Returns the rows [count, ...] from ``first`` on; None where one is not there, or torn."""
        rows = []
        for position in range(first, first + count):
            part, row = divmod(position, self.per_part)
            maps = self._open(part)
            if maps is None:
                return None
            content, total = maps[0][row].tobytes(), int(maps[1][row])
            if total != sum_bytes(content):
                return None
            rows.append(torch.frombuffer(bytearray(content), dtype=self.dtype))
        return torch.stack(rows).reshape(count, *self.shape)

    def write(self, first: int, rows: Tensor) -> None:
        """Writes ``rows`` from position ``first`` on; they are reserved already.

        Raises DataError where the disk fails.
        """
        plain = rows.detach().to("cpu", self.dtype).contiguous()
        for number, row in enumerate(plain):
            part, index = divmod(first + number, self.per_part)
            content = row.reshape(-1).view(torch.uint8).numpy().tobytes()
            path = self._path(part)
            try:
                with path.open("r+b", buffering=0) as file:
                    write_at(file.fileno(), self._start[ROWS] + index * self.row_bytes, content)
                    total = struct.pack("<q", sum_bytes(content))
                    write_at(file.fileno(), self._start[SUMS] + index * SUM_BYTES, total)
            except OSError as error:
                raise DataError(f"cannot write {path}: {error}") from error

    def _path(self, part: int) -> Path:
        return self.folder / f"{part * self.per_part:012d}.safetensors"

    def _open(self, part: int) -> tuple[Any, Any] | None:
        """Returns the rows [n, bytes] and sums [n] of a part as mapped; None where it is missing.

        Raises DataError for a file that is no such part.
        """
        if part in self._maps:
            return self._maps[part]
        path = self._path(part)
        if not path.exists():
            return None
        tensors, _ = read_header(path)
        stored = {name: (tensor.type_name, tensor.shape) for name, tensor in tensors.items()}
        with path.open("rb") as file:
            if file.read(len(self._header)) != self._header:
                raise DataError(f"{path} holds {stored}, no part of the cache: remove it")
        rows = (self.per_part, self.row_bytes)
        maps = (
            np.memmap(path, np.uint8, "r", tensors[ROWS].start, rows),
            np.memmap(path, np.int64, "r", tensors[SUMS].start, (self.per_part,)),
        )
        self._maps[part] = maps
        return maps


def read_cache(folder: Path) -> RowCache | None:
    """Returns the cache in a folder, None without one. Raises DataError where it is damaged."""
    path = folder / RECORD
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values["version"]
        if version == VERSION:
            dtype, shape = vars(torch)[values["dtype"]], tuple(map(int, values["shape"]))
            per_part = int(values["rows_per_part"])
            return RowCache(folder, values["about"], dtype, shape, per_part=per_part)
    except FileNotFoundError:
        if any(part.stem.isdigit() for part in folder.glob("*.safetensors")):
            raise DataError(f"{folder} holds rows without {RECORD}: remove it") from None
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"cannot read {path}: {error!r}; remove {folder}") from error
    raise DataError(f"{path} has version {version!r}, this package reads {VERSION}")


def make_once(path: Path, write: Callable[[BinaryIO], Any]) -> bool:
    """Makes a file, whole, unless there is one; of several processes that do so at once, one wins.

    Returns whether this call made it.
    """
    own = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with own.open("xb") as file:
            write(file)
        os.link(own, path)
    except FileExistsError:
        return False
    finally:
        own.unlink(missing_ok=True)
    return True


def sum_bytes(content: bytes) -> int:
    """Returns a checksum that is never 0, which stands for a row that was not written."""
    return zlib.crc32(content) + 1


def reserve_bytes(handle: int, size: int) -> None:
    """Gives an open file that size; where the system can, its blocks are the file's from now on."""
    allocate = vars(os).get("posix_fallocate")
    if allocate is None:
        os.truncate(handle, size)
    else:
        allocate(handle, 0, size)


def write_at(handle: int, position: int, content: bytes) -> None:
    """Writes all of ``content`` at a position of an open file."""
    os.lseek(handle, position, os.SEEK_SET)
    while content:
        content = content[os.write(handle, content) :]


def get_free_bytes(folder: Path) -> int:
    """Returns the bytes that are free where ``folder`` is, or will be."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free
