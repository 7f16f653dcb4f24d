"""Scores of images: Fréchet distances (FID), kernel distances (KID), precision and recall."""

from __future__ import annotations

from .feature_network import FeatureNetwork
from .features import extract_features, load_network
from .frechet import frechet_distance, frechet_score
from .kid import kernel_distance
from .moments import Moments, Statistics, load_statistics, save_statistics
from .precision_recall import precision_recall
from .score import Score
from .score_images import FeatureSummary, Metrics, prepare_reference, score_images

__all__ = [
    "FeatureNetwork",
    "FeatureSummary",
    "Metrics",
    "Moments",
    "Score",
    "Statistics",
    "extract_features",
    "frechet_distance",
    "frechet_score",
    "kernel_distance",
    "load_network",
    "load_statistics",
    "precision_recall",
    "prepare_reference",
    "save_statistics",
    "score_images",
]
