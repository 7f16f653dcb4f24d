"""``sparsedm sample`` against ``diffusion.sample`` of a model masked by the oracle."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import sparsedm_compiler as sdm
from sparsedm_compiler.cli import main
from sparsedm_compiler.cli.sampling_options import read_condition_options, read_null_options
from sparsedm_compiler.diffusion import Guidance, make_scheduler, sample
from sparsedm_compiler.diffusion.image_batches import to_uint8
from sparsedm_compiler.models import open_model
from tests.cli.conftest import Shell, student
from tests.group import run_group
from tests.oracle import oracle_of

SETTINGS = ("--steps", "3", "--sampler", "ddim", "--backend", "eager")
MASKED = ("--model", "own:net", "--weights", "student.safetensors", "--mode", "train", *SETTINGS)


def expected(model: torch.nn.Module, count: int, **options: Any) -> Tensor:
    """The bytes of the samples [count, 1, 8, 8], as PNGs hold them."""
    scheduler = make_scheduler("ddim", "eps")
    settings = {"shape": (count, 1, 8, 8), "steps": 3, "progress": False, **options}
    return to_uint8(sample(model, scheduler, **settings))


def read_pngs(folder: Path | str) -> Tensor:
    files = sorted(Path(folder).glob("*.png"))
    assert [file.name for file in files] == [f"{number:06d}.png" for number in range(len(files))]
    return torch.stack([torch.tensor(np.asarray(Image.open(file)))[None] for file in files])


def test_sample_folder_equals_samples_of_the_masked_model(
    shell: Shell, weights: Sequence[str]
) -> None:
    oracle = oracle_of(student())
    result = shell(
        "sample", *MASKED, "--out", "a", "--count", "5", "--batch-size", "2", "--seed", "7"
    )
    assert result.out == "drew 5 images by DDIMScheduler 3 steps into a\n"
    assert torch.equal(read_pngs("a"), expected(oracle, 5, seed=7, batch_size=2))
    assert not torch.equal(read_pngs("a"), expected(open_model("own:net"), 5, seed=7))
    folded = ("--mode", "infer", "--out", "b", "--count", "5", "--seed", "7")
    assert shell("sample", *MASKED, *folded).status == 0
    assert (read_pngs("a").int() - read_pngs("b").int()).abs().max() <= 1


def test_sample_with_dense_weights_runs_dense(shell: Shell, weights: Sequence[str]) -> None:
    argv = ("--model", "own:net", "--weights", "dense.safetensors", *SETTINGS, "--count", "3")
    assert shell("sample", *argv, "--out", "a").status == 0
    assert torch.equal(read_pngs("a"), expected(open_model("own:net"), 3))
    assert (
        shell("sample", "--model", "own:net", *SETTINGS, "--count", "3", "--out", "b").status == 0
    )
    assert torch.equal(read_pngs("a"), read_pngs("b"))


def test_sample_grid_writes_one_png(shell: Shell, weights: Sequence[str]) -> None:
    result = shell("sample", *MASKED, "--out", "new/grid.png", "--count", "5", "--columns", "3")
    assert result.status == 0
    with Image.open("new/grid.png") as picture:
        assert picture.width > 3 * 64
        assert picture.height > 2 * 64
    assert [path.name for path in Path("new").iterdir()] == ["grid.png"]


def test_sample_again_resumes_and_refuses_other_settings(
    shell: Shell, weights: Sequence[str]
) -> None:
    argv = ("sample", *MASKED, "--out", "a", "--batch-size", "2")
    shell(*argv, "--count", "4")
    before = read_pngs("a")
    Path("a/000003.png").unlink()
    kept = Path("a/000000.png").stat().st_mtime_ns
    Path("a/000001.png").write_bytes(Path("a/000000.png").read_bytes())  # would be drawn anew
    shell(*argv, "--count", "5")
    assert Path("a/000000.png").stat().st_mtime_ns == kept
    after = read_pngs("a")
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])
    assert torch.equal(after[1], before[0])
    assert len(after) == 5
    for changed, says in (
        (("--seed", "1"), "a holds images of seed 0, not 1"),
        (("--steps", "4"), "sampler 'DDIMScheduler 3 steps', not 'DDIMScheduler 4 steps'"),
        (("--weights", "dense.safetensors"), "a holds images of weights_sha256 "),
        (("--objective", "v"), "a holds images of objective 'eps', not 'v'"),
    ):
        for ask in (shell, shell.dry):
            assert says in ask(*argv, "--count", "5", *changed).reason


def group_member(rank: int, folder: Path) -> None:
    os.chdir(folder)
    assert main(["sample", *MASKED, "--out", "b", "--count", "5", "--batch-size", "2"]) == 0
    assert main(["sample", *MASKED, "--out", "b.png", "--count", "5", "--batch-size", "2"]) == 0


def test_sample_in_two_processes_makes_the_same_images(
    shell: Shell, weights: Sequence[str]
) -> None:
    for out in ("a", "a.png"):
        shell("sample", *MASKED, "--out", out, "--count", "5", "--batch-size", "2")
    run_group(group_member, shell.folder)
    assert torch.equal(read_pngs("a"), read_pngs("b"))
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_sample_with_labels_and_guidance(shell: Shell) -> None:
    made = student(num_classes=5)
    sdm.save(made, shell.folder / "student.safetensors")
    argv = ("sample", *MASKED, "--option", "num_classes=5", "--count", "6")
    assert shell(*argv, "--out", "a", "--classes", "4").status == 0
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    assert torch.equal(read_pngs("a"), expected(oracle_of(made), 6, labels=labels))
    strong = ("--labels", "2,0", "--guidance", "3", "--null-label", "4")
    result = shell(*argv, "--out", "b", *strong)
    assert "DDIMScheduler 3 steps, guidance 3.0" in result.out
    labels, guidance = torch.tensor([2, 0] * 3), Guidance(3.0, 4)
    assert torch.equal(
        read_pngs("b"), expected(oracle_of(made), 6, labels=labels, guidance=guidance)
    )


def namespace(**options: Any) -> argparse.Namespace:
    names = ("condition", "labels", "classes", "null", "null_label")
    return argparse.Namespace(**{**dict.fromkeys(names), **options})


def test_read_condition_options_cycles_through_conditions(shell: Shell) -> None:
    assert read_condition_options(namespace()) is None
    condition = read_condition_options(namespace(classes=3))
    assert condition is not None
    assert condition(range(2, 5)).tolist() == [2, 0, 1]
    save_file({"context": torch.tensor([[1.0], [2.0]])}, "texts.safetensors")
    condition = read_condition_options(namespace(condition="texts.safetensors"))
    assert condition is not None
    assert condition(range(1, 4))["context"].tolist() == [[2.0], [1.0], [2.0]]


def test_read_null_options_accepts_tensors_with_and_without_rows(shell: Shell) -> None:
    null = {"text": torch.randn(1, 3), "scale": torch.tensor(2.0)}  # 1 token: no axis of rows
    save_file({name: torch.stack([part] * 4) for name, part in null.items()}, "texts.safetensors")
    save_file(null, "bare.safetensors")
    save_file({name: part[None] for name, part in null.items()}, "row.safetensors")
    condition = read_condition_options(namespace(condition="texts.safetensors"))
    for file in ("bare.safetensors", "row.safetensors"):
        null_read = read_null_options(namespace(null=file), condition)
        torch.testing.assert_close(null_read, null, rtol=0, atol=0)
    assert read_null_options(namespace(null_label=4), condition) == 4


def test_sample_writes_the_provenance_of_its_images(shell: Shell, weights: Sequence[str]) -> None:
    shell("sample", *MASKED, "--out", "a", "--count", "2")
    notes = json.loads(Path("a/samples.json").read_text())
    assert len(notes.pop("weights_sha256")) == 64
    assert notes == {
        "model": "own:net",
        "options": {},
        "pattern": "2:4",
        "sampler": "DDIMScheduler 3 steps",
        "objective": "eps",
        "betas": None,
        "condition": None,
        "null": None,
        "vae": None,
        "seed": 0,
        "shape": [1, 8, 8],
    }


def test_sample_into_a_folder_of_images_of_other_conditions_is_refused(shell: Shell) -> None:
    argv = ("sample", "--model", "own:net", "--option=num_classes=10", *SETTINGS, "--count", "2")
    assert shell(*argv, "--out", "a", "--labels", "3,5").status == 0
    assert shell(*argv, "--out", "b", "--labels", "3", "--guidance=2", "--null-label=9").status == 0
    for out, other, says in (
        ("a", ("--labels", "3,4"), "a holds images of condition '"),
        ("a", ("--classes", "10"), "a holds images of condition '"),
        (
            "b",
            ("--labels", "3", "--guidance=2", "--null-label=8"),
            "b holds images of null 9, not 8",
        ),
    ):
        for call in (shell, shell.dry):
            assert says in call(*argv, "--out", out, *other).reason
    assert shell(*argv, "--out", "a", "--labels", "3,5").status == 0


def test_sample_dry_run_prints_model_sampler_and_folder(
    shell: Shell, weights: Sequence[str]
) -> None:
    assert shell.dry("sample", *MASKED, "--out", "a", "--count", "5").out.splitlines()[:3] == [
        "model   own:net with weights student.safetensors, masked to 2:4, mode train, on cpu",
        "sample  5 images [1, 8, 8] by DDIMScheduler 3 steps, seed 0",
        "out     a",
    ]


UVIT = [f"--option={name}" for name in ("img_size=8", "embed_dim=16", "depth=0", "num_heads=2")]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--model", "UViT", *UVIT], "UViT alone has random weights: give --weights FILE"),
        (["--model", "own:net", "--count", "0"], "shape [0, 1, 8, 8] is not images x"),
        (["--model", "own:net", "--columns", "0"], "--columns 0 is not >= 1"),
        (["--model", "own:net", "--shape", "3x"], "--shape '3x' are not whole numbers like 3x32"),
        (["--model", "own:net", "--shape", "3x8x8"], "images [1, 3, 8, 8] are not [B, 1, 8, 8]"),
        (["--model", "own:net", "--labels", "a"], "--labels 'a' are not whole numbers like 3,5"),
        (["--model", "own:net", "--classes", "0"], "--classes 0 is not >= 1"),
        (["--model", "own:net", "--classes", "4"], "was built without class labels"),
        (["--model", "own:net", "--option", "num_classes=4"], "this U-ViT needs class labels"),
        (["--model", "own:net", "--guidance", "2"], "needs --null-label or --null"),
        (["--model", "own:net", "--guidance", "2", "--null-label", "1"], "needs labels or a cond"),
        (["--model", "own:net", "--condition", "gone"], "cannot read the condition gone"),
        (["--model", "own:net", "--sampler", "ddim", "--objective", "flow"], "does not follow a"),
        (["--model", "own:net", "--weights", "gone.pt"], "cannot read weights from gone.pt"),
        (["--model", "own:net", "--vae", "gone"], "--vae gone holds no AutoencoderKL"),
        (["--model", "own:net", "--steps", "0"], "steps 0 is not >= 1"),
        (["--model", "own:net", "--steps", "5000"], "1000 noise levels: lower --steps"),
        (["--model", "own:halves"], "returns no inputs"),
        (["--model", "own:net", "--out", "own.py"], "cannot write own.py: it is a file"),
    ],
    ids=lambda value: "_".join(value[1:])[:40] if isinstance(value, list) else "",
)
def test_sample_of_an_invalid_request_is_refused(shell: Shell, argv: list[str], says: str) -> None:
    for ask in (shell, shell.dry):
        assert says in ask("sample", "--out", "a", *argv).reason


# ------------------------------------------------------------------ from a run


def run_folder(shell: Shell, *, weights: bool = True, **train: Any) -> Path:
    """A run on the digits, as far as sampling needs it."""
    from sparsedm_compiler.experiment.run_config import RunConfig

    folder = shell.folder / "run"
    config = RunConfig.create(
        {
            "model": {"name": "own:net", "options": {"num_classes": 10}},
            "data": {"train": "digits"},
            "sample": {"sampler": "ddim", "steps": 3},
            "train": train,
            "out": "run",
        }
    )
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(config.as_dict()))
    if weights:
        sdm.save(student(num_classes=10), folder / "student.safetensors")
    return folder


def test_sample_of_a_run_uses_its_settings(shell: Shell) -> None:
    folder = run_folder(shell)
    result = shell(
        "sample",
        "--model",
        folder,
        "--mode",
        "train",
        "--backend",
        "eager",
        "--out",
        "a",
        "--count",
        "12",
    )
    assert result.out == "drew 12 images by DDIMScheduler 3 steps into a\n"
    labels = torch.arange(12) % 10
    assert torch.equal(
        read_pngs("a"), expected(oracle_of(student(num_classes=10)), 12, labels=labels)
    )
    result = shell.dry(
        "sample", "--model", folder, "--out", "b", "--steps", "4", "--sampler", "ddpm"
    )
    assert "DDPMScheduler 4 steps" in result.out


def test_sample_of_a_run_takes_guidance(shell: Shell) -> None:
    folder = run_folder(shell, null_label=9, drop_condition=0.1)
    argv = ("sample", "--model", folder, "--out", "b", "--guidance", "2")
    assert "guidance 2.0" in shell.dry(*argv).out


def test_sample_of_an_unfinished_run_names_its_last_checkpoint(shell: Shell) -> None:
    folder = run_folder(shell, weights=False)
    argv = ("sample", "--model", folder, "--out", "a")
    assert "the run is not finished" in shell.dry(*argv).reason
    last = folder / "checkpoints" / "000000000064"
    last.mkdir(parents=True)
    sdm.save(student(num_classes=10), last / "student.safetensors")
    result = shell.dry(*argv)
    assert f"--weights {last / 'student.safetensors'} is its last checkpoint" in result.reason
    assert shell.dry(*argv, "--weights", last / "student.safetensors").status == 0
