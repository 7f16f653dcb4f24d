"""The table of ``sparsedm bench --layers``: timed row by row, printed in Markdown and JSON."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from ..progress import announce, print_line
from .job import STDOUT, write_json

if TYPE_CHECKING:
    import torch

    from ..autotune.linear_layers import Layer
    from ..autotune.time_layer import LayerSetting, LayerTimes, PatternTimes


@dataclass(frozen=True, slots=True)
class Table:
    """A checked request: what to time, for how many ``seconds``, and where to write it as JSON.

    Rows are (layer, tokens), in the order in which they are timed.
    """

    setting: LayerSetting
    rows: tuple[tuple[Layer, int], ...]
    seconds: float
    json: str | None


def describe(table: Table) -> str:
    """Returns the request as text."""
    layers = len({layer for layer, _ in table.rows})
    tokens = ", ".join(map(str, dict.fromkeys(tokens for _, tokens in table.rows)))
    setting = table.setting
    patterns = ", ".join(map(str, setting.patterns))
    return (
        f"{layers} layers with {tokens} tokens at {patterns} on {setting.device}, "
        f"{setting.dtype}, in {table.seconds:g} s"
    )


def run_table(table: Table, deadline: float) -> None:
    """Times the rows until the deadline, prints each when it is done, and writes the JSON."""
    from ..autotune.time_layer import time_layer

    facts = describe_machine(table.setting.device)
    done: list[LayerTimes] = []
    stream = sys.stderr if table.json == STDOUT else sys.stdout
    left_out = [*table.rows]
    for line in format_head(table.setting):
        print_line(line, stream)
    for number, (layer, tokens) in enumerate(table.rows, 1):
        if time.perf_counter() >= deadline:
            break
        title = f"timing {layer}, {tokens} tokens ({number} of {len(table.rows)})"
        with announce(title):
            times = time_layer(layer, tokens, table.setting, deadline)
        if times is not None:
            done.append(times)
            left_out.remove((layer, tokens))
            print_line(format_row(times, table.setting), stream)
            if table.json is not None and table.json != STDOUT:
                write_json(table.json, make_json(table, facts, done, left_out))
    for line in format_foot(table, facts, done, left_out):
        print_line(line, stream)
    if table.json is not None:
        write_json(table.json, make_json(table, facts, done, left_out))


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Returns the facts about the machine that the numbers need beside them."""
    from .. import __version__
    from ..autotune import side_by_side
    from ..backends.processor import read_cpu_name
    from ..backends.registry import find_families

    facts = {"processor": read_cpu_name(), **side_by_side.describe_machine(device)}
    libraries: dict[str, str | None] = {}
    for family in find_families(device.type):
        libraries |= family.list_libraries()
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return {"date": date, "sparsedm_compiler": __version__, **facts, "libraries": libraries}


def make_json(
    table: Table,
    facts: Mapping[str, Any],
    done: Iterable[LayerTimes],
    left_out: Iterable[tuple[Layer, int]],
) -> dict[str, Any]:
    """Returns everything that was measured, as plain values."""
    from ..autotune.select_kernel import MARGIN

    setting = table.setting
    return {
        "device": str(setting.device),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "rounds": setting.rounds,
        "margin": MARGIN,
        "machine": facts,
        "seconds": table.seconds,
        "rows": [
            {**name_row(times.layer, times.tokens), **asdict(times), "layer": times.layer.name}
            for times in done
        ],
        "left_out": [name_row(layer, tokens) for layer, tokens in left_out],
    }


def name_row(layer: Layer, tokens: int) -> dict[str, str | int]:
    """Returns the names and sizes of a row; its activation is not timed."""
    names = {"model": layer.model, "layer": layer.name}
    return {**names, "cols": layer.cols, "rows": layer.rows, "tokens": tokens}


def format_head(setting: LayerSetting) -> list[str]:
    """Returns the first two lines of the table in Markdown."""
    heads = ["layer", "in x out", "tokens", "dense ms", *map(str, setting.patterns)]
    return [join_cells(heads), join_cells(["---", *["--:"] * (len(heads) - 1)])]


def format_row(times: LayerTimes, setting: LayerSetting) -> str:
    """Returns the line of one layer."""
    layer = times.layer
    cells = [format_cell(times.patterns.get(str(pattern))) for pattern in setting.patterns]
    size = f"{layer.cols} x {layer.rows}"
    return join_cells([str(layer), size, str(times.tokens), f"{times.dense_ms:.4g}", *cells])


def format_cell(result: PatternTimes | None) -> str:
    """Returns ratio and kernel as text; "dense" where the kernel does not pass the gate."""
    if result is None:
        return "left out"
    if result.kernel is None or result.ratio is None:
        return "no kernel"
    from ..autotune.side_by_side import format_ratio

    kernel, spread = result.kernel.partition("/")[0], format_ratio(result.ratio)
    return f"dense ({spread} {kernel})" if result.dense else f"{spread} {kernel}"


def join_cells(cells: Sequence[str]) -> str:
    """Returns a line of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def format_foot(
    table: Table,
    facts: Mapping[str, Any],
    done: Sequence[LayerTimes],
    left_out: Sequence[tuple[Layer, int]],
) -> list[str]:
    """Returns the lines below the table: refusals, a legend, the machine, and what is left out."""
    from ..autotune.select_kernel import MARGIN
    from ..autotune.side_by_side import format_machine

    refusals = dict.fromkeys(
        f"no kernel at {text}: {result.refusal}"
        for times in done
        for text, result in times.patterns.items()
        if result.refusal is not None
    )
    dtype = str(table.setting.dtype).removeprefix("torch.")
    versions = [f"{name} {version}" for name, version in facts["libraries"].items() if version]
    legend = (
        f"Times faster than dense (torch's linear in {dtype}, no bias or activation): median "
        f"[quartiles] of {table.setting.rounds} rounds, taken in turns. dense: no kernel took less "
        f"than {MARGIN:g} of dense's time, its call in a model included, so that compile runs the "
        "layer dense."
    )
    machine = f"{facts['date']}, sparsedm_compiler {facts['sparsedm_compiler']}"
    lines = ["", *refusals, legend, f"{machine}, {format_machine(facts)}", ", ".join(versions)]
    return [*lines, format_left_out(table, done, left_out)]


def format_left_out(
    table: Table, done: Sequence[LayerTimes], left_out: Sequence[tuple[Layer, int]]
) -> str:
    """Returns a line that names the rows, and the patterns of other rows, that were not timed."""
    models: dict[tuple[int, str], list[str]] = {}
    for layer, tokens in left_out:
        models.setdefault((tokens, layer.model), []).append(layer.name)
    omitted = [
        f"{model} {', '.join(names)} with {tokens} tokens"
        for (tokens, model), names in sorted(models.items())
    ]
    omitted += [
        f"{times.layer} with {times.tokens} tokens at {', '.join(times.left_out)}"
        for times in done
        if times.left_out
    ]
    if not omitted:
        return f"all {len(table.rows)} rows were timed"
    return (
        f"left out for lack of time, as --seconds is {table.seconds:g}: {len(left_out)} of "
        f"{len(table.rows)} rows: {'; '.join(omitted)}"
    )
