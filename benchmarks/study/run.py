"""Trains, samples and scores every student of a study, in one folder per run."""

from __future__ import annotations

import json
import multiprocessing
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import sparsedm_compiler as sdm
from sparsedm_compiler.data import ImageData, open_data
from sparsedm_compiler.diffusion.sampling import SamplePlan, sample_batches, sampler_name
from sparsedm_compiler.diffusion.schedulers import make_scheduler
from sparsedm_compiler.evaluate import FeatureNetwork, prepare_reference, score_images
from sparsedm_compiler.train import SampleGrids, finetune

from .judge import SmallResNet, load_judge, make_feature_network, measure_accuracy
from .plan import GROUPS, Setting, Study
from .tables import write_tables

REFERENCE = 2000
"""Held-out images that Fréchet distances compare with."""


def run_study(study: Study, jobs: int, only: list[str] | None) -> int:
    """Does every part that has no results yet; returns 1 if a run failed, else 0."""
    wanted = only or ["teacher", *GROUPS, "report"]
    if "teacher" in wanted:
        train_teacher(study)
        network = open_judge(study)
        accuracy = measure_accuracy(network, study.open_test_data())
        score_real_images(study, make_feature_network(network), accuracy)
    todo = [
        (study, setting)
        for group in GROUPS
        if group in wanted
        for setting in study.list_settings(group)
        if not is_done(study, setting)
    ]
    failed = 0
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=8) as pool:
        for number, (name, error) in enumerate(pool.imap_unordered(attempt, todo), 1):
            failed += error is not None
            print(f"[{number}/{len(todo)}] {name}: {error or 'done'}", flush=True)
    if "report" in wanted:
        write_tables(study)
    return int(failed > 0)


def attempt(task: tuple[Study, Setting]) -> tuple[str, str | None]:
    """Trains one student; returns its name and, if it failed, the traceback."""
    torch.set_num_threads(1)
    try:
        train_student(*task)
    except Exception:
        return task[1].name, traceback.format_exc()
    return task[1].name, None


def open_judge(study: Study) -> SmallResNet:
    """Loads the classifier of the study; trains it first where there is none."""
    path = study.out / "judge.safetensors"
    return load_judge(path, study.open_training_data(), study.budget.judge_epochs)


def run_folder(study: Study, setting: Setting) -> Path:
    """Returns the folder of the run of that setting."""
    return study.out / setting.group / setting.name


def is_done(study: Study, setting: Setting) -> bool:
    """Returns whether the run of that setting has all its results."""
    path = run_folder(study, setting) / "results.json"
    return path.exists() and json.loads(path.read_text())["samples"] is not None


def train_teacher(study: Study) -> None:
    """Trains the dense model from random weights, or resumes its training."""
    if study.teacher_weights.exists():
        return
    torch.manual_seed(0)
    model, held_out = study.make_model(), open_held_out(study)
    finetune(
        model,
        None,
        study.open_training_data(),
        held_out=held_out,
        out=study.out / "teacher",
        **study.make_teacher_options(),
    )


def open_held_out(study: Study) -> ImageData:
    """Opens the images that held-out losses are measured on."""
    return study.open_test_data(study.budget.held_out)


def load_teacher(study: Study) -> nn.Module:
    """Loads the trained dense model."""
    model = study.make_model()
    model.load_state_dict(load_file(study.teacher_weights))
    return model


def train_student(study: Study, setting: Setting) -> None:
    """Trains, samples and scores one student of the teacher."""
    teacher, folder = load_teacher(study), run_folder(study, setting)
    data = study.open_training_data()
    pattern = setting.pattern
    student = teacher
    if pattern is not None:
        student = sdm.compile(teacher, pattern=pattern, backend="eager")
    result = finetune(
        student,
        None if student is teacher else teacher,
        data,
        held_out=open_held_out(study),
        out=folder,
        progress=False,
        save_every=max(study.budget.images, 1),
        keep=1,
        **study.make_student_options(setting),
    )
    model = student if result.ema is None else result.ema
    example = torch.zeros(1, *data.shape), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    report = sdm.count_macs(teacher, *example, pattern=pattern or "1:1")
    values = result.as_dict(setting.name)
    values["macs"] = report.totals
    values["scores"] = compute_scores(study, setting, model)
    values["samples"] = write_grid(study, folder, model)
    (folder / "results.json").write_text(json.dumps(values, indent=1) + "\n")


def compute_scores(study: Study, setting: Setting, model: nn.Module) -> list[dict[str, Any]]:
    """Returns the Fréchet distance of samples to the held-out images; none for the sweep."""
    if setting.group == "sweep":
        return []
    network = make_feature_network(open_judge(study))
    budget, data = study.budget, study.open_training_data()
    assert data.classes is not None
    scheduler = make_scheduler("dpm++", "eps")
    labels = torch.arange(budget.samples) % data.classes
    plan = SamplePlan((budget.samples, *data.shape), budget.steps, setting.seed, labels)
    reference = study.open_test_data(REFERENCE)
    scores = score_images(
        network,
        sample_batches(model, scheduler, plan, progress=False),
        reference=prepare_reference(network, reference, progress=False),
        sampler=sampler_name(scheduler, budget.steps),
    )
    return [asdict(score) for score in scores]


def write_grid(study: Study, folder: Path, model: nn.Module) -> str:
    """Writes a grid of samples; returns its path below the folder of the run."""
    data = study.open_training_data()
    assert data.classes is not None
    labels = torch.arange(2 * data.classes) % data.classes
    grid = SampleGrids(data.shape, 2 * data.classes, data.classes, condition=labels)
    grid.save(folder / "samples" / "final.png", grid.draw(model, "eps"))
    return "samples/final.png"


def score_real_images(study: Study, network: FeatureNetwork, accuracy: float) -> None:
    """Writes the score of real training images and the accuracy of the classifier to judge.json."""
    real = open_data(study.data, size=study.size, limit=study.budget.samples)
    batches = [(range(len(real)), real.fetch(range(len(real)))[0])]
    reference = study.open_test_data(REFERENCE)
    score = score_images(network, batches, reference=reference, sampler="real images")[0]
    values = {"accuracy": accuracy, "floor": score.value, "count": score.count}
    (study.out / "judge.json").write_text(json.dumps(values, indent=1) + "\n")
