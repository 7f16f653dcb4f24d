"""Selection networks: right for every input, and as cheap as was counted."""

from __future__ import annotations

from itertools import product

import pytest

from sparsedm_compiler.selection.sorting_network import SortingNetwork, build_selection_network


def run(network: SortingNetwork, values: list[int]) -> list[int]:
    """The outputs, computed on plain integers."""
    wires = dict(enumerate(values))
    for step in network.steps:
        a, b = wires.pop(step.a), wires.pop(step.b)
        if step.high is not None:
            wires[step.high] = max(a, b)
        if step.low is not None:
            wires[step.low] = min(a, b)
    return [wires[output] for output in network.outputs]


@pytest.mark.parametrize("m", range(2, 12))
def test_selection_network_selects_every_pair_of_neighbouring_ranks(m: int) -> None:
    """By the 0-1 principle, right on all inputs of zeros and ones is right on all inputs."""
    for rank in range(1, m):
        network = build_selection_network((1,) * m, (rank - 1, rank))
        for values in product((0, 1), repeat=m):
            ranked = sorted(values, reverse=True)
            assert run(network, list(values)) == ranked[rank - 1 : rank + 1]


@pytest.mark.parametrize("sizes", [(2, 2), (3, 3, 3), (2, 2, 2, 2), (4, 1), (1, 2, 3)])
def test_selection_network_merges_sorted_lists(sizes: tuple[int, ...]) -> None:
    ranks = tuple(range(sum(sizes)))
    network = build_selection_network(sizes, ranks)
    for ones in product(*(range(size + 1) for size in sizes)):
        lists = [[1] * one + [0] * (size - one) for one, size in zip(ones, sizes, strict=True)]
        values = [value for part in lists for value in part]
        assert run(network, values) == sorted(values, reverse=True)


COSTS = {
    (2, 0, 1): 2,
    (4, 1, 2): 8,
    (5, 1, 2): 13,
    (8, 0): 7,
    (8, 0, 1): 20,
    (8, 3, 4): 28,
    (32, 0, 1): 92,
    (32, 15, 16): 284,
}


@pytest.mark.parametrize("m_and_ranks", COSTS)
def test_selection_network_cost_is_as_low_as_counted_by_hand(m_and_ranks: tuple[int, ...]) -> None:
    m, *ranks = m_and_ranks
    assert build_selection_network((1,) * m, tuple(ranks)).cost == COSTS[m_and_ranks]
