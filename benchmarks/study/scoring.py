"""Scores of the students of a study: Fréchet distances, and a grid of samples."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsedm_compiler.data import open_data
from sparsedm_compiler.diffusion.sampling import SamplePlan, sample_batches, sampler_name
from sparsedm_compiler.diffusion.schedulers import make_scheduler
from sparsedm_compiler.evaluate import FeatureNetwork, prepare_reference, score_images
from sparsedm_compiler.evaluate.score_images import FeatureSummary
from sparsedm_compiler.train import SampleGrids

from .judge import SmallResNet, load_judge, make_feature_network, measure_accuracy
from .plan import Study
from .resnet56 import ResNet56, load_resnet56, make_resnet_features
from .setting import Setting

REFERENCE = 2000
"""Held-out images that Fréchet distances compare with."""


def open_judge(study: Study) -> SmallResNet | ResNet56:
    """Loads the classifier of the study; trains it first where there is none."""
    if study.features is not None:
        return load_resnet56(study.features).to(study.device)
    data = open_data(study.data, size=study.size)
    path = study.out / "judge.safetensors"
    return load_judge(path, data, study.budget.judge_epochs, study.device)


def open_features(study: Study) -> FeatureNetwork:
    """Returns the features of the classifier under their name."""
    network = open_judge(study)
    if isinstance(network, ResNet56):
        return make_resnet_features(network)
    return make_feature_network(network)


@cache
def summarize_reference(study: Study) -> FeatureSummary:
    """Returns the features of the held-out images, once in a process."""
    reference = study.open_test_data(REFERENCE)
    return prepare_reference(open_features(study), reference, progress=False)


def compute_scores(study: Study, setting: Setting, model: nn.Module) -> list[dict[str, Any]]:
    """Returns the Fréchet distance of samples to the held-out images; none for the sweep."""
    if setting.group == "sweep":
        return []
    budget, data = study.budget, study.open_training_data()
    scheduler = make_scheduler("dpm++", "eps")
    labels = make_labels(study, budget.samples)
    shape = (budget.samples, *data.shape)
    plan = SamplePlan(shape, budget.steps, setting.seed, labels, batch_size=study.sample_batch)
    scores = score_images(
        open_features(study),
        sample_batches(model, scheduler, plan, progress=False),
        reference=summarize_reference(study),
        sampler=sampler_name(scheduler, budget.steps),
    )
    return [asdict(score) for score in scores]


def make_labels(study: Study, count: int) -> Tensor | None:
    """Returns ``count`` labels, class after class; None of a study without classes."""
    classes = study.open_training_data().classes
    return None if classes is None else torch.arange(count) % classes


def write_grid(study: Study, folder: Path, model: nn.Module) -> str:
    """Writes a grid of samples; returns its path below the folder of the run."""
    data = study.open_training_data()
    count = 20 if data.classes is None else 2 * data.classes
    columns = 10 if data.classes is None else data.classes
    grid = SampleGrids(data.shape, count, columns, condition=make_labels(study, count))
    grid.save(folder / "samples" / "final.png", grid.draw(model, "eps"))
    return "samples/final.png"


def score_real_images(study: Study) -> None:
    """Writes the score of real training images and the accuracy of the classifier to judge.json."""
    accuracy = measure_accuracy(open_judge(study), open_data(study.held_out, size=study.size))
    real = open_data(study.data, size=study.size, limit=study.budget.samples, labels=False)
    batches = [(range(len(real)), real.fetch(range(len(real)))[0])]
    network, reference = open_features(study), summarize_reference(study)
    score = score_images(network, batches, reference=reference, sampler="real images")[0]
    values = {"network": network.name, "accuracy": accuracy}
    values |= {"floor": score.value, "count": score.count}
    (study.out / "judge.json").write_text(json.dumps(values, indent=1) + "\n")
