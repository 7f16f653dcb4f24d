"""``sparsedm bench``: candidates under one compiler, ratios within rounds, printed and stored."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsedm_compiler as sdm
from sparsedm_compiler.autotune.side_by_side import (
    Samples,
    compute_ratio,
    describe_machine,
    format_machine,
    sample_in_turns,
)
from sparsedm_compiler.cli.bench import (
    ALL_DENSE,
    BenchmarkCase,
    make_candidates,
    print_dense,
    runs_all_dense,
    store_speedup,
)
from sparsedm_compiler.models import UViT
from tests.cli.conftest import Shell

BENCH = ("bench", "own:net", "--backend", "eager", "--rounds", "2")


def test_bench_prints_a_table_of_ratios(shell: Shell) -> None:
    result = shell(*BENCH, "--pattern", "2:4", "1:4", "2:4", "--policy", "all")
    title, heads, _, first, second, last = result.out.splitlines()[:6]
    assert title == "own:net, batch 1: times faster than"
    assert re.split(r"\s{2,}", heads) == ["pattern", "dense, eager"]
    for line, pattern in ((first, "2:4"), (second, "1:4")):
        assert re.fullmatch(rf"{pattern} +\d+\.\d\d \[\d+\.\d\d, \d+\.\d\d\]", line)
    assert last.startswith("medians of 2 rounds [quartiles]; ")
    assert f"torch {torch.__version__}" in last
    assert f"{torch.get_num_threads()} of " in last


@pytest.mark.parametrize(("kernel", "dense"), [("dense", True), ("sparse", False)])
def test_runs_all_dense_of_a_pruned_model_looks_at_its_kernels(kernel: str, dense: bool) -> None:
    model = UViT(img_size=8, in_chans=1, embed_dim=16, depth=0, num_heads=2).eval()
    options = {"mode": "infer", "backend": "eager", "kernels": {"mid_block.mlp.*": kernel}}
    fast = sdm.compile(model, "2:4", keep_dense=["*attn*", "decoder*"], **options)
    with torch.no_grad():
        fast(torch.randn(1, 1, 8, 8), torch.tensor([5]))
    assert runs_all_dense(fast) is dense


def test_bench_of_patterns_that_run_dense_says_so_and_stores_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ratios = {"2:4": {"dense, eager": (0.8, 0.87, 0.9)}}
    print_dense(["2:4"], ratios)
    out = capsys.readouterr().out
    assert out.startswith("2:4: every layer of the pruned model runs dense, as no sparse kernel")
    assert "below 1 (0.87) is the cost of a call" in out
    print_dense(["2:4"], {"2:4": {"dense, eager": (1.0, 1.1, 1.2)}})
    assert "cost" not in capsys.readouterr().out
    (tmp_path / "results.json").write_text("{}")
    facts = {"processor": "a processor", **describe_machine(torch.device("cpu"))}
    store_speedup(tmp_path / "results.json", ratios, 1, facts, ALL_DENSE)
    speed = json.loads((tmp_path / "results.json").read_text())["speed"]
    assert speed["ratio"] == 0.87
    assert speed["baseline"].endswith("(every layer of the pruned model runs dense)")


def test_bench_json_prints_ratios_and_machine_only(shell: Shell) -> None:
    values = json.loads(shell(*BENCH, "--json", "--option", "depth=0", "--policy", "all").out)
    low, middle, high = values["times_faster"]["2:4"]["dense, eager"]
    assert 0 < low <= middle <= high
    assert (values["model"], values["batch"], values["rounds"]) == ("own:net", 1, 2)
    assert values["machine"]["threads"] == torch.get_num_threads()
    assert "ms" not in json.dumps(values["times_faster"])


def case_of(*patterns: str) -> BenchmarkCase:
    return BenchmarkCase("own:net", {}, patterns, {"policy": "all"})


def test_make_candidates_returns_dense_and_pruned_models() -> None:
    model = UViT(img_size=8, in_chans=1, embed_dim=16, depth=0, num_heads=2)
    assert [*make_candidates(model, case_of("2:4"), "eager")] == ["dense, eager", "2:4"]
    assert [*make_candidates(model, case_of("2:4"), "aot_eager")] == ["dense, aot_eager", "2:4"]
    models = make_candidates(model, case_of("2:4", "1:8"), "inductor")
    assert [*models] == ["dense, inductor", "dense, inductor frozen", "2:4", "1:8"]
    call = torch.randn(1, 1, 8, 8), torch.tensor([5])
    models = make_candidates(model, case_of("2:4"), "eager")
    with torch.no_grad():
        assert torch.equal(models["dense, eager"](*call), model(*call))
        models["2:4"](*call)
    explained = sdm.explain(models["2:4"])
    assert (explained.mode, explained.backend) == ("infer", "eager")
    assert "decoder_pred.weight" in explained.masked  # dense but for policy "all"


def run_folder(shell: Shell, method: str = "ste") -> Path:
    folder = shell.folder / "runs" / method
    folder.mkdir(parents=True)
    values = {
        "model": {"name": "own:net", "options": {"depth": 0}},
        "data": {"train": "digits"},
        "prune": {"pattern": "1:4", "policy": "all", "keep_dense": ["*.qkv"]},
        "train": {"method": method},
        "out": str(folder),
    }
    (folder / "run.json").write_text(json.dumps(values), encoding="utf-8")
    (folder / "results.json").write_text('{"speed": null, "images": 3}', encoding="utf-8")
    return folder


def test_bench_of_a_run_stores_the_speedup_in_its_results(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = run_folder(shell), []
    real = sdm.compile

    def compile(*args: Any, **options: Any) -> Any:
        made.append((args[1], options))
        return real(*args, **options)

    monkeypatch.setattr("sparsedm_compiler.compiler.api.compile", compile)
    argv = ("bench", folder, "--backend", "eager", "--rounds", "2")
    before = (folder / "results.json").read_text()
    assert f"{folder}, batch 1: times" in shell(*argv, "--pattern", "2:4").out
    assert (folder / "results.json").read_text() == before  # not what the run did
    result = shell(*argv)
    ((pattern, options),) = made[1:]
    assert (pattern, options["policy"], options["keep_dense"]) == ("1:4", "all", ("*.qkv",))
    values = json.loads((folder / "results.json").read_text())
    assert values["images"] == 3
    assert re.search(rf"1:4 +{values['speed']['ratio']:.2f} \[", result.out)
    assert values["speed"]["baseline"].startswith("dense, eager, batch 1, ")
    assert "load" not in values["speed"]["baseline"]


def test_bench_of_a_dense_run_is_refused(shell: Shell) -> None:
    folder = run_folder(shell, "dense")
    assert "trained a dense model" in shell("bench", folder).reason


def test_bench_dry_run_measures_nothing(shell: Shell) -> None:
    result = shell.dry("bench", "uvit-cifar10-small", "--backend", "eager", "--batch", "8")
    compared = "dense with 2:4 on cpu, compiled by eager, 11 rounds"
    assert result.out.splitlines()[0] == f"would compare uvit-cifar10-small, {compared}"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["own:nothing"], "cannot import 'own:nothing'"),
        (["own:net", "--pattern", "4:2"], "pattern '4:2' is not 'n:m'"),
        (["own:net", "--policy", "mine"], "policy 'mine'"),
        (["own:net", "--rounds", "0"], "--rounds 0 is not >= 1"),
        (["own:net", "--threads", "0"], "--threads 0 is not >= 1"),
        (["own:net", "--backend", "no"], "backend 'no' is no torch.compile backend"),
        (["own:net", "--device", "no"], "cannot run on --device no"),
        (["own:net", "--batch", "2"], "--batch is not for factories"),
    ],
    ids=lambda value: "_".join(value[1:]) if isinstance(value, list) else "",
)
def test_bench_of_an_invalid_request_is_refused(shell: Shell, argv: list[str], says: str) -> None:
    for ask in (shell, shell.dry):
        assert f"sparsedm bench: {says}" in ask("bench", *argv).reason


def test_interleaved_takes_turns_and_ratio_compares_within_rounds() -> None:
    order: list[str] = []
    times = sample_in_turns({name: lambda n=name: order.append(n) for name in "abc"}, rounds=2)
    assert "".join(order) == "abc" * 2 + "abc" + "bca"
    assert {len(samples.of("wall")) for samples in times.values()} == {2}
    assert compute_ratio([1.0, 9.0, 4.0], [1.0, 3.0, 2.0]) == (1.5, 2.0, 2.5)
    assert Samples([1.0], [2.0]).of("cpu") == [2.0]


def test_format_machine() -> None:
    facts = {"processor": "X", "cpu": "AVX2", "threads": 1, "cores": 2, "torch": "2", "load": [0.5]}
    assert format_machine({**facts, "gpu": None}) == "X, AVX2, 1 of 2 threads, torch 2, load 0.5"
    assert format_machine({**facts, "gpu": "Y"}) == "Y, 1 of 2 threads, torch 2, load 0.5"
