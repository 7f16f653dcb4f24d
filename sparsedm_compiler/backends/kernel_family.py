"""The base class of kernel families.

A family is the kernels of one device that read one packed format. It declares the kinds of pattern
that it runs and the needs of its ops; passes and kernel selection ask ``registry`` and never name
a family.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from ..errors import PackError
from ..patterns import Pattern
from .interleaved_timer import sample_on_host, time_on_host
from .kernel_values import KernelConfig as KernelConfig
from .kernel_values import MatmulProblem as MatmulProblem
from .kernel_values import Op as Op
from .kernel_values import OpCall as OpCall
from .kernel_values import WeightFormat as WeightFormat
from .row_rounding import RowRounding


class KernelFamily(ABC):
    """The kernels of one device that read one packed format.

    A new family is one concrete subclass, registered by ``registry.register_family``; the smallest
    one is in ``tests/backends/test_toy_family.py``.

    Attributes:
        device: Device type of the tensors that it runs on: "cpu", "cuda".
        names: Names of its kernels, as ``kernels=`` and ``explain`` spell them.
        accepts: The kinds of pattern that its kernels run. A pattern of another kind is run as the
            first one it implies whose kind is listed; where there is none, it is refused.
        inexact: What its kernels do to numbers beyond the model's dtype, as a phrase; "" for
            nothing. A family with such a phrase runs only where pinned by name, and the dense
            weight stays beside the packed one.
        opaque: Whether the packed form means nothing on another machine, so that files hold what
            ``to_portable`` returns.
        token_multiple: The ``token_ops`` want a number of tokens (rows of x [..., cols]) that is a
            multiple of this; with any other they pad x in every call.
        token_ops: The ops that ``token_multiple`` is about, and whose outputs depend on each row of
            x alone.
        feature_major_op: The op that reads and writes activations with the tokens side by side in
            memory, the latter by its keyword argument ``feature_major``; None without one.
        rounding_ops: The linear ops that round the rows of x to 8 bits, so that rows which several
            of them read can be rounded once, together with what comes before.
        norm_ops: The conv ops that can compute a GroupNorm and an activation in front of them, by
            the op that does, called as ``op(x, weight, bias, rows, offset, norm_weight, norm_bias,
            groups, epsilon, pre_act, **arguments)``. It has no gradient.
        call_ms: Milliseconds that a call costs more in a model than timed alone, where its Python
            and its objects stay in the cache.
        training_op: The op of sparse products in training, called as
            ``op(x, masked_weight, bias, transposable)``, or, where there is a ``layout_op``, as
            ``op(x, weight, bias, layout, pattern as text, whether the mask is frozen)``; None
            without one.
        layout_op: The op that finds what a masked weight, or a mask, keeps, in the form that
            ``training_op`` takes: ``op(masked_weight, pattern as text)``; None without one.
    """

    device: str
    names: tuple[str, ...]
    accepts: tuple[type[Pattern], ...]
    inexact: str = ""
    opaque: bool = False
    token_multiple: int = 1
    token_ops: tuple[Op, ...] = ()
    feature_major_op: Op | None = None
    rounding_ops: Mapping[Op, RowRounding] = MappingProxyType({})
    norm_ops: Mapping[Op, Op] = MappingProxyType({})
    call_ms: float = 0.0
    training_op: Op | None = None
    layout_op: Op | None = None

    @final
    def find_accepted(self, pattern: Pattern) -> Pattern | None:
        """Returns the pattern that the kernels run ``pattern`` as; None if they cannot.

        It is the pattern itself, or the first that it implies whose kind is in ``accepts``.
        """
        choices = (pattern, *pattern.implied())
        return next((choice for choice in choices if isinstance(choice, self.accepts)), None)

    @final
    def require_accepted(self, pattern: Pattern) -> Pattern:
        """Returns the pattern of ``find_accepted``. Raises PackError if there is none."""
        accepted = self.find_accepted(pattern)
        if accepted is None:
            raise PackError(self._name_accepted(pattern))
        return accepted

    @final
    def why_refused(self, pattern: Pattern, rows: int, cols: int, dtype: torch.dtype) -> str | None:
        """Returns why a weight of that size cannot be packed, as a sentence; None if it can.

        Args:
            pattern: The pattern of its mask.
            rows: Output channels.
            cols: Input channels, times the taps of a convolution's kernel.
            dtype: Dtype of its values.
        """
        if self.find_accepted(pattern) is None:
            return self._name_accepted(pattern)
        return self._refuse(pattern, rows, cols, dtype)

    def _name_accepted(self, pattern: Pattern) -> str:
        kinds = [f"{kind.__name__} ({kind.EXPLANATION})" for kind in self.accepts]
        verb = "runs" if len(self.names) == 1 else "run"
        return f"{', '.join(self.names)} {verb} {', '.join(kinds)}, not {pattern}"

    @abstractmethod
    def why_unavailable(self) -> str | None:
        """Returns why none of the kernels runs on this machine, as a sentence; None if they do."""

    def describe_doubts(self) -> str | None:
        """Returns what is known against the libraries it runs on here, as a phrase, or None.

        It is a note beside the reason of a choice, and refuses nothing.
        """
        return None

    def identify_card(self) -> tuple[str, str] | None:
        """Returns (name, compute capability) of the card that its kernels run on; None for a CPU.

        Tables of measured kernels are kept by it.
        """
        return None

    def list_libraries(self) -> dict[str, str | None]:
        """Returns the libraries and tools of its kernels, name -> version here, None without it.

        ``sparsedm doctor`` shows them, so that it never asks a device itself.
        """
        return {}

    @abstractmethod
    def _refuse(self, pattern: Pattern, rows: int, cols: int, dtype: torch.dtype) -> str | None:
        """Returns what ``why_refused`` does, for a pattern that is accepted."""

    def why_refused_in_training(
        self, pattern: Pattern, rows: int, cols: int, dtype: torch.dtype
    ) -> str | None:
        """Returns why ``training_op`` cannot multiply by a weight, as ``why_refused`` does."""
        return self.why_refused(pattern, rows, cols, dtype)

    def prepare_training(  # noqa: B027
        self, uses: Sequence[tuple[Pattern, MatmulProblem, tuple[int, int]]]
    ) -> None:
        """Builds what ``training_op`` needs for products by weights (rows, cols), side by side."""

    def describe_backward(self, pattern: Pattern, *, frozen: bool) -> str:
        """Returns which products of a backward are dense after all, as a phrase; "" for none."""
        return ""

    @abstractmethod
    def list_candidates(self, pattern: Pattern, dtype: torch.dtype) -> tuple[KernelConfig, ...]:
        """Returns the kernels for an accepted pattern, in the settings worth measuring."""

    def prepare(  # noqa: B027
        self,
        kernels: Sequence[KernelConfig],
        pattern: Pattern,
        problems: Sequence[MatmulProblem],
        shape: tuple[int, int],
    ) -> None:
        """Builds what kernels need before they are called, side by side, where that takes long.

        shape: (rows, cols) of the weight. A kernel that cannot be built says so when it is called.
        """

    @abstractmethod
    def pack(self, weight: Tensor, mask: Tensor, pattern: Pattern, kernel: KernelConfig) -> Tensor:
        """Returns weight * mask packed, on the weight's device.

        weight, mask: [rows, cols] or [rows, cols, kh, kw]. Raises PackError for a weight that is
        refused.
        """

    @abstractmethod
    def unpack(self, packed: Tensor, shape: tuple[int, ...], weight_format: WeightFormat) -> Tensor:
        """Returns the masked dense weight of that shape, to the bit."""

    @abstractmethod
    def check(
        self, packed: Tensor, shape: tuple[int, ...], weight_format: WeightFormat
    ) -> torch.dtype:
        """Returns the dtype of a packed weight from a file: as of ``to_portable``, on the CPU.

        Raises PackError unless it is one of that shape that may be run or unpacked.
        """

    def to_portable(
        self, packed: Tensor, shape: tuple[int, ...], weight_format: WeightFormat
    ) -> Tensor:
        """Returns the packed weight as files hold it, on the CPU, for ``check`` and ``unpack``."""
        return packed.cpu()

    @abstractmethod
    def call(
        self, problem: MatmulProblem, weight_format: WeightFormat, tile: tuple[int, ...]
    ) -> OpCall:
        """Returns the op for a product and its arguments behind (x, packed weight, bias, rows)."""

    @abstractmethod
    def describe_machine(self) -> tuple[Any, ...]:
        """Returns all that a measured time depends on, but for the weight and its use."""

    def time_calls(
        self, calls: Mapping[str, Callable[[], Any]], device: torch.device, *, graphs: bool
    ) -> dict[str, float]:
        """Returns the median milliseconds of calls on its device, taken in turns.

        Args:
            calls: The calls by name; a name "dense" is among them.
            device: The device that they run on.
            graphs: Whether the model will run under CUDA graphs, which hide the cost of launches.
        """
        return time_on_host(calls)

    def sample_calls(
        self, calls: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int
    ) -> dict[str, list[float]]:
        """Returns the milliseconds of calls on its device by round, taken in turns."""
        return sample_on_host(calls, range(rounds))
