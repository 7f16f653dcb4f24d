"""The InceptionV3 of pytorch-fid as a feature network, with weights from a local file."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from ..errors import ConfigError, DataError
from ..fileio import explain_unpickling
from ..optional_deps import mend_torchvision
from .feature_network import FeatureNetwork

WIDTHS = (64, 192, 768, 2048)
"""Features of the four layers pytorch-fid offers; the FID uses 2048."""


class InceptionFeatures(nn.Module):
    """Features [B, d] of images [B, 1 or 3, H, W] in [-1, 1] by pytorch-fid's ``network``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise DataError(f"images {list(images.shape)} are not [B, 1 or 3, H, W] for Inception")
        colour = images.expand(-1, 3, -1, -1)
        maps: Tensor = self.network((colour + 1) / 2)[0]
        return adaptive_avg_pool2d(maps, (1, 1)).flatten(1)


def load_inception(weights: Path | None = None, *, width: int = 2048) -> FeatureNetwork:
    """Loads pytorch-fid's InceptionV3 in eval mode, up to the layer of ``width`` features.

    ``weights`` is the file that pytorch-fid downloads; None looks where torch.hub caches it. The
    network is called "InceptionV3" with exactly those weights, "InceptionV3@" and the start of
    the file's hash with others. Raises DataError, which names the URL and the path, where there is
    no such file; ConfigError for other widths.
    """
    if width not in WIDTHS:
        raise ConfigError(
            f"InceptionV3 has no layer of {width} features; it has {', '.join(map(str, WIDTHS))}"
        )
    mend_torchvision()
    from pytorch_fid import inception

    path = find_weights(weights, inception.FID_WEIGHTS_URL)
    state = read_weights(path)
    with replace_download(inception, state):
        try:
            network = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[width]])
        except (RuntimeError, TypeError, AttributeError) as error:
            raise DataError(f"{path} does not hold the weights of InceptionV3: {error}") from error
    name = "InceptionV3" if width == 2048 else f"InceptionV3-{width}"
    digest = hash_file(path)
    if not digest.startswith(parse_digest(inception.FID_WEIGHTS_URL)):
        name += f"@{digest[:8]}"
    return FeatureNetwork(name, InceptionFeatures(network).eval())


def find_weights(path: Path | None, url: str) -> Path:
    """Returns the file of the weights; None looks in the cache of torch.hub.

    Raises DataError, with the URL and the path to store the file at, where there is none.
    """
    name = url.rpartition("/")[2]
    path = path or Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        raise DataError(
            f"there are no InceptionV3 weights at {path}, and nothing is downloaded here: get "
            f"{url} on a machine with a network, then put it there or name it as the feature "
            f"network inception:PATH/{name}"
        )
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads the state_dict in ``path``. Raises DataError where it holds anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        why = explain_unpickling(error)
        raise DataError(f"cannot read the InceptionV3 weights {path}: {why}") from error
    if not isinstance(state, dict) or not all(isinstance(part, Tensor) for part in state.values()):
        raise DataError(f"{path} is no state_dict: get the InceptionV3 weights of pytorch-fid")
    return state


@contextmanager
def replace_download(inception: Any, state: dict[str, Tensor]) -> Iterator[None]:
    """Makes pytorch-fid's module ``inception`` use ``state`` instead of downloading weights."""
    before = inception.load_state_dict_from_url
    inception.load_state_dict_from_url = lambda *_, **__: state
    try:
        yield
    finally:
        inception.load_state_dict_from_url = before


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def parse_digest(url: str) -> str:
    """Returns the start of the SHA-256 that a torch.hub file name ends with.

    >>> parse_digest("https://host/weights-6726825d.pth")
    '6726825d'
    """
    return url.rpartition("-")[2].removesuffix(".pth")
