"""``sparsedm fid``: scores of folders and models against those of ``evaluate``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsedm_compiler.data import open_data
from sparsedm_compiler.diffusion.image_batches import round_to_uint8
from sparsedm_compiler.evaluate import (
    Score,
    frechet_distance,
    kernel_distance,
    load_statistics,
    precision_recall,
)
from sparsedm_compiler.reporting import save_images
from tests.cli.conftest import Shell

PIXELS = ("--network", "own:pixels")


@pytest.fixture
def images(shell: Shell) -> torch.Tensor:
    """Ninety digits, upside down, as a folder of PNGs; features [90, 64] are their pixels."""
    data = open_data("digits:test", labels=False)
    flipped = data.fetch(range(90))[0].flip(-2)
    save_images(shell.folder / "images", range(90), flipped)
    return round_to_uint8(flipped).flatten(1)


@pytest.fixture
def theirs() -> torch.Tensor:
    """The held-out digits as features [360, 64]."""
    data = open_data("digits:test", labels=False)
    return round_to_uint8(data.fetch(range(len(data)))[0]).flatten(1)


FOLDER = ("fid", "--images", "images", "--reference", "digits:test", "--gray", *PIXELS)


def test_fid_of_a_folder_equals_the_metrics_of_evaluate(
    shell: Shell, images: torch.Tensor, theirs: torch.Tensor
) -> None:
    result = shell(*FOLDER, "--kid", "--pr", "--made-by", "a mirror", "--json")
    scores = [Score(**values) for values in json.loads(result.out)]
    assert [score.metric for score in scores] == ["FD", "KID", "precision", "recall"]
    distance, kernel, *shares = (score.value for score in scores)
    assert distance == pytest.approx(frechet_distance(images, theirs), rel=1e-4)
    assert kernel == pytest.approx(kernel_distance(images, theirs)[0], rel=1e-3)
    assert shares == pytest.approx(precision_recall(images, theirs), abs=0.02)
    for score in scores:
        assert (score.network, score.sampler) == ("pixels", "a mirror")
        assert (score.count, score.reference_count) == (90, 360)


def test_fid_prints_counts_and_sampler(shell: Shell, images: torch.Tensor) -> None:
    result = shell(*FOLDER)
    line = result.out.splitlines()[-1]
    assert line.startswith("FD-pixels ")
    assert line.endswith(" (90 vs 360 images, unknown sampler)")
    (shell.folder / "images" / "samples.json").write_text(json.dumps({"sampler": "DDIM 5 steps"}))
    assert "(90 vs 360 images, DDIM 5 steps)" in shell(*FOLDER).out


def test_fid_save_stats_writes_a_reusable_reference(
    shell: Shell, images: torch.Tensor, theirs: torch.Tensor
) -> None:
    result = shell("fid", "--reference", "digits:test", *PIXELS, "--save-stats", "new/ref.npz")
    assert result.out == "wrote new/ref.npz\n"
    saved = load_statistics("new/ref.npz")
    np.testing.assert_allclose(saved.mean, theirs.double().mean(0), rtol=1e-9)
    assert (saved.count, saved.network) == (360, "pixels")
    by_file = shell("fid", "--images", "images", "--gray", "--reference", "new/ref.npz", *PIXELS)
    assert by_file.out.splitlines()[-1] == shell(*FOLDER).out.splitlines()[-1]


def test_fid_stored_limits_the_images_of_kid(shell: Shell, images: torch.Tensor) -> None:
    first, kernel = json.loads(shell(*FOLDER, "--kid", "--stored", "40", "--json").out)
    assert (first["count"], kernel["count"], kernel["reference_count"]) == (90, 40, 40)


def test_fid_of_a_model_equals_fid_of_its_saved_samples(
    shell: Shell, weights: Sequence[str]
) -> None:
    model = ("--model", "own:net", "--weights", "student.safetensors", "--backend", "eager")
    settings = ("--count", "70", "--steps", "2", "--sampler", "ddim", "--mode", "train")
    reference = ("--reference", "digits:test", *PIXELS, "--json")
    (drawn,) = json.loads(shell("fid", *model, *settings, *reference).out)
    shell("sample", *model, *settings, "--out", "drawn")
    (saved,) = json.loads(shell("fid", "--images", "drawn", "--gray", *reference).out)
    assert drawn["value"] == pytest.approx(saved["value"], rel=1e-5)
    assert {**drawn, "value": 0} == {**saved, "value": 0}
    assert drawn["sampler"] == "DDIMScheduler 2 steps"


def test_fid_dry_run_names_images_and_reference(shell: Shell, images: torch.Tensor) -> None:
    result = shell.dry(*FOLDER, "--save-stats", "new/ref.npz")
    assert result.out.splitlines()[:4] == [
        "images     90 of images, unknown sampler",
        "reference  digits:test",
        "network    pixels",
        "statistics new/ref.npz",
    ]


def change(argv: Sequence[str], *values: str) -> list[str]:
    return [*argv, *values]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (FOLDER[:3] + FOLDER[3:5] + PIXELS, "the images are [3, 8, 8], the reference is [1, 8, 8]"),
        (["fid", "--reference", "digits", *PIXELS], "nothing to score: give --images, or --model"),
        (change(FOLDER, "--model", "own:net"), "both --images and --model are given"),
        (change(FOLDER, "--images", "gone"), "'gone' does not exist"),
        (change(FOLDER, "--reference", "gone.npz"), "gone.npz"),
        (change(FOLDER, "--network", "own:nothing"), "cannot import 'own:nothing'"),
        (change(FOLDER, "--weights-path", "x"), "--weights-path is for --network inception"),
        (
            change(FOLDER, "--network", "inception", "--weights-path", "x"),
            "InceptionV3 weights at x",
        ),
        (change(FOLDER, "--save-stats", "own.py/x.npz"), "own.py is a file, not a folder"),
        (change(FOLDER, "--stored", "1", "--kid"), "stored 1 of Metrics is not >= 2"),
    ],
    ids=lambda value: "_".join(value[-2:]) if isinstance(value, list | tuple) else "",
)
def test_fid_of_an_invalid_request_is_refused(
    shell: Shell, images: Any, argv: Sequence[str], says: str
) -> None:
    for ask in (shell, shell.dry):
        assert says in ask(*argv).reason


def test_fid_kid_against_statistics_is_refused(shell: Shell, images: Any) -> None:
    shell("fid", "--reference", "digits:test", *PIXELS, "--save-stats", "ref.npz")
    argv = ("fid", "--images", "images", "--gray", "--reference", "ref.npz", *PIXELS, "--kid")
    assert "holds statistics and no features" in shell(*argv).err
    assert Path("ref.npz").exists()
