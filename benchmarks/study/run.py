"""Trains, samples and scores every student of a study, in one folder per run."""

from __future__ import annotations

import json
import multiprocessing
import traceback
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import sparsedm_compiler as sdm
from sparsedm_compiler.models import UViT
from sparsedm_compiler.train import finetune

from .baselines import make_smaller_model
from .images import open_images
from .plan import GROUPS, SMALLER, Study
from .scoring import compute_scores, open_judge, score_real_images, write_grid
from .setting import Setting
from .tables import write_tables


def run_study(study: Study, jobs: int, only: list[str] | None) -> int:
    """Does every part that has no results yet; returns 1 if a run failed, else 0."""
    wanted = only or ["teacher", *GROUPS, "report"]
    if "teacher" in wanted:
        prepare_study(study)
    groups = [group for group in GROUPS if group in wanted]
    failed = run_settings(study, [s for group in groups for s in study.list_settings(group)], jobs)
    if "report" in wanted:
        write_tables(study)
    return int(failed > 0)


def prepare_study(study: Study) -> None:
    """Scores real images, so that scoring is known to work, and trains a missing teacher."""
    if not (study.out / "judge.json").exists():
        study.out.mkdir(parents=True, exist_ok=True)
        score_real_images(study)
    train_teacher(study)


def run_settings(study: Study, settings: Iterable[Setting], jobs: int) -> int:
    """Trains the students that have no results yet, in that order; returns how many failed."""
    todo = [(study, setting) for setting in settings if not is_done(study, setting)]
    failed = 0
    if not todo:
        return failed
    open_judge(study)  # trained once, here, rather than by every process
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=8) as pool:
        for number, (name, error) in enumerate(pool.imap_unordered(attempt, todo), 1):
            failed += error is not None
            print(f"[{number}/{len(todo)}] {name}: {error or 'done'}", flush=True)
    return failed


def attempt(task: tuple[Study, Setting]) -> tuple[str, str | None]:
    """Trains one student; returns its name and, if it failed, the traceback."""
    if task[0].device == "cpu":
        torch.set_num_threads(1)
    try:
        train_student(*task)
    except Exception:
        return task[1].name, traceback.format_exc()
    return task[1].name, None


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
    images = open_images(study)
    finetune(
        study.make_model(),
        None,
        images.train,
        held_out=images.held_out,
        out=study.out / "teacher",
        **study.make_teacher_options(),
    )


def load_teacher(study: Study) -> UViT:
    """Loads the trained dense model."""
    model = study.make_model()
    model.load_state_dict(load_file(study.teacher_weights))
    return model


def train_student(study: Study, setting: Setting) -> None:
    """Trains, samples and scores one student of the teacher."""
    teacher, folder = load_teacher(study), run_folder(study, setting)
    images = open_images(study)
    pattern = None if setting.method in SMALLER else setting.pattern
    student = teacher
    if setting.method in SMALLER:
        student = make_smaller_model(study, setting, teacher)
    elif pattern is not None:
        student = sdm.compile(teacher, pattern=pattern, backend="eager")
    result = finetune(
        student,
        None if pattern is None else teacher,
        images.train,
        held_out=images.held_out,
        out=folder,
        progress=False,
        save_every=max(study.budget.images, 1),
        keep=1,
        **study.make_student_options(setting),
    )
    model = student if result.ema is None else result.ema
    values = result.as_dict(setting.name)
    values["macs"] = count_model_macs(study, student, pattern)
    values["scores"] = compute_scores(study, setting, model)
    values["samples"] = write_grid(study, folder, model)
    (folder / "results.json").write_text(json.dumps(values, indent=1) + "\n")


def count_model_macs(study: Study, model: nn.Module, pattern: str | None) -> dict[str, int]:
    """Returns the MACs of a dense model, or of the study's own model at a pattern."""
    if pattern is not None:
        return count_pattern_macs(study, pattern)
    return sdm.count_macs(model, *study.make_inputs(), pattern="1:1").totals


@cache
def count_pattern_macs(study: Study, pattern: str) -> dict[str, int]:
    """Returns the MACs of the study's own model at a pattern, counted once in a process."""
    return sdm.count_macs(study.make_model(), *study.make_inputs(), pattern=pattern).totals
