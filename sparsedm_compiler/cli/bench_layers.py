"""``sparsedm bench --layers``: well-known linear layers, dense and by pattern, in a table."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .job import STDOUT, Job, check_writable
from .layer_table import Table, describe, run_table
from .options import select_device

if TYPE_CHECKING:
    import torch

    from ..autotune.linear_layers import Layer
    from ..autotune.time_layer import LayerSetting
    from ..patterns import Pattern

PATTERNS = ("2:4", "1:4", "1:8", "1:8x64", "1:2@64x16", "1:4@128x16", "1:8@128x16")
TOKENS: Mapping[str, tuple[int, ...]] = {"cpu": (257, 1024), "cuda": (4096, 1024)}
DTYPES = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
}
SECONDS = 110.0


def add_layer_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the table."""
    add = parser.add_argument_group("table of layers").add_argument
    add("--layers", action="store_true", help="time well-known linear layers, without MODEL")
    add("--tokens", nargs="+", type=int, help="rows of their inputs (cpu: 257 1024; 4096 1024)")
    about = f"float32, bfloat16 or float16, or {', '.join([*DTYPES][3:])} (cpu: float32; bfloat16)"
    add("--dtype", help=about)
    add("--seconds", type=float, help=f"begin nothing that takes longer than this ({SECONDS:g})")


def check_unused(options: argparse.Namespace) -> None:
    """Raises ConfigError for an option that goes with --layers alone, or with a model alone."""
    layers = {name: getattr(options, name) for name in ("tokens", "dtype", "seconds")}
    models = {name: getattr(options, name) for name in ("policy", "batch", "inputs")}
    models |= {"option": options.option or None}
    models |= {"backend": None if options.backend == "auto" else options.backend}
    if options.layers and options.model is not None:
        raise ConfigError(f"--layers times layers without a model: leave out {options.model}")
    unused, other = (models, "MODEL") if options.layers else (layers, "--layers")
    for name, value in unused.items():
        if value is not None:
            with_this = "--layers" if options.layers else "MODEL"
            raise ConfigError(f"--{name} is an option for {other}, not for {with_this}")


def prepare(options: argparse.Namespace) -> Job:
    """Checks the request. Raises SparseDMError."""
    started = time.perf_counter()
    if options.json not in (None, STDOUT):
        check_writable(options.json)
    for name, least in (("rounds", 2), ("threads", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} {value} is not >= {least}")
    table = make_table(options)

    def run() -> None:
        import torch

        if options.threads is not None:
            torch.set_num_threads(options.threads)
        run_table(table, started + table.seconds)

    return Job((f"would time {describe(table)}",), run)


def make_table(options: argparse.Namespace) -> Table:
    """Returns the table of the options. Raises ConfigError and PatternError."""
    import torch

    from ..autotune import linear_layers
    from ..autotune.time_layer import LayerSetting
    from ..patterns import Pattern

    device = select_device(options)
    default = "float32" if device.type == "cpu" else "bfloat16"
    name = DTYPES.get(options.dtype or default)
    if name is None:
        raise ConfigError(f"--dtype {options.dtype!r} is none of {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    seconds = SECONDS if options.seconds is None else options.seconds
    tokens = options.tokens or TOKENS.get(device.type, TOKENS["cpu"])
    if not seconds > 0:
        raise ConfigError(f"--seconds {seconds:g} is not > 0")
    if min(tokens) < 1:
        raise ConfigError(f"--tokens {min(tokens)} is not >= 1")
    rows = [(layer, count) for count in dict.fromkeys(tokens) for layer in linear_layers.LAYERS]
    if device.type == "cpu":  # small layers first: the large may take longer than there is time
        rows.sort(key=lambda row: (row[1], row[0].rows * row[0].cols))
    wanted = [*dict.fromkeys(map(Pattern.parse, options.pattern or PATTERNS))]
    setting = LayerSetting(device, dtype, tuple(wanted), options.rounds)
    setting = keep_patterns(setting, rows, explicit=options.pattern is not None)
    return Table(setting, tuple(rows), seconds, options.json)


def keep_patterns(
    setting: LayerSetting, rows: Sequence[tuple[Layer, int]], *, explicit: bool
) -> LayerSetting:
    """Returns the setting with the patterns for which some layer has a kernel on the device.

    Raises ConfigError where there is none, or ``explicit`` patterns are without one.
    """
    from dataclasses import replace

    refusals = {pattern: find_refusal(pattern, rows, setting) for pattern in setting.patterns}
    kept = tuple(pattern for pattern, reason in refusals.items() if reason is None)
    reasons = dict.fromkeys(f"{reason}" for reason in refusals.values() if reason is not None)
    if reasons and (explicit or not kept):
        bad = [str(pattern) for pattern, reason in refusals.items() if reason is not None]
        raise ConfigError(
            f"no kernel on {setting.device.type} runs {', '.join(bad)} in "
            f"{str(setting.dtype).removeprefix('torch.')}: {'; '.join(reasons)}"
        )
    return replace(setting, patterns=kept)


def find_refusal(
    pattern: Pattern, rows: Sequence[tuple[Layer, int]], setting: LayerSetting
) -> str | None:
    """Returns why no layer has a kernel for the pattern, by the first layer; None if one has."""
    from ..autotune.time_layer import list_kernels

    first = None
    for layer in dict.fromkeys(layer for layer, _ in rows):
        kernels = list_kernels(pattern, layer.rows, layer.cols, setting)
        if isinstance(kernels, tuple):
            return None
        first = first or kernels.sentence
    return first
