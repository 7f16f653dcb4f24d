"""The frozen values that analyses return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tabulate import tabulate

from .patterns import Pattern


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to one weight: pruned to ``pattern``, or left dense for ``refusal``.

    ``weight``: parameter name in the model. ``op``: "linear", "conv2d", ... ``shape``: the
    weight's shape. Exactly one of ``pattern`` and ``refusal`` is set.
    """

    weight: str
    op: str
    shape: tuple[int, ...]
    pattern: Pattern | None = None
    refusal: str | None = None

    @property
    def accepted(self) -> bool:
        """Whether the weight is pruned."""
        return self.pattern is not None

    def prefixed(self, prefix: str) -> Decision:
        """The same decision with the weight's name inside a larger model."""
        return replace(self, weight=prefix + self.weight)


@dataclass(frozen=True, slots=True)
class Choice:
    """Which kernel multiplies by one folded weight, and why.

    ``weight``: parameter name. ``inputs``: shape of what it multiplies, one per use. ``kernel``:
    "dense" or the name of a sparse kernel. ``dense_ms``/``sparse_ms``: medians of one call of
    dense and of the fastest sparse kernel, None where nothing was measured. ``reason``: a sentence.
    ``dense_bytes``/``run_bytes``: size of the weight, and of what the kernel reads in its place.
    """

    weight: str
    inputs: tuple[tuple[int, ...], ...]
    kernel: str
    reason: str
    dense_ms: float | None = None
    sparse_ms: float | None = None
    dense_bytes: int = 0
    run_bytes: int = 0

    def prefixed(self, prefix: str) -> Choice:
        """The same choice with the weight's name inside a larger model."""
        return replace(self, weight=prefix + self.weight)


@dataclass(frozen=True, slots=True)
class MacRow:
    """MACs of one operand of one call node.

    ``name``: the weight's parameter name, or the node's name where no parameter is involved.
    ``kind``: "conv", "linear" or "attention" (a product of two activations).
    ``shape``: the weight's shape, () for attention. ``dense``/``sparse``: exact MACs before and
    after pruning (equal where the row stays dense, ``refusal`` says why).
    """

    name: str
    kind: str
    op: str
    shape: tuple[int, ...]
    dense: int
    sparse: int
    pattern: Pattern | None = None
    refusal: str | None = None


@dataclass(frozen=True, slots=True)
class MacsReport:
    """MACs of one forward: ``dense`` and ``sparse`` are conv+linear, ``attention`` is apart."""

    dense: int
    sparse: int
    attention: int
    rows: tuple[MacRow, ...] = field(repr=False)

    @property
    def totals(self) -> dict[str, int]:
        """The three sums by name."""
        return {"dense": self.dense, "sparse": self.sparse, "attention": self.attention}

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: totals, the convention, and one entry per row."""
        return {
            "convention": CONVENTION,
            **self.totals,
            "rows": [
                {
                    "name": row.name,
                    "kind": row.kind,
                    "op": row.op,
                    "shape": list(row.shape),
                    "dense": row.dense,
                    "sparse": row.sparse,
                    "pattern": None if row.pattern is None else str(row.pattern),
                    "refusal": row.refusal,
                }
                for row in self.rows
            ],
        }

    def __str__(self) -> str:
        body = [
            (row.name, row.op, "x".join(map(str, row.shape)), row.dense, row.sparse, note(row))
            for row in self.rows
        ]
        total = [
            ("conv+linear", "", "", self.dense, self.sparse, ""),
            ("attention QK+AV", "", "", self.attention, self.attention, ""),
        ]
        headers = ("layer", "op", "weight", "dense MACs", "sparse MACs", "pattern")
        table = tabulate(body + total, headers, intfmt=",", disable_numparse=[0, 1, 2, 5])
        return f"{table}\n{CONVENTION}"


CONVENTION = (
    "1 MAC = one multiply-accumulate; conv and linear layers are counted together, "
    "attention (QK+AV) apart; norms, activations and embeddings are not counted"
)


def note(row: MacRow | Decision) -> str:
    """The pattern of a pruned row, or "dense: " and the reason."""
    if row.pattern is not None:
        return str(row.pattern)
    return "" if row.refusal is None else f"dense: {row.refusal}"


@dataclass(frozen=True, slots=True)
class Topology:
    """How the prunable ops of a graph are wired.

    ``first``/``last``: ops that read a graph input alone / feed only graph outputs.
    ``skips``: long connections (source, merge) that bypass other ops. ``critical_path``: the
    chain of ops that carries the most MACs, ``critical_macs`` their sum: the bound on what
    sparsity can win without running branches side by side.
    """

    first: frozenset[str]
    last: frozenset[str]
    skips: tuple[tuple[str, str], ...]
    critical_path: tuple[str, ...]
    critical_macs: int
    macs: Mapping[str, int] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Explanation:
    """What became of every weight of a compiled model; ``str()`` is a table.

    ``rows``: one Decision per weight. ``masked``: names of the parameters that run masked.
    ``choices``: in mode "infer" the kernel of each folded weight, for each shape it has met.
    ``mode``, ``backend``: as compiled. ``broken``: why the model runs as several graphs, or None.
    """

    rows: tuple[Decision, ...]
    masked: tuple[str, ...]
    mode: str
    backend: str
    choices: tuple[Choice, ...] = ()
    broken: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        if not self.rows:
            return "not captured yet: call the model once, or explain(model, *inputs)"
        body = [(row.weight, row.op, "x".join(map(str, row.shape)), note(row)) for row in self.rows]
        table = tabulate(body, ("weight", "op", "shape", "pattern"), disable_numparse=True)
        how = f"{len(self.masked)} of {len(self.rows)} weights masked, mode {self.mode!r}"
        parts = [table, f"{how}, compiled by {self.backend!r}"]
        if self.choices:
            parts += ["", _kernels(self.choices)]
        if self.broken is not None:
            parts.append(f"runs as several graphs: {self.broken}")
        return "\n".join(parts)


def _kernels(choices: tuple[Choice, ...]) -> str:
    body = [
        (
            choice.weight,
            " ".join("x".join(map(str, shape)) for shape in choice.inputs),
            choice.kernel,
            choice.dense_ms,
            choice.sparse_ms,
            choice.reason,
        )
        for choice in choices
    ]
    headers = ("weight", "input", "kernel", "dense ms", "sparse ms", "why")
    table = tabulate(body, headers, floatfmt=".3f", disable_numparse=[0, 1, 2, 5])
    if not any(choice.run_bytes for choice in choices):  # nothing is folded in training
        return table
    sizes = {choice.weight: (choice.dense_bytes, choice.run_bytes) for choice in choices}
    dense, run = (sum(column) / 2**20 for column in zip(*sizes.values(), strict=True))
    return f"{table}\nfolded weights: {dense:.2f} MiB dense, {run:.2f} MiB as they run"
