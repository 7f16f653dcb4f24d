"""Precision and recall against brute force over balls in numpy."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsedm_compiler.diffusion import generator_at
from sparsedm_compiler.errors import ConfigError, DataError
from sparsedm_compiler.evaluate import precision_recall

# the package shows the function under this name
MODULE = importlib.import_module("sparsedm_compiler.evaluate.precision_recall")


def drawn(name: str, count: int, width: int = 3) -> Tensor:
    return torch.randn(count, width, generator=generator_at(name))


def share_inside(points: np.ndarray, centres: np.ndarray, k: int) -> float:
    """The share of ``points`` in a ball around one of ``centres`` that holds its k neighbours."""
    inside = 0
    for point in points:
        for number, centre in enumerate(centres):
            others = np.delete(centres, number, axis=0)
            radius = np.sort(np.linalg.norm(others - centre, axis=1))[k - 1]
            if np.linalg.norm(point - centre) <= radius:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("chunk", [4, 1024])
def test_precision_recall_equals_brute_force_over_balls(
    k: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "CHUNK", chunk)
    ours, theirs = drawn("a", 23) + 1, drawn("b", 17)
    expected = [
        share_inside(a.double().numpy(), b.double().numpy(), k)
        for a, b in ((ours, theirs), (theirs, ours))
    ]
    assert list(precision_recall(ours, theirs, k=k)) == expected
    assert 0 < expected[1] < expected[0] < 1  # or the shares would say little


@pytest.mark.parametrize("away", [0, 19, 30, 39, 10_000])  # 19 to 39 fail at SLACK = 0
def test_precision_counts_points_on_the_edge_of_a_ball_as_inside(away: int) -> None:
    centres = (
        torch.tensor([0.0, 10.0, 31.0]).double()[:, None] + away
    )  # balls of radius 10, 10 and 21
    edges = torch.tensor([-10.0, 52.0]).double()[:, None] + away
    for far, share in ((edges, 1.0), (edges + torch.tensor([[-1e-3], [1e-3]]), 0.0)):
        assert precision_recall(torch.cat([far] * 2), centres, k=1)[0] == share


def test_precision_recall_of_repeated_features_is_one() -> None:
    copies = drawn("a", 20, 100).repeat_interleave(4, 0) + 30
    assert precision_recall(copies[::4], copies, k=3) == (1.0, 1.0)


def test_recall_falls_with_a_missing_mode_and_precision_with_an_extra_one() -> None:
    left, right = drawn("a", 40), drawn("b", 40) + 50
    assert precision_recall(left, torch.cat([left, right])) == (1.0, 0.5)
    assert precision_recall(torch.cat([left, right]), left) == (0.5, 1.0)


def test_precision_recall_of_invalid_input_raises() -> None:
    a = drawn("a", 5)
    with pytest.raises(DataError, match="at least 4 rows"):
        precision_recall(a, a[:3])
    for wrong in (drawn("b", 5, 2), a * torch.inf):
        with pytest.raises(DataError):
            precision_recall(a, wrong)
    with pytest.raises(ConfigError, match="k = 0 is no neighbour"):
        precision_recall(a, a, k=0)
