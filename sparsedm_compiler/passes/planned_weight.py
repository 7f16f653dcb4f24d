"""``PlannedWeight``: the one value that goes from the decision about a weight to its kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from torch import Tensor, fx

from ..backends.kernel_family import KernelConfig, MatmulProblem, WeightFormat
from ..patterns import Pattern
from ..reports import Choice


@dataclass(frozen=True, slots=True)
class Refusal:
    """A reason why no kernel can run a weight.

    Attributes:
        sentence: The reason, as ``explain`` shows it.
    """

    sentence: str


class Status(Enum):
    """How it was settled what runs a weight."""

    MASKED = "masked in every forward; no kernel was asked for"
    MEASURED = "the fastest of dense and the kernels that were timed"
    TABLE = "as the table for its card says"
    PINNED = "pinned by the user"
    FINALIZED = "only its packed form is left, from an earlier graph"
    REFUSED = "dense, since no kernel can run it or none was measured"


@dataclass(frozen=True, slots=True)
class KernelTimes:
    """What was measured for one weight.

    Attributes:
        dense_ms: Median milliseconds of one call of dense.
        sparse_ms: The same of the fastest sparse kernel.
    """

    dense_ms: float
    sparse_ms: float


@dataclass(frozen=True, slots=True, eq=False)
class WeightUse:
    """One linear or conv2d by a weight that no other node reads in any other way.

    Attributes:
        node: The product.
        last: The node whose value a kernel gives: the activation behind the product if there is
            one, else ``node``.
        problem: The product as a kernel sees it.
    """

    node: fx.Node
    last: fx.Node
    problem: MatmulProblem


@dataclass(frozen=True, slots=True, eq=False)
class PlannedWeight:
    """One pruned weight of one graph, from the decision about it to the kernel that runs it.

    Attributes:
        placeholder: The graph's input that stands for the weight.
        position: Its number among the inputs.
        name: The parameter's name in the model.
        pattern: What it is pruned to.
        shape: The weight's shape.
        uses: Every product by it, or why no kernel can run them.
        kernel: What multiplies by it; None for the dense op with the masked weight.
        weight_format: What is passed in the place of the weight in mode "infer".
        status: How the kernel was settled.
        reason: The same as a sentence, for ``explain``.
        times: What was measured; None where nothing was.
        dense_bytes: Size of the weight.
        run_bytes: Size of what is read in its place; 0 in mode "train".
        frozen: Its mask, where that is not computed anew; in mode "train" alone.
        held: Its mask where that is computed from time to time, else the scale of its soft
            threshold; in mode "train" alone.
        soft: Whether ``held`` is such a scale.
        layout: What its kernel gets in the place of such a mask, from the family's ``layout_op``.
    """

    placeholder: fx.Node
    position: int
    name: str
    pattern: Pattern
    shape: tuple[int, ...]
    uses: tuple[WeightUse, ...] | Refusal
    weight_format: WeightFormat
    kernel: KernelConfig | None = None
    status: Status = Status.MASKED
    reason: str = ""
    times: KernelTimes | None = None
    dense_bytes: int = 0
    run_bytes: int = 0
    frozen: Tensor | None = None
    layout: Tensor | None = None
    held: Tensor | None = None
    soft: bool = False

    @property
    def is_frozen(self) -> bool:
        """Whether its mask is not computed anew."""
        return self.frozen is not None or self.layout is not None

    @property
    def kernel_uses(self) -> tuple[WeightUse, ...]:
        """The products that a kernel takes over; none where the dense op runs."""
        if self.kernel is None or isinstance(self.uses, Refusal):
            return ()
        return self.uses

    @property
    def problems(self) -> tuple[MatmulProblem, ...]:
        """What a kernel has to do for every use; none where no kernel can run them."""
        return () if isinstance(self.uses, Refusal) else tuple(use.problem for use in self.uses)

    @property
    def inputs(self) -> tuple[tuple[int, ...], ...]:
        """The shape of what it multiplies, one per use."""
        return tuple(problem.inputs for problem in self.problems)

    def run_dense(
        self, reason: str, *, status: Status = Status.REFUSED, times: KernelTimes | None = None
    ) -> PlannedWeight:
        """Returns the plan that the dense op runs the masked weight, for this reason."""
        return replace(
            self,
            kernel=None,
            weight_format=WeightFormat(self.pattern),
            status=status,
            reason=reason,
            times=times,
        )

    def run_sparse(
        self,
        kernel: KernelConfig,
        weight_format: WeightFormat,
        *,
        status: Status,
        reason: str,
        times: KernelTimes | None = None,
    ) -> PlannedWeight:
        """Returns the plan that a kernel runs the weight in this format, for this reason."""
        return replace(
            self,
            kernel=kernel,
            weight_format=weight_format,
            status=status,
            reason=reason,
            times=times,
        )

    def to_choice(self) -> Choice:
        """Returns the row that ``explain`` shows, which holds no part of the graph."""
        return Choice(
            weight=self.name,
            inputs=self.inputs,
            kernel="dense" if self.kernel is None else self.kernel.name,
            reason=self.reason,
            dense_ms=None if self.times is None else self.times.dense_ms,
            sparse_ms=None if self.times is None else self.times.sparse_ms,
            dense_bytes=self.dense_bytes,
            run_bytes=self.run_bytes,
        )


Plan = Sequence[PlannedWeight]
"""One row for every pruned weight of a graph."""
