"""Configurations: what people write is what they get, and back; recipes are the published ones."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

import sparsedm_compiler as sdm
from sparsedm_compiler import ConfigError, SparseDMError
from sparsedm_compiler.config import CompileConfig
from sparsedm_compiler.experiment.distil_recipes import DISTIL_RECIPES
from sparsedm_compiler.experiment.recipes import RECIPES, find_recipe
from sparsedm_compiler.experiment.run import get_compile_options
from sparsedm_compiler.experiment.run_config import (
    SET_BY_RUN,
    PruneSpec,
    RunConfig,
    derive_prune_spec,
)
from sparsedm_compiler.experiment.yaml_values import assign, merge, parse_yaml
from sparsedm_compiler.models import PRESETS

FULL = """
model: {name: uvit-cifar10-small, weights: dense.pth, options: {depth: 2}}
data: {train: digits, size: 16}
prune: {pattern: 2:4x4, keep_dense: [mid_block], overrides: {"*.fc1": 1:8}}
train: {method: transfer, lr: 2e-4, images: 6_400, betas: [0.9, 0.99], stages: [3:4, 2:4]}
score: {network: inception, count: 1000}
out: runs/one
"""
LEAST: dict[str, Any] = {"data": {"train": "digits"}, "train": {"method": "dense"}, "out": "a"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2:4", "2:4"),
        ("[1:8, 31:32]", ["1:8", "31:32"]),
        ("1:2@64x32+2:4", "1:2@64x32+2:4"),
        ("{fc1: 1:2@64x16}", {"fc1": "1:2@64x16"}),
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-.5", -0.5),
        (".inf", float("inf")),
        ("64_000", 64_000),
        ("007", 7),
        ("2026-01-02", "2026-01-02"),
        ("true", True),
        ("null", None),
        ("1.2.3", "1.2.3"),
        ('"5"', "5"),
    ],
)
def test_parse_yaml_reads_patterns_as_text_and_numbers_as_decimal(text: str, value: object) -> None:
    found = parse_yaml(text, "a test")
    assert found == value
    assert type(found) is type(value)


def test_run_config_from_a_file_round_trips(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(FULL, encoding="utf-8")
    config = RunConfig.read(tmp_path / "run.yaml")
    assert config.prune.pattern == "2:4x4"
    assert config.prune.overrides == {"*.fc1": "1:8"}
    assert config.prune.keep_dense == ("mid_block",)
    assert (config.train.lr, config.train.images) == (2e-4, 6400)
    assert config.train.stages == ("3:4", "2:4")
    assert config.train.teacher == "previous"
    (tmp_path / "run.json").write_text(json.dumps(config.as_dict()), encoding="utf-8")
    assert RunConfig.read(tmp_path / "run.json") == config
    assert RunConfig.read(tmp_path / "run.json", ["train.lr=1"]) != config


def test_prune_spec_of_compile_options_has_those_that_the_run_does_not_set() -> None:
    """An option that is new in ``CompileConfig`` is decided on here: for the user, or the run."""
    names = ["pattern", "policy", "keep_dense", "overrides", "backend", "regional"]
    assert [option.name for option in fields(PruneSpec)] == names
    run = ["mode", "kernels", "exclude_kernels", "autotune", "autotune_seconds", "finalize"]
    assert list(SET_BY_RUN) == run
    assert {option.name for option in fields(CompileConfig)} == {*names, *run}
    assert {*names, *run} < inspect.signature(sdm.compile).parameters.keys()


def test_prune_spec_by_default_is_the_default_compile_config() -> None:
    config = RunConfig.create(LEAST)
    assert config.prune == PruneSpec("2:4", "structural", (), {}, "auto", False)
    options = get_compile_options(config)
    assert options.keys() == {"policy", "keep_dense", "overrides", "backend", "regional"}
    assert CompileConfig.create(config.prune.pattern, **options) == CompileConfig.create("2:4")


def test_derive_prune_spec_with_a_new_compile_option_has_it_with_its_default() -> None:
    @dataclass(frozen=True)
    class Wider(CompileConfig):
        granularity: str = "row"

    spec = derive_prune_spec(Wider)
    assert spec().granularity == "row"
    assert spec(granularity="tile").granularity == "tile"
    assert {option.name for option in fields(spec)} == {
        "granularity",
        *(option.name for option in fields(PruneSpec)),
    }


@pytest.mark.parametrize("name", SET_BY_RUN)
def test_prune_section_with_an_option_that_the_run_sets_raises(name: str) -> None:
    with pytest.raises(ConfigError, match=f"prune has no '{name}'; it has pattern, policy, keep_d"):
        RunConfig.create({**LEAST, "prune": {name: 1}})


def test_merge_merges_sections_value_by_value() -> None:
    below = {"train": {"lr": 1, "seed": 2}, "out": "a"}
    found = merge(below, {"train": {"lr": 3}, "data": {"train": "digits"}})
    assert found == {"train": {"lr": 3, "seed": 2}, "out": "a", "data": {"train": "digits"}}
    assert below == {"train": {"lr": 1, "seed": 2}, "out": "a"}
    assert merge({"a": 1}, {"a": {"b": 2}}) == {"a": {"b": 2}}


def test_assign_creates_missing_sections() -> None:
    values: dict[str, Any] = {}
    assign(values, "model.options.depth=4")
    assign(values, "out = runs/a=b")
    assert values == {"model": {"options": {"depth": 4}}, "out": "runs/a=b"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"out": ""}, "no folder to write to"),
        ({"out": 3}, "no folder to write to"),
        ({"trian": {}}, "there is no section 'trian'; there are model, data"),
        ({"train": 3}, "train is 3, not names and values"),
        ({"data": {}}, "no training data"),
        ({"data": {"train": "digits", "helt_out": "x"}}, "did you mean held_out"),
        ({"prune": {"pattern": "4:2"}}, "'4:2'"),
        ({"train": {"method": "sparsedm"}}, "has random weights"),
        ({"train": {"method": "dense", "images": 0}}, "images 0"),
        ({"train": {1: 2}}, "finetune has no option 1; it has method"),
        ({"sample": {"sampler": "foo"}}, r"sample.sampler 'foo' is none of ddpm, ddim, dpm\+\+"),
        ({"sample": {"sampler": {"ddim": 1}}}, "sample.sampler {'ddim': 1} is none of"),
        ({"sample": {"steps": 0}}, "sample.steps 0 is not >= 1"),
        ({"sample": {"steps": "abc"}}, "sample.steps 'abc' is not a whole number"),
        ({"sample": {"steps": True}}, "sample.steps True is not a whole number"),
        ({"sample": {"grid": 0}}, "sample.grid 0 is not >= 1"),
        ({"sample": {"grid": -4}}, "sample.grid -4 is not >= 1"),
        ({"sample": {"grid": 2.5}}, "sample.grid 2.5 is not a whole number"),
        ({"sample": {"batch_size": 0}}, "sample.batch_size 0 is not >= 1"),
        ({"sample": {"seed": 1.5}}, "sample.seed 1.5 is not a whole number"),
        ({"sample": {"seed": 2**64}}, r"sample.seed 18446744073709551616 is not from -2\^63"),
        ({"sample": {"guidance": "high"}}, "sample.guidance 'high' is not a number"),
        ({"sample": {"guidance": float("nan")}}, "sample.guidance nan is not a finite number"),
        ({"score": {"count": 1}}, "score.count 1 is not >= 2"),
        ({"score": {"count": "all"}}, "score.count 'all' is not a whole number"),
        ({"score": {"kid": "no"}}, "score.kid 'no' is neither true nor false"),
        ({"data": {"train": "digits", "size": 0}}, "data.size 0 is not >= 1"),
        ({"data": {"train": "digits", "held_out_limit": 0.5}}, "data.held_out_limit 0.5 is not a"),
        ({"data": {"train": "digits", "labels": "no"}}, "data.labels 'no' is neither true nor"),
        (
            {"train": {"method": "dense", "objective": "flow"}, "sample": {"sampler": "ddim"}},
            r"sample.sampler 'ddim' does not follow a flow; .* set it to euler or dpm\+\+",
        ),
        ({"recipe": "cifar10"}, "there is cifar10-uvit and cifar10-ddpm"),
    ],
)
def test_run_config_with_invalid_values_raises(change: dict[str, Any], says: str) -> None:
    with pytest.raises(SparseDMError, match=says):
        RunConfig.create({**LEAST, **change})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: [", "run.yaml is not YAML"),
        ("- a", "holds list, not sections"),
        ("train: {lr: high}", "lr"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_run_config_from_an_invalid_file_raises(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=says):
        RunConfig.read(tmp_path / "run.yaml", ["data.train=digits", "out=a", "train.method=dense"])


@pytest.mark.parametrize("assignment", ["lr", "=3", "train..lr=3", "out.x=3", "train.lr=[1"])
def test_assign_with_invalid_assignment_raises(assignment: str) -> None:
    with pytest.raises(ConfigError, match=r"is not section|looks into out|is not YAML"):
        assign({"out": "a"}, assignment)


@pytest.mark.parametrize("name", RECIPES)
def test_run_config_from_every_recipe_is_valid(name: str) -> None:
    values = {"recipe": name, "data": {"train": "x"}, "model": {"weights": "w"}, "out": "a"}
    config = RunConfig.create(values)
    assert config.model.name in PRESETS
    assert config.train.method == "sparsedm"
    paper = not name.startswith("short") and name not in DISTIL_RECIPES
    if name in ("less-memory", "adapters"):
        return
    assert config.train.sr_ste_lambda == (2e-4 if paper else 0)
    assert config.train.warmup_images < config.train.images
    assert config.data.train == "x"
    assert find_recipe(None) == {}
    assert "recipe" in values


def test_find_recipe_joins_recipes_in_order() -> None:
    below, above = RECIPES["cifar10-uvit"], RECIPES["short"]
    found = find_recipe("cifar10-uvit+short")
    assert found["train"] == {**below["train"], **above["train"]}
    assert found["model"] == below["model"]
    assert find_recipe("short+cifar10-uvit")["train"]["warmup_images"] == 320_000
    with pytest.raises(ConfigError, match="there is no recipe 'shot'; there is short"):
        find_recipe("cifar10-uvit+shot")


def test_graphs_of_inductor_with_accumulation_are_refused() -> None:
    values = {"data": {"train": "digits"}, "model": {"weights": "a.safetensors"}, "out": "runs/a"}
    prune = {"backend": "inductor-graphs"}
    assert RunConfig.create({**values, "prune": prune}).train.accumulation == 1
    with pytest.raises(ConfigError, match=r"over those of the part before.*accumulation to 1"):
        RunConfig.create({**values, "prune": prune, "train": {"accumulation": 2}})
