"""``PatternChoice``: the pattern of every layer, what it costs, and the options for ``compile``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from ...errors import ConfigError
from ...fileio import write_atomically
from ...patterns import Pattern
from .layer_costs import LayerCosts
from .read_choice import read_choice
from .solve_budget import solve_budget


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """The pattern of one weight.

    Attributes:
        weight: Its name.
        pattern: The pattern that was chosen; a dense one such as "1:1" leaves the weight dense.
        errors: The error by candidate.
        costs: MACs or milliseconds of all its uses in a call, by candidate.
    """

    weight: str
    pattern: str
    errors: Mapping[str, float]
    costs: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class PatternChoice:
    """What ``choose_patterns`` chose.

    Attributes:
        pattern: The pattern to give ``compile``: the candidate that most weights got.
        unit: "MACs" or "ms".
        budget: The most that the layers of the model may cost.
        cost: What they cost: convolutions and linear layers, those that stay dense among them.
        score: What errors are of: "output" or "layer".
        keep_dense: The weights for which "dense" was chosen, and the layers that were to stay so.
        rows: One row per weight, in the order of use.
        policy: Which layers were to be pruned.
        fixed: The share of ``cost`` of layers that stay dense in any case.
    """

    pattern: str
    unit: str
    budget: float
    cost: float
    score: str
    keep_dense: tuple[str, ...]
    rows: tuple[LayerChoice, ...]
    policy: str
    fixed: float

    @property
    def overrides(self) -> dict[str, str]:
        """The patterns of the weights that have another than ``pattern``."""
        dense = {*self.keep_dense}
        return {
            row.weight: row.pattern
            for row in self.rows
            if row.pattern != self.pattern and row.weight not in dense
        }

    @property
    def error(self) -> float:
        """The sum of the errors of all weights as chosen."""
        return sum(row.errors[row.pattern] for row in self.rows)

    @property
    def options(self) -> dict[str, Any]:
        """The options for ``compile`` and ``prune_one_shot`` beside ``pattern``."""
        return {
            "keep_dense": list(self.keep_dense),
            "overrides": self.overrides,
            "policy": self.policy,
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {
            "pattern": self.pattern,
            **self.options,
            "unit": self.unit,
            "budget": self.budget,
            "cost": self.cost,
            "fixed": self.fixed,
            "score": self.score,
            "error": self.error,
            "layers": [asdict(row) for row in self.rows],
        }

    def within(self, budget: float) -> PatternChoice:
        """Chooses for another budget, of the errors and costs that are known already.

        Args:
            budget: MACs or milliseconds, as ``unit`` says.

        Returns:
            The choice for that budget.

        Raises:
            ConfigError: It is less than the cheapest candidates cost.
        """
        costs = LayerCosts(
            self.unit, self.fixed, {row.weight: row.costs for row in self.rows}, None
        )
        dense = {row.weight for row in self.rows}
        return choose_within(
            budget,
            costs,
            {row.weight: row.errors for row in self.rows},
            score=self.score,
            keep_dense=tuple(glob for glob in self.keep_dense if glob not in dense),
            policy=self.policy,
        )

    def save(self, path: str | Path) -> None:
        """Writes all of it as JSON; ``overrides`` and the other options are at the top level.

        Args:
            path: The file. JSON is YAML too, so that its options can be pasted into a recipe.
        """
        write_atomically(Path(path), (json.dumps(self.to_dict(), indent=1) + "\n").encode())

    @staticmethod
    def load(path: str | Path) -> PatternChoice:
        """Reads what ``save`` wrote, exactly.

        Args:
            path: The file.

        Returns:
            The choice.

        Raises:
            ConfigError: The file cannot be read, lacks a value, has one that no choice has, or
                contradicts itself, e.g. since some of it was edited.

        Example:
            >>> import tempfile, torch, sparsedm_compiler as sdm
            >>> net = torch.nn.Sequential(*[torch.nn.Linear(16, 16) for _ in range(4)])
            >>> choice = sdm.choose_patterns(
            ...     net, ["2:4", "1:4"], [torch.randn(8, 16)], macs="1:4", progress=False
            ... )
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     choice.save(f"{folder}/patterns.json")
            ...     sdm.PatternChoice.load(f"{folder}/patterns.json") == choice
            True
        """
        values = read_choice(Path(path))
        choice = PatternChoice(
            **{name: values[name] for name in ("pattern", "unit", "budget", "cost", "score")},
            keep_dense=tuple(values["keep_dense"]),
            rows=tuple(LayerChoice(**row) for row in values["layers"]),
            policy=values["policy"],
            fixed=values["fixed"],
        )
        for name in ("overrides", "error"):
            if choice.to_dict()[name] != values[name]:
                raise ConfigError(f"{path}: {name} are not those of its layers: choose anew")
        return choice

    def __str__(self) -> str:
        names = [*dict.fromkeys(text for row in self.rows for text in row.errors)]
        body = [
            (
                row.weight,
                row.pattern,
                *(f"{row.errors[text]:.5f}" if text in row.errors else "" for text in names),
                _format(row.costs[row.pattern], self.unit),
            )
            for row in self.rows
        ]
        head = ("weight", "pattern", *(f"error at {text}" for text in names), self.unit)
        table = tabulate(body, head, disable_numparse=True)
        cost, budget = _format(self.cost, self.unit), _format(self.budget, self.unit)
        return (
            f"{table}\n{len(self.rows)} weights: {cost} of {budget} {self.unit}, sum of errors "
            f"{self.error:.5f}"
        )


def _format(cost: float, unit: str) -> str:
    return f"{cost:,.0f}" if unit == "MACs" else f"{cost:.4f}"


def require_affordable(
    unit: str, fixed: float, costs: Mapping[str, Mapping[str, float]], budget: float
) -> None:
    """Raises ConfigError where the cheapest candidates cost more than the budget."""
    least = fixed + sum(min(own.values()) for own in costs.values())
    if least > budget:
        raise ConfigError(
            f"a budget of {budget:,.6g} {unit} is less than the {least:,.6g} that the cheapest "
            "candidates cost: give more, or sparser candidates"
        )


def choose_within(
    budget: float,
    costs: LayerCosts,
    errors: Mapping[str, Mapping[str, float]],
    *,
    score: str,
    keep_dense: tuple[str, ...],
    policy: str,
) -> PatternChoice:
    """Chooses a candidate for every weight, and returns the choice.

    Raises:
        ConfigError: The budget is less than the cheapest candidates cost.
    """
    require_affordable(costs.unit, costs.fixed, costs.by_weight, budget)
    names = [*costs.by_weight]
    texts = {name: [*costs.by_weight[name]] for name in names}
    numbers = solve_budget(
        [np.array([errors[name][text] for text in texts[name]]) for name in names],
        [np.array([costs.by_weight[name][text] for text in texts[name]]) for name in names],
        max(budget - costs.fixed, sum(min(costs.by_weight[name].values()) for name in names)),
    )
    chosen = {name: texts[name][k] for name, k in zip(names, numbers, strict=True)}
    dense = [name for name, text in chosen.items() if Pattern.parse(text).is_dense]
    counts = Counter(text for name, text in chosen.items() if name not in dense)
    sparse = [text for own in texts.values() for text in own if not Pattern.parse(text).is_dense]
    rows = tuple(
        LayerChoice(name, chosen[name], dict(errors[name]), dict(costs.by_weight[name]))
        for name in names
    )
    return PatternChoice(
        pattern=counts.most_common(1)[0][0] if counts else sparse[0],
        unit=costs.unit,
        budget=budget,
        cost=costs.fixed + sum(row.costs[row.pattern] for row in rows),
        score=score,
        keep_dense=(*keep_dense, *dense),
        rows=rows,
        policy=policy,
        fixed=costs.fixed,
    )
