"""One plain forward of one sample before a run begins, and the reason in one line if it fails."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import allow_dense
from ..diffusion import evaluating
from ..diffusion.condition import Condition, describe_condition, move_condition, take_rows
from ..diffusion.objective import Objective
from ..diffusion.predict import TIME_NAMES, build_arguments, extract_prediction
from ..errors import DataError, SparseDMError
from ..models.model_class import InputRequest
from ..models.model_classes import find_model_class
from .checkpoint import is_compiled

BRIGHT = 16.0
"""Images without a negative value that reach so far are not scaled to [-1, 1]; latents have both
signs."""


@dataclass(frozen=True, slots=True)
class Advice:
    """The way out of every misfit between data and model, in the words of the caller."""

    size: str = "bring the data to that size"
    channels: str = "choose other data or another model"
    labels_extra: str = "leave the labels out of the data"
    labels_missing: str = "give (images, labels) as data"
    condition_missing: str = "give batches of (images, a dict with {names}) as data"
    label_range: str = "give labels from 0, or a model of more classes"
    null_label: str = "null_label must be a class of the model"


IN_CONFIG = Advice(
    size="set data.size={size}",
    channels="choose another data.train or another model.name",
    labels_extra="set data.labels=false",
    labels_missing="choose a data.train with labels (a folder with a sub-folder for each class), "
    "and leave data.labels true",
    condition_missing="choose a data.train that holds {names}, e.g. latents with text embeddings "
    "in a .safetensors file",
    label_range="set model.options to more classes, or choose another data.train",
    null_label="set train.null_label to a class of the model",
)
"""The same in the names of a run's configuration."""


def check_values(images: Tensor, source: str = "the data") -> None:
    """Raises DataError for images with NaN or Inf, and for such as are not scaled to [-1, 1].

    ``source``: the name of the images in errors.
    """
    if not images.isfinite().all():
        raise DataError(f"the first images of {source} hold NaN or Inf: mend them")
    low, high = images.min().item(), images.max().item()
    if low >= 0 and high > BRIGHT:
        raise DataError(
            f"the first images of {source} range from {low:.3g} to {high:.3g}: scale them to "
            "[-1, 1], 0..255 by x / 127.5 - 1"
        )


def check_call(
    model: nn.Module,
    objective: Objective,
    images: Tensor,
    condition: Condition | None,
    *,
    dropped: Condition | None = None,
    source: str = "the data",
    advice: Advice = Advice(),
) -> None:
    """Calls a model with the first of ``images`` [B, ...], in eval mode and without gradients.

    A compiled model runs its class's own forward, which captures nothing. ``dropped``: a condition
    that stands for none, one row, to call the model with as well. ``source``: the name of the
    images in errors. Raises DataError in one line where the model does not take the sample.
    """
    parameter = next(model.parameters())
    x0 = images[:1].to(parameter.device, torch.float32)
    u = torch.full((1,), 0.5, dtype=torch.float64, device=parameter.device)
    x, t, _ = objective.prepare(x0, torch.zeros_like(x0), u)
    x = x.to(parameter.dtype)
    first = None if condition is None else take_rows(condition, range(1))
    for y in (first,) if dropped is None else (first, dropped):
        moved = None if y is None else move_condition(y, parameter)
        try:
            with evaluating(model), allow_dense(), checking_labels(model):
                args, kwargs = build_arguments(model, x, t, moved)
                call = type(model).forward if is_compiled(model) else type(model).__call__
                extract_prediction(x, call(model, *args, **kwargs), type(model).__name__)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except LabelError as error:
            remedy = advice.null_label if y is dropped else advice.label_range
            raise DataError(f"{source}: {error}: {remedy}") from error
        except Exception as error:
            if isinstance(error, SparseDMError) and not isinstance(error, DataError):
                raise
            raise DataError(f"{source}: {explain_misfit(model, x, y, error, advice)}") from error


class LabelError(DataError):
    """A number that is no row of the embedding it is looked up in."""


@contextmanager
def checking_labels(model: nn.Module) -> Iterator[None]:
    """Raises LabelError for a label that an embedding of ``model`` does not have.

    Checked before the lookup, which on a GPU would end every later call of the process too.
    """

    def check(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, nn.Embedding)
        if args and isinstance(args[0], Tensor) and args[0].numel():
            high, low = int(args[0].max()), int(args[0].min())
            if not 0 <= low <= high < module.num_embeddings:
                wrong = low if low < 0 else high
                raise LabelError(
                    f"label {wrong} is none of the {module.num_embeddings} classes of "
                    f"{type(model).__name__}"
                )

    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    handles = [module.register_forward_pre_hook(check) for module in embeddings]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def explain_misfit(
    model: nn.Module, x: Tensor, y: Condition | None, error: Exception, advice: Advice
) -> str:
    """Returns in one line why a model does not take a sample: its own numbers, and the way out."""
    name, shape = type(model).__name__, list(x.shape[1:])
    sample = f"images {shape}"
    if y is not None:
        sample += f" and {'class labels' if isinstance(y, Tensor) else describe_condition(y)}"
    text = f"{name} cannot be called with {sample}"
    takes = describe_call(model)
    if takes is None:
        return f"{text}: {get_first_line(error)}" + (
            f"; {advice.labels_extra}?" if isinstance(y, Tensor) else ""
        )
    image, names = takes
    has_labels = "labels" in names.values()
    if names and (y is None or (isinstance(y, Tensor) and not has_labels)):
        remedy = advice.labels_missing if has_labels else advice.condition_missing
        return f"{text}: it needs {', '.join(names)}: {remedy.format(names=', '.join(names))}"
    if y is not None and not names:
        return f"{text}: it takes no condition: {advice.labels_extra}"
    if len(image) == len(shape) and image[0] != shape[0]:
        return f"{text}: it takes {image[0]} channels: {advice.channels}"
    if len(image) == len(shape) and image != shape:
        return f"{text}: it takes {image}: {advice.size.format(size=image[-1])}"
    return f"{text}: {get_first_line(error)}"


def get_first_line(error: Exception) -> str:
    """Returns the first line of an error's text, after its type where it is not one of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason"]
    return lines[0] if isinstance(error, SparseDMError) else f"{type(error).__name__}: {lines[0]}"


def describe_call(model: nn.Module) -> tuple[list[int], Mapping[str, str]] | None:
    """Returns the shape of an image and the conditions that a model takes; None if not known.

    A condition is a keyword of its forward with "labels" or "tensors".
    """
    row = find_model_class(model)
    if row is None:
        return None
    request = InputRequest(torch.device("meta"), next(model.parameters()).dtype)
    try:
        args, kwargs = row.make_inputs(model.config, request)
        bound = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
    except (SparseDMError, TypeError):
        return None
    _, image, *names = bound
    kinds = {
        name: "tensors" if not isinstance(part, Tensor) or part.is_floating_point() else "labels"
        for name, part in bound.items()
        if name in names and name not in TIME_NAMES
    }
    return list(bound[image].shape[1:]), kinds
