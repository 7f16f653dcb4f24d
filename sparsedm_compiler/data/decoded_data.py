"""Image files that Pillow decodes when they are fetched."""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from ..diffusion.condition import Condition, list_tensors
from ..diffusion.image_batches import Batch
from ..errors import DataError
from .fingerprint import hash_all, hash_encoded, hash_tensor, spread_numbers
from .image_data import ImageData, ReadOptions, count_classes
from .pixels import decode_image, map_in_threads, scale_pixels

NamedFile: TypeAlias = tuple[str, Path | BytesIO]
"""The name of an image in errors, and the file that Pillow opens."""


class DecodedData(ImageData):
    """Images as RGB [3, H, W], whatever their mode; all of one size where no size is set.

    ``count``: number of images before ``options`` limit it. ``labels``: int64 [count] or None. A
    subclass sets the attributes that its ``open_files`` needs before it calls this constructor,
    which decodes the first image for the shape.
    """

    def __init__(self, count: int, labels: Tensor | None, options: ReadOptions) -> None:
        self.count = options.limit_count(count)
        self.size = options.size
        self.labels = None if labels is None else labels[: self.count]
        self.classes = count_classes(labels)
        ((self.first, file),) = self.open_files([0])
        height, width, channels = decode_image(self.first, file, self.size).shape
        self.shape = (channels, height, width)

    @abstractmethod
    def open_files(self, numbers: Sequence[int]) -> Sequence[NamedFile]:
        """Returns the encoded images of those numbers, with their names."""

    def take_condition(self, index: Tensor) -> Condition | None:
        """Returns the condition of the images at ``index`` [B]."""
        return None if self.labels is None else self.labels[index]

    def read_pixels(self, index: Tensor) -> Tensor:
        """Returns uint8 [B, 3, H, W] of the images at ``index`` [B]."""
        pixels = torch.empty(len(index), *self.shape, dtype=torch.uint8, device="cpu")
        files = self.open_files(index.tolist()) if len(index) else []
        for row, image in zip(pixels, map_in_threads(self._decode, files), strict=True):
            row.copy_(image)
        return pixels

    def fingerprint(self) -> str:
        numbers = torch.tensor(spread_numbers(len(self)), device="cpu")
        digest = hashlib.sha256(f"{self.count} {list(self.shape)} {self.classes}".encode())
        for name, file in self.open_files(numbers.tolist()):
            digest.update(hash_encoded(name, file))
        condition = self.take_condition(numbers)
        if condition is not None:
            for name, tensor in list_tensors(condition).items():
                digest.update(name.encode() + hash_tensor(tensor))
        return digest.hexdigest()

    def find_unreadable(self, numbers: range) -> list[str]:
        problems = map_in_threads(self._find_problem, self.open_files(numbers))
        return [problem for problem in problems if problem is not None]

    def _find_problem(self, file: NamedFile) -> str | None:
        try:
            self._decode(file)
        except DataError as error:
            return str(error)
        return None

    def _decode(self, file: NamedFile) -> Tensor:
        image = torch.from_numpy(decode_image(*file, self.size)).permute(2, 0, 1)
        if image.shape != self.shape:
            raise DataError(
                f"{file[0]} is {image.shape[2]} x {image.shape[1]} pixels, {self.first} "
                f"{self.shape[2]} x {self.shape[1]}: give a size that all are brought to"
            )
        return image

    def __len__(self) -> int:
        return self.count

    def fetch(self, numbers: Sequence[int]) -> Batch:
        index = self.check_numbers(numbers)
        return scale_pixels(self.read_pixels(index)), self.take_condition(index)


class FileData(DecodedData):
    """Image files by path, with one label per image or none."""

    def __init__(self, paths: Sequence[Path], labels: Tensor | None, options: ReadOptions) -> None:
        self.paths = paths
        super().__init__(len(paths), labels, options)

    def fingerprint(self) -> str:
        names = [str(path) for path in self.paths[: self.count]]
        root = os.path.commonpath([os.path.dirname(name) for name in names])
        text = "\n".join(name[len(root) :] for name in names)
        return hashlib.sha256(f"{super().fingerprint()} {text}".encode()).hexdigest()

    def hash_content(self) -> str:
        try:
            sizes = map_in_threads(os.path.getsize, self.paths[: self.count])
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
        labels = () if self.labels is None else (self.labels,)
        return hash_all([torch.tensor(sizes, device="cpu"), *labels])

    def open_files(self, numbers: Sequence[int]) -> Sequence[NamedFile]:
        return [(str(self.paths[number]), self.paths[number]) for number in numbers]
