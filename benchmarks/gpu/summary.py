"""results.json -> Markdown: the goals, and a table for every section."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .beside import beside
from .cells import GONE, REHEARSAL, Cells, counts, markdown, megabytes, speed
from .first_rows import first_calls
from .goals import judge_goals, models
from .quality import Quality, read_quality
from .results import Results, list_failures


def summary(results: Results) -> str:
    """The whole report. In a rehearsal no number of it stands for a speed: none is shown."""
    known = read_quality(results)
    parts = [*head(results)]
    if results["tests"]:
        parts += ["## Tests", tests(results["tests"])]
    for title, key, section in SECTIONS:
        if results.get(key):
            mark = f" ({REHEARSAL})" if results["rehearsal"] else ""
            parts += [f"## {title}{mark}", section(results, known)]
    parts += [known.about] if any(results.get(key) for _, key, _ in SECTIONS) else []
    wrong = list_failures(results)
    parts += ["## What failed", "\n".join(f"- {line}" for line in wrong)] if wrong else []
    return "\n\n".join(parts) + "\n"


def head(results: Results) -> list[str]:
    """Title, machine, goals, how far each section came."""
    about, goals = results["environment"], judge_goals(results)
    if results["rehearsal"]:
        title = f"# {REHEARSAL}"
        said = "Every section at toy sizes on a CPU, the CUDA kernels by their references in torch."
    else:
        title, said = f"# {about['gpu']}", machine_line(about)
    judged = markdown(("goal", "", "found"), [(g.goal, g.status, g.detail) for g in goals])
    parts = [title, said, "## Goals", judged]
    slowest = sorted(models(results))[:1]
    if slowest and not results["rehearsal"]:
        parts.append(f"Lowest of all models: {slowest[0][0]:.3f} ({slowest[0][1]}).")
    stopped = [
        f"- {name}: {len(results[name])} rows in {said['seconds']:.0f} s"
        + (f"; the time was up {said['stopped']}" if said["stopped"] else "")
        for name, said in results["sections"].items()
    ]
    return [*parts, "\n".join(stopped)] if stopped else parts


def machine_line(about: dict[str, Any]) -> str:
    """The environment in two sentences."""
    card = about["card"] or {}
    at = ", ".join(
        f"{card[key]} {word}"
        for key, word in (("clocks.sm", "SM clock"), ("power.draw", "drawn"))
        if key in card
    )
    return (
        f"Driver {card.get('driver_version', 'unknown')}; torch {about['torch']}, CUDA "
        f"{about['cuda']}, cuSPARSELt {about['cusparselt']}, Triton {about['triton']}; commit "
        f"{about['commit']}, {about['time']}; before the first test: {at or 'no card seen'}. "
        "Ratios are medians [quartiles] of rounds taken in turns in one process; > 1 is faster."
    )


def tests(outcomes: dict[str, Any]) -> str:
    """Counts, and the names of what did not pass."""
    end = ", then the time was up." if outcomes["stopped"] else "."
    lines = [f"{len(outcomes['passed'])} passed in {outcomes['seconds']:.0f} s{end}"]
    for key in ("failed", "left_out"):
        lines += [
            f"- {key.replace('_', ' ')}: {name}: {why}" for name, why in outcomes[key].items()
        ]
    skipped: dict[str, int] = {}
    for why in outcomes["skipped"].values():
        skipped[why] = skipped.get(why, 0) + 1
    lines += [f"- {count} skipped: {why}" for why, count in skipped.items()]
    return "\n".join(lines)


def ops(results: Results, known: Quality) -> str:
    """A line per shape, a column per pattern; the fastest kernel of each."""
    patterns = patterns_of(results["ops"])
    body = [
        (
            *(row[key] for key in ("model", "layer", "tokens", "cols", "rows", "act")),
            *(op_cell(results, row["patterns"].get(text, {})) for text in patterns),
        )
        for row in results["ops"]
    ]
    names = ("model", "layer", "tokens", "in", "out", "act")
    note = (
        "bf16, bias fused, L2 cold, CUDA graphs; over cuBLASLt, with an activation over compiled "
        "dense. In brackets the quartiles; "
        '"(dense)": the gate keeps that layer dense.'
    )
    table = markdown((*names, *patterns), [*body, losses(known, patterns, len(names))])
    return f"{note}\n\n{table}\n\n{kernels(results)}"


def kernels(results: Results) -> str:
    """A line per shape and pattern, a column per kernel of ours or of others."""
    cells = [(row, text, cell) for row in results["ops"] for text, cell in row["patterns"].items()]
    fastest = [fastest_by_name(cell.get("ms", {})) for *_, cell in cells]
    names = list(dict.fromkeys(name for times in fastest for name in times))
    body = [
        (
            *(row[key] for key in ("model", "layer", "tokens")),
            text,
            *(kernel_cell(results, cell["screened_dense_ms"], times.get(name)) for name in names),
        )
        for (row, text, cell), times in zip(cells, fastest, strict=True)
        if times
    ]
    note = (
        "Every kernel in its fastest setting, by the few rounds of the screening, over dense. "
        "Those in 8 bits (cuda_fp8, which is dense, cuda_semi_fp8, cuda_semi_int8) run only where "
        "pinned. "
        "bsr_dense_addmm (torch's own for blocks) and compiled_fp8 (dense fp8 by Inductor and "
        "torch._scaled_mm) are not ours."
    )
    return f"{note}\n\n{markdown(('model', 'layer', 'tokens', 'pattern', *names), body)}"


def fastest_by_name(times: dict[str, float]) -> dict[str, float]:
    """The milliseconds of the fastest setting of every kernel."""
    fastest: dict[str, float] = {}
    for setting, ms in times.items():
        name = setting.partition("/")[0]
        fastest[name] = min(ms, fastest.get(name, ms))
    return fastest


def kernel_cell(results: Results, dense_ms: float, ms: float | None) -> str:
    """How many times faster than dense; in a rehearsal, that it ran."""
    if ms is None:
        return GONE
    return "ran" if results["rehearsal"] else f"{dense_ms / ms:.2f}"


def op_cell(results: Results, cell: dict[str, Any]) -> str:
    """Ratio and kernel, or why there is none."""
    if "ratio" not in cell:
        return GONE
    family = cell["kernel"].partition("/")[0]
    shown = speed(results, cell["ratio"])
    return f"{shown} {family}" + (" (dense)" if cell["gated"] == "dense" else "")


def table(results: Results, known: Quality) -> str:
    """The paper's table beside ours: a line per cell."""
    body = [
        (
            *(row[key] for key in ("dtype", "batch", "mlp_ratio", "patch", "tokens")),
            GONE if row["paper"] is None else f"{row['paper']:.2f}",
            speed(results, row["over_eager"]),
            speed(results, row["over_compiled"]),
            counts(row["kernels"]),
            known.of(row["pattern"]),
        )
        for row in results["table"]
    ]
    names = ("dtype", "batch", "mlp_ratio", "patch", "tokens", "paper", "over eager")
    note = (
        "One U-ViT block at 2:4, width 8192, 8 heads: tokens are the (32 / patch)^2 patches of a "
        "CIFAR10 image and one of time. The paper's speed-ups are over eager; it states neither "
        "batch nor dtype."
    )
    more = ("over compiled", "kernels", "quality")
    return f"{note}\n\n{markdown((*names, *more), body)}"


