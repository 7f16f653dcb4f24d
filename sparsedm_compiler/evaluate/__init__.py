"""Sampling, pictures and scores for any diffusion model, sparse or not."""

from __future__ import annotations

from ..data.condition import Condition
from ..models.modes import evaluating, in_mode
from .calling import generator_at, predict, seed_at
from .features import FeatureNetwork, features, load_network
from .frechet import frechet_distance, frechet_score
from .grid import save_grid
from .guidance import Guidance
from .images import save_images, saved
from .kid import kernel_distance
from .manifold import precision_recall
from .moments import Moments, Statistics, load_statistics, save_statistics
from .sampling import SamplePlan, sample, sample_batches, sampler_name
from .schedulers import make_scheduler
from .score import Score
from .scores import Metrics, reference_of, score_images
from .stream import image_batches

__all__ = [
    "Condition",
    "FeatureNetwork",
    "Guidance",
    "Metrics",
    "Moments",
    "SamplePlan",
    "Score",
    "Statistics",
    "evaluating",
    "features",
    "frechet_distance",
    "frechet_score",
    "generator_at",
    "image_batches",
    "in_mode",
    "kernel_distance",
    "load_network",
    "load_statistics",
    "make_scheduler",
    "precision_recall",
    "predict",
    "reference_of",
    "sample",
    "sample_batches",
    "sampler_name",
    "save_grid",
    "save_images",
    "save_statistics",
    "saved",
    "score_images",
    "seed_at",
]
