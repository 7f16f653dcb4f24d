"""Fingerprints of everything a run is computed from, beside its options.

A folder keeps them in ``inputs.json``, so that a run is resumed with the same data and weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from .. import CheckpointError, pattern_of
from ..data.fingerprint import hash_all, hash_tensor, spread_numbers
from ..data.image_data import ImageData
from ..data.pixels import map_in_threads
from .checkpoint import get_unique_weights, is_compiled

if TYPE_CHECKING:
    from ..diffusion.condition import Condition
    from ..diffusion.objective import NoiseScheduler

RECORD = "inputs.json"
"""The file in a run's folder that keeps the fingerprints of its inputs."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """One input of a run: ``about`` describes it to people, ``sha256`` stands for its content.

    ``content``: for images, of which ``sha256`` covers 64, a hash of all; None where it would take
    long, and in records of earlier versions.
    """

    about: str
    sha256: str
    content: str | None = None

    def is_like(self, other: Fingerprint) -> bool:
        """Returns whether both stand for the same, as far as both tell."""
        all_told = self.content is not None and other.content is not None
        return self.sha256 == other.sha256 and not (all_told and self.content != other.content)


Fingerprints: TypeAlias = Mapping[str, Fingerprint]
"""The inputs of a run by name."""


def fingerprint_models(student: nn.Module, teacher: nn.Module | None) -> dict[str, Fingerprint]:
    """Returns the student's pattern, and the fingerprint of the weights that a run is made from.

    These are the teacher's; without one, those that a compiled student starts from. A dense
    student without a teacher may start from random weights, which are not compared.
    """
    prints = {}
    if is_compiled(student):
        pattern = str(pattern_of(student))
        prints["pattern"] = Fingerprint(pattern, hashlib.sha256(pattern.encode()).hexdigest())
    if teacher is not None:
        prints["teacher"] = fingerprint_weights(teacher)
    elif is_compiled(student):
        prints["student"] = fingerprint_weights(student, frozen=True)
    return prints


def fingerprint_settings(
    scheduler: NoiseScheduler | None, optimizer: torch.optim.Optimizer | None
) -> dict[str, Fingerprint]:
    """Returns the fingerprints of the scheduler and the optimizer that ``finetune`` gets."""
    prints = {}
    if scheduler is not None:
        prints["scheduler"] = fingerprint_values(scheduler, dict(scheduler.config))
    if optimizer is not None:
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        prints["optimizer"] = fingerprint_values(optimizer, groups)
    return prints


def fingerprint_data(data: Any) -> Fingerprint:
    """Returns the fingerprint of images in any form that ``finetune`` takes.

    Tensors and ``ImageData`` are told apart by number, shape and content; any other dataset, whose
    images may differ from one reading to the next, by type and length alone.
    """
    if isinstance(data, ImageData):
        return Fingerprint(describe_images(data), data.fingerprint(), data.hash_content())
    parts = data if isinstance(data, tuple) else (data,)
    if all(isinstance(part, Tensor) for part in parts):
        images = parts[0]
        digest = hashlib.sha256(str([list(part.shape) for part in parts]).encode())
        rows = torch.tensor(spread_numbers(len(images)), device=images.device)
        digest.update(hash_tensor(images[rows]))
        for part in parts[1:]:
            digest.update(hash_tensor(part))
        about = f"{len(images):,} images {list(images.shape[1:])}"
        return Fingerprint(about, digest.hexdigest(), hash_all(parts))
    name = type(data).__name__
    try:
        about = f"a {name} of length {len(data):,}"
    except TypeError:
        about = f"a {name}"
    return Fingerprint(about, hashlib.sha256(about.encode()).hexdigest())


def describe_images(data: ImageData) -> str:
    """Describes images to people: their number and shape."""
    return f"{len(data):,} images {list(data.shape)}"


def fingerprint_condition(condition: Condition) -> Fingerprint:
    """Returns the fingerprint of a condition's tensors."""
    from ..diffusion.condition import describe_condition, list_tensors

    digest = hashlib.sha256()
    for name, tensor in list_tensors(condition).items():
        digest.update(name.encode() + hash_tensor(tensor))
    return Fingerprint(describe_condition(condition), digest.hexdigest())


def fingerprint_weights(model: nn.Module, *, frozen: bool = False) -> Fingerprint:
    """Returns the fingerprint of all weights and buffers of a model.

    ``frozen``: only of those that are not trained, if there are any: adapters that are trained
    beside frozen weights start from random values.
    """
    tensors = get_unique_weights(model)
    trained = {name for name, part in model.named_parameters() if part.requires_grad}
    kept = {name: tensor for name, tensor in tensors.items() if name not in trained}
    if frozen and any(not part.requires_grad for part in model.parameters()):
        tensors = kept
    digest = hashlib.sha256()
    hashes = map_in_threads(hash_tensor, list(tensors.values()))
    for name, part in zip(tensors, hashes, strict=True):
        digest.update(name.encode() + part)
    return Fingerprint(describe_model(model), digest.hexdigest())


def describe_model(model: nn.Module) -> str:
    """Describes a model to people: its class and size."""
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{type(model).__name__} of {count:,} parameters"


def fingerprint_values(owner: Any, values: Any) -> Fingerprint:
    """Returns the fingerprint of the settings of an object, which its class describes."""
    name = type(owner).__name__
    return Fingerprint(name, hashlib.sha256(f"{name} {values!r}".encode()).hexdigest())


def read_record(folder: Path) -> dict[str, Fingerprint] | None:
    """Reads the fingerprints in a run's folder; None where there are none.

    Raises CheckpointError for a damaged file.
    """
    path = folder / RECORD
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        return {name: Fingerprint(**value) for name, value in plain.items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; remove {folder}") from error


def format_record(prints: Fingerprints) -> str:
    """Returns the text of ``inputs.json``."""
    return json.dumps({name: to_json(value) for name, value in prints.items()}, indent=2) + "\n"


def to_json(fingerprint: Fingerprint) -> dict[str, str]:
    """Returns a fingerprint as plain values."""
    return {name: value for name, value in asdict(fingerprint).items() if value is not None}


def list_differences(theirs: Fingerprints, ours: Fingerprints) -> list[str]:
    """Lists in words every input that differs from that of a run, with both values."""
    differences = []
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        before, now = theirs.get(name), ours.get(name)
        if before and now and before.is_like(now):
            continue
        old, new = (value.about if value else "none" for value in (before, now))
        if before and now and old == new:
            hashes = [part.sha256[:8] for part in (before, now)]
            if before.sha256 == now.sha256:
                hashes = [str(part.content)[:8] for part in (before, now)]
            old, new = f"{old}, sha256 {hashes[0]}", hashes[1]
        differences.append(f"{name} {old}, not {new}")
    return differences
