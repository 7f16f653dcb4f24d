"""A model as the command line names it, ready to be called, masked where its weights say so."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ConfigError
from .options import MODES, add_backend, add_device, add_model, device_of, model_options

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..experiment.run_config import RunConfig


@dataclass(frozen=True, slots=True)
class Source:
    """A checked model: ``name`` and ``options`` as ``open_model`` takes them.

    ``pruned``: the metadata of ``weights`` where ``sparsedm_compiler.save`` wrote them, else None.
    ``mode``, ``backend``: how it then runs. ``run``: the configuration of the run that was named.
    """

    name: str
    options: Mapping[str, Any]
    weights: Path | None
    pruned: Mapping[str, Any] | None
    mode: str
    backend: str
    device: torch.device
    run: RunConfig | None = None

    def open(self) -> nn.Module:
        """The model with its weights, on its device. Raises SparseDMError."""
        from ..compiler.serialization import load
        from ..models import open_model

        if self.pruned is None or self.weights is None:
            return open_model(
                self.name, options=self.options, weights=self.weights, device=self.device
            )
        dense = open_model(self.name, options=self.options, device=self.device)
        return in_mode(load(self.weights, dense, backend=self.backend), self.mode)

    def example(self, inputs: str | None = None) -> tuple[nn.Module, tuple[Any, ...], Any]:
        """(model, args, kwargs) to count or to copy: on the meta device where possible."""
        from ..models import open_with_inputs

        return open_with_inputs(self.name, options=self.options, inputs=inputs)

    @property
    def pattern(self) -> str | None:
        """What the weights were pruned to, None where they are dense."""
        if self.pruned is None:
            return None
        return str(self.pruned["options"]["pattern"] or "recognised")

    def __str__(self) -> str:
        weights = "its own weights" if self.weights is None else f"weights {self.weights}"
        how = "dense" if self.pruned is None else f"masked to {self.pattern}, mode {self.mode}"
        return f"{self.name} with {weights}, {how}, on {self.device}"


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Which weights."""
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="what training saved (then it runs masked), or dense weights: .safetensors, .pt, .pth",
    )


def add_source(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Options of ``source_of`` beside the weights."""
    add_model(parser, required=required)
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="infer",
        help="how pruned weights run: infer folds the masks once and takes the fastest kernels, "
        "train masks in every call (infer)",
    )
    add_backend(parser)
    add_device(parser)


def source_of(options: argparse.Namespace) -> Source:
    """The model that was asked for, checked on the meta device. Raises SparseDMError."""
    from ..compiler.inner_backend import resolve_backend
    from ..models import load_weights, open_model
    from ..models.loading import may_have_weights

    name, chosen, weights, run = options.model, model_options(options), options.weights, None
    if (Path(name) / "run.json").exists():
        run = read_run_config(Path(name) / "run.json")
        weights = weights or student_of(Path(name))
        name, chosen = run.model.name, {**run.model.options, **chosen}
    if weights is None and not may_have_weights(name):
        raise ConfigError(f"{name} alone has random weights: give --weights FILE")
    model = open_model(name, options=chosen, device="meta")
    pruned = None if weights is None else metadata_of(Path(weights))
    if weights is not None and not (pruned and pruned["packed"]):
        load_weights(model, weights)
    resolve_backend(options.backend)
    path = None if weights is None else Path(weights)
    mode, backend, device = options.mode, options.backend, device_of(options)
    return Source(name, chosen, path, pruned, mode, backend, device, run)


def read_run_config(path: Path) -> RunConfig:
    """The configuration of a run."""
    from ..experiment.run_config import RunConfig

    return RunConfig.read(path)


def student_of(folder: Path) -> Path:
    """The weights a finished run left. Raises ConfigError for one that has not finished."""
    found = folder / "student.safetensors"
    if not found.exists():
        saved = max((folder / "checkpoints").glob("*/*.safetensors"), default=None)
        hint = "" if saved is None else f"; --weights {saved.with_name('student.safetensors')} is"
        raise ConfigError(
            f"{folder} has no student.safetensors: the run is not finished{hint}"
            + (" its last checkpoint" if hint else "")
        )
    return found


def metadata_of(path: Path) -> dict[str, Any] | None:
    """What ``sparsedm_compiler.save`` wrote beside the weights, None for another file's.

    Raises CheckpointError for a file that cannot be read.
    """
    if path.suffix != ".safetensors":
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("sparsedm")
        found: dict[str, Any] | None = None if text is None else json.loads(text)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"cannot read weights from {path}: {error}") from error
    return found


def in_mode(model: nn.Module, mode: str) -> nn.Module:
    """A compiled model in ``mode``, with the decisions it has. Raises ConfigError."""
    from ..compiler.api import install
    from ..compiler.guarded_forward import require_compiled

    ((_, forward),) = require_compiled(model)
    if forward.config.mode == mode:
        return model
    if forward.weights.packed:
        raise ConfigError("these weights are finalized, their dense values are gone: --mode infer")
    config = replace(forward.config, mode=mode)
    return install(model, config, forward.decisions, forward.known)
