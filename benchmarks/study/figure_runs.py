"""The runs behind the paper's figures, of one seed, at one learning rate and budget."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .more_runs import RATE
from .plan import Study
from .setting import Setting
from .tables import read_run

GROUP = "figures"
SWITCHED = ("2:4", "1:4", "1:8", "1:16")
"""The ratios that masks are switched to in stages."""
ORDER = ("progressive", "untrained", "sparsedm", "ste", "transfer")


def list_figure_settings(study: Study) -> list[Setting]:
    """Returns all runs, the most important first.

    Runs that compare with smaller dense models are those of the group "baselines".
    """
    seed = study.budget.seeds[0]
    shared = [setting for setting in study.list_settings("baselines") if setting.seed == seed]
    late = [setting for setting in shared if setting.method == "narrow-long"]
    first = [setting for setting in shared if setting.method != "narrow-long"]
    first.sort(key=lambda setting: setting.method in ("ste", "obs-distill"))
    own = sorted(list_own_settings(study), key=lambda setting: ORDER.index(setting.method))
    sparse = [setting for setting in own if setting.pattern in SWITCHED]
    others = [setting for setting in own if setting.pattern not in SWITCHED]
    return [*first, *sparse, *others, *late]


def list_own_settings(study: Study) -> Iterator[Setting]:
    """Yields the runs that are not of the group "baselines"."""
    seed, options = study.budget.seeds[0], {"lr": RATE}
    switched = [ratio for ratio in SWITCHED if ratio in study.budget.ratios]
    for ratio in study.budget.ratios:
        yield Setting(GROUP, "untrained", ratio, seed)
        if ratio not in study.budget.settled:
            yield Setting(GROUP, "sparsedm", ratio, seed, options)
            yield Setting(GROUP, "ste", ratio, seed, options)
        if ratio in switched:
            yield Setting(GROUP, "progressive", ratio, seed, options)
            yield Setting(GROUP, "transfer", ratio, seed, options)


def read_figure_runs(study: Study) -> list[dict[str, Any]]:
    """Returns the results of every finished run, with the curve of its held-out loss."""
    rows = (read_run(study, setting) for setting in list_figure_settings(study))
    return [row for row in rows if row is not None]
