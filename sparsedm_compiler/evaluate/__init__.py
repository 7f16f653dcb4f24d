"""Sampling, picture grids and Fréchet distances for any diffusion model, sparse or not."""

from __future__ import annotations

from .calling import evaluating, generator_at, in_mode, predict, seed_at
from .frechet import FrechetScore, features, frechet_distance, frechet_score
from .grid import save_grid
from .sampling import sample, sampler_name

__all__ = [
    "FrechetScore",
    "evaluating",
    "features",
    "frechet_distance",
    "frechet_score",
    "generator_at",
    "in_mode",
    "predict",
    "sample",
    "sampler_name",
    "save_grid",
    "seed_at",
]
