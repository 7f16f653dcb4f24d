"""Features of images: loading a network, running it, and collecting what scores need."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.image_batches import check_images, round_to_uint8
from ..diffusion.modes import evaluating
from ..errors import ConfigError, DataError
from ..models.factories import import_function
from .feature_network import Extractor, FeatureNetwork
from .inception import load_inception
from .moments import Moments

CONTRACT = (
    "a feature network is a module or function from images [B, C, H, W] in [-1, 1] to features "
    "[B, d], or a function without arguments that returns one"
)
"""The sentence that errors and help say of package.module:function."""
BATCH = 64
"""Images in one call of the feature network while a stream is read."""
INCEPTION = re.compile(r"inception(?:-(?P<width>\d+))?(?::(?P<weights>.+))?")


@dataclass(frozen=True, slots=True)
class CollectedFeatures:
    """The moments of all features of a stream, and the first features themselves.

    Attributes:
        moments: The moments of all features, None where there were no images.
        numbers: The numbers [n] of the images whose features are stored.
        stored: Their features [n, d].
    """

    moments: Moments | None
    numbers: Tensor
    stored: Tensor


def extract_features(network: Extractor, images: Tensor, *, batch_size: int = 256) -> Tensor:
    """Runs a feature network over images.

    A module runs in eval mode on the device of its parameters, a function where the images are;
    neither records gradients.

    Args:
        network: A module or function from images [B, C, H, W] to features, as in
            ``FeatureNetwork``.
        images: Images [n, C, H, W] in [-1, 1].
        batch_size: Images per call of the network.

    Returns:
        The features [n, d], on the CPU.

    Raises:
        DataError: The network returned anything but one row of features per image.

    Example:
        >>> extract_features(lambda images: images.mean((2, 3)), torch.zeros(5, 3, 8, 8)).shape
        torch.Size([5, 3])
    """
    parts = torch.split(images, batch_size)
    if not isinstance(network, nn.Module):
        with torch.no_grad():
            return torch.cat([flatten_output(network(part), part).cpu() for part in parts])
    device = next((tensor.device for tensor in network.parameters()), images.device)
    with evaluating(network):
        return torch.cat([flatten_output(network(part.to(device)), part).cpu() for part in parts])


def flatten_output(output: Any, images: Tensor) -> Tensor:
    """Returns a network's output for ``images`` as features [B, d].

    Raises DataError unless it is a tensor with a row per image, or a tuple that starts with one.
    """
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise DataError(f"the feature network returned a {type(output).__name__}, not a tensor")
    if output.ndim < 2 or len(output) != len(images):
        raise DataError(
            f"the feature network returned {list(output.shape)} for {len(images)} images, not "
            f"[{len(images)}, d]"
        )
    return output.flatten(1)


def collect_features(
    network: FeatureNetwork, batches: Iterable[tuple[range, Tensor]], *, stored: int = 0
) -> CollectedFeatures:
    """Computes the moments of all features, and keeps those of images numbered < ``stored``.

    Images are clamped and rounded to bytes first, so that they score as their PNGs would.
    Raises DataError for images that are not finite [B, C, H, W] with a number each.
    """
    moments: Moments | None = None
    kept: list[Tensor] = [torch.zeros(0, 0, device="cpu")]
    numbers: list[int] = []
    for part, images in batches:
        rows = extract_features(
            network.network, round_to_uint8(check_images(images, part)), batch_size=BATCH
        )
        own = Moments.from_features(rows)
        moments = own if moments is None else moments + own
        first = [number for number in part if number < stored]
        if first:
            numbers += first
            kept.append(rows[: len(first)].float())
    numbers_stored = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    return CollectedFeatures(moments, numbers_stored, torch.cat(kept[1:] or kept))


def load_network(
    spec: str, *, name: str | None = None, device: str | torch.device = "cpu"
) -> FeatureNetwork:
    """Loads a feature network by name.

    Args:
        spec: One of

            - ``"inception"``: the InceptionV3 of pytorch-fid with its 2048 features, from which
              the FID is computed; ``"inception-64"``, ``"-192"`` and ``"-768"`` are its earlier
              layers. ``":PATH"`` at the end names the file of its weights.
            - ``"package.module:function"``: a module, or a function from images to features, that
              is an attribute there; or a function without arguments that returns a module, a
              function or a ``FeatureNetwork``.
        name: The name that results print; None takes the network's own.
        device: The device that a module is moved to.

    Returns:
        The network under its name.

    Raises:
        ConfigError: ``spec`` names no network, or the function cannot be imported or called, or
            returns something else.
        DataError: There is no file with the weights of InceptionV3, or it holds others. Nothing is
            downloaded.

    Example:
        >>> load_network("torch.nn:Flatten").name
        'Flatten'
    """
    if match := INCEPTION.fullmatch(spec):
        path, width = match["weights"], int(match["width"] or 2048)
        loaded = load_inception(None if path is None else Path(path).expanduser(), width=width)
    elif ":" in spec:
        loaded = instantiate(spec, import_function(spec))
    else:
        raise ConfigError(
            f"no feature network is called {spec!r}; known: inception, inception-64, "
            "inception-192, inception-768, each also with :PATH of its weights, or "
            "package.module:function"
        )
    if isinstance(loaded.network, nn.Module):
        loaded.network.to(device)
    return FeatureNetwork(name or loaded.name, loaded.network)


def instantiate(spec: str, imported: Any) -> FeatureNetwork:
    """Returns the network behind ``spec``: the imported module or function, or what it returns.

    A function of one argument is the network itself. Raises ConfigError where it takes more, or
    returns no network.
    """
    if isinstance(imported, nn.Module):
        return FeatureNetwork(type(imported).__name__, imported)
    title = spec.rpartition(":")[2]
    required = count_required(imported)
    if required == 1 and not inspect.isclass(imported):
        return FeatureNetwork(title, imported)
    if required:
        raise ConfigError(f"{spec} takes {required} arguments: {CONTRACT}")
    made = imported()
    if isinstance(made, FeatureNetwork):
        return made
    if isinstance(made, nn.Module):
        return FeatureNetwork(type(made).__name__, made)
    if not callable(made):
        raise ConfigError(f"{spec} returned {type(made).__name__}: {CONTRACT}")
    return FeatureNetwork(title, made)


def count_required(function: Any) -> int:
    """Returns the number of arguments that a call of ``function`` must give; 0 if not known."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 0
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return sum(1 for p in parameters if p.default is p.empty and p.kind not in variable)


def check_network(network: FeatureNetwork, shape: Sequence[int]) -> None:
    """Runs a network on one grey image [C, H, W]. Raises DataError where that fails."""
    try:
        extract_features(network.network, torch.zeros(1, *shape, device="cpu"))
    except torch.OutOfMemoryError:
        raise
    except DataError as error:
        raise DataError(f"{error}; {CONTRACT}") from error
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise DataError(
            f"the feature network {network.name} cannot be called with images {list(shape)}: "
            f"{type(error).__name__}: {first}; {CONTRACT}"
        ) from error
