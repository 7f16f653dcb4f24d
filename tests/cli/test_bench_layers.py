"""``sparsedm bench --layers``: rows by row, gated as compile does, within its time, as JSON."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsedm_compiler.autotune.time_layer as timing
from benchmarks.gpu.plan import FULL
from sparsedm_compiler import __version__
from sparsedm_compiler.autotune.linear_layers import LAYERS, Layer
from sparsedm_compiler.autotune.side_by_side import format_ratio
from sparsedm_compiler.autotune.time_layer import LayerSetting, LayerTimes, time_layer
from sparsedm_compiler.backends.registry import find_family
from sparsedm_compiler.cli import bench_layers, main
from sparsedm_compiler.patterns import Pattern
from tests.backends.cuda.here import on_cpu
from tests.cli.conftest import Shell

TOYS = (Layer("toy", "fc1", 128, 256), Layer("toy", "proj", 128, 128))
TABLE = ("bench", "--layers", "--device", "cpu", "--rounds", "3")
FLOATS = r"\d+\.\d\d \[\d+\.\d\d, \d+\.\d\d\]"


@pytest.fixture(autouse=True)
def toy_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsedm_compiler.autotune.linear_layers.LAYERS", TOYS)


def rows_of(out: str) -> list[list[str]]:
    """The cells of a table in Markdown, without its rule."""
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    assert re.fullmatch(r"\| --- (\| --: )+\|", lines.pop(1))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def set_times(patch: pytest.MonkeyPatch, times: Mapping[str, float]) -> None:
    """Let kernels have been measured: milliseconds by name, of dense and by pattern of a kernel."""

    def read(trial: Any, kernels: Any) -> dict[str, float]:
        ms = times[str(trial.pattern)]
        return {"dense": 1.0, **{str(kernel): ms for kernel in kernels}}

    patch.setattr(timing, "read_measured", read)


def test_layers_are_printed_in_markdown_and_written_as_json(shell: Shell) -> None:
    argv = ("--pattern", "2:4", "--pattern", "1:8x64", "--tokens", "17", "5", "--json", "t.json")
    result = shell(*TABLE, *argv)
    heads, *rows = rows_of(result.out)
    assert heads == ["layer", "in x out", "tokens", "dense ms", "2:4", "1:8x64"]
    assert [row[:3] for row in rows] == [  # few tokens first, then small layers
        ["toy proj", "128 x 128", "5"],
        ["toy fc1", "128 x 256", "5"],
        ["toy proj", "128 x 128", "17"],
        ["toy fc1", "128 x 256", "17"],
    ]
    for row in rows:
        for cell, kernel in zip(row[4:], ("cpu_free", "cpu_shared"), strict=True):
            text = rf"{FLOATS} {kernel}"
            assert re.fullmatch(rf"{text}|dense \({text}\)", cell)
    foot = result.out.splitlines()
    assert "linear in float32" in foot[-4]
    assert f"{torch.get_num_threads()} of " in foot[-3]
    assert "C++ compiler" in foot[-2]
    assert foot[-1] == "all 4 rows were timed"
    values = json.loads((shell.folder / "t.json").read_text())
    assert [(row["model"], row["layer"], row["tokens"]) for row in values["rows"]] == [
        ("toy", "proj", 5),
        ("toy", "fc1", 5),
        ("toy", "proj", 17),
        ("toy", "fc1", 17),
    ]
    for cells, row in zip(rows, values["rows"], strict=True):
        assert cells[3] == f"{row['dense_ms']:.4g}"
        for cell, timed in zip(cells[4:], row["patterns"].values(), strict=True):
            low, middle, high = timed["ratio"]
            assert 0 < low <= middle <= high
            assert format_ratio((low, middle, high)) in cell
            assert timed["dense"] is cell.startswith("dense")
            assert find_family(timed["kernel"].partition("/")[0]).device == "cpu"
            assert timed["sparse_ms"] > 0
    assert (values["left_out"], values["rounds"], values["dtype"]) == ([], 3, "float32")
    machine = values["machine"]
    assert (machine["torch"], machine["sparsedm_compiler"]) == (torch.__version__, __version__)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", machine["date"])
    assert machine["gpu"] is None


def test_layers_json_alone_prints_json_only_and_rows_on_stderr(shell: Shell) -> None:
    for option in (("--json",), ("--json", "-")):
        result = shell(*TABLE, "--pattern", "2:4", "--tokens", "5", "--dtype", "bf16", *option)
        values = json.loads(result.out)
        assert (values["dtype"], len(values["rows"])) == ("bfloat16", 2)
        assert len(rows_of(result.err)) == 3


def test_layers_show_dense_where_compile_would_run_dense(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_times(monkeypatch, {"2:4": 0.95, "1:4": 0.94, "1:8": math.inf})  # 0.015 for the call
    result = shell(*TABLE, "--pattern", "2:4", "1:4", "1:8", "--tokens", "5", "--json", "t.json")
    _, row, _ = rows_of(result.out)
    assert re.fullmatch(rf"dense \({FLOATS} cpu_free\)", row[4])
    assert re.fullmatch(rf"{FLOATS} cpu_free", row[5])
    assert row[6] == "no kernel"
    reason = "cpu_free refused its size, or gave other numbers than dense"
    assert result.out.count(f"no kernel at 1:8: {reason}\n") == 1
    patterns = json.loads((shell.folder / "t.json").read_text())["rows"][0]["patterns"]
    assert [timed["dense"] for timed in patterns.values()] == [True, False, True]
    assert (patterns["1:8"]["refusal"], patterns["1:8"]["kernel"]) == (reason, None)


def test_layers_say_why_one_of_them_has_no_kernel(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = (*TOYS, Layer("toy", "odd", 128, 12))
    monkeypatch.setattr("sparsedm_compiler.autotune.linear_layers.LAYERS", odd)
    on_cpu(monkeypatch)
    argv = ("--pattern", "2:4", "--tokens", "16", "--dtype", "bf16")
    result = shell(*TABLE, *argv)
    cells = {row[0]: row[4] for row in rows_of(result.out)[1:]}
    assert cells["toy odd"] == "no kernel"
    assert "cuda_semi" in cells["toy fc1"]
    assert re.search(r"\nno kernel at 2:4: (?!cuda).*12 rows are not a multiple of 16", result.out)


def test_layers_are_timed_by_the_kernels_of_the_device(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu(monkeypatch)
    argv = ("--pattern", "64:2:8", "--tokens", "16", "--dtype", "bf16")
    kernels = [row[4] for row in rows_of(shell(*TABLE, *argv).out)[1:]]
    assert all("cuda_vnm" in cell or "cuda_semi" in cell for cell in kernels)


def test_layers_without_time_are_named(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "time_layer", lambda *_: pytest.fail("it began a row"))
    argv = ("--pattern", "2:4", "--tokens", "5", "9", "--json", "t.json")
    result = shell(*TABLE, *argv, "--seconds", "1e-6")
    assert len(rows_of(result.out)) == 1
    rows = "toy proj, fc1 with 5 tokens; toy proj, fc1 with 9 tokens"
    line = f"left out for lack of time, as --seconds is 1e-06: 4 of 4 rows: {rows}"
    assert result.out.splitlines()[-1] == line
    values = json.loads((shell.folder / "t.json").read_text())
    assert (values["rows"], len(values["left_out"])) == ([], 4)


def test_a_row_begins_no_pattern_that_would_take_too_long(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(trial: Any, kernels: Any) -> dict[str, float] | None:
        known = {"dense": 1.0, **{str(kernel): 0.5 for kernel in kernels}}
        return known if str(trial.pattern) == "2:4" else None

    monkeypatch.setattr(timing, "COST", 1e12)
    monkeypatch.setattr(timing, "read_measured", read)
    setting = LayerSetting(torch.device("cpu"), torch.float32, (Pattern.parse("1:16"),), 2)
    assert time_layer(TOYS[0], 5, setting, time.perf_counter() + 60) is None
    known = LayerSetting(torch.device("cpu"), torch.float32, (Pattern.parse("2:4"),), 2)
    assert time_layer(TOYS[0], 5, known, time.perf_counter() + 60) is not None
    assert time_layer(TOYS[0], 5, known, time.perf_counter() - 1) is None
    result = shell(*TABLE, "--pattern", "2:4", "1:16", "--tokens", "5")
    _, first, _ = rows_of(result.out)
    assert first[5] == "left out"
    assert "0 of 2 rows: toy proj with 5 tokens at 1:16; toy fc1" in result.out


def test_ratios_come_from_rounds_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    set_times(monkeypatch, {"2:4": 0.1})
    setting = LayerSetting(torch.device("cpu"), torch.float32, (Pattern.parse("2:4"),), 3)

    def sample(self: Any, calls: Any, device: torch.device, rounds: int) -> dict[str, list[float]]:
        assert ([*calls], rounds) == (["dense", "2:4"], 3)
        assert torch.isfinite(calls["dense"]()).all()
        return {"dense": [6.0, 4.0, 9.0], "2:4": [2.0, 2.0, 2.0]}

    monkeypatch.setattr("sparsedm_compiler.backends.cpu.family.CpuFamily.sample_calls", sample)
    times = time_layer(TOYS[0], 5, setting, math.inf)
    assert isinstance(times, LayerTimes)
    assert times.patterns["2:4"].ratio == (2.5, 3.0, 3.75)
    assert (times.dense_ms, times.patterns["2:4"].sparse_ms) == (6.0, 2.0)


def test_default_patterns_are_those_with_a_kernel(shell: Shell) -> None:
    out = shell.dry(*TABLE).out
    assert out.startswith(
        f"would time 2 layers with 257, 1024 tokens at {', '.join(bench_layers.PATTERNS)} on cpu, "
        "torch.float32, in 110 s"
    )


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["uvit-cifar10-small"], "--layers times layers without a model: leave out uvit-"),
        (["--policy", "all"], "--policy is an option for MODEL, not for --layers"),
        (["--batch", "2"], "--batch is an option for MODEL, not for --layers"),
        (["--backend", "eager"], "--backend is an option for MODEL, not for --layers"),
        (["--option", "depth=1"], "--option is an option for MODEL, not for --layers"),
        (["--dtype", "int8"], "--dtype 'int8' is none of float32, bfloat16"),
        (["--seconds", "0"], "--seconds 0 is not > 0"),
        (["--tokens", "4", "0"], "--tokens 0 is not >= 1"),
        (["--rounds", "1"], "--rounds 1 is not >= 2"),
        (["--threads", "0"], "--threads 0 is not >= 1"),
        (["--pattern", "4:2"], "pattern '4:2' is not 'n:m'"),
        (["--dtype", "fp16", "--pattern", "2:4"], "no kernel on cpu runs 2:4 in float16: "),
        (["--dtype", "fp16"], "no kernel on cpu runs 2:4, 1:4, 1:8, "),
        (["--device", "meta"], "no kernel on meta runs "),
        (["--json", "own.py/t.json"], "cannot write own.py/t.json"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_layers_of_an_invalid_request_are_refused(shell: Shell, argv: list[str], says: str) -> None:
    assert f"sparsedm bench: {says}" in shell(*TABLE, *argv).reason
    assert f"sparsedm bench: {says}" in shell.dry(*TABLE, *argv).reason


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "name a MODEL, or --layers"),
        (["own:net", "--tokens", "4"], "--tokens is an option for --layers, not for MODEL"),
        (["own:net", "--dtype", "bf16"], "--dtype is an option for --layers, not for MODEL"),
        (["own:net", "--seconds", "9"], "--seconds is an option for --layers, not for MODEL"),
        (["own:net", "--json", "t.json"], "--json t.json: only --layers writes JSON to a file"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_bench_of_a_model_refuses_the_options_of_layers(
    shell: Shell, argv: list[str], says: str
) -> None:
    assert f"sparsedm bench: {says}" in shell("bench", *argv).reason


def test_bench_json_before_the_model_still_prints_json(shell: Shell) -> None:
    options = ("--backend", "eager", "--rounds", "2", "--option", "depth=0")
    result = shell("bench", "--json", "own:net", *options)
    assert json.loads(result.out)["model"] == "own:net"


def test_known_layers_are_shared_with_the_gpu_benchmarks() -> None:
    assert FULL.layers is LAYERS
    sizes = {str(layer): (layer.cols, layer.rows) for layer in LAYERS}
    assert sizes["FLUX fc1"] == (3072, 12288)
    assert sizes["DiT-XL/2 qkv"] == (1152, 3456)
    assert len(sizes) == len(LAYERS)


def test_layers_help_names_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "--help"])
    out = capsys.readouterr().out
    for option in ("--layers", "--tokens", "--dtype", "--seconds", "--json"):
        assert option in out


def test_json_of_layers_is_whole_after_every_row(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = timing.time_layer

    def interrupt(layer: Layer, *args: Any) -> LayerTimes | None:
        if layer.name == "fc1":
            raise KeyboardInterrupt
        return first(layer, *args)

    monkeypatch.setattr(timing, "time_layer", interrupt)
    result = shell(*TABLE, "--pattern", "2:4", "--tokens", "5", "--json", "t.json")
    assert result.status == 130
    values = json.loads(Path("t.json").read_text())
    assert (len(values["rows"]), len(values["left_out"])) == (1, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_layers_on_a_card_are_timed_by_its_kernels(shell: Shell) -> None:
    argv = ("--device", "cuda", "--pattern", "2:4", "--tokens", "256", "--rounds", "3")
    result = shell("bench", "--layers", *argv, "--json", "t.json")
    assert len(rows_of(result.out)) == 1 + len(TOYS)
    values = json.loads((shell.folder / "t.json").read_text())
    assert values["dtype"] == "bfloat16"
    assert values["machine"]["gpu"] == torch.cuda.get_device_name()
    for row in values["rows"]:
        assert row["patterns"]["2:4"]["kernel"].startswith("cuda_")
