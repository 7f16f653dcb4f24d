"""Packs of JPEGs that share one header: small on disk, decoded once, then uint8 in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .decoded_data import DecodedData, NamedFile
from .fingerprint import hash_all
from .image_data import ReadOptions, check_labels

PACK = {"header", "body", "offsets"}


class PackData(DecodedData):
    """JPEGs of one pack: number i is ``header + body[offsets[i]:offsets[i + 1]]``.

    The array "labels" [n] may be in the pack. An image is decoded when it is first fetched, and
    then stays in memory. Raises DataError where the arrays contradict one another.
    """

    def __init__(self, path: Path, arrays: Mapping[str, np.ndarray], options: ReadOptions) -> None:
        check_pack(arrays, path)
        self.path = path
        self.header = arrays["header"].tobytes()
        self.body = arrays["body"].tobytes()
        self.offsets = arrays["offsets"].astype(np.int64)
        count = len(self.offsets) - 1
        labels = None
        if options.labels and "labels" in arrays:
            labels = check_labels(arrays["labels"], count, str(path))
        super().__init__(count, labels, options)
        self.decoded = torch.empty(self.count, *self.shape, dtype=torch.uint8, device="cpu")
        self.is_decoded = torch.zeros(self.count, dtype=torch.bool, device="cpu")

    def open_files(self, numbers: Sequence[int]) -> Sequence[NamedFile]:
        return [
            (
                f"JPEG {number} of {self.path}",
                BytesIO(self.header + self.body[self.offsets[number] : self.offsets[number + 1]]),
            )
            for number in numbers
        ]

    def hash_content(self) -> str:
        offsets = self.offsets[: self.count + 1]
        arrays = [np.frombuffer(self.header + self.body[: offsets[-1]], np.uint8), offsets]
        labels = () if self.labels is None else (self.labels,)
        return hash_all([*map(torch.tensor, arrays), *labels])

    def read_pixels(self, index: Tensor) -> Tensor:
        new = torch.unique(index[~self.is_decoded[index]])
        if len(new):
            self.decoded[new] = super().read_pixels(new)
            self.is_decoded[new] = True
        return self.decoded[index]


def check_pack(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Raises DataError unless ``arrays`` are a whole pack."""
    header, body, offsets = (arrays[name] for name in ("header", "body", "offsets"))
    for name, array in (("header", header), ("body", body)):
        if array.dtype != np.uint8 or array.ndim != 1:
            raise DataError(
                f"{path}: {name} {list(array.shape)} {array.dtype} is not uint8 [bytes]"
            )
    if offsets.dtype.kind not in "iu" or offsets.ndim != 1 or len(offsets) < 2:
        raise DataError(
            f"{path}: offsets {list(offsets.shape)} {offsets.dtype} are not integers [n + 1]"
        )
    starts = offsets.astype(np.int64)
    if starts[0] < 0 or (np.diff(starts) <= 0).any():
        raise DataError(f"{path}: the offsets do not rise from 0: the pack is damaged")
    if starts[-1] != len(body):
        raise DataError(
            f"{path}: the offsets end at byte {starts[-1]}, the body at {len(body)}: "
            "the pack is cut off or damaged"
        )
