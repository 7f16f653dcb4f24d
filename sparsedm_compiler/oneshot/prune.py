"""``prune_one_shot``: prunes a model without training it, layer after layer.

find_targets        the weights that compile prunes, in the order of use     targets.py
collect_statistics  the moments of their inputs, some layers per pass        collect.py
solve_layer         the pruned weight, never worse than by magnitude         solve_layer.py
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import nn

from ..compiler.api import check_model
from ..config import CompileConfig
from ..diffusion import evaluating
from ..errors import ConfigError
from ..masks.nm_mask import nm_mask
from ..patterns import Pattern
from .batches import Batches, list_batches
from .collect import watch_uses
from .folder import OneShotFolder, fingerprint
from .job import Job
from .options import OneShotOptions
from .report import OneShotReport
from .targets import find_targets


def prune_one_shot(
    model: nn.Module,
    pattern: str | Pattern | None,
    batches: Batches,
    *,
    method: str = "obs",
    keep_dense: str | Iterable[str] | Callable[[str], bool] = (),
    overrides: Mapping[str, str | Pattern] | None = None,
    policy: str = "structural",
    damping: float | None = None,
    calibrate_bias: bool | None = None,
    passes: int = 16,
    memory: int = 4 << 30,
    out: str | Path | None = None,
    progress: bool = True,
) -> OneShotReport:
    """Prunes a model in place and without training, from the inputs its layers see.

    The same weights are pruned as by ``compile``. Afterwards they are dense tensors that hold the
    zeros of the pattern, so that ``compile`` with the same options keeps all that is left, and any
    training can start there. Where an error is raised, the model is what it was.

    Method "obs" is SparseGPT (Frantar & Alistarh 2023), which goes back to the optimal brain
    surgeon (Hassibi & Stork 1993): weights are removed where the layer's output suffers least, and
    those that are kept adapt. Layers are pruned in the order of use, each for the inputs that the
    pruned layers before it give. "wanda" (Sun et al. 2023) keeps the largest ``|w| |x|`` and
    changes no kept weight; "magnitude" keeps the largest ``|w|``. A layer whose output error would
    be larger than by magnitude is pruned by magnitude.

    Args:
        model: A dense model, or a student that was compiled in mode "train".
        pattern: What to prune to, as in ``compile``; None for a student.
        batches: Inputs of calls of the model: each a tuple of positional inputs, a dict of keyword
            inputs, one tensor, or a ``CalibrationBatch``; ``make_calibration_batches`` makes them
            of images. They are gone through several times.
        method: "obs", "wanda" or "magnitude".
        keep_dense: Layers that stay dense, as in ``compile``.
        overrides: Other patterns for some layers, as in ``compile``.
        policy: Which layers are pruned, as in ``compile``.
        damping: What is added to the diagonal of a layer's Hessian, as a share of its mean; more
            keeps kept weights nearer to what they were. It rises where it is too small to invert.
            None: 0.01 where at least half of the weights are kept, else 0.1.
        calibrate_bias: Whether a layer's bias takes up the mean of the error, where it has one.
            None: with "obs", where it helps; with a mask alone it often harms the whole model.
        passes: The most passes over the batches; the layers of one pass are pruned together. More
            are made where their Hessians do not fit ``memory`` together.
        memory: Bytes that Hessians may take. A layer too wide for it is pruned in parts.
        out: A folder in which every finished layer is kept; the same call resumes there. None
            keeps nothing.
        progress: Whether to show a progress bar, on stderr.

    Returns:
        A report with one row per pruned weight; ``str()`` is a table.

    Raises:
        PatternError: A pattern is misspelled.
        ConfigError: An option has an unknown value, nothing would be pruned, layers are never
            called, the model and the options do not go together, or ``out`` holds another run.
        DataError: There are no batches, the model cannot be called with one, or the inputs of a
            layer hold NaN or Inf.
        MaskError: A weight holds NaN or Inf.
        CheckpointError: A file in ``out`` is damaged or cannot be written.

    Example:
        >>> import torch, sparsedm_compiler as sdm
        >>> net = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])
        >>> report = sdm.prune_one_shot(net, "2:4", [torch.randn(64, 8)], progress=False)
        >>> [(row.weight, row.method) for row in report.rows]
        [('1.weight', 'obs')]
        >>> int((net[1].weight == 0).sum())
        32
    """
    started = time.perf_counter()
    check_model(model)
    chosen = OneShotOptions(method, damping, calibrate_bias, passes, memory)
    listed = list_batches(batches)
    choice = {"keep_dense": keep_dense, "overrides": overrides, "policy": policy}
    usual = {"keep_dense": (), "overrides": None, "policy": "structural"}
    config = None
    if pattern is not None or choice != usual:
        config = CompileConfig.create(_require_pattern(pattern), **choice)
    with evaluating(model):
        targets = find_targets(model, config, listed[0])
        for target in targets:
            nm_mask(target.weight, target.pattern, name=target.name)  # raises for NaN and Inf
        job = Job(model, targets, listed, chosen, watch_uses(model, listed[0], targets))
        if out is not None:
            patterns = {target.name: str(target.pattern) for target in targets}
            record = {**fingerprint(model, listed), "patterns": patterns, **chosen.to_dict()}
            job.folder = OneShotFolder(Path(out), record)
        with job.restoring_on_failure():
            rows = tuple(job.run(progress))
    return OneShotReport(method, rows, len(listed), time.perf_counter() - started)


def _require_pattern(pattern: str | Pattern | None) -> str | Pattern:
    if pattern is None:
        raise ConfigError("keep_dense, overrides and policy go with a pattern, e.g. '2:4'")
    return pattern
