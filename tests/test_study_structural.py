"""Diff-Pruning and narrow models of the study: whole channels go, everywhere, by importance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsedm_compiler as sdm
from benchmarks.study import structural
from benchmarks.study.baselines import count_macs, find_nearest, make_smaller_model
from benchmarks.study.plan import QUICK, Study
from benchmarks.study.setting import Setting
from sparsedm_compiler.data import ImageData
from sparsedm_compiler.models import UViT

SIZES: dict[str, Any] = {"img_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 4, "num_heads": 2}
KEPT = structural.STEPS * 7 // 10
"""11 of 16 channels of a stream, 5 of 8 of a head, 44 of 64 hidden ones."""


class Images(ImageData):
    """Six images of three classes."""

    shape, classes = (1, 4, 4), 3

    def __len__(self) -> int:
        return 6

    def fetch(self, numbers: Sequence[int]) -> Any:
        rows = torch.tensor(list(numbers))
        return torch.linspace(-1, 1, 96).view(6, 1, 4, 4)[rows], rows % 3


def make_model() -> tuple[UViT, dict[str, Tensor], tuple[Tensor, ...]]:
    """A U-ViT of which no two values are equal, made-up gradients, and inputs of a forward."""
    torch.manual_seed(0)
    model = UViT(**SIZES, num_classes=3, mlp_time_embed=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    gradients = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
    return model, gradients, (torch.randn(2, 1, 4, 4), torch.rand(2), torch.tensor([0, 2]))


def find_kept(whole: Tensor, part: Tensor) -> list[int]:
    """Which values of a vector are left."""
    return [whole.tolist().index(value) for value in part.tolist()]


@pytest.fixture(scope="module")
def pruned() -> tuple[UViT, dict[str, Tensor], UViT]:
    """A model, its gradients, and what Diff-Pruning leaves of it."""
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
    model, gradients, inputs = make_model()
    return model, gradients, structural.prune_channels(model, gradients, KEPT, inputs)


def test_pruned_weights_when_sliced_by_hand_are_the_same(
    pruned: tuple[UViT, dict[str, Tensor], UViT],
) -> None:
    model, _, small = pruned
    stream = find_kept(model.patch_embed.proj.bias, small.patch_embed.proj.bias)
    assert len(stream) == 11
    assert small(torch.randn(2, 1, 4, 4), torch.rand(2), torch.tensor([0, 2])).isfinite().all()
    hidden = find_kept(model.time_embed[0].bias, small.time_embed[0].bias)
    torch.testing.assert_close(
        small.time_embed[2].weight, model.time_embed[2].weight[stream][:, hidden], rtol=0, atol=0
    )
    torch.testing.assert_close(small.pos_embed, model.pos_embed[..., stream], rtol=0, atol=0)
    wholes = [*model.in_blocks, model.mid_block, *model.out_blocks]
    parts = [*small.in_blocks, small.mid_block, *small.out_blocks]
    streams, stack = [], []
    for i, (whole, part) in enumerate(zip(wholes, parts, strict=True)):
        if whole.skip_linear is not None:
            wide = [*stream, *(16 + j for j in stack.pop())]
            stream = find_kept(whole.skip_linear.bias, part.skip_linear.bias)
            torch.testing.assert_close(
                part.skip_linear.weight, whole.skip_linear.weight[stream][:, wide], rtol=0, atol=0
            )
        if i < len(model.in_blocks):
            stack.append(stream)
        streams.append(tuple(stream))
        check_block(whole, part, stream)
    assert len(set(streams)) == 3  # each long skip begins a stream of its own
    torch.testing.assert_close(
        small.decoder_pred.weight, model.decoder_pred.weight[:, stream], rtol=0, atol=0
    )


def check_block(whole: Any, part: Any, stream: list[int]) -> None:
    """One block is the whole one, sliced; heads lose the same places in query, key and value."""
    hidden = find_kept(whole.mlp.fc1.bias, part.mlp.fc1.bias)
    assert len(hidden) == 44
    torch.testing.assert_close(
        part.mlp.fc1.weight, whole.mlp.fc1.weight[hidden][:, stream], rtol=0, atol=0
    )
    torch.testing.assert_close(
        part.mlp.fc2.weight, whole.mlp.fc2.weight[stream][:, hidden], rtol=0, atol=0
    )
    columns = find_kept(whole.attn.proj.weight[stream[0]], part.attn.proj.weight[0])
    assert [j - 8 for j in columns[5:]] == columns[:5]  # in both heads
    rows = [start + j for start in (0, 16, 32) for j in columns]
    expected = whole.attn.qkv.weight[rows][:, stream].clone()
    expected[:10] *= (5 / 8) ** 0.5
    torch.testing.assert_close(part.attn.qkv.weight, expected)
    torch.testing.assert_close(part.norm1.weight, whole.norm1.weight[stream], rtol=0, atol=0)


def test_kept_channels_when_ranked_by_hand_have_the_largest_taylor_terms(
    pruned: tuple[UViT, dict[str, Tensor], UViT],
) -> None:
    model, gradients, small = pruned
    rows = model.mid_block.mlp.fc1.weight * gradients["mid_block.mlp.fc1.weight"]
    columns = model.mid_block.mlp.fc2.weight * gradients["mid_block.mlp.fc2.weight"]
    score = rows.abs().sum(1) + columns.abs().sum(0)
    kept = find_kept(model.mid_block.mlp.fc1.bias, small.mid_block.mlp.fc1.bias)
    assert kept == sorted(score.topk(44).indices.tolist())


def test_prune_channels_when_all_are_kept_changes_nothing() -> None:
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
    model, gradients, inputs = make_model()
    same = structural.prune_channels(model, gradients, structural.STEPS, inputs)
    assert torch.equal(same(*inputs), model(*inputs))
    assert same.state_dict().keys() == model.state_dict().keys()


def test_compute_gradients_leaves_out_timesteps_below_the_threshold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(structural, "LEVELS", 4)
    model, _, _ = make_model()
    sums = {}
    for threshold in (0.0, 0.9999):
        monkeypatch.setattr(structural, "THRESHOLD", threshold)
        gradients, count = structural.compute_gradients(model, Images(), seed=0)
        sums[count] = gradients["decoder_pred.weight"]
    assert sorted(sums) == [1, 4]
    assert not torch.allclose(sums[1], sums[4])
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("method", ["diff-pruning", "narrow-long"])
def test_make_smaller_model_has_the_macs_of_the_pattern(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == "diff-pruning":
        pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
    pytest.importorskip("sklearn")
    monkeypatch.setattr(structural, "LEVELS", 2)
    study = Study("digits", "digits:test", None, tmp_path, QUICK)
    torch.manual_seed(0)
    teacher = study.make_model()
    small = make_smaller_model(study, Setting("baselines", method, "1:4", 0), teacher)
    target = sdm.count_macs(teacher, *study.make_inputs(), pattern="1:4").sparse
    macs = count_macs(small, study.make_inputs())
    assert macs == sdm.count_macs(small, *study.make_inputs(), pattern="1:1").dense
    nearest = {"diff-pruning": 0.05}.get(method, 0.2)  # 32 is a narrow model's 4 heads by 8
    assert abs(macs / target - 1) < nearest
    options = study.make_student_options(Setting("baselines", method, "1:4", 0))
    assert options["method"] == "dense"
    assert options["images"] == QUICK.images + (512 if method == "narrow-long" else 0)


def test_find_nearest_takes_the_smaller_gap_on_either_side() -> None:
    assert find_nearest(lambda size: size * size, range(1, 20), 38) == 6
    assert find_nearest(lambda size: size * size, range(1, 20), 45) == 7
    assert find_nearest(lambda size: size * size, range(1, 20), 10_000) == 19
    assert find_nearest(lambda size: size * size, range(3, 20), 0) == 3
