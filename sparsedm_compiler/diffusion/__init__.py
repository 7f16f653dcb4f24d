"""Diffusion processes: conditions, objectives, schedulers, guidance and sampling."""

from __future__ import annotations

from .condition import Condition
from .guidance import Guidance
from .image_batches import ImageSource, image_batches
from .modes import evaluating, in_mode
from .predict import generator_at, predict, seed_at
from .sampling import SamplePlan, sample, sample_batches, sampler_name
from .schedulers import make_scheduler

__all__ = [
    "Condition",
    "Guidance",
    "ImageSource",
    "SamplePlan",
    "evaluating",
    "generator_at",
    "image_batches",
    "in_mode",
    "make_scheduler",
    "predict",
    "sample",
    "sample_batches",
    "sampler_name",
    "seed_at",
]
