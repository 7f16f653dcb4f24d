"""Packs of JPEGs that share one header: small on disk, decoded once, then uint8 in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .decoded import DecodedData, Encoded
from .image_data import Wanted, checked_labels

PACK = {"header", "body", "offsets"}


class PackData(DecodedData):
    """JPEG number i is ``header + body[offsets[i]:offsets[i + 1]]``; "labels" [n] may be there.

    A picture is decoded when it is first fetched and kept. Raises DataError where the arrays
    contradict one another.
    """

    def __init__(self, path: Path, arrays: Mapping[str, np.ndarray], wanted: Wanted) -> None:
        check(arrays, path)
        self.path = path
        self.header = arrays["header"].tobytes()
        self.body = arrays["body"].tobytes()
        self.offsets = arrays["offsets"].astype(np.int64)
        count = len(self.offsets) - 1
        labels = None
        if wanted.labels and "labels" in arrays:
            labels = checked_labels(arrays["labels"], count, str(path))
        super().__init__(count, labels, wanted)
        self.kept = torch.empty(self.count, *self.shape, dtype=torch.uint8)
        self.known = torch.zeros(self.count, dtype=torch.bool)

    def encoded(self, numbers: Sequence[int]) -> Sequence[Encoded]:
        return [
            (
                f"JPEG {number} of {self.path}",
                BytesIO(self.header + self.body[self.offsets[number] : self.offsets[number + 1]]),
            )
            for number in numbers
        ]

    def pixels(self, index: Tensor) -> Tensor:
        new = torch.unique(index[~self.known[index]])
        if len(new):
            self.kept[new] = super().pixels(new)
            self.known[new] = True
        return self.kept[index]


def check(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Raises DataError where ``arrays`` are no whole pack."""
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
    places = offsets.astype(np.int64)
    if places[0] < 0 or (np.diff(places) <= 0).any():
        raise DataError(f"{path}: the offsets do not rise from 0: the pack is damaged")
    if places[-1] != len(body):
        raise DataError(
            f"{path}: the offsets end at byte {places[-1]}, the body at {len(body)}: "
            "the pack is cut off or damaged"
        )
