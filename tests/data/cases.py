"""Pictures, archives and counters that the tests of several sources share."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    """Random uint8."""
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def smooth(count: int, side: int) -> np.ndarray:
    """Pictures uint8 [count, side, side, 3] that a JPEG keeps well, each another one."""
    rows, columns = np.mgrid[:side, :side] / side
    found = np.empty((count, side, side, 3), np.uint8)
    for number in range(count):
        planes = (rows, columns, np.full_like(rows, number / count))
        found[number] = (np.stack(planes, 2) * 200 + 20).astype(np.uint8)
    return found


def expected(images: np.ndarray) -> Tensor:
    """The tensor [n, C, h, w] in [-1, 1] that uint8 [n, h, w, C] must become."""
    return torch.tensor(images.transpose(0, 3, 1, 2) / 127.5 - 1, dtype=torch.float32)


def save(path: Path, image: np.ndarray, mode: str = "RGB", **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).convert(mode).save(path, **options)


def jpeg_pack(images: np.ndarray, labels: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The arrays of a JPEG pack, and what its pictures decode to, uint8 [n, h, w, 3].

    A JPEG is cut behind its start-of-scan segment: all before it is the same for all.
    """
    headers, bodies, truth = set(), [], []
    for image in images:
        file = BytesIO()
        Image.fromarray(image).save(file, "jpeg", quality=90)
        data = file.getvalue()
        scan = data.index(b"\xff\xda")
        cut = scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")
        headers.add(data[:cut])
        bodies.append(data[cut:])
        truth.append(np.array(Image.open(BytesIO(data))))
    (header,) = headers
    arrays = {
        "header": np.frombuffer(header, np.uint8),
        "body": np.frombuffer(b"".join(bodies), np.uint8),
        "offsets": np.cumsum([0, *map(len, bodies)]).astype(np.uint32),
        "labels": labels.astype(np.uint8),
    }
    return arrays, np.stack(truth)


class Ops(TorchDispatchMode):
    """Counts what torch computes: as many ops for many images as for few is no work per image."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def ops_of(data: Any, numbers: range) -> int:
    """How many ops one fetch takes."""
    with Ops() as ops:
        data.fetch(numbers)
    return ops.count
