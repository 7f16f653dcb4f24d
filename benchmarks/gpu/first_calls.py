"""First calls with empty caches: of dense under Inductor, and of ours, in processes of their own.

The row of a model grows by one variant of ``benchmarks.first_call`` at a time; dense is the first.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

from benchmarks.first_call import GRAPHS, run_child

from .case import Case, Row, Tell
from .models import ENTRIES
from .plan import Plan

LEAST = 5.0
"""Seconds without which no process is begun."""


def cases(plan: Plan, avoid: frozenset[str]) -> Iterator[Case]:
    """One per model and batch."""
    for name, batch in plan.first_calls:
        key = f"{ENTRIES[name].title}, batch {batch}"
        yield Case(key, partial(compare, plan, (name, batch), avoid))


def compare(plan: Plan, which: tuple[str, int], avoid: frozenset[str], tell: Tell) -> Iterator[Row]:
    """The row of one model, with one more variant each time."""
    name, batch = which
    title = ENTRIES[name].title
    row: Row = {"model": title, "name": name, "batch": batch, "variants": {}}
    case = {"model": name, "mode": "infer", "device": plan.device, "batch": batch, "later": 10}
    case |= {"dtype": "bfloat16", "backend": GRAPHS if plan.compiled else "eager"}
    for variant in plan.first_variants:
        left = plan.until - time.time()
        crumb = f"the first call of {title}, {variant}"
        if crumb in avoid or left < LEAST:
            continue
        tell(crumb)
        try:
            seen = run_child({**case, "variant": variant}, seconds=left)
        except RuntimeError as why:
            row["variants"][variant] = {"refused": " ".join(str(why).split())[-300:]}
        else:
            shown = ("wall_s", "timings", "later_ms", "regions")
            row["variants"][variant] = {key: seen[key] for key in shown if key in seen}
        print(f"first_call: {title}, {variant}: {row['variants'][variant]}", flush=True)
        yield row
