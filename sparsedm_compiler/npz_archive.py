"""``open_archive``: the arrays of an .npz file by name, none of which is unpickled."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, is_zipfile

import numpy as np

from .errors import DataError

DAMAGE = (
    *(OSError, ValueError, EOFError, RuntimeError, BadZipFile, zlib.error, struct.error),
    *(MemoryError, OverflowError),  # a header may tell of any shape
)
"""The errors of reading damaged bytes."""
NOT_WHOLE = "no whole .npz file"


class NpzArrays(Mapping[str, np.ndarray]):
    """The arrays of an open .npz by name, read when they are taken.

    Taking one raises DataError where it cannot be read, or would have to be unpickled.
    """

    def __init__(self, archive: Any, label: str) -> None:
        self._archive = archive
        self._label = label

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            array: Any = self._archive[name]
        except DAMAGE as error:
            raise DataError(f"cannot read {self._label}: {explain(name, error)}") from error
        if not isinstance(array, np.ndarray):
            raise DataError(f"cannot read {self._label}: its entry {name!r} is no array")
        return array

    def __contains__(self, name: object) -> bool:
        return name in self._archive.files

    def __iter__(self) -> Iterator[str]:
        return iter(self._archive.files)

    def __len__(self) -> int:
        return len(self._archive.files)


def explain(name: str, error: Exception) -> str:
    """Returns why an array cannot be read, without numpy's advice to unpickle it.

    >>> explain("x", ValueError("Object arrays cannot be loaded when allow_pickle=False"))
    "its array 'x' holds Python objects, which are never unpickled here: save numbers"
    """
    if str(error).startswith("Object arrays"):
        return (
            f"its array {name!r} holds Python objects, which are never unpickled here: save numbers"
        )
    if isinstance(error, MemoryError):
        return f"its array {name!r} does not fit into memory, if it is not damaged ({error})"
    reason = "" if "pickle" in str(error) else f" ({error})"
    return f"its array {name!r} is damaged{reason}"


@contextmanager
def open_archive(path: Path, title: str = "") -> Iterator[NpzArrays]:
    """Opens the .npz at ``path`` for the block.

    ``title`` says in errors what the file is, e.g. "the statistics ". Raises DataError for a file
    that cannot be opened, or is no whole .npz.
    """
    label = f"{title}{path}"
    try:
        file = path.open("rb")  # numpy itself leaves a damaged file open
    except OSError as error:
        raise DataError(f"cannot read {label}: {error}") from error
    with file:
        if not is_zipfile(file):
            file.seek(0)
            one = file.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX
            reason = "one array, not an archive of named ones: use np.savez" if one else NOT_WHOLE
            raise DataError(f"cannot read {label}: it is {reason}")
        file.seek(0)
        try:
            archive = np.load(file, allow_pickle=False)
        except DAMAGE as error:
            raise DataError(f"cannot read {label}: it is {NOT_WHOLE}") from error
        yield NpzArrays(archive, label)
