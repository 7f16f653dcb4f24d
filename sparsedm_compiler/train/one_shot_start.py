"""The start of a run from weights that are pruned in one shot (``FinetuneConfig.start``)."""

from __future__ import annotations

from .. import prune_one_shot
from .calibration import make_calibration_batches
from .state import Run


def start_pruned(run: Run, progress: bool) -> None:
    """Prunes the student in one shot on images of the run's own objective; it was called already.

    Every process does the same; the main one's weights are everybody's.
    """
    config, show = run.config, progress and run.process.is_main
    batches = make_calibration_batches(
        run.student,
        run.inputs.data,
        images=config.start_images,
        objective=run.objective,
        seed=config.seed,
    )
    prune_one_shot(run.student, None, batches, method=config.start, progress=show)
    run.process.share_parameters()
    if run.ema is not None:
        run.ema.restart()
