"""Features of images by any network: all of them, or what a score needs of a stream."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.image_batches import check_images, round_to_uint8
from ..diffusion.modes import evaluating
from ..errors import ConfigError, DataError
from ..models.factories import import_function
from .moments import Moments

BATCH = 64
"""Images that a feature network sees at once when it reads a stream."""
Extractor = nn.Module | Callable[[Tensor], Any]
"""Images [B, C, H, W] in [-1, 1] -> features [B, d], [B, d, 1, 1] or a tuple that starts so."""


@dataclass(frozen=True, slots=True)
class FeatureNetwork:
    """A feature network under the name that results give it."""

    name: str
    network: Extractor


@dataclass(frozen=True, slots=True)
class Collected:
    """What is kept of the features of a stream.

    ``moments``: of all of them, None where there were none. ``stored``: the features [n, d] of the
    images with the ``numbers`` [n], as many as were asked for.
    """

    moments: Moments | None
    numbers: Tensor
    stored: Tensor


def features(network: Extractor, images: Tensor, *, batch_size: int = 256) -> Tensor:
    """The features [n, d] of ``images``, on the CPU; a module runs in eval mode on its device."""
    parts = torch.split(images, batch_size)
    if not isinstance(network, nn.Module):
        with torch.no_grad():
            return torch.cat([flat(network(part), part).cpu() for part in parts])
    device = next((tensor.device for tensor in network.parameters()), images.device)
    with evaluating(network):
        return torch.cat([flat(network(part.to(device)), part).cpu() for part in parts])


def flat(found: Any, images: Tensor) -> Tensor:
    """Features [B, d] in what a network returned for ``images``. Raises DataError."""
    if isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise DataError(f"the feature network returned a {type(found).__name__}, not a tensor")
    if found.ndim < 2 or len(found) != len(images):
        raise DataError(
            f"the feature network returned {list(found.shape)} for {len(images)} images, not "
            f"[{len(images)}, d]"
        )
    return found.flatten(1)


def collect(
    network: FeatureNetwork, batches: Iterable[tuple[range, Tensor]], *, stored: int = 0
) -> Collected:
    """The moments of the features of all images, and the features of those numbered < ``stored``.

    Images are clamped and rounded to bytes first, so that they count as their PNGs would.
    """
    moments: Moments | None = None
    kept: list[Tensor] = [torch.zeros(0, 0)]
    numbers: list[int] = []
    for part, images in batches:
        found = features(
            network.network, round_to_uint8(check_images(images, part)), batch_size=BATCH
        )
        moments = Moments.of(found) if moments is None else moments + Moments.of(found)
        few = [number for number in part if number < stored]
        if few:
            numbers += few
            kept.append(found[: len(few)].float())
    return Collected(moments, torch.tensor(numbers, dtype=torch.int64), torch.cat(kept[1:] or kept))


INCEPTION = re.compile(r"inception(?:-(?P<width>\d+))?(?::(?P<weights>.+))?")


def load_network(
    spec: str, *, name: str | None = None, device: str | torch.device = "cpu"
) -> FeatureNetwork:
    """The feature network of that name, on ``device``.

    "inception" is pytorch-fid's InceptionV3 (2048 features), "inception-192" one of its earlier
    layers, "inception:PATH" its weights in that file. "package.module:function" calls a function
    that returns a network, or takes the module that stands there. ``name``: what results call it.
    Raises ConfigError, and DataError where there are no weights.
    """
    if match := INCEPTION.fullmatch(spec):
        from .inception import inception

        path, width = match["weights"], int(match["width"] or 2048)
        found = inception(None if path is None else Path(path).expanduser(), width=width)
    elif ":" in spec:
        found = named(spec, import_function(spec))
    else:
        raise ConfigError(
            f"no feature network is called {spec!r}; known: inception, inception-64, "
            "inception-192, inception-768, each also with :PATH of its weights, or "
            "package.module:function"
        )
    if isinstance(found.network, nn.Module):
        found.network.to(device)
    return FeatureNetwork(name or found.name, found.network)


def named(spec: str, found: Callable[..., Any]) -> FeatureNetwork:
    """What ``spec`` named: a module, or what the function there returns. Raises ConfigError."""
    if isinstance(found, nn.Module):
        return FeatureNetwork(type(found).__name__, found)
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise ConfigError(f"{spec} must be a function that needs no arguments: {error}") from error
    made = found()
    if isinstance(made, FeatureNetwork):
        return made
    if isinstance(made, nn.Module):
        return FeatureNetwork(type(made).__name__, made)
    if not callable(made):
        raise ConfigError(
            f"{spec} returned {type(made).__name__} where a feature network should be"
        )
    return FeatureNetwork(spec.rpartition(":")[2], made)
