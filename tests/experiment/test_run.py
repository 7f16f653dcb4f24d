"""``run``: a configuration from the dense model to scores; interrupted, in parallel, with text."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from safetensors.torch import load_file, save_file

import sparsedm_compiler as sdm
from sparsedm_compiler import SparseDMError
from sparsedm_compiler.data import open_data
from sparsedm_compiler.diffusion import generator_at
from sparsedm_compiler.experiment import run as runs
from sparsedm_compiler.experiment.inputs import make_guidance, make_sample_grids, open_inputs
from sparsedm_compiler.experiment.run import describe, run
from sparsedm_compiler.experiment.run_config import RunConfig
from sparsedm_compiler.experiment.yaml_values import merge
from sparsedm_compiler.models import open_model
from tests.experiment.cases import VALUES, change, write_inputs
from tests.group import run_group
from tests.train.cases import empty_curves


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunConfig]:
    """A tiny run in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "judge", raising=False)
    write_inputs(tmp_path)
    torch._dynamo.reset()
    with empty_curves():
        yield RunConfig.create(VALUES)


def test_run_writes_weights_grids_scores_and_macs(config: RunConfig) -> None:
    values = run(config, progress=False)
    assert json.loads(Path("run/results.json").read_text()) == values
    assert RunConfig.read("run/run.json") == config
    metrics = {score["metric"]: score for score in values["scores"]}
    assert set(metrics) == {"FD", "KID"}
    assert metrics["FD"]["count"] == 80
    assert "guidance 1.5" in metrics["FD"]["sampler"]
    dense = open_model("UViT", options=config.model.options, weights="dense.safetensors")
    x, t, y = torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    counted = sdm.count_macs(dense, x, t, y, pattern="1:4")
    assert values["macs"] == {
        "dense": counted.dense,
        "sparse": counted.sparse,
        "attention": counted.attention,
    }
    saved = sdm.load("run/student.safetensors", dense, backend="eager")
    opened = open_inputs(config, torch.device("cpu"))
    grids = make_sample_grids(config, opened)
    grids.save(Path("again.png"), grids.draw(saved, "eps"))
    drawn = matplotlib.image.imread("run/" + values["samples"])
    assert (drawn == matplotlib.image.imread("again.png")).mean() > 0.99
    fetched = open_data("digits:test", limit=16).fetch([k * 16 // 12 for k in range(12)])[0]
    grids.save(Path("again.png"), fetched)
    assert Path("run/real.png").read_bytes() == Path("again.png").read_bytes()
    for model, same in ((saved, True), (dense, False)):
        scores = runs.score_samples(config, opened, model, progress=False)
        assert (scores[0]["value"] == pytest.approx(metrics["FD"]["value"], rel=1e-6)) == same
    assert drawn.shape[0] > 2 * 64  # twelve images are two rows of ten
    assert drawn.std() > 0.1
    assert run(config, progress=False) == values


def test_run_with_other_scores_scores_a_finished_training_again(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run(config, progress=False)
    monkeypatch.setattr("sparsedm_compiler.train.loop.take_step", None)  # nothing may be trained
    after = run(change(config, score={"count": 90}), progress=False)
    assert after["scores"][0]["count"] == 90
    assert after["held_out"] == before["held_out"]


def test_run_killed_while_scoring_resumes_with_the_scores(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(change(config, out="whole"), progress=False)

    def fails(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "score_samples", fails)
        with pytest.raises(KeyboardInterrupt):
            run(config, progress=False)
    assert "complete" not in json.loads(Path("run/results.json").read_text())
    monkeypatch.setattr("sparsedm_compiler.train.loop.take_step", None)
    found = run(config, progress=False)
    assert found["scores"] == whole["scores"]


def test_describe_previews_a_run(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    told = describe(config)
    assert not Path("run").exists()
    for part in ("1:4, MACs", "sparsedm: ", "1,437 images [1, 8, 8]", "64 images", "a new run"):
        assert part in told
    run(config)
    shown, _, needed = told.partition("\nmemory ")
    assert needed  # which a run does not stop to compute
    assert shown in capsys.readouterr().out
    assert "resumed after 64" in describe(config)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"data": {"held_out": None}}, r"needs score\.reference or data\.held_out"),
        ({"score": {"network": "judge:nothing"}}, "judge:nothing"),
        ({"score": {"network": "inception:gone.pth"}}, r"gone\.pth"),
        ({"score": {"reference": "gone"}}, "'gone' does not exist"),
    ],
    ids=["no-reference", "function", "inception", "reference"],
)
def test_run_with_invalid_scores_raises_before_training(
    config: RunConfig, sections: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "train_run", None)
    for ask in (run, describe):
        with pytest.raises(SparseDMError, match=says):
            ask(change(config, **sections))
    assert not Path("run").exists()


def group_member(rank: int, folder: Path) -> None:
    """The run once averaged and once sharded by two processes."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    for out, train in (("ddp", {}), ("fsdp", {"shard": True})):
        torch._dynamo.reset()
        with empty_curves():
            run(change(RunConfig.read("config.json"), out=out, train=train), progress=False)


def test_run_in_two_processes_ends_with_the_same_scores(config: RunConfig, tmp_path: Path) -> None:
    alone = run(config, progress=False)
    Path("config.json").write_text(json.dumps(config.as_dict()), encoding="utf-8")
    run_group(group_member, tmp_path)
    for out in ("ddp", "fsdp"):
        found = json.loads(Path(out, "results.json").read_text())
        assert found["machine"]["processes"] == 2
        for one, two in zip(alone["scores"], found["scores"], strict=True):
            assert two["value"] == pytest.approx(one["value"], rel=1e-3)
        assert found["held_out"][-1]["ema"] == pytest.approx(alone["held_out"][-1]["ema"], rel=1e-5)


def text_to_image(folder: Path) -> dict[str, Any]:
    """A text-conditional UNet, an autoencoder and latents in files, as diffusers has them."""
    import diffusers

    torch.manual_seed(0)
    blocks = {"layers_per_block": 1, "norm_num_groups": 4}
    diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        cross_attention_dim=8,
        attention_head_dim=4,
        **blocks,
    ).save_pretrained(folder / "unet")
    diffusers.AutoencoderKL(
        latent_channels=2,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
        **blocks,
    ).save_pretrained(folder / "vae")
    source = generator_at("latents")
    text = torch.randn(16, 5, 8, generator=source)
    rows = {"latents": torch.randn(16, 2, 8, 8, generator=source)}
    save_file({**rows, "condition.encoder_hidden_states": text}, folder / "latents.safetensors")
    return {
        "model": {"name": str(folder / "unet"), "options": {}, "weights": None},
        "data": {
            "train": str(folder / "latents.safetensors"),
            "held_out": str(folder / "latents.safetensors"),
            "vae": str(folder / "vae"),
        },
        "train": {"images": 16, "batch_size": 8, "drop_condition": 0.5, "null_label": None},
        "score": {"network": None},
    }


def read_null(config: RunConfig) -> Any:
    guidance = make_guidance(config, open_inputs(config, torch.device("cpu")))
    assert guidance is not None
    return guidance.null


def test_run_on_latents_with_text_conditions_trains_and_samples(
    config: RunConfig, tmp_path: Path
) -> None:
    sections = text_to_image(tmp_path)
    plain = {**config.as_dict(), "model": sections.pop("model")}
    config = RunConfig.create(merge(plain, sections))
    zeros = {"encoder_hidden_states": torch.zeros(5, 8)}
    torch.testing.assert_close(read_null(config), zeros)
    save_file({"encoder_hidden_states": torch.ones(5, 8)}, "null.safetensors")
    config = change(config, data={"null": "null.safetensors"})
    ones = {"encoder_hidden_states": torch.ones(5, 8)}
    torch.testing.assert_close(read_null(config), ones)
    values = run(config, progress=False)
    assert values["images"] == 16
    assert values["held_out"][-1]["student"] != values["held_out"][0]["student"]
    grid = matplotlib.image.imread("run/" + values["samples"])
    assert grid.shape[-1] >= 3
    assert (grid[..., 0] != grid[..., 1]).any()  # latents of 2 channels became images of 3
    student = load_file("run/student.safetensors")
    dense = open_model(str(tmp_path / "unet")).state_dict()
    changes = [name for name in dense if not torch.equal(dense[name], student[name])]
    assert any("attn2.to_k" in name for name in changes)
