"""Images to latents and back, by a diffusers AutoencoderKL."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..diffusion.condition import Condition, take_rows
from ..diffusion.modes import evaluating
from ..errors import ConfigError, DataError
from ..optional_deps import import_diffusers
from .image_data import ImageData, checked_condition, positive
from .latents import PREFIX
from .rowfile import RowFile


@dataclass(frozen=True, slots=True)
class Scaling:
    """``latent = (mean - shift) * factor``: what diffusion models are trained on."""

    factor: float
    shift: float
    name: str

    @staticmethod
    def of(vae: Any) -> Scaling:
        """What the config of ``vae`` says. Raises DataError where it is no AutoencoderKL."""
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
        return Scaling(
            float(config["scaling_factor"]),
            float(config.get("shift_factor") or 0.0),
            Path(name).name if local else name,
        )

    def notes(self) -> dict[str, str]:
        """The metadata of a file of latents."""
        values = {"scaling_factor": self.factor, "shift_factor": self.shift}
        return {"vae": self.name, **{name: repr(value) for name, value in values.items()}}


def open_autoencoder(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> Any:
    """The AutoencoderKL in a folder of diffusers, in eval mode. Raises ConfigError."""
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
    """Write the latents of all ``data``, in order, with their labels, for ``open_data`` to read.

    A latent is the mean of the posterior, less the shift, times the scaling factor of ``vae``,
    which runs in eval mode in its own type on its own device. ``conditions``: keyword of the
    model's forward -> tensor [n, ...], written in the labels' place. ``dtype``: float16 or float32.
    The file appears whole or not at all. Raises DataError where something does not fit, or where
    a latent is NaN or Inf.
    """
    target, scaling = Path(path), Scaling.of(vae)
    check(vae, data, target, dtype)
    positive("batch_size", batch_size)
    given = None if conditions is None else checked_condition(conditions, len(data), "conditions")
    notes = scaling.notes()
    if data.classes is not None:
        notes["classes"] = str(data.classes)
    steps = range(0, len(data), batch_size)
    with RowFile(target, len(data), notes) as file, evaluating(vae):
        for first in tqdm(steps, desc="encode", unit="batch", disable=not progress):
            numbers = range(first, min(first + batch_size, len(data)))
            images, condition = data.fetch(numbers)
            mean = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mean
            latents = ((mean.float() - scaling.shift) * scaling.factor).to(dtype)
            if not latents.isfinite().all():
                raise DataError(
                    f"an image among {first} to {numbers[-1]} was encoded to NaN or Inf; run the "
                    "autoencoder in float32 (vae.float()) and write dtype=torch.float32"
                )
            file.write({"latents": latents, **condition_tensors(condition, given, numbers)})


def decode_latents(vae: Any, latents: Tensor, *, batch_size: int = 16) -> Tensor:
    """The images float32 [n, 3, H, W] in [-1, 1], on the CPU, of ``latents`` [n, C, h, w].

    ``latents`` are scaled and shifted as ``encode_latents`` writes them.
    """
    scaling = Scaling.of(vae)
    positive("batch_size", batch_size)
    if latents.ndim != 4 or latents.shape[1] != vae.config.latent_channels:
        raise DataError(
            f"latents {list(latents.shape)} are not [n, {vae.config.latent_channels}, h, w]"
        )
    found = []
    with evaluating(vae):
        for part in torch.split(latents, batch_size):
            plain = part.to(vae.device, torch.float32) / scaling.factor + scaling.shift
            found.append(vae.decode(plain.to(vae.dtype)).sample.float().clamp(-1, 1).cpu())
    return torch.cat(found)


def check(vae: Any, data: ImageData, target: Path, dtype: torch.dtype) -> None:
    """Raises DataError where ``vae`` cannot encode ``data`` into ``target``."""
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


def condition_tensors(
    own: Condition | None, given: Condition | None, numbers: range
) -> dict[str, Tensor]:
    """The tensors of a file that hold the condition of images ``numbers``."""
    if own is not None and given is not None:
        raise DataError(
            "the data have a condition of their own and conditions are given: open the data with "
            "labels=False; if the model takes both, add them to conditions"
        )
    chosen = own if given is None else take_rows(given, numbers)
    if chosen is None:
        return {}
    if isinstance(chosen, Tensor):
        return {"labels": chosen}
    found: dict[str, Tensor] = {}
    for name, part in chosen.items():
        if not isinstance(part, Tensor):
            raise DataError(f"condition {name!r} holds names of its own, which no file can")
        found[PREFIX + name] = part
    return found
