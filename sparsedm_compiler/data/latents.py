"""Latents in safetensors files, read from the disk row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..diffusion.condition import Condition
from ..diffusion.image_batches import Batch
from ..errors import DataError
from .fingerprint import HASHED_BYTES, hash_all
from .image_data import READ_ALL, ImageData, ReadOptions, check_labels, count_classes
from .rowfile import StoredTensor, read_header

Value = TypeVar("Value", int, float)

PREFIX = "condition."
"""Prefix of a keyword of the model's forward in the name of a tensor that conditions it."""
FLOATS = ("F64", "F32", "F16", "BF16")


class LatentData(ImageData):
    """The latents [n, C, h, w] of a safetensors file, read from the disk as they are fetched.

    Packed latents [n, tokens, C], as FLUX takes them, are read likewise. Tensors "labels" [n] or
    "condition.KEYWORD" [n, ...] are their condition; "condition.added_cond_kwargs.time_ids" is in a
    mapping of that keyword. Where there is a
    "std" [n, C, h, w], the latents are means, and ``fetch`` returns the means: it draws nothing.

    Args:
        path: A safetensors file, e.g. of ``encode_latents``.
        options: Labels and number of latents; the default reads all. A size must be the latents'
            own.

    Attributes:
        scaling_factor: Factor that the latents were multiplied by, None where the file does not
            say.
        shift_factor: Shift that was subtracted before, None where the file does not say.
        vae: Name of the autoencoder, None where the file does not say.

    Raises:
        DataError: The file cannot be read, or holds no such latents.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"latents": torch.ones(3, 4, 2, 2)}, f"{folder}/x.safetensors")
        ...     LatentData(Path(folder, "x.safetensors")).fetch([2, 0])[0].shape
        torch.Size([2, 4, 2, 2])
    """

    def __init__(self, path: Path, options: ReadOptions = READ_ALL) -> None:
        self.path = path
        file, metadata = read_header(path)
        self.latents = check_latents(file, options, path)
        total, *shape = self.latents.shape
        self.count = options.limit_count(total)
        self.shape = tuple(shape)
        self.conditions = {
            name.removeprefix(PREFIX): tensor
            for name, tensor in file.items()
            if options.labels and name.startswith(PREFIX)
        }
        self.labels: Tensor | None = None
        if options.labels and "labels" in file:
            stored = file["labels"]
            labels = stored.read_rows(torch.arange(stored.shape[0], device="cpu"))
            self.labels = check_labels(labels, total, str(path))
        self.classes = None
        if self.labels is not None:
            noted_classes = read_number(metadata, "classes", int, path)
            self.classes = noted_classes or count_classes(self.labels)
        self.scaling_factor = read_number(metadata, "scaling_factor", float, path)
        self.shift_factor = read_number(metadata, "shift_factor", float, path)
        self.vae = metadata.get("vae")

    def __len__(self) -> int:
        return self.count

    def hash_content(self) -> str | None:
        stored = [self.latents, *self.conditions.values()]
        if sum(tensor.count_bytes(self.count) for tensor in stored) > HASHED_BYTES:
            return None
        labels = () if self.labels is None else (self.labels[: self.count],)
        index = torch.arange(self.count, device="cpu")
        return hash_all([*(tensor.read_rows(index) for tensor in stored), *labels])

    def fetch(self, numbers: Sequence[int]) -> Batch:
        index = self.check_numbers(numbers)
        latents = self.latents.read_rows(index).float()
        if not latents.isfinite().all():
            bad = index[~latents.isfinite().flatten(1).all(1)][0]
            raise DataError(f"{self.path}: latents of image {int(bad)} hold NaN or Inf")
        return latents, self._take_condition(index)

    def _take_condition(self, index: Tensor) -> Condition | None:
        if self.labels is not None:
            return self.labels[index]
        tensors = {name: stored.read_rows(index) for name, stored in self.conditions.items()}
        plain = {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }
        return nest_names(plain) or None


def nest_names(tensors: Mapping[str, Tensor]) -> dict[str, Condition]:
    """Returns tensors with mappings in the place of the dots in their names.

    >>> nest_names({"a.b": torch.tensor(1), "c": torch.tensor(2)})
    {'a': {'b': tensor(1)}, 'c': tensor(2)}
    """
    nested: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *outer, last = name.split(".")
        inner = nested
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[last] = tensor
    return nested


def check_latents(
    file: Mapping[str, StoredTensor], options: ReadOptions, path: Path
) -> StoredTensor:
    """Checks that the tensors of a file fit one another, and returns its latents.

    Raises DataError where there are none, or where the tensors do not fit one another.
    """
    if "latents" not in file:
        raise DataError(
            f"{path} holds {', '.join(file) or 'nothing'}, no 'latents': weights of a model? "
            "encode_latents writes such files"
        )
    latents = file["latents"]
    shape = latents.shape
    if len(shape) not in (3, 4) or not latents.readable or latents.type_name not in FLOATS:
        raise DataError(
            f"{path}: latents {list(shape)} of type {latents.type_name} are not floating-point "
            "[n, C, h, w] or, packed, [n, tokens, C]"
        )
    if options.size is not None and shape[2:] != (options.size, options.size):
        raise DataError(
            f"{path}: latents {list(shape)} cannot be resized to {options.size}; "
            "resize the images, then encode them"
        )
    if "std" in file and file["std"].shape != shape:
        raise DataError(f"{path}: std {list(file['std'].shape)} is not shaped like {list(shape)}")
    conditions = [name for name in file if name.startswith(PREFIX)]
    for name in (*conditions, *({"labels"} & file.keys())):
        if file[name].shape[:1] != shape[:1] or not file[name].readable:
            raise DataError(
                f"{path}: {name} {list(file[name].shape)} of type {file[name].type_name} does not "
                f"go with {shape[0]} latents"
            )
    if options.labels and conditions and "labels" in file:
        raise DataError(
            f"{path} holds labels and {conditions[0]}: take one out, or write the labels as "
            f"'{PREFIX}KEYWORD' if the model takes both"
        )
    return latents


def read_number(
    metadata: Mapping[str, str], key: str, kind: Callable[[str], Value], path: Path
) -> Value | None:
    """Returns the number under ``key`` in the metadata of a file, None where there is no such key.

    Raises DataError for a value that is no number.
    """
    if key not in metadata:
        return None
    try:
        return kind(metadata[key])
    except ValueError as error:
        raise DataError(f"{path}: its metadata say {key} = {metadata[key]!r}, no number") from error
