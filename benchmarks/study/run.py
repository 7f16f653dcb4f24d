"""Train, sample and score every student of a study, each in a folder of its own."""

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
from sparsedm_compiler.data import open_data
from sparsedm_compiler.diffusion.sampling import SamplePlan, sample_batches, sampler_name
from sparsedm_compiler.diffusion.schedulers import make_scheduler
from sparsedm_compiler.evaluate.features import FeatureNetwork
from sparsedm_compiler.evaluate.score_images import reference_of, score_images
from sparsedm_compiler.train import SampleGrids, finetune

from .judge import accuracy, features_of, judge
from .plan import GROUPS, Setting, Study
from .tables import write_tables

REFERENCE = 2000
"""Held-out images that Fréchet distances are taken to."""


def run_study(study: Study, jobs: int, only: list[str] | None) -> int:
    """Everything that is not there yet; 1 if a run failed, else 0."""
    wanted = only or ["teacher", *GROUPS, "report"]
    if "teacher" in wanted:
        train_teacher(study)
        network = judge(judge_path(study), study.train(), study.budget.judge_epochs)
        floor(study, features_of(network), accuracy(network, study.test()))
    todo = [
        (study, setting)
        for group in GROUPS
        if group in wanted
        for setting in study.settings(group)
        if not done(study, setting)
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
    """The name of a run and, if it failed, why."""
    torch.set_num_threads(1)
    try:
        train_student(*task)
    except Exception:
        return task[1].name, traceback.format_exc()
    return task[1].name, None


def judge_path(study: Study) -> Path:
    return study.out / "judge.safetensors"


def folder_of(study: Study, setting: Setting) -> Path:
    return study.out / setting.group / setting.name


def done(study: Study, setting: Setting) -> bool:
    """Whether the run of that setting has all its results."""
    path = folder_of(study, setting) / "results.json"
    return path.exists() and json.loads(path.read_text())["samples"] is not None


def train_teacher(study: Study) -> None:
    """Train the dense model from random weights, or go on with it."""
    if study.teacher_weights.exists():
        return
    torch.manual_seed(0)
    model, held = study.model(), held_out(study)
    out = study.out / "teacher"
    finetune(model, None, study.train(), held_out=held, out=out, **study.teacher_options())


def held_out(study: Study) -> Any:
    return study.test(study.budget.held_out)


def teacher_of(study: Study) -> nn.Module:
    """The trained dense model."""
    model = study.model()
    model.load_state_dict(load_file(study.teacher_weights))
    return model


def train_student(study: Study, setting: Setting) -> None:
    """One run from the teacher to its scores."""
    teacher, folder = teacher_of(study), folder_of(study, setting)
    data = study.train()
    pattern = setting.pattern
    student = teacher
    if pattern is not None:
        student = sdm.compile(teacher, pattern=pattern, backend="eager")
    result = finetune(
        student,
        None if student is teacher else teacher,
        data,
        held_out=held_out(study),
        out=folder,
        progress=False,
        save_every=max(study.budget.images, 1),
        keep=1,
        **study.options(setting),
    )
    model = student if result.ema is None else result.ema
    example = torch.zeros(1, *data.shape), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    report = sdm.count_macs(teacher, *example, pattern=pattern or "1:1")
    values = result.as_dict(setting.name)
    values["macs"] = report.totals
    values["scores"] = scores(study, setting, model)
    values["samples"] = draw_grid(study, folder, model)
    (folder / "results.json").write_text(json.dumps(values, indent=1) + "\n")


def scores(study: Study, setting: Setting, model: nn.Module) -> list[dict[str, Any]]:
    """The Fréchet distance of samples to the held-out images; none for the sweep."""
    if setting.group == "sweep":
        return []
    network = features_of(judge(judge_path(study), study.train(), study.budget.judge_epochs))
    budget, shape = study.budget, study.train().shape
    classes = study.train().classes
    assert classes is not None
    scheduler = make_scheduler("dpm++", "eps")
    labels = torch.arange(budget.samples) % classes
    plan = SamplePlan((budget.samples, *shape), budget.steps, setting.seed, labels)
    found = score_images(
        network,
        sample_batches(model, scheduler, plan, progress=False),
        reference=reference_of(network, study.test(REFERENCE), progress=False),
        sampler=sampler_name(scheduler, budget.steps),
    )
    return [asdict(score) for score in found]


def draw_grid(study: Study, folder: Path, model: nn.Module) -> str:
    """Write a grid of samples; its path below the folder of the run."""
    data = study.train()
    assert data.classes is not None
    labels = torch.arange(2 * data.classes) % data.classes
    grids = SampleGrids(data.shape, 2 * data.classes, data.classes, condition=labels)
    grids.save(folder / "samples" / "final.png", grids.draw(model, "eps"))
    return "samples/final.png"


def floor(study: Study, network: FeatureNetwork, right: float) -> None:
    """Write what real training images score, and how good the judge is, to judge.json."""
    real = open_data(study.data, size=study.size, limit=study.budget.samples)
    batches = [(range(len(real)), real.fetch(range(len(real)))[0])]
    reference = study.test(REFERENCE)
    found = score_images(network, batches, reference=reference, sampler="real images")[0]
    values = {"accuracy": right, "floor": found.value, "count": found.count}
    (study.out / "judge.json").write_text(json.dumps(values, indent=1) + "\n")
