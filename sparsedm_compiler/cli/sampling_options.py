"""The options of ``sample`` and ``fid`` that say how images are sampled from a model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DataError, SparseDMError
from .open_student import ModelSource
from .options import parse_integers

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..diffusion import Condition, Guidance, SamplePlan
    from ..diffusion.image_batches import NumberedBatches

SAMPLERS = ("dpm++", "ddim", "ddpm", "euler")
OBJECTIVES = ("eps", "v", "x0", "flow")
STEPS = {"ddpm": 1000}
"""Default steps of a sampler; all others take 50."""

ConditionOfImages = Callable[[range], "Condition | None"]
"""Returns the condition of the images with these numbers."""


@dataclass(frozen=True, slots=True)
class SamplingRequest:
    """A checked request to sample images from a model.

    ``sampler`` is the description of scheduler, steps and guidance that results print; ``betas``
    are the noise levels where they are not the default; ``vae`` is the folder of the decoder.
    """

    source: ModelSource
    plan: SamplePlan
    scheduler: Any
    sampler: str
    objective: str
    betas: Mapping[str, Any] | None = None
    vae: str | None = None

    def sample(
        self, model: nn.Module, *, skip: Callable[[range], bool] | None = None, progress: bool
    ) -> NumberedBatches:
        """Yields this process's share of the images in chunks, with their numbers.

        Chunks for whose numbers ``skip`` returns True are left out.
        """
        from ..diffusion import sample_batches
        from ..evaluate.process_group import own_share

        return sample_batches(
            model, self.scheduler, self.plan, share=own_share(), skip=skip, progress=progress
        )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``make_sampling_request``."""
    add = parser.add_argument
    add("--sampler", choices=SAMPLERS, help="sampler (default: that of the run, else dpm++)")
    add("--steps", type=int, help="steps of the sampler (default: 50; ddpm: 1000)")
    add(
        "--objective",
        choices=OBJECTIVES,
        help="prediction target of the model (default: that of the run, of ../scheduler beside a "
        "diffusers model, else eps)",
    )
    add("--seed", type=int, default=0, help="seed; the noise of image i depends on (seed, i) (0)")
    add("--batch-size", type=int, default=64, help="images per call of the model (64)")
    add("--shape", help="shape of one input, e.g. 3x32x32, for a model class that is not known")
    conditions = parser.add_mutually_exclusive_group()
    conditions.add_argument("--classes", type=int, help="number of classes; images cycle through")
    conditions.add_argument("--labels", help="class labels to cycle through instead, e.g. 3,5,7")
    conditions.add_argument(
        "--condition",
        metavar="FILE",
        help=".safetensors with keyword arguments of the model, e.g. text embeddings: one row per "
        "image; images cycle through the rows",
    )
    add("--guidance", type=float, help="scale of classifier-free guidance; 1 is none")
    add("--null-label", type=int, help="for guidance: the label of the class that means no class")
    add(
        "--null",
        metavar="FILE",
        help="for guidance: .safetensors with the condition that means none: one row, or the "
        "tensors of one image without the axis of rows, as in data.null",
    )
    add("--vae", metavar="FOLDER", help="diffusers AutoencoderKL that decodes latents to images")


def make_sampling_request(
    options: argparse.Namespace, source: ModelSource, count: int
) -> SamplingRequest:
    """Returns the checked request for ``count`` images.

    An option that is not set takes the value of the training run, if one was named. Raises
    SparseDMError.
    """
    from ..diffusion import SamplePlan, make_scheduler, sampler_name
    from ..diffusion.schedulers import check_steps
    from ..models.schedules import read_schedule

    run = source.run
    sampler = options.sampler or (run.sample.sampler if run else "dpm++")
    steps = options.steps
    if steps is None:
        steps = run.sample.steps if run else STEPS.get(sampler, 50)
    schedule = read_schedule(source.name)
    trained = "eps" if schedule is None else schedule.objective
    objective = options.objective or (run.train.objective if run else trained)
    betas = None if schedule is None else schedule.betas
    scheduler = make_scheduler(sampler, objective, betas=betas)
    check_steps(scheduler, steps, "--steps")
    condition, guidance = resolve_condition(options, source)
    vae = options.vae or (run.data.vae if run else None)
    plan = SamplePlan(
        (count, *resolve_shape(options, source)),
        steps,
        options.seed,
        condition,
        guidance,
        None if vae is None else open_decoder(vae, source),
        options.batch_size,
    )
    check_model_call(source, plan)
    label = sampler_name(scheduler, steps, guidance)
    return SamplingRequest(source, plan, scheduler, label, objective, betas, vae)


