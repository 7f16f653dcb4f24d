"""The first call of a compiled model beside that of torch.compile, each in a process of its own.

    python benchmarks/first_call.py --out docs/results/first_call.json

Every process starts with empty caches (Inductor's, Triton's, ours) in a folder that is deleted
afterwards. It makes the model, calls it for the first time, and then again and again. The table
shows the CPU seconds of the first call, compilers included, over those of ``torch.compile`` on the
dense model; how they are spent; and what a later call takes. Seconds on the wall are kept, too,
but mean little where other work shares the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
MODELS = ("dit-28", "uvit-s")
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "2:4": {"pattern": "2:4"},
    "2:4, regional": {"pattern": "2:4", "regional": True},
}
"""What is compiled: options of ``sparsedm_compiler.compile``, none for ``torch.compile`` alone."""


def main(arguments: list[str] | None = None) -> None:
    """Prints a table, and writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=MODELS, choices=MODELS)
    add("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    add("--modes", nargs="+", default=["infer"], choices=("infer", "train"))
    add("--backend", default="inductor")
    add("--device", default="cpu")
    add("--later", type=int, default=30, help="number of later calls that are timed")
    add("--out", type=Path)
    add("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(measure(json.loads(options.child))))
        return
    rows = [
        run_child({"model": model, "variant": variant, "mode": mode, **shared(options)})
        for model in options.models
        for mode in options.modes
        for variant in options.variants
    ]
    show(rows)
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def shared(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the options that all processes share."""
    return {name: vars(options)[name] for name in ("backend", "device", "later")}


def run_child(case: dict[str, Any]) -> dict[str, Any]:
    """Returns the row of one case, measured by a fresh process with empty caches."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "TRITON_CACHE_DIR": f"{folder}/triton",
            "SPARSEDM_CACHE": f"{folder}/sparsedm",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # in this process, so that its time is seen
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, __file__, "--child", json.dumps(case)]
        run = subprocess.run(
            command, env={**os.environ, **caches}, capture_output=True, text=True, check=False
        )
    if run.returncode:
        raise RuntimeError(f"{case} failed:\n{run.stderr[-3000:]}")
    row: dict[str, Any] = {**case, **json.loads(run.stdout.splitlines()[-1])}
    print(row, flush=True)
    return row


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Returns what one process measures."""
    import torch

    torch.set_num_threads(1)
    call, model = prepare(case)
    warm_up(torch, case["device"])
    wall, cpu = time_once(call)
    later = [time_once(call) for _ in range(case["later"])]
    row: dict[str, Any] = {"wall_s": wall, "cpu_s": cpu}
    row |= {"later_ms": 1e3 * median([pair[1] for pair in later[3:]]), "timings": {}}
    if case["variant"] != "dense":
        import sparsedm_compiler as sdm

        explanation = sdm.explain(model)
        row |= {"timings": explanation.timings, "pruned": len(explanation.masked)}
    return row


def warm_up(torch: Any, device: str) -> None:
    """Compiles a trifle, so that imports and what Inductor builds once per machine are left out."""
    torch.compile(lambda x: x.sin() + 1)(torch.ones(64, device=device))
    torch.compiler.reset()


def prepare(case: dict[str, Any]) -> tuple[Callable[[], object], Any]:
    """Returns one call of the model, compiled as the case wants it, and that model."""
    import torch

    import sparsedm_compiler as sdm

    torch.manual_seed(0)
    model, args = build(case["model"], case["device"])
    train = case["mode"] == "train"
    options = VARIANTS[case["variant"]]
    model.train(train)
    run = torch.compile(model, backend=case["backend"])
    if options:
        run = sdm.compile(model, mode=case["mode"], backend=case["backend"], **options)

    def step() -> None:
        with torch.set_grad_enabled(train):
            out = run(*args)
            if train:
                out.sum().backward()
        if case["device"] == "cuda":
            torch.cuda.synchronize()

    return step, run


def build(name: str, device: str) -> tuple[Any, tuple[Any, ...]]:
    """Returns a model with random weights and its arguments."""
    import torch

    from benchmarks.gpu.models import DiT
    from sparsedm_compiler.models import example_inputs
    from sparsedm_compiler.models.presets import find_preset

    with torch.device(device):
        if name == "dit-28":
            model = DiT(128, 28, 4, side=16)
            return model, (torch.randn(1, 4, 16, 16), torch.ones(1), torch.zeros(1).long())
        model = find_preset("uvit-cifar10-small").build()
        args, kwargs = example_inputs(model, batch=1)
        return model, (*args, *kwargs.values())


def time_once(call: Callable[[], object]) -> tuple[float, float]:
    """Returns the seconds on the wall and of CPU time, compilers included, of one call."""
    import resource
    import time

    def read() -> float:
        whole = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in whole)

    wall, cpu = time.perf_counter(), read()
    call()
    return time.perf_counter() - wall, read() - cpu


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the table."""
    from tabulate import tabulate

    dense = {(row["model"], row["mode"]): row for row in rows if row["variant"] == "dense"}
    body = []
    for row in rows:
        base = dense.get((row["model"], row["mode"]), row)
        phases = ", ".join(f"{name} {s:.1f}" for name, s in row["timings"].items())
        first, later = row["cpu_s"] / base["cpu_s"], row["later_ms"] / base["later_ms"]
        body.append((row["model"], row["mode"], row["variant"], row["cpu_s"], first, phases, later))
    head = ("model", "mode", "", "first call, CPU s", "/ dense", "of it (s)", "later / dense")
    print(tabulate(body, head, floatfmt=".2f"))


if __name__ == "__main__":
    main()
