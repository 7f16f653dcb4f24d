"""What ``sample`` and ``fid`` share: how images are drawn from a model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DataError, SparseDMError
from .open_student import Source
from .options import numbers_in

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..diffusion import Condition, Guidance, SamplePlan
    from ..diffusion.image_batches import NumberedBatches

SAMPLERS = ("dpm++", "ddim", "ddpm", "euler")
OBJECTIVES = ("eps", "v", "x0", "flow")
STEPS = {"ddpm": 1000}
"""Steps of a sampler that is not told how many; all others take 50."""

Asked = Callable[[range], "Condition | None"]
"""The condition of the images with these numbers."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """A checked plan to draw images; ``sampler``: as results name it."""

    source: Source
    plan: SamplePlan
    scheduler: Any
    sampler: str
    objective: str

    def batches(
        self, model: nn.Module, *, skip: Callable[[range], bool] | None = None, progress: bool
    ) -> NumberedBatches:
        """This process's share of the images, chunk by chunk with their numbers."""
        from ..diffusion import sample_batches
        from ..evaluate.process_group import own_share

        return sample_batches(
            model, self.scheduler, self.plan, share=own_share(), skip=skip, progress=progress
        )


def add_drawing(parser: argparse.ArgumentParser) -> None:
    """Options of ``drawing_of``."""
    add = parser.add_argument
    add("--sampler", choices=SAMPLERS, help="how to sample (dpm++)")
    add("--steps", type=int, help="steps of the sampler (50; ddpm: 1000)")
    add("--objective", choices=OBJECTIVES, help="what the model predicts (eps)")
    add("--seed", type=int, default=0, help="image i draws its noise from (seed, i) alone (0)")
    add("--batch-size", type=int, default=64, help="images at once (64)")
    add("--shape", help="shape of one input, e.g. 3x32x32, for a model of an unknown class")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--classes", type=int, help="number of classes: images take them in turn")
    what.add_argument("--labels", help="these classes in turn instead, e.g. 3,5,7")
    what.add_argument(
        "--condition",
        metavar="FILE",
        help=".safetensors with keyword arguments of the model, e.g. text embeddings, one row per "
        "image, used in turn",
    )
    add("--guidance", type=float, help="scale of classifier-free guidance; 1 is none")
    add("--null-label", type=int, help="for guidance: the class that means no class")
    add(
        "--null",
        metavar="FILE",
        help="for guidance: .safetensors that means no condition: one row, or the tensors of one "
        "image without that axis, as in data.null",
    )
    add("--vae", metavar="FOLDER", help="diffusers AutoencoderKL that decodes latents to images")


def drawing_of(options: argparse.Namespace, source: Source, count: int) -> Drawing:
    """The plan that was asked for, a run's own settings where none were. Raises SparseDMError."""
    from ..diffusion import SamplePlan, make_scheduler, sampler_name

    run = source.run
    sampler = options.sampler or (run.sample.sampler if run else "dpm++")
    steps = options.steps or (run.sample.steps if run else STEPS.get(sampler, 50))
    objective = options.objective or (run.train.objective if run else "eps")
    scheduler = make_scheduler(sampler, objective)
    asked, guidance = asked_of(options, source)
    vae = options.vae or (run.data.vae if run else None)
    plan = SamplePlan(
        (count, *shape_of(options, source)),
        steps,
        options.seed,
        asked,
        guidance,
        None if vae is None else decoder_of(vae, source),
        options.batch_size,
    )
    check_call(source, plan)
    return Drawing(source, plan, scheduler, sampler_name(scheduler, steps, guidance), objective)


def shape_of(options: argparse.Namespace, source: Source) -> tuple[int, ...]:
    """The shape of one input of the model: the one given, or that of its class."""
    if options.shape is not None:
        return numbers_in(options.shape, "x", "--shape", "3x32x32")
    _, args, kwargs = source.example()
    first = next((x for x in (*args, *kwargs.values())), None)
    if first is None:
        raise ConfigError(f"what {source.name} takes is not known: give --shape, e.g. 3x32x32")
    return tuple(first.shape[1:])


def asked_of(options: argparse.Namespace, source: Source) -> tuple[Asked | None, Guidance | None]:
    """What the images are conditioned on, and how strongly."""
    from ..diffusion import Guidance

    scale, asked = options.guidance, own_condition(options)
    if asked is None and source.run is not None:
        from ..experiment import inputs as opening

        run = source.run
        if scale is not None:
            run = replace(run, sample=replace(run.sample, guidance=scale))
        opened = opening.open_inputs(run, source.device)
        asked = None if opened.make_condition(range(1)) is None else opened.make_condition
        if options.null is None and options.null_label is None:
            return asked, opening.make_guidance(run, opened)
    null = null_of(options, asked)
    if scale is None:
        return asked, None
    if null is None:
        raise ConfigError(f"--guidance {scale} needs --null-label or --null: what means none?")
    return asked, Guidance(scale, null)


def own_condition(options: argparse.Namespace) -> Asked | None:
    """The condition that the options name, None for none."""
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
        labels = [*numbers_in(options.labels, ",", "--labels", "3,5,7")]
    elif options.classes is not None:
        if options.classes < 1:
            raise ConfigError(f"--classes {options.classes} is not >= 1")
        labels = [*range(options.classes)]
    if not labels:
        return None
    return lambda numbers: torch.tensor([labels[number % len(labels)] for number in numbers])


def null_of(options: argparse.Namespace, asked: Asked | None) -> int | Condition | None:
    """What stands for no condition: a class, or the tensors of one image.

    In a file they may have one axis more, that of rows, which what is ``asked`` for tells.
    """
    if options.null is None:
        label: int | None = options.null_label
        return label
    from torch import Tensor

    from ..diffusion.condition import read_condition

    like = None if asked is None else asked(range(1))
    rows = like if isinstance(like, Mapping) else {}
    axes = {name: part.ndim for name, part in rows.items() if isinstance(part, Tensor)}
    return {
        name: part[0] if part.ndim == axes.get(name) and len(part) else part
        for name, part in read_condition(options.null).items()
    }


def decoder_of(folder: str, source: Source) -> Callable[[torch.Tensor], torch.Tensor]:
    """Latents to images."""
    from ..experiment.inputs import open_decoder

    if not (Path(folder) / "config.json").exists():
        raise ConfigError(f"--vae {folder} holds no AutoencoderKL of diffusers: no config.json")
    return open_decoder(folder, source.device)


def check_call(source: Source, plan: SamplePlan) -> None:
    """Call the model on the meta device as sampling will, where it can be called there.

    Raises DataError where shape or condition do not fit it.
    """
    import torch

    from ..diffusion import predict
    from ..diffusion.condition import move_condition
    from ..models import open_model
    from ..models.loading import is_function

    model = open_model(source.name, options=source.options, device="meta")
    asked = plan.take_condition(range(1))
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    x = torch.zeros(1, *plan.shape[1:], device="meta", dtype=dtype)
    y = None if asked is None else move_condition(asked, x)
    try:
        with torch.no_grad():
            predict(model, x, torch.zeros(1, device="meta"), y)
    except SparseDMError:
        raise
    except Exception as error:
        if not is_function(source.name):  # anything may be in there, also what meta cannot do
            raise ConfigError(
                f"{source.name} cannot be called with {list(x.shape)}: {error}"
            ) from error
