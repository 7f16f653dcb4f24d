"""The MAC counter's command line: right numbers, clean JSON, one line for a bad request."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "count_macs.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("count_macs_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Runner:
    """Runs the script in this process and keeps what it printed."""

    def __init__(self, script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
        self.script, self.capsys = script, capsys

    def text(self, *argv: str) -> str:
        self.capsys.readouterr()
        assert self.script.main(argv) == 0
        return self.capsys.readouterr().out

    def json(self, *argv: str) -> Any:
        return json.loads(self.text(*argv, "--json"))

    def refused(self, *argv: str) -> str:
        self.capsys.readouterr()
        assert self.script.main(argv) == 2
        out, err = self.capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        return err


@pytest.fixture
def run(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(script, capsys)


FACTORIES = """
from torch import nn, zeros, int64

def net():
    layers = [nn.Linear(16, 16, bias=False) for _ in range(3)]
    return nn.Sequential(*layers)

def with_args():
    return net(), (zeros(5, 16),)

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.net = nn.Embedding(4, 16), net()
    def forward(self, token, scale=None):
        return self.net(self.table(token)) * scale

def with_kwargs():
    return Named(), (zeros(7, dtype=int64),), {"scale": zeros(1)}

def two():
    return Named()

def wrong():
    return 3

def too_many():
    return net(), (zeros(1, 16),), {}, 1

number = 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_factories.py").write_text(FACTORIES, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_factories", raising=False)
    return "own_factories"


def test_call_without_arguments_shows_a_model_of_the_paper(run: Runner) -> None:
    shown = run.text("--model", "uvit-cifar10-small", "--pattern", "2:4", "--pattern", "1:8")
    assert run.text() == shown
    assert "1:8" in shown


def test_count_macs_as_a_program_counts_the_papers_model() -> None:
    command = [sys.executable, str(SCRIPT), "--json", "--pattern", "2:4", "--policy", "uvit"]
    done = subprocess.run(
        [*command, "--model", "uvit-cifar10-small"], check=True, capture_output=True, text=True
    )
    report = json.loads(done.stdout)
    assert report["dense"] == 11_321_564_160
    assert report["attention"] == 879_244_288
    assert report["sparse"] == 6_066_625_536
    assert report["model"] == "uvit-cifar10-small"
    assert report["pattern"] == "2:4"
    assert report["policy"] == "uvit"
    assert report["batch"] == 1
    assert report["patterns"] == {"2:4": {"sparse": 6_066_625_536, "ratio": 1.8662}}


@pytest.mark.parametrize(
    ("model", "dense", "attention"),
    [
        ("ddpm-cifar10", 6_053_953_536, 167_903_232),
        ("uvit-imagenet256-large", 73_593_438_208, 2_862_784_512),
        # Peebles & Xie 2023 say 118.64 GFLOPs, attention included, one FLOP per MAC.
        ("dit-xl-2", 114_438_979_584, 4_227_858_432),
    ],
)
def test_count_macs_of_published_models_equals_their_counts(
    run: Runner, model: str, dense: int, attention: int
) -> None:
    report = run.json("--model", model)
    assert (report["dense"], report["attention"]) == (dense, attention)


def test_count_macs_of_several_models_and_patterns_is_one_table(
    run: Runner, factories: str
) -> None:
    names = [f"{factories}:with_args", f"{factories}:with_kwargs"]
    asked = ("--model", names[0], "--model", names[1], "--pattern", "2:4", "--pattern", "1:8")
    out = run.text(*asked, "--pattern", "2:4")
    head, _, first, second, _, convention = out.strip().split("\n")
    totals = "model dense conv+linear attention QK+AV"
    assert " ".join(head.split()) == f"{totals} 2:4 conv+linear ratio 1:8 conv+linear ratio"
    assert first.split() == [names[0], "3,840", "0", "3,200", "1.20x", "2,720", "1.41x"]
    assert second.split() == [names[1], "5,376", "0", "4,480", "1.20x", "3,808", "1.41x"]
    assert convention.startswith("1 MAC = one multiply-accumulate")
    reports = run.json(*asked)
    assert [report["dense"] for report in reports] == [3840, 5376]
    assert reports[0]["patterns"]["1:8"]["sparse"] == 2720
    assert "sparse" not in reports[0]


def test_count_macs_per_layer_shows_shapes_and_reasons(run: Runner, factories: str) -> None:
    model = ("--model", f"{factories}:with_args", "--per-layer")
    out = run.text(*model, "--pattern", "2:4", "--pattern", "1:32")
    first, middle, last = (line.split() for line in out.split("\n")[3:6])
    assert first[:6] == ["0", "linear", "16x16", "1,280", "1,280", "1,280"]
    assert middle[:6] == ["1", "linear", "16x16", "1,280", "640", "1,280"]
    assert " ".join(middle[6:]) == "1:32: input width 16 is not a multiple of 32"
    assert " ".join(first[6:]) == "first op of the graph"
    assert " ".join(last[6:]) == "last op of the graph"
    report = run.json(*model)
    assert [row["sparse"] for row in report["patterns"]["2:4"]["rows"]] == [1280, 640, 1280]