def whole(results: Results, known: Quality) -> str:
    """A line per model and batch, a column per pattern."""
    patterns = patterns_of(results["models"])
    body = [
        (row["model"], row["batch"], *(model_cell(results, row, text) for text in patterns))
        for row in results["models"]
    ]
    note = (
        "One forward in bf16, every layer gated, over torch.compile(mode='reduce-overhead'); in "
        "parentheses how many weights each kernel runs."
    )
    rows = [*body, losses(known, patterns, 2)]
    return f"{note}\n\n{markdown(('model', 'batch', *patterns), rows)}"


def model_cell(results: Results, row: dict[str, Any], text: str) -> str:
    """Ratio and gate decisions."""
    cell = row["patterns"].get(text, {})
    if "ratio" not in cell:
        return next((word for word in ("wrong", "failed") if cell.get(word)), GONE)
    return f"{speed(results, cell['ratio'])} ({counts(cell['kernels'])})"


def training(results: Results, known: Quality) -> str:
    """A line per model and pattern."""
    kinds = ("mask", "sr-ste", "sparse", "frozen")
    body = [
        (
            row["model"],
            row["batch"],
            text,
            *(step_cell(results, cell["step"], kind) for kind in kinds),
            known.of(text),
        )
        for row in results["training"]
        for text, cell in row["patterns"].items()
        if "step" in cell
    ]
    note = (
        "Forward, backward and AdamW; bf16 autocast, Inductor. Times the dense step: < 1 is faster."
    )
    ways = ("mask", "sr-ste", "sparse products", "frozen masks")
    names = ("model", "batch", "pattern", *ways, "quality")
    return f"{note}\n\n{markdown(names, body)}"


def step_cell(results: Results, step: dict[str, Any], kind: str) -> str:
    """One way of training."""
    return speed(results, step[kind]) if kind in step else GONE


def memory(results: Results, known: Quality) -> str:
    """A line per model and pattern."""
    body = [
        (
            row["model"],
            row["batch"],
            text,
            megabytes(cell["folded_dense"]),
            megabytes(cell["folded"]),
            *(megabytes(row["dense"][key]) for key in ("resting", "peak")),
            *(megabytes(cell[key]) for key in ("resting", "peak")),
            known.of(text),
        )
        for row in results["memory"]
        for text, cell in row["patterns"].items()
        if "folded" in cell
    ]
    note = "MiB, every layer that a kernel takes pinned to it and finalized; eager."
    names = ("model", "batch", "pattern", "weights dense", "folded", "model", "peak of a call")
    more = ("model, sparse", "peak, sparse", "quality")
    return f"{note}\n\n{markdown((*names, *more), body)}"


SECTIONS: tuple[tuple[str, str, Callable[[Results, Quality], str]], ...] = (
    ("Single layers", "ops", ops),
    ("The paper's table", "table", table),
    ("Whole models", "models", whole),
    ("Training steps", "training", training),
    ("Memory", "memory", memory),
    ("First calls", "first_call", first_calls),
    ("Speed and quality", "quality", beside),
)


def patterns_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Every pattern in them, in their order."""
    return list(dict.fromkeys(text for row in rows for text in row["patterns"]))


def losses(known: Quality, patterns: Sequence[str], before: int) -> Cells:
    """The last line of a table of speeds."""
    return ("quality", *[""] * (before - 1), *(known.of(text) for text in patterns))
