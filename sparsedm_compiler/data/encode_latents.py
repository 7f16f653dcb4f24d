"""Images to latents and back, by a diffusers AutoencoderKL."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diffusion.condition import Condition, take_rows
from ..diffusion.modes import evaluating
from ..errors import ConfigError, DataError
from ..optional_deps import import_diffusers
from ..progress import show_progress_bar
from .image_data import ImageData, check_condition, check_positive
from .latents import PREFIX
from .rowfile import RowFile


@dataclass(frozen=True, slots=True)
class LatentScaling:
    """The scaling of latents for diffusion models: ``latent = (mean - shift) * factor``.

    ``name``: of the autoencoder, without the folders of a local path.
    """

    factor: float
    shift: float
    name: str

    @staticmethod
    def read(vae: Any) -> LatentScaling:
        """Reads the scaling in the config of ``vae``.

        Raises DataError where it is no AutoencoderKL, or scales every channel by itself.
        """
        if not isinstance(vae, import_diffusers().AutoencoderKL):
            raise DataError(f"{type(vae).__name__} is no AutoencoderKL of diffusers")
        config = dict(vae.config)
        if config.get("latents_mean") is not None:
            raise DataError(
                "this AutoencoderKL scales every channel by itself (latents_mean), which is not "
                "supported; encode by hand and write 'latents' into a safetensors file"
            )
        name = str(config.get("_name_or_path") or type(vae).__name__)
        local = os.path.isabs(name) or os.path.exists(name)
        return LatentScaling(
            float(config["scaling_factor"]),
            float(config.get("shift_factor") or 0.0),
            Path(name).name if local else name,
        )

    def make_metadata(self) -> dict[str, str]:
        """Returns the metadata for a file of latents."""
        values = {"scaling_factor": self.factor, "shift_factor": self.shift}
        return {"vae": self.name, **{name: repr(value) for name, value in values.items()}}


def open_autoencoder(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> Any:
    """Loads an AutoencoderKL of diffusers, in eval mode.

    Args:
        folder: A folder that diffusers wrote, e.g. ``vae`` of a pipeline; nothing is downloaded.
        device: Device of the autoencoder.

    Returns:
        The ``diffusers.AutoencoderKL``.

    Raises:
        ConfigError: The folder holds no AutoencoderKL, or diffusers is not installed.
    """
    try:
        vae = import_diffusers().AutoencoderKL.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no AutoencoderKL of diffusers: {error}") from error
    return vae.to(device).eval()


def encode_latents(
    vae: Any,
    data: ImageData,
    path: str | os.PathLike[str],
    *,
    batch_size: int = 16,
    conditions: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float16,
    progress: bool = True,
) -> None:
    """Encodes all images of a source, in order, into a file of latents that ``open_data`` reads.

    A latent is the mean of the posterior, less the shift, times the scaling factor of ``vae``,
    which runs in eval mode, in its own type and on its own device. The labels or other condition of
    the data are written beside the latents. The file appears whole or not at all.

    Args:
        vae: An AutoencoderKL of diffusers.
        data: The images, e.g. of ``open_data``.
        path: The .safetensors file to write; its folder is made.
        batch_size: Images that are encoded at once.
        conditions: Keyword of the model's forward -> tensor [n, ...], written in the labels' place.
            None writes the condition of the data, if any.
        dtype: Type of the latents in the file, float16 or float32.
        progress: Whether a progress bar counts the batches.

    Raises:
        DataError: Images, conditions or options do not fit, or a latent is NaN or Inf.
    """
    target, scaling = Path(path), LatentScaling.read(vae)
    check_encoding(vae, data, target, dtype)
    check_positive("batch_size", batch_size)
    extra = None if conditions is None else check_condition(conditions, len(data), "conditions")
    metadata = scaling.make_metadata()
    if data.classes is not None:
        metadata["classes"] = str(data.classes)
    steps = range(0, len(data), batch_size)
    bar = show_progress_bar(len(steps), unit="batch", name="encode", shown=progress)
    with RowFile(target, len(data), metadata) as file, evaluating(vae), bar as counter:
        for first in steps:
            numbers = range(first, min(first + batch_size, len(data)))
            images, condition = data.fetch(numbers)
            mean = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mean
            latents = ((mean.float() - scaling.shift) * scaling.factor).to(dtype)
            if not latents.isfinite().all():
                raise DataError(
                    f"an image among {first} to {numbers[-1]} was encoded to NaN or Inf; run the "
                    "autoencoder in float32 (vae.float()) and write dtype=torch.float32"
                )
            file.write({"latents": latents, **name_tensors(condition, extra, numbers)})
            counter.update()


def decode_latents(vae: Any, latents: Tensor, *, batch_size: int | None = None) -> Tensor:
    """Decodes latents to images.

    Args:
        vae: An AutoencoderKL of diffusers; it runs in eval mode, on its own device.
        latents: [n, C, h, w], scaled and shifted as ``encode_latents`` writes them.
        batch_size: Latents that are decoded at once; None for at most 16, and of large ones fewer,
            with as many numbers as 16 of 64 x 64.

    Returns:
        Images float32 [n, 3, H, W] in [-1, 1] on the CPU.

    Raises:
        DataError: ``vae`` is no AutoencoderKL, or the latents do not fit it.
    """
    scaling = LatentScaling.read(vae)
    if latents.ndim != 4 or latents.shape[1] != vae.config.latent_channels:
        raise DataError(
            f"latents {list(latents.shape)} are not [n, {vae.config.latent_channels}, h, w]"
        )
    if batch_size is None:
        batch_size = max(1, min(16, 16 * 64 * 64 // max(1, latents.shape[2:].numel())))
    check_positive("batch_size", batch_size)
    images = []
    with evaluating(vae):
        for part in torch.split(latents, batch_size):
            plain = part.to(vae.device, torch.float32) / scaling.factor + scaling.shift
            images.append(vae.decode(plain.to(vae.dtype)).sample.float().clamp(-1, 1).cpu())
    return torch.cat(images)


def check_encoding(vae: Any, data: ImageData, target: Path, dtype: torch.dtype) -> None:
    """Raises DataError unless ``vae`` can encode ``data`` into ``target`` as ``dtype``."""
    if target.suffix != ".safetensors":
        raise DataError(f"latents are written to a .safetensors file, not to {target.name!r}")
    if dtype not in (torch.float16, torch.float32):
        raise DataError(f"latents are written as torch.float16 or torch.float32, not {dtype}")
    times = 2 ** (len(vae.config.block_out_channels) - 1)
    channels, height, width = data.shape
    if channels != vae.config.in_channels or height % times or width % times:
        raise DataError(
            f"images {list(data.shape)} do not fit the autoencoder: it takes "
            f"{vae.config.in_channels} channels and sides that are multiples of {times}"
        )


def name_tensors(
    own: Condition | None, extra: Condition | None, numbers: range
) -> dict[str, Tensor]:
    """Names the tensors that hold the condition of the images ``numbers`` in a file.

    ``own``: the condition of these images in the data. ``extra``: the condition of all images
    beside the data. Raises DataError for both, or for nested names.
    """
    if own is not None and extra is not None:
        raise DataError(
            "the data have a condition of their own and conditions are given: open the data with "
            "labels=False; if the model takes both, add them to conditions"
        )
    condition = own if extra is None else take_rows(extra, numbers)
    if condition is None:
        return {}
    if isinstance(condition, Tensor):
        return {"labels": condition}
    tensors: dict[str, Tensor] = {}
    for name, part in condition.items():
        if not isinstance(part, Tensor):
            raise DataError(f"condition {name!r} holds names of its own, which no file can")
        tensors[PREFIX + name] = part
    return tensors