def resolve_shape(options: argparse.Namespace, source: ModelSource) -> tuple[int, ...]:
    """Returns the shape of one input of the model: of the options, or of its class."""
    if options.shape is not None:
        return parse_integers(options.shape, "x", "--shape", "3x32x32")
    _, args, kwargs = source.open_example()
    first = next((x for x in (*args, *kwargs.values())), None)
    if first is None:
        raise ConfigError(f"what {source.name} takes is not known: give --shape, e.g. 3x32x32")
    return tuple(first.shape[1:])


def resolve_condition(
    options: argparse.Namespace, source: ModelSource
) -> tuple[ConditionOfImages | None, Guidance | None]:
    """Returns the condition of the images and the guidance, of the options or of the run.

    Raises ConfigError for guidance without a condition that means none.
    """
    from ..diffusion import Guidance

    scale, condition = options.guidance, read_condition_options(options)
    if condition is None and source.run is not None:
        from ..experiment import inputs

        run = source.run
        if scale is not None:
            run = replace(run, sample=replace(run.sample, guidance=scale))
        opened = inputs.open_inputs(run, source.device)
        condition = None if opened.make_condition(range(1)) is None else opened.make_condition
        if options.null is None and options.null_label is None:
            return condition, inputs.make_guidance(run, opened)
    null = read_null_options(options, condition)
    if scale is None:
        return condition, None
    if null is None:
        raise ConfigError(f"--guidance {scale} needs --null-label or --null: what means none?")
    return condition, Guidance(scale, null)


def read_condition_options(options: argparse.Namespace) -> ConditionOfImages | None:
    """Returns the condition of --condition, --labels or --classes, None where none is set.

    Raises ConfigError and DataError.
    """
    import torch

    if options.condition is not None:
        from ..diffusion.condition import map_condition, read_condition

        rows = read_condition(options.condition)
        if not all(part.ndim and len(part) for part in rows.values()):
            raise DataError(f"{options.condition} holds no tensors with a row per image")
        return lambda numbers: map_condition(
            lambda part: part[[number % len(part) for number in numbers]], rows
        )
    labels: list[int] = []
    if options.labels is not None:
        labels = [*parse_integers(options.labels, ",", "--labels", "3,5,7")]
    elif options.classes is not None:
        if options.classes < 1:
            raise ConfigError(f"--classes {options.classes} is not >= 1")
        labels = [*range(options.classes)]
    if not labels:
        return None
    return lambda numbers: torch.tensor(
        [labels[number % len(labels)] for number in numbers], device="cpu"
    )


def read_null_options(
    options: argparse.Namespace, condition: ConditionOfImages | None
) -> int | Condition | None:
    """Returns the condition that means none: a class label, or the tensors of one image.

    The tensors in a file may have the axis of rows as well; it is removed where a tensor has as
    many axes as that of ``condition``.
    """
    if options.null is None:
        label: int | None = options.null_label
        return label
    from torch import Tensor

    from ..diffusion.condition import read_condition

    like = None if condition is None else condition(range(1))
    rows = like if isinstance(like, Mapping) else {}
    axes = {name: part.ndim for name, part in rows.items() if isinstance(part, Tensor)}
    return {
        name: part[0] if part.ndim == axes.get(name) and len(part) else part
        for name, part in read_condition(options.null).items()
    }


def open_decoder(folder: str, source: ModelSource) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the function from latents to images. Raises ConfigError."""
    from ..experiment import inputs

    if not (Path(folder) / "config.json").exists():
        raise ConfigError(f"--vae {folder} holds no AutoencoderKL of diffusers: no config.json")
    return inputs.open_decoder(folder, source.device)


def check_model_call(source: ModelSource, plan: SamplePlan) -> None:
    """Calls the model on the meta device as sampling will, where it can be called there.

    Raises SparseDMError where shape or condition do not fit the model.
    """
    import torch

    from ..diffusion import predict
    from ..diffusion.condition import move_condition
    from ..models import open_model
    from ..models.loading import is_function

    model = open_model(source.name, options=source.options, device="meta")
    condition = plan.take_condition(range(1))
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    x = torch.zeros(1, *plan.shape[1:], device="meta", dtype=dtype)
    y = None if condition is None else move_condition(condition, x)
    try:
        with torch.no_grad():
            predict(model, x, torch.zeros(1, device="meta"), y)
    except SparseDMError:
        raise
    except Exception as error:
        if not is_function(source.name):  # a function may build what the meta device cannot run
            raise ConfigError(
                f"{source.name} cannot be called with {list(x.shape)}: {error}"
            ) from error
