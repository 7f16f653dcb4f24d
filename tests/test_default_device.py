"""``torch.set_default_device``: what the library makes lies where it belongs all the same.

"meta" stands in for a card: what is made on it by mistake has no values, and mixes with no others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.diffusion import Guidance, make_scheduler, sample
from sparsedm_compiler.evaluate import precision_recall
from sparsedm_compiler.masks.nm_mask import nm_mask
from sparsedm_compiler.models import UViT
from tests.oracle import assert_same

OTHER = torch.device("meta")
X = torch.rand(8, 3, 8, 8) * 2 - 1
Y = torch.arange(8) % 4
T = torch.full((8,), 0.5)


def uvit() -> nn.Module:
    torch.manual_seed(0)
    return UViT(img_size=8, patch_size=2, embed_dim=16, depth=2, num_heads=2, num_classes=5)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)])


def assert_same_there(compute: Callable[[], Tensor]) -> None:
    """A result is the same under another default device."""
    here = compute()
    with OTHER:
        there = compute()
    assert_same(there, here)


@pytest.mark.parametrize("text", ["2:4", "31:32", "1:8x4", "64:2:8", "2:4t", "1:2@16x4+2:4"])
def test_masks(text: str) -> None:
    pattern = sdm.Pattern.parse(text)
    weight = torch.randn(2 * pattern.height, 4 * pattern.width, 3, 3)
    assert_same_there(lambda: nm_mask(weight, pattern))


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # numpy, of diffusers
@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_sampling(sampler: str) -> None:
    model = uvit()
    options = {"steps": 2, "labels": Y[:2], "progress": False, "guidance": Guidance(2.0, null=4)}

    def draw() -> Tensor:
        return sample(model, make_scheduler(sampler, "eps"), shape=(2, 3, 8, 8), **options)

    assert_same_there(draw)


def test_scores() -> None:
    a, b = torch.randn(50, 8), torch.randn(60, 8)
    with OTHER:
        assert precision_recall(a, b, k=2)[0] > 0


@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="Adam of torch 2.11 counts its steps on the default device"
)
def test_training_and_files(tmp_path: Path) -> None:
    model = uvit()
    data: Any = (X, Y)
    weights = []
    for folder, device in (("here", torch.device("cpu")), ("there", OTHER)):
        student = sdm.compile(model, "2:4", backend="eager")
        options = {"images": 16, "batch_size": 8, "held_out": data, "out": tmp_path / folder}
        with device:
            sdm.finetune(student, model, data, progress=False, **options)
            for form in ("state", "dense", "compact"):
                path = tmp_path / f"{folder}-{form}.safetensors"
                sdm.save(student, path, form=form)
                loaded = sdm.load(path, copy.deepcopy(model), backend="eager")
                assert_same(loaded(X, T, Y), student(X, T, Y))
        weights.append(dict(student.named_parameters()))
    for name, weight in weights[0].items():
        assert_same(weights[1][name], weight)


@pytest.mark.parametrize("way", ["one-shot", "permuted", "mixed"])
def test_pruning_without_training(way: str) -> None:
    models, batches = [net(), net()], [torch.randn(8, 32)]

    def prune() -> Tensor:
        model = models.pop()
        if way == "one-shot":
            sdm.prune_one_shot(model, "2:4", batches, progress=False)
        elif way == "permuted":
            sdm.permute_channels(model, "2:4", batches, progress=False)
        else:
            options = {"macs": "2:4", "progress": False}
            choice = sdm.choose_patterns(model, ["2:4", "1:4", "1:8"], batches, **options)
            sdm.prune_one_shot(model, "2:4", batches, overrides=choice.overrides, progress=False)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    assert_same_there(prune)


@pytest.mark.parametrize("kernels", [None, {"*": "sparse"}])
def test_calls_of_a_folded_model(kernels: Any) -> None:
    options: dict[str, Any] = {} if kernels is None else {"kernels": kernels, "finalize": True}
    student = sdm.compile(uvit(), "2:4", mode="infer", backend="eager", **options)
    expected = sdm.compile(uvit(), "2:4", backend="eager")(X, T, Y)
    with OTHER, torch.no_grad():
        for _ in range(3):
            assert_same(student(X, T, Y), expected, tolerance=1e-5)
        assert student.state_dict().keys() == dict(uvit().state_dict()).keys()
