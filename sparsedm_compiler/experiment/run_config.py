"""``RunConfig``: all settings of one run, from the model to the score, as one file."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .. import ConfigError, Pattern
from ..config import GRAPHS, CompileConfig
from ..diffusion.schedulers import FLOWING, SAMPLERS
from ..models.loading import may_have_weights
from ..option_values import check_real, check_seed, check_switch, check_whole
from ..train.finetune_config import FinetuneConfig
from .recipes import find_recipe
from .yaml_values import assign, build, merge, read_mapping


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The dense model.

    Attributes:
        name: A preset, a diffusers folder or "package.module:function", as ``open_model`` takes it.
        options: Keyword arguments of the model's class or function.
        weights: A file of weights. None keeps those the model comes with; random weights can be
            trained with method "dense" alone.
    """

    name: str = "uvit-cifar10-small"
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None


@dataclass(frozen=True, slots=True)
class DataSpec:
    """The images to train on and to hold out.

    Attributes:
        train: Images to train on, as ``open_data`` takes them: a folder, an .npz, ... Required.
        held_out: Images to measure the loss on, likewise. None holds out none.
        size: Side in pixels to which images are resized; None keeps their size.
        labels: Whether labels or texts are used, if there are any.
        held_out_limit: Number of held-out images to use, from the first; None is all.
        null: A .safetensors file with the condition that stands for none; None has none.
        vae: Folder of a diffusers AutoencoderKL that decodes latents for samples. None is for
            images.
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
        for name, value in (("size", self.size), ("held_out_limit", self.held_out_limit)):
            if value is not None:
                check_whole(f"data.{name}", value, least=1)
        check_switch("data.labels", self.labels)


SET_BY_RUN: Mapping[str, str] = {
    "mode": "a run trains, and then samples",
    "kernels": "samples are drawn by dense kernels, which give the same numbers everywhere",
    "exclude_kernels": "no sparse kernel is considered",
    "autotune": "no kernel is chosen",
    "autotune_seconds": "no kernel is timed",
    "finalize": "no weight is packed",
}
"""The options of ``compile`` that a run sets itself, with the reason; ``prune`` refuses them."""


def derive_prune_spec(config: type[CompileConfig] = CompileConfig) -> type[Any]:
    """Returns the dataclass of the options of ``compile`` that a user of a run sets.

    They are the fields of ``config`` but those in ``SET_BY_RUN``, as plain values, with the
    defaults of ``config``; its pattern, which has none, is "2:4" by default.
    """
    defaults = CompileConfig.create("2:4").to_dict()
    for option in fields(config):
        defaults.setdefault(option.name, option.default)
    rows = [
        (name, Any, field(default_factory=partial(copy.copy, _freeze(value))))
        for name, value in defaults.items()
        if name not in SET_BY_RUN
    ]
    namespace = {
        "__module__": __name__,
        "__doc__": "The options of ``compile`` that a user of a run sets; see there for each.",
        "__post_init__": lambda self: Pattern.parse(self.pattern),
    }
    return make_dataclass("PruneSpec", rows, namespace=namespace, frozen=True, slots=True)


def _freeze(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


PruneSpec = derive_prune_spec()


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """The settings of samples, for grids and for scores.

    Attributes:
        sampler: The sampler, as ``make_scheduler`` names it.
        steps: Sampling steps.
        guidance: Scale of classifier-free guidance; None samples without.
        seed: The seed; sample i is drawn from (seed, i) alone.
        grid: Samples in a grid.
        batch_size: Samples drawn at once for scores.
    """

    sampler: str = "dpm++"
    steps: int = 20
    guidance: float | None = None
    seed: int = 0
    grid: int = 40
    batch_size: int = 256

    def __post_init__(self) -> None:
        if self.sampler not in [*SAMPLERS]:
            known = ", ".join(SAMPLERS)
            raise ConfigError(f"sample.sampler {self.sampler!r} is none of {known}")
        counts = {"steps": self.steps, "grid": self.grid, "batch_size": self.batch_size}
        for name, value in counts.items():
            check_whole(f"sample.{name}", value, least=1)
        if self.guidance is not None:
            check_real("sample.guidance", self.guidance)
        check_seed("sample.seed", self.seed)


@dataclass(frozen=True, slots=True)
class ScoreSpec:
    """The scores of a finished run.

    Attributes:
        network: The feature network, as ``load_network`` takes it: "inception", "inception:FILE",
            or "package.module:function". None scores nothing.
        reference: Images, or a file of statistics, to compare with; None is the held-out images.
        count: Number of samples to score.
        kid: Whether to compute KID.
        precision_recall: Whether to compute precision and recall.
    """

    network: str | None = None
    reference: str | None = None
    count: int = 10_000
    kid: bool = False
    precision_recall: bool = False

    def __post_init__(self) -> None:
        check_whole("score.count", self.count, least=2)
        check_switch("score.kid", self.kid)
        check_switch("score.precision_recall", self.precision_recall)


SECTIONS: Mapping[str, type[Any]] = {
    "model": ModelSpec,
    "data": DataSpec,
    "prune": PruneSpec,
    "sample": SampleSpec,
    "score": ScoreSpec,
}


@dataclass(frozen=True, slots=True)
class RunConfig:
    """All settings of one run, by section.

    Attributes:
        model: The dense model.
        data: Images to train on and to hold out.
        prune: Options of ``compile``: a ``PruneSpec``, by name.
        train: Options of ``finetune``.
        sample: Settings of samples.
        score: Scores of the finished run; by default none.
        out: The folder of the run.
    """

    model: ModelSpec
    data: DataSpec
    prune: Any
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
        if self.train.objective == "flow" and self.sample.sampler not in FLOWING:
            raise ConfigError(
                f"sample.sampler {self.sample.sampler!r} does not follow a flow; with "
                f"train.objective 'flow' set it to {' or '.join(FLOWING)}"
            )
        if self.prune.backend == GRAPHS and self.train.accumulation > 1:
            raise ConfigError(
                f"prune.backend {GRAPHS!r} writes the gradients of a part of a batch over those of "
                "the part before: leave it out, or set train.accumulation to 1"
            )

    @staticmethod
    def create(values: Mapping[str, Any]) -> RunConfig:
        """Returns the configuration of plain values, on top of its ``recipe``.

        Raises ConfigError for unknown names and for values out of range.

        >>> values = {"data": {"train": "digits"}, "train": {"method": "dense"}, "out": "runs/a"}
        >>> RunConfig.create(values).prune.pattern
        '2:4'
        """
        plain = copy.deepcopy(dict(values))
        plain = merge(find_recipe(plain.pop("recipe", None)), plain)
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
        """Reads a YAML or JSON file, with "section.name=value" assignments on top.

        ``sections``: plain values below the file's, e.g. ``recipe=...``. Raises ConfigError.
        """
        values = merge(sections, {} if path is None else read_mapping(Path(path)))
        for assignment in assignments:
            assign(values, assignment)
        return RunConfig.create(values)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON and YAML; ``create`` reads them back."""
        sections = {name: _plain(asdict(getattr(self, name))) for name in SECTIONS}
        return {**sections, "train": self.train.as_dict(), "out": self.out}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
