"""The study on one device, in one process, within a budget of minutes.

Start-up and images are paid once: all images lie on the device, and students run one after another.
The dense model takes ``TEACHER`` of the time. Once it is trained and scored, the rest is shared
out: every student sees as many images as fit, so that all of them are comparable. A run that would
end after the time is not begun, and the most important ones come first. What has finished is whole:
results.json of every run, tables after every run. The same command goes on, with the same numbers
of images, which plan.json keeps.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sparsedm_compiler.train import FinetuneConfig, finetune

from .images import open_images
from .more_runs import TIMED
from .plan import Study
from .run import attempt, is_done, load_teacher, prepare_study, run_folder
from .scoring import compute_scores
from .setting import Setting
from .tables import write_tables

TEACHER = 0.35
"""The share of the time that the dense model is trained for."""
SLOWER = 1.35
"""A masked step with a teacher over a dense one."""
AROUND, ONE_SHOT = 12.0, 15.0
"""Seconds that a GPU is given for what is around a run, captures above all, and for OBS."""
SPARE = 0.9
"""The share of the time that is planned with."""
PROBE = (4, 16)
"""Steps of the two runs whose difference is the time of a step."""


@dataclass(frozen=True, slots=True)
class Clock:
    """The time of a study, from ``start`` on; ``seconds`` in all."""

    start: float
    seconds: float

    @property
    def left(self) -> float:
        """Seconds that are left to plan with."""
        return SPARE * self.seconds - (time.monotonic() - self.start)


def run_timed(study: Study, minutes: float) -> int:
    """Trains the dense model, then students until the time is up; returns 1 if a run failed."""
    clock = Clock(time.monotonic(), 60 * minutes)
    if study.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, for scores and samples
    study.out.mkdir(parents=True, exist_ok=True)
    study = plan_teacher(study, clock)
    prepare_study(study)
    study = plan_students(study, clock)
    settings = list(study.list_settings(TIMED))
    failed, longest = 0, 0.0
    for number, setting in enumerate(settings, 1):
        if is_done(study, setting):
            continue
        if clock.left < longest:
            names = ", ".join(left.name for left in settings[number - 1 :])
            print(f"no time is left for {names}; the same command goes on", flush=True)
            break
        begin = time.monotonic()
        name, error = attempt((study, setting))
        failed += error is not None
        tidy_up(run_folder(study, setting))
        longest = max(longest, time.monotonic() - begin)
        took = f"{time.monotonic() - begin:.0f} s, {max(0.0, clock.left):.0f} s left"
        print(f"[{number}/{len(settings)}] {name}: {error or 'done'} ({took})", flush=True)
        write_tables(study, pages=False)
    write_tables(study)
    return int(failed > 0)


def plan_teacher(study: Study, clock: Clock) -> Study:
    """Returns the study with the teacher's number of images: as planned before, or by a probe."""
    path = study.out / "plan.json"
    values = json.loads(path.read_text()) if path.exists() else {}
    if not values:
        rate = measure_rate(study)
        images = round_images(study, TEACHER * clock.left * rate)
        values = {"teacher_images": images, "dense_images_per_second": rate}
        path.write_text(json.dumps(values, indent=1) + "\n")
    budget = replace(study.budget, teacher_images=values["teacher_images"])
    return replace(study, budget=budget)


def plan_students(study: Study, clock: Clock) -> Study:
    """Returns the study with the number of images of every student, as many as there is time for.

    Scoring takes as long as that of the dense model, which is done here.
    """
    path = study.out / "plan.json"
    values = json.loads(path.read_text())
    if "images" not in values:
        begin = time.monotonic()
        score_teacher(study)
        scoring = time.monotonic() - begin
        settings = list(study.list_settings(TIMED))
        pruned = [s for s in settings if FinetuneConfig.create(s.method).start == "obs"]
        seconds = clock.left / len(settings) - scoring
        if study.device == "cuda":
            seconds -= AROUND + ONE_SHOT * len(pruned) / len(settings)
        rate = values["dense_images_per_second"] / SLOWER
        values |= {
            "images": round_images(study, max(0.0, seconds) * rate),
            "scoring_seconds": scoring,
        }
        path.write_text(json.dumps(values, indent=1) + "\n")
    return replace(study, budget=replace(study.budget, images=values["images"]))


def score_teacher(study: Study) -> None:
    """Writes the scores of the teacher to teacher.json."""
    scores = compute_scores(study, Setting(TIMED, "dense", None, 0), load_teacher(study))
    (study.out / "teacher.json").write_text(json.dumps(scores, indent=1) + "\n")


def round_images(study: Study, images: float) -> int:
    """Returns whole batches, at least two."""
    batch = study.make_common_options()["batch_size"]
    return max(2, int(images / batch)) * batch


def measure_rate(study: Study) -> float:
    """Returns the images per second of dense training steps, from two short runs."""
    options = {**study.make_teacher_options(), "held_out_every": None, "ema_decay": None}
    batch, images = options["batch_size"], open_images(study).train
    seconds = []
    for steps in (PROBE[0], *PROBE):  # the first warms up
        options |= {"images": steps * batch, "warmup_images": 0}
        model = study.make_model()
        begin = time.monotonic()
        finetune(model, None, images, progress=False, **options)
        synchronize(study)
        seconds.append(time.monotonic() - begin)
    return (PROBE[1] - PROBE[0]) * batch / max(seconds[2] - seconds[1], 1e-3)


def synchronize(study: Study) -> None:
    """Waits for the device."""
    if study.device == "cuda":
        torch.cuda.synchronize()


def tidy_up(folder: Path) -> None:
    """Drops the checkpoints of a finished run, and the memory of its models and graphs."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
