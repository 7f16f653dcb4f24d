"""pytorch-fid's InceptionV3 as a feature network, with weights from a file and never a download."""

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
from ..optional_deps import mend_torchvision
from .features import FeatureNetwork

WIDTHS = (64, 192, 768, 2048)
"""Features of pytorch-fid's four layers; 2048 is the one of the FID."""


class InceptionFeatures(nn.Module):
    """Features [B, d] of images [B, 1 or 3, H, W] in [-1, 1] by pytorch-fid's ``network``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise DataError(f"images {list(images.shape)} are not [B, 1 or 3, H, W] for Inception")
        colour = images.expand(-1, 3, -1, -1)
        found: Tensor = self.network((colour + 1) / 2)[0]
        return adaptive_avg_pool2d(found, (1, 1)).flatten(1)


def inception(weights: Path | None = None, *, width: int = 2048) -> FeatureNetwork:
    """pytorch-fid's InceptionV3 in eval mode, up to the layer of ``width`` features.

    ``weights``: the file pytorch-fid downloads; None is where it (torch.hub) keeps it. The network
    is called "InceptionV3" with those very weights and "InceptionV3@" and a hash with others.
    Raises DataError, with the way to the file, where there is none; ConfigError for other widths.
    """
    if width not in WIDTHS:
        raise ConfigError(
            f"InceptionV3 has no layer of {width} features; it has {', '.join(map(str, WIDTHS))}"
        )
    mend_torchvision()
    from pytorch_fid import inception as theirs

    path = weights_path(weights, theirs.FID_WEIGHTS_URL)
    state = weights_in(path)
    with loading(theirs, state):
        try:
            network = theirs.InceptionV3([theirs.InceptionV3.BLOCK_INDEX_BY_DIM[width]])
        except (RuntimeError, TypeError, AttributeError) as error:
            raise DataError(f"{path} does not hold the weights of InceptionV3: {error}") from error
    name = "InceptionV3" if width == 2048 else f"InceptionV3-{width}"
    digest = digest_of(path)
    if not digest.startswith(expected_digest(theirs.FID_WEIGHTS_URL)):
        name += f"@{digest[:8]}"
    return FeatureNetwork(name, InceptionFeatures(network).eval())


def weights_path(given: Path | None, url: str) -> Path:
    """The file of the weights. Raises DataError that says where to get and to put it."""
    name = url.rpartition("/")[2]
    path = given or Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        raise DataError(
            f"there are no InceptionV3 weights at {path}, and nothing is downloaded here: get "
            f"{url} on a machine with a network, then put it there or name it as the feature "
            f"network inception:PATH/{name}"
        )
    return path


def weights_in(path: Path) -> dict[str, Tensor]:
    """The tensors in ``path``. Raises DataError where it holds anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(f"cannot read the InceptionV3 weights {path}: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(part, Tensor) for part in state.values()):
        raise DataError(f"{path} is no state_dict: get the InceptionV3 weights of pytorch-fid")
    return state


@contextmanager
def loading(theirs: Any, state: dict[str, Tensor]) -> Iterator[None]:
    """Give ``state`` to the block where pytorch-fid would download it."""
    before = theirs.load_state_dict_from_url
    theirs.load_state_dict_from_url = lambda *_, **__: state
    try:
        yield
    finally:
        theirs.load_state_dict_from_url = before


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        found = hashlib.sha256()
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def expected_digest(url: str) -> str:
    """The start of the SHA-256 that torch.hub wants of a file, from its name "...-6726825d.pth"."""
    return url.rpartition("-")[2].removesuffix(".pth")
