"""The frozen values that analyses and ``explain`` return, with their tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tabulate import tabulate

from .patterns import Pattern


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to one weight: pruned to ``pattern``, or left dense for ``refusal``.

    Exactly one of ``pattern`` and ``refusal`` is set.

    Attributes:
        weight: The parameter's name in the model.
        op: The op that multiplies by it: "linear", "conv2d", ...
        shape: The weight's shape.
        pattern: What it is pruned to.
        refusal: Why it stays dense, as a sentence.
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
        """Returns the same decision with the weight's name inside a larger model."""
        return replace(self, weight=prefix + self.weight)


@dataclass(frozen=True, slots=True)
class Choice:
    """Which kernel multiplies by one folded weight, and why.

    Attributes:
        weight: The parameter's name in the model.
        inputs: The shape of what it multiplies, one per use.
        kernel: "dense" or the name of a sparse kernel.
        reason: Why, as a sentence.
        dense_ms: Median milliseconds of one call of dense; None where nothing was measured.
        sparse_ms: The same of the fastest sparse kernel.
        dense_bytes: Size of the weight.
        run_bytes: Size of what the kernel reads in its place; 0 in mode "train".
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
        """Returns the same choice with the weight's name inside a larger model."""
        return replace(self, weight=prefix + self.weight)


@dataclass(frozen=True, slots=True)
class MacRow:
    """MACs of one operand of one call node.

    Attributes:
        name: The weight's parameter name, or the node's name where there is no parameter.
        kind: "conv", "linear" or "attention" (a product of two activations).
        op: The op: "linear", "conv2d", "matmul", ...
        shape: The weight's shape; () for attention.
        dense: Exact MACs before pruning.
        sparse: Exact MACs after pruning; equal to ``dense`` where the row stays dense.
        pattern: What the weight is pruned to.
        refusal: Why it stays dense, as a sentence.
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
    """MACs of one forward; ``str()`` is a table.

    Attributes:
        dense: MACs of convolutions and linear layers.
        sparse: The same after pruning.
        attention: MACs of attention (QK+AV), which are in neither.
        rows: One row per call node.
    """

    dense: int
    sparse: int
    attention: int
    rows: tuple[MacRow, ...] = field(repr=False)

    @property
    def totals(self) -> dict[str, int]:
        """The three sums by name."""
        return {"dense": self.dense, "sparse": self.sparse, "attention": self.attention}

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON: totals, the convention, and one entry per row."""
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
            (
                row.name,
                row.op,
                "x".join(map(str, row.shape)),
                row.dense,
                row.sparse,
                describe_pattern(row),
            )
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


def describe_pattern(row: MacRow | Decision) -> str:
    """Returns the pattern of a pruned row, or "dense: " and the reason."""
    if row.pattern is not None:
        return str(row.pattern)
    return "" if row.refusal is None else f"dense: {row.refusal}"


@dataclass(frozen=True, slots=True)
class Topology:
    """How the prunable ops of a graph are wired.

    Attributes:
        first: Ops that read a graph input alone.
        last: Ops that feed only graph outputs.
        skips: Long connections (source, merge) that bypass other ops.
        critical_path: The chain of ops that carries the most MACs.
        critical_macs: Their sum: the bound on what sparsity can win without running branches side
            by side.
        macs: MACs by op.
    """

    first: frozenset[str]
    last: frozenset[str]
    skips: tuple[tuple[str, str], ...]
    critical_path: tuple[str, ...]
    critical_macs: int
    macs: Mapping[str, int] = field(repr=False)


SLOW = 5.0
"""Seconds from which a table tells what they were spent on."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """What became of every weight of a compiled model; ``str()`` is a table.

    Attributes:
        rows: One decision per weight.
        masked: Names of the parameters that run masked.
        mode: "train" or "infer".
        backend: What compiled the rewritten graphs.
        choices: In mode "infer" the kernel of each folded weight, for each shape it has met.
        broken: The graph break for which the model runs as several graphs; None for one graph.
        eager: Names of masked weights that Python multiplies which no graph holds: masked anew
            in every use, and without a kernel.
        timings: Seconds that the calls so far spent on measuring kernels ("search"), folding
            weights ("pack") and in the inner compiler ("compile").
        frozen: Names of the weights whose masks ``freeze_masks`` has frozen.
        regions: The repeated modules that were compiled once (``regional=True``), as sentences.
        notes: What is known of this machine against the times, as sentences.
    """

    rows: tuple[Decision, ...]
    masked: tuple[str, ...]
    mode: str
    backend: str
    choices: tuple[Choice, ...] = ()
    broken: str | None = field(default=None, repr=False)
    eager: tuple[str, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict, repr=False)
    frozen: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.rows:
            return "not captured yet: call the model once, or explain(model, *inputs)"
        body = [
            (row.weight, row.op, "x".join(map(str, row.shape)), describe_pattern(row))
            for row in self.rows
        ]
        table = tabulate(body, ("weight", "op", "shape", "pattern"), disable_numparse=True)
        summary = f"{len(self.masked)} of {len(self.rows)} weights masked, mode {self.mode!r}"
        if self.frozen:
            summary += f", {len(self.frozen)} of the masks frozen"
        parts = [table, f"{summary}, compiled by {self.backend!r}"]
        if self.choices:
            parts += ["", _kernels(self.choices)]
        if self.broken is not None:
            parts.append(f"runs as several graphs: {self.broken}")
        if self.eager:
            parts.append(
                f"{len(self.eager)} of the weights run masked in Python that cannot be captured, "
                f"without a kernel: {', '.join(self.eager)}"
            )
        parts += [*self.regions, *self.notes]
        if sum(self.timings.values()) >= SLOW:
            spent = ", ".join(f"{phase} {spent:.1f} s" for phase, spent in self.timings.items())
            parts.append(f"first calls spent: {spent}")
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
