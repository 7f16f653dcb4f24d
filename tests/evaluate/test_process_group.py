"""Scores of two processes against those of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparsedm_compiler.diffusion import (
    SamplePlan,
    generator_at,
    image_batches,
    make_scheduler,
    sample_batches,
)
from sparsedm_compiler.diffusion.image_batches import ProcessShare
from sparsedm_compiler.errors import ConfigError
from sparsedm_compiler.evaluate import FeatureNetwork, Metrics, Moments, Score, score_images
from sparsedm_compiler.evaluate.process_group import (
    gather_objects,
    merge_moments,
    own_share,
    raising_together,
    sum_over_processes,
)
from tests.group import run_group

METRICS = Metrics(kid=True, precision_recall=True, stored=30, subsets=4, subset_size=20)


def images(name: str) -> Tensor:
    return torch.rand(50, 1, 2, 3, generator=generator_at(name)) * 2 - 1


def scores(share: ProcessShare, last: int = 50) -> tuple[Score, ...]:
    network = FeatureNetwork("Pixels", lambda x: x.flatten(1))
    batches = image_batches(images("ours")[:last], batch_size=8, share=share)
    return score_images(
        network, batches, reference=images("theirs"), sampler="none", metrics=METRICS
    )


class Shifts(nn.Module):
    """A model with a buffer, which DistributedDataParallel keeps equal before every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("shift", torch.tensor(0.25))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shifted: Tensor = self.scale * x + self.shift
        return shifted


def drawn(model: nn.Module, share: ProcessShare) -> dict[range, Tensor]:
    """Five images in three chunks: two processes have two and one of them."""
    plan = SamplePlan((5, 1, 2, 2), steps=2, batch_size=2)
    scheduler = make_scheduler("ddpm", "eps")
    return dict(sample_batches(model, scheduler, plan, share=share, progress=False))


def together(rank: int, folder: Path) -> None:
    """Runs in one of two processes: checks the helpers and saves samples and scores."""
    assert own_share() == (rank, 2)
    assert sum_over_processes(torch.tensor([1.0, rank])).tolist() == [2.0, 1.0]
    assert gather_objects(("rank", rank)) == [("rank", 0), ("rank", 1)]
    assert merge_moments(None) is None
    features = images("ours").flatten(1)
    whole = Moments.from_features(features)
    for own in (features[rank * 13 :][: 13 + 24 * rank], features if rank else features[:0]):
        merged = merge_moments(Moments.from_features(own) if len(own) else None)
        assert merged is not None
        assert merged.count == 50
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(merged.scatter, whole.scatter, rtol=1e-12, atol=1e-14)
    torch.save(drawn(DistributedDataParallel(Shifts()), (rank, 2)), folder / f"drawn{rank}.pt")
    torch.save([scores((rank, 2)), scores((rank, 2), last=7)], folder / f"{rank}.pt")


def test_score_images_in_two_processes_equals_one_process(tmp_path: Path) -> None:
    run_group(together, tmp_path)
    halves = [torch.load(tmp_path / f"drawn{rank}.pt", weights_only=False) for rank in range(2)]
    whole = drawn(Shifts(), (0, 1))
    assert [len(half) for half in halves] == [2, 1]
    assert all(torch.equal(images, whole[n]) for half in halves for n, images in half.items())
    alone = [scores((0, 1)), scores((0, 1), last=7)]
    for rank in range(2):
        for own, expected in zip(
            torch.load(tmp_path / f"{rank}.pt", weights_only=False), alone, strict=True
        ):
            assert [str(score) for score in own] == [str(score) for score in expected]
            values = [score.value for score in own]
            assert values == pytest.approx([score.value for score in expected], rel=1e-9)


def test_process_group_helpers_without_a_group_return_their_input(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert own_share() == (0, 1)
    assert gather_objects(3) == [3]
    assert sum_over_processes(torch.ones(2)).tolist() == [1, 1]
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"4 processes, .* call accelerate.PartialState"):
        own_share()


def refuse_in(rank: int, refusing: int) -> None:
    """A block that is refused in one process."""
    with raising_together():
        if rank == refusing:
            raise ConfigError(f"refused by process {rank}")


def refused_in_one(rank: int, folder: Path) -> None:
    """An error of one process is raised in all; a block without errors passes in all."""
    refuse_in(rank, 2)
    with pytest.raises(ConfigError, match="refused by process 1"):
        refuse_in(rank, 1)
    (folder / f"{rank}").touch()


def test_raising_together_raises_an_error_of_one_process_in_all(tmp_path: Path) -> None:
    run_group(refused_in_one, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
    with pytest.raises(ConfigError, match="refused by process 0"):
        refuse_in(0, 0)
