"""Resolves the model that a command line names, and opens it, masked if its weights are pruned."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .options import (
    MODES,
    add_backend,
    add_device,
    add_model,
    read_model_options,
    select_device,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..experiment.run_config import RunConfig


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A checked model: ``name`` and ``options`` as ``open_model`` takes them.

    ``pruned`` is the metadata of ``weights`` where ``sparsedm_compiler.save`` wrote them, else
    None; ``mode`` and ``backend`` say how such weights run. ``run`` is the configuration of the
    training run whose folder was named, else None.
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
        """Opens the model with its weights, on its device. Raises SparseDMError."""
        from ..compiler.serialization import load
        from ..models import open_model

        if self.pruned is None or self.weights is None:
            return open_model(
                self.name, options=self.options, weights=self.weights, device=self.device
            )
        dense = open_model(self.name, options=self.options, device=self.device)
        return switch_mode(load(self.weights, dense, backend=self.backend), self.mode)

    def open_example(self, inputs: str | None = None) -> tuple[nn.Module, tuple[Any, ...], Any]:
        """Returns (model, args, kwargs) of one call, on the meta device where possible."""
        from ..models import open_with_inputs

        return open_with_inputs(self.name, options=self.options, inputs=inputs)

    @property
    def pattern(self) -> str | None:
        """The pattern that the weights were pruned to, None where they are dense."""
        if self.pruned is None:
            return None
        return str(self.pruned["options"]["pattern"] or "recognised")

    def __str__(self) -> str:
        weights = "its own weights" if self.weights is None else f"weights {self.weights}"
        state = "dense" if self.pruned is None else f"masked to {self.pattern}, mode {self.mode}"
        return f"{self.name} with {weights}, {state}, on {self.device}"


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Adds the option that names the weights."""
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="weights saved by training, which run masked, or dense weights: .safetensors, .pt, "
        ".pth",
    )


def add_source_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds the options of ``resolve_source`` beside the weights."""
    add_model(parser, required=required)
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="infer",
        help="how pruned weights run: infer folds the masks into the weights once and uses the "
        "fastest kernels, train masks the weights in every call (default: infer)",
    )
    add_backend(parser)
    add_device(parser)


def resolve_source(options: argparse.Namespace) -> ModelSource:
    """Returns the model of the options, checked on the meta device. Raises SparseDMError."""
    from ..compiler.inner_backend import resolve_backend
    from ..models import load_weights, open_model
    from ..models.loading import may_have_weights

    name, fields = options.model, read_model_options(options)
    weights, run = options.weights, None
    if (Path(name) / "run.json").exists():
        run = read_run_config(Path(name) / "run.json")
        weights = weights or find_student_weights(Path(name))
        name, fields = run.model.name, {**run.model.options, **fields}
    weights = weights or find_pruned_weights(Path(name))
    if weights is None and not may_have_weights(name):
        raise ConfigError(f"{name} alone has random weights: give --weights FILE")
    model = open_model(name, options=fields, device="meta")
    pruned = None if weights is None else read_metadata(Path(weights))
    if weights is not None and not (pruned and (pruned["packed"] or pruned["compact"])):
        load_weights(model, weights)
    resolve_backend(options.backend)
    path = None if weights is None else Path(weights)
    mode, backend, device = options.mode, options.backend, select_device(options)
    return ModelSource(name, fields, path, pruned, mode, backend, device, run)


def read_run_config(path: Path) -> RunConfig:
    """Reads the configuration of a run. Raises ConfigError."""
    from ..experiment.run_config import RunConfig

    return RunConfig.read(path)


def find_student_weights(folder: Path) -> Path:
    """Returns the weights that a finished run saved. Raises ConfigError for an unfinished one."""
    path = folder / "student.safetensors"
    if not path.exists():
        last = max((folder / "checkpoints").glob("*/*.safetensors"), default=None)
        hint = "" if last is None else f"; --weights {last.with_name('student.safetensors')} is"
        raise ConfigError(
            f"{folder} has no student.safetensors: the run is not finished{hint}"
            + (" its last checkpoint" if hint else "")
        )
    return path


def find_pruned_weights(folder: Path) -> Path | None:
    """Returns the weights of a diffusers folder that ``from_pretrained`` would load pruned."""
    path = folder / "diffusion_pytorch_model.safetensors"
    return path if path.exists() and read_metadata(path) is not None else None


def read_metadata(path: Path) -> dict[str, Any] | None:
    """Reads what ``sparsedm_compiler.save`` stored beside the weights, None for another file.

    Raises CheckpointError for a file that cannot be read.
    """
    if path.suffix != ".safetensors":
        return None
    from ..files.container import read_record

    record = read_record(path)
    return None if record is None or record["options"] is None else record


def switch_mode(model: nn.Module, mode: str) -> nn.Module:
    """Returns a compiled model in ``mode``, with the same decisions. Raises ConfigError."""
    from ..compiler.api import install
    from ..compiler.lookup import require_compiled

    ((_, forward),) = require_compiled(model)
    if forward.config.mode == mode:
        return model
    if forward.weights.packed:
        raise ConfigError("these weights are finalized, their dense values are gone: --mode infer")
    config = replace(forward.config, mode=mode)
    return install(model, config, forward.decisions, forward.known)