def test_count_macs_with_a_batch_scales_a_preset(run: Runner) -> None:
    one, two = (run.json("--model", "uvit-cifar10-small", "--batch", batch) for batch in ("1", "2"))
    assert two["dense"] == 2 * one["dense"]
    assert two["attention"] == 2 * one["attention"]
    assert two["batch"] == 2


def test_count_macs_of_a_factory_takes_the_inputs_option(run: Runner, factories: str) -> None:
    assert run.json("--model", f"{factories}:net", "--inputs", "5x16")["dense"] == 3840
    assert run.json("--model", f"{factories}:two", "--inputs", "7:int64, 1")["dense"] == 5376


TINY = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.1",
    "sample_size": 8,
    "block_out_channels": [16],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "add_attention": False,
}


def config_file(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**TINY, **changes}), encoding="utf-8")
    return file


def test_count_macs_accepts_a_diffusers_config_as_file_and_folder(
    run: Runner, tmp_path: Path
) -> None:
    file = config_file(tmp_path)
    by_file, by_folder = (run.json("--model", str(path)) for path in (file, tmp_path))
    assert by_file["patterns"] == by_folder["patterns"]
    assert by_file["dense"] == by_folder["dense"] > 1_000_000
    assert by_file["attention"] == 0


def test_count_macs_list_names_every_preset(run: Runner, script: ModuleType) -> None:
    lines = run.text("--list").strip().split("\n")
    assert [line.split()[0] for line in lines] == list(script.PRESETS)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["uvit-cifar10-smal"], "did you mean uvit-cifar10-small"),
        (["zzz"], "no preset is called 'zzz'; known: uvit-cifar10-small"),
        (["uvit-cifar10-small", "--pattern", "4:2"], "'4:2' is not 'n:m' with 0 < n <= m"),
        (["uvit-cifar10-small", "--policy", "mine"], "policy 'mine'"),
        (["uvit-cifar10-small", "--batch", "0"], "--batch 0 is not >= 1"),
        (["uvit-cifar10-small", "--inputs", "1"], "--inputs is for factories"),
        (["no/such/config.json"], "cannot read no/such/config.json: No such file"),
        (["no/such/folder"], "cannot read no/such/folder: No such file"),
        (["no_such_module:net"], "cannot import 'no_such_module:net': No module named"),
        (["own_factories:nothing"], "cannot import 'own_factories:nothing': module"),
        (["own_factories:"], "cannot import 'own_factories:'"),
        (["own_factories:number"], "own_factories:number is not a function but 3"),
        (["own_factories:wrong"], "returned int where a model should be"),
        (["own_factories:too_many"], "neither a model, (model, args) nor (model, args, kwargs)"),
        (["own_factories:net"], "returns no inputs: give --inputs"),
        (["own_factories:net", "--inputs", "5xx16"], "input '5xx16' is not a shape"),
        (["own_factories:net", "--inputs", "5x0"], "input '5x0' is not a shape"),
        (["own_factories:net", "--inputs", "5x16:float99"], "input '5x16:float99' is not a shape"),
        (["own_factories:with_args", "--inputs", "5x16"], "drop --inputs 5x16"),
        (["own_factories:net", "--batch", "2"], "--batch is not for factories"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "_".join(value),
)
@pytest.mark.usefixtures("factories")
def test_count_macs_with_a_bad_request_prints_one_line_and_returns_2(
    run: Runner, argv: list[str], says: str
) -> None:
    assert says in run.refused("--model", *argv)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"_class_name": "AutoencoderKL"}, "how to call a AutoencoderKL"),
        ({"_class_name": "AutoencoderKL"}, "pass --model package.module:function"),
        ({"_class_name": None}, "it has no _class_name"),
        ({"down_block_types": ["NoBlock"]}, "does not make a UNet2DModel: ValueError"),
        ({"sample_size": None}, "no sample_size"),
    ],
    ids=["class", "hint", "none", "broken", "size"],
)
def test_count_macs_of_an_invalid_diffusers_config_raises(
    run: Runner, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    assert says in run.refused("--model", str(config_file(tmp_path, **changes)))


def test_count_macs_prints_errors_of_the_package_unchanged(run: Runner, tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    file.write_text('{"_class_name": "UViT", "img_size": 9}', encoding="utf-8")
    said = run.refused("--model", str(file))
    assert said == "count_macs: img_size 9 of a U-ViT is not a multiple of patch_size 2\n"
    file.write_text('{"_class_name": "UViT", "embed_dim": 8, "depth": 0}', encoding="utf-8")
    assert run.json("--model", str(file))["dense"] > 0


def test_count_macs_of_files_that_are_no_model_raises(run: Runner, tmp_path: Path) -> None:
    file = config_file(tmp_path)
    file.write_text("{", encoding="utf-8")
    assert "is not JSON" in run.refused("--model", str(file))
    file.write_text("[1]", encoding="utf-8")
    assert "it has no _class_name" in run.refused("--model", str(file))
    (tmp_path / "model_index.json").write_text("{}", encoding="utf-8")
    assert "is a whole pipeline" in run.refused("--model", str(tmp_path))


def test_count_macs_with_options_and_no_model_is_a_usage_error(script: ModuleType) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main(["--pattern", "2:4"])
