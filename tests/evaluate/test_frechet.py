"""The Fréchet distance against its closed form, and pytorch-fid beside any torchvision."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from sparsedm_compiler.diffusion import generator_at
from sparsedm_compiler.errors import DataError
from sparsedm_compiler.evaluate import extract_features, frechet_distance, frechet_score


def normal(count: int, width: int) -> Tensor:
    return torch.randn(count, width, generator=generator_at("normal"), dtype=torch.float64)


def test_frechet_distance_of_shifted_and_scaled_features_equals_its_closed_form() -> None:
    a = normal(500, 6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, a + 2) == pytest.approx(6 * 4, rel=1e-6)
    mean, spread = a.mean(0), a.var(0).sum()
    expected = (4 * mean.square().sum() + 4 * spread).item()  # |3m - m|^2 + tr(C + 9C - 6C)
    assert frechet_distance(a, 3 * a) == pytest.approx(expected, rel=1e-6)


def test_frechet_score_runs_the_network_in_eval_mode_and_prints_its_conditions() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5))
    images = normal(40, 4).float().reshape(40, 1, 2, 2)
    score = frechet_score(network, images, images[:30] + 1, name="Pixels", sampler="DDIM 50 steps")
    assert score.value == pytest.approx(
        frechet_distance(images.flatten(1), images[:30].flatten(1) + 1), rel=1e-6
    )
    assert str(score) == (f"FD-Pixels {score.value:.3f} (40 vs 30 images, DDIM 50 steps)")
    assert network[1].training
    by_function = extract_features(lambda x: x.flatten(1), images, batch_size=7)
    assert torch.equal(by_function, extract_features(network, images))


def test_frechet_distance_of_invalid_features_raises_data_error() -> None:
    a = normal(10, 3)
    for wrong in (normal(10, 4), normal(10, 1)[:, 0], a[:1]):
        with pytest.raises(DataError):
            frechet_distance(a, wrong)
    with pytest.raises(DataError, match="NaN"):
        frechet_distance(a, a * torch.inf)


FRESH = """
import torch
from sparsedm_compiler.evaluate import frechet_distance
constant = torch.eye(3)[:2].repeat(2, 1)
assert frechet_distance(constant, constant) < 1e-3
from pytorch_fid.inception import InceptionV3
from diffusers import UNet2DModel
from transformers import CLIPTextModel
"""


def test_frechet_distance_in_a_fresh_process_leaves_diffusers_importable() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FRESH],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_frechet_distance_of_equal_features_is_never_below_zero() -> None:
    for seed in range(20):
        features = torch.randn(60, 48, generator=torch.Generator().manual_seed(seed))
        distance = frechet_distance(features, features)
        assert 0 <= distance < 1e-4
        assert f"{distance:.3f}" == "0.000"
