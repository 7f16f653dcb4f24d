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
SMALL = "dit-28"
"""A DiT of 28 blocks of width 128; the other names are those of benchmarks/gpu/models.py."""
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "2:4": {"pattern": "2:4"},
    "2:4, no kernels": {"pattern": "2:4", "kernels": {"*": "dense"}},
    "2:4, regional": {"pattern": "2:4", "regional": True},
    "2:4, regional, table": {"pattern": "2:4", "regional": True, "autotune": "table"},
}
"""What is compiled: options of ``sparsedm_compiler.compile``, none for ``torch.compile`` alone."""
DEFAULT = ("dense", "2:4", "2:4, regional")
GRAPHS = "inductor-graphs"


def main(arguments: list[str] | None = None) -> None:
    """Prints a table, and writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=MODELS)
    add("--batch", type=int, default=1)
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--variants", nargs="+", default=DEFAULT, choices=list(VARIANTS))
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
    rows = []
    for model in options.models:
        for mode in options.modes:
            for variant in options.variants:
                case = {"model": model, "variant": variant, "mode": mode, **shared(options)}
                rows.append(run_child(case))
                print(rows[-1], flush=True)
    show(rows)
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def shared(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the options that all processes share."""
    names = ("backend", "device", "later", "batch", "dtype")
    return {name: vars(options)[name] for name in names}


def run_child(case: dict[str, Any], *, seconds: float | None = None) -> dict[str, Any]:
    """Returns the row of one case, measured by a fresh process with empty caches.

    Raises RuntimeError where that fails, or takes longer than so many seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        caches = {
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "TRITON_CACHE_DIR": f"{folder}/triton",
            "SPARSEDM_CACHE": f"{folder}/sparsedm",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        if case["device"] == "cpu":  # compile in the process itself, so that its time is seen
            caches["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        command = [sys.executable, __file__, "--child", json.dumps(case)]
        try:
            run = subprocess.run(
                command,
                env={**os.environ, **caches},
                capture_output=True,
                text=True,
                check=False,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired as late:
            raise RuntimeError(f"it took more than {seconds:.0f} s") from late
    if run.returncode:
        raise RuntimeError(f"{case} failed: {run.stderr[-2000:]}")
    row: dict[str, Any] = {**case, **json.loads(run.stdout.splitlines()[-1])}
    return row


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Returns what one process measures."""
    import torch

    if case["device"] == "cpu":
        torch.set_num_threads(1)
    call, model = prepare(case)
    warm_up(torch, case)
    wall, cpu = time_once(call)
    later = [time_once(call) for _ in range(case["later"])]
    row: dict[str, Any] = {"wall_s": wall, "cpu_s": cpu}
    clock = 1 if case["device"] == "cpu" else 0  # of the CPU alone, where others share it
    row |= {"later_ms": 1e3 * median([pair[clock] for pair in later[3:]]), "timings": {}}
    if case["variant"] != "dense":
        import sparsedm_compiler as sdm

        explanation = sdm.explain(model)
        row |= {"timings": explanation.timings, "pruned": len(explanation.masked)}
        row |= {"regions": explanation.regions}
    return row


def warm_up(torch: Any, case: dict[str, Any]) -> None:
    """Compiles a trifle, so that imports and what Inductor builds once per machine are left out."""
    backend = "inductor" if case["backend"] == GRAPHS else case["backend"]
    trifle = torch.compile(lambda x: x.sin() + 1, backend=backend)
    trifle(torch.ones(64, device=case["device"]))
    torch.compiler.reset()


def prepare(case: dict[str, Any]) -> tuple[Callable[[], object], Any]:
    """Returns one call of the model, compiled as the case wants it, and that model."""
    import torch

    import sparsedm_compiler as sdm

    torch.manual_seed(0)
    model, args, kwargs = build(case)
    train, backend = case["mode"] == "train", case["backend"]
    options = VARIANTS[case["variant"]]
    model.train(train)
    if options:
        run = sdm.compile(model, mode=case["mode"], backend=backend, **options)
    elif backend == GRAPHS:
        run = torch.compile(model, mode="reduce-overhead")
    else:
        run = torch.compile(model, backend=backend)

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.set_grad_enabled(train):
            out = run(*args, **kwargs)
            if train:
                out.sum().backward()
        if case["device"] == "cuda":
            torch.cuda.synchronize()

    return step, run


def build(case: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Returns a model with random weights, and the arguments of a call."""
    import torch

    from benchmarks.gpu.models import DiT, cast, open_model

    name, batch, dtype = case["model"], case["batch"], getattr(torch, case["dtype"])
    if name != SMALL:
        model, (args, kwargs) = open_model(name, batch, case["device"], dtype)
        return model, args, kwargs
    with torch.device(case["device"]):
        small = DiT(128, 28, 4, side=16).to(dtype)
        inputs = torch.randn(batch, 4, 16, 16), torch.ones(batch), torch.zeros(batch).long()
    args, kwargs = cast((inputs, {}), dtype)
    return small, args, kwargs


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
