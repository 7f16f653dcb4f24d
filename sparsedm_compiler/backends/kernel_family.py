"""The base class of kernel families, and the values that pass between them and the passes.

A family is the kernels of one device that read one packed format. It declares the kinds of pattern
that it runs and the needs of its ops; passes and kernel selection ask ``registry`` and never name
a family.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from ..errors import PackError
from ..patterns import Pattern
from .interleaved_timer import sample_on_host, time_on_host

Op = Callable[..., Tensor]
"""An op in the form that an FX graph calls: a custom op's overload, or a plain function."""

OpCall = tuple[Op, dict[str, Any]]
"""An op, and its keyword arguments: it is called as ``op(x, packed, bias, rows, **arguments)``."""


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """A sparse kernel in one setting.

    Attributes:
        name: The kernel's name, as ``explain`` shows it.
        layout: The numbers of the setting that packing depends on.
        tile: The numbers of the setting that packing does not depend on.
    """

    name: str
    layout: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()

    @property
    def untiled(self) -> KernelConfig:
        """The part that decides how a weight is packed: the same without ``tile``."""
        return replace(self, tile=())

    def __str__(self) -> str:
        return "/".join((self.name, *map(str, self.layout), *map(str, self.tile)))


@dataclass(frozen=True, slots=True)
class MatmulProblem:
    """One product by a weight, as a kernel has to compute it.

    Attributes:
        inputs: Shape of x; hints where a size is symbolic.
        dtype: Dtype of x as the kernel gets it, and of the output.
        channels_last: Whether x lies channels_last in memory.
        kernel: Kernel size of a conv2d; () for linear, as the three below.
        stride: Stride of a conv2d.
        padding: Padding of a conv2d.
        dilation: Dilation of a conv2d.
        act: The activation behind the product, one of ``custom_op.ACTS``.
    """

    inputs: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool = False
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    act: str = "none"

    def choose_op(self, linear: Op, conv2d: Op, **arguments: Any) -> OpCall:
        """Returns ``linear``, or ``conv2d`` with its geometry, and the keyword arguments."""
        if not self.kernel:
            return linear, arguments
        geometry = {
            "kernel": list(self.kernel),
            "stride": list(self.stride),
            "padding": list(self.padding),
            "dilation": list(self.dilation),
        }
        return conv2d, {**geometry, **arguments}


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """The form in which a graph reads a weight.

    Attributes:
        pattern: The pattern of its mask.
        dtype: Dtype of the values; None for the weight's own.
        kernel: The kernel it is packed for, without tile; None for the dense masked weight.
    """

    pattern: Pattern
    dtype: torch.dtype | None = None
    kernel: KernelConfig | None = None


@dataclass(frozen=True, slots=True)
class RowRounding:
    """The two functions that a linear op consists of, where it rounds the rows of x to 8 bits.

    Attributes:
        round_rows: Called as ``round_rows(x, kind, **prologue)``, with the norm or the activation
            in front of it as ``prologue``: (numbers, factors).
        multiply: Called as ``multiply(x, numbers, factors, packed, bias, rows, **arguments)``, with
            the keyword arguments of the op, "kind" and "act" among them; of x, or of what came
            before a norm, it uses leading shape and dtype.
    """

    round_rows: Callable[..., tuple[Tensor, Tensor]]
    multiply: Op


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
