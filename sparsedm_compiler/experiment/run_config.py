"""``RunConfig``: everything one fine-tune needs, from the model to the score, as one file."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import ConfigError, Pattern
from ..models.loading import may_have_weights
from ..train.finetune_config import FinetuneConfig
from .recipes import recipe
from .yaml_values import build, merged, put, read_mapping


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The dense model: ``name`` as ``open_model`` takes it, with ``options`` and ``weights``.

    ``weights`` may be left out to train from random weights with method "dense" alone.
    """

    name: str = "uvit-cifar10-small"
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None


@dataclass(frozen=True, slots=True)
class DataSpec:
    """Images to train on and to hold out, as ``open_data`` takes them, resized to ``size``.

    ``null``: a .safetensors with the condition that stands for none. ``held_out_limit``: the first
    so many. ``vae``: folder of a diffusers AutoencoderKL that decodes latents for samples.
    """

    train: str = ""
    held_out: str | None = None
    size: int | None = None
    labels: bool = True
    held_out_limit: int | None = 1000
    null: str | None = None
    vae: str | None = None

    def __post_init__(self) -> None:
        if not self.train:
            raise ConfigError(
                "no training data: set data.train to a folder of images, an .npz, hf:PATH, "
                "torchvision:NAME:ROOT, latents in .safetensors, or digits"
            )


@dataclass(frozen=True, slots=True)
class PruneSpec:
    """What is pruned to which pattern: options of ``compile``."""

    pattern: str = "2:4"
    policy: str = "structural"
    keep_dense: tuple[str, ...] = ()
    overrides: Mapping[str, str] = field(default_factory=dict)
    backend: str = "auto"

    def __post_init__(self) -> None:
        Pattern.parse(self.pattern)


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """How samples are drawn, for the grids (``grid`` images) and for scores."""

    sampler: str = "dpm++"
    steps: int = 20
    guidance: float | None = None
    seed: int = 0
    grid: int = 40
    batch_size: int = 256


@dataclass(frozen=True, slots=True)
class ScoreSpec:
    """What is scored in the end: ``count`` samples on a ``network``; None scores nothing.

    ``network``: as ``load_network`` takes it: "inception", "inception:FILE", or
    "package.module:function". ``reference``: images or a file of statistics; the held-out
    images by default.
    """

    network: str | None = None
    reference: str | None = None
    count: int = 10_000
    kid: bool = False
    precision_recall: bool = False


SECTIONS: Mapping[str, type[Any]] = {
    "model": ModelSpec,
    "data": DataSpec,
    "prune": PruneSpec,
    "sample": SampleSpec,
    "score": ScoreSpec,
}


@dataclass(frozen=True, slots=True)
class RunConfig:
    """One run: its sections, and the folder ``out``."""

    model: ModelSpec
    data: DataSpec
    prune: PruneSpec
    train: FinetuneConfig
    sample: SampleSpec
    score: ScoreSpec
    out: str

    def __post_init__(self) -> None:
        name, weights = self.model.name, self.model.weights
        if self.train.sparse and weights is None and not may_have_weights(name):
            raise ConfigError(
                f"method {self.train.method!r} prunes a trained model, and {name} has random "
                "weights: set model.weights, or train the dense model first: train.method=dense"
            )

    @staticmethod
    def create(values: Mapping[str, Any]) -> RunConfig:
        """The configuration of plain values, on top of its ``recipe``. Raises ConfigError.

        >>> values = {"data": {"train": "digits"}, "train": {"method": "dense"}, "out": "runs/a"}
        >>> RunConfig.create(values).prune.pattern
        '2:4'
        """
        plain = copy.deepcopy(dict(values))
        plain = merged(recipe(plain.pop("recipe", None)), plain)
        out = plain.pop("out", None)
        if not isinstance(out, str) or not out:
            raise ConfigError("no folder to write to: set out, e.g. to runs/first")
        train = plain.pop("train", {})
        if not isinstance(train, Mapping):
            raise ConfigError(f"train is {train!r}, not names and values")
        for name in plain:
            if name not in SECTIONS:
                known = ", ".join([*SECTIONS, "train", "out", "recipe"])
                raise ConfigError(f"there is no section {name!r}; there are {known}")
        sections = {name: build(cls, plain.get(name, {}), name) for name, cls in SECTIONS.items()}
        return RunConfig(**sections, train=FinetuneConfig().with_options(train), out=out)

    @staticmethod
    def read(
        path: str | Path | None, assignments: Iterable[str] = (), **sections: Any
    ) -> RunConfig:
        """The configuration of a YAML or JSON file with "section.name=value" assignments on top.

        ``sections``: plain values below the file's, e.g. ``recipe=...``. Raises ConfigError.
        """
        values = merged(sections, {} if path is None else read_mapping(Path(path)))
        for assignment in assignments:
            put(values, assignment)
        return RunConfig.create(values)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON and YAML; ``of`` reads them back."""
        found = {name: _plain(asdict(getattr(self, name))) for name in SECTIONS}
        return {**found, "train": self.train.as_dict(), "out": self.out}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
