"""Folded weights: masked once, in the form a kernel reads, and again when the weight changes."""

from __future__ import annotations

import io
import math
import warnings
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..backends.kernel_family import KernelConfig, KernelFamily, WeightFormat
from ..backends.registry import find_families, find_family
from ..errors import DenseRunError
from ..masks.nm_mask import apply_mask, nm_mask
from .edit_watch import EditWatcher, WeightSample

_SAMPLES = 64


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight of which only the packed form is left. ``kernel``: what runs it."""

    form: WeightFormat
    kernel: KernelConfig
    shape: tuple[int, ...]
    dtype: torch.dtype
    data: Tensor

    @property
    def family(self) -> KernelFamily:
        """The family of its kernel."""
        return find_family(self.kernel.name)

    def dense(self) -> Tensor:
        """The masked weight, to the bit."""
        return self.family.unpack(self.data, self.shape, self.form)

    def portable(self) -> PackedWeight:
        """The same as files hold it: on the CPU, in a form that any machine can read."""
        return replace(self, data=self.family.portable(self.data, self.shape, self.form))

    def suits(self, weight: Tensor) -> bool:
        """Whether it can still run in the place of its parameter, after what has become of that."""
        if weight.device != self.data.device:
            return False
        if self.family not in find_families(weight.device.type):
            return False
        size = self.shape[0], math.prod(self.shape[1:])
        return self.family.refusal(self.form.pattern, *size, weight.dtype) is None

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        return replace(self, data=self.data.clone())

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, which carries it to other machines: as bytes, that no map_location moves."""
        held = io.BytesIO()
        torch.save(self.portable().data, held)
        return _unpickled, (self.form, self.kernel, self.shape, self.dtype, held.getvalue())


def _unpickled(
    form: WeightFormat,
    kernel: KernelConfig,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    held: bytes,
) -> PackedWeight:
    data = torch.load(io.BytesIO(held), map_location="cpu", weights_only=True)
    return PackedWeight(form, kernel, shape, dtype, data)


@dataclass(slots=True)
class _FoldedWeight:
    weight: weakref.ref[Tensor]
    state: tuple[int, int]
    samples: WeightSample
    folded: Tensor


class FoldedWeights:
    """The folded weights of one model; all its graphs share them.

    A change of the weight is seen by its version counter, its storage, and, for edits through
    ``.data`` that move neither, by 64 of its values spread evenly: before the call on a CPU; on
    another device by a later call, with a warning, since asking it would be to wait for it.

    ``packed``: by name, the weights that were finalized: the parameter is hollow, one NaN seen
    through strides of zero, so that whatever reads it by another way is loud.
    """

    def __init__(self, packed: Mapping[str, PackedWeight] | None = None) -> None:
        self.packed = dict(packed or {})
        self._arrived = set(self.packed)  # from another place, maybe one of other kernels
        self._folds: dict[tuple[int, WeightFormat], _FoldedWeight] = {}
        self._lookout = EditWatcher()

    def catch_up(self) -> None:
        """Forget all folds if a look at the weights, after some earlier call, found an edit."""
        if self._lookout.found():
            self._folds.clear()
            warnings.warn(
                "weights were edited through .data after they had been folded, and at least one "
                "call still ran what they were; edit them in place under torch.no_grad(), which "
                "is seen at once",
                stacklevel=2,
            )

    def look(self) -> None:
        """Have devices other than the CPU asked whether their weights are what was folded."""
        late = [fold.samples for fold in self._folds.values() if _late(fold.samples.now)]
        if late:
            self._lookout.look(late)

    def get(self, weight: Tensor, form: WeightFormat, name: str) -> Tensor:
        """The weight in that form. Raises DenseRunError where a gradient is asked for."""
        if weight.requires_grad and torch.is_grad_enabled():
            raise DenseRunError(
                f"{name!r} asks for a gradient, but mode='infer' has folded its mask; "
                "train with mode='train', or call under torch.no_grad()"
            )
        packed = self.finalized(weight, name)
        if packed is not None and packed.form == form:
            return packed.data
        state = (0 if weight.is_inference() else weight._version, weight.data_ptr())
        fold = self._folds.get((id(weight), form))
        known = fold is not None and fold.weight() is weight and fold.state == state
        if fold is not None and known and (_late(weight) or _as_before(fold.samples)):
            return fold.folded
        with torch.no_grad():
            source = weight.detach() if packed is None else packed.dense()
            folded = fold_weight(source, form, name)
            now = _samples(weight, packed)
            samples = WeightSample(now, now.clone())
        self._folds[id(weight), form] = _FoldedWeight(weakref.ref(weight), state, samples, folded)
        return folded

    def finalized(self, weight: Tensor, name: str) -> PackedWeight | None:
        """What is left of a hollow weight; None for one that holds its values."""
        packed = self.packed.get(name)
        if packed is None or not _is_hollow(weight):
            return None
        return packed

    def settle(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Make finalized weights hollow again that a copy, a file or a cast has filled with NaN.

        One that its packed form does not suit any more (another device, a dtype its kernel does not
        run) gets its values back, to be folded anew.
        """
        for name, weight in named:
            packed = self.packed.get(name)
            if packed is None:
                continue
            known = name not in self._arrived and weight.stride()[0] == 0
            if known and weight.dtype == packed.dtype and weight.device == packed.data.device:
                continue
            self._arrived.discard(name)
            if not weight.is_meta and not _is_hollow(weight):
                continue
            if not packed.suits(weight):
                weight.data = packed.dense().to(weight)
                del self.packed[name]
                continue
            hollow_out(weight)
            if weight.dtype != packed.dtype:
                self.packed[name] = _cast(packed, weight.dtype, name)

    def finalize(
        self, weight: Tensor, form: WeightFormat, name: str, kernel: KernelConfig | None
    ) -> None:
        """Keep only that form of the weight; a dense form is written into the weight itself."""
        folded = self.get(weight, form, name)
        for key in [key for key in self._folds if key[0] == id(weight)]:
            del self._folds[key]
        if kernel is None:
            with torch.no_grad():
                weight.copy_(folded)
            return
        self.packed[name] = PackedWeight(form, kernel, tuple(weight.shape), weight.dtype, folded)
        hollow_out(weight)


def hollow_out(weight: Tensor) -> None:
    """Free the memory of a weight: it becomes one NaN, seen through strides of zero."""
    nan = torch.full((1,), torch.nan, dtype=weight.dtype, device=weight.device)
    weight.data = nan.expand(weight.shape)


def _is_hollow(weight: Tensor) -> bool:
    if not any(weight.stride()):  # seen without reading it, which on a card would wait for it
        return True
    return bool(weight.detach()[(0,) * weight.dim()].isnan())


def _cast(packed: PackedWeight, dtype: torch.dtype, name: str) -> PackedWeight:
    """The same weight after ``model.to(dtype)``."""
    data = fold_weight(packed.dense().to(dtype), packed.form, name)
    return replace(packed, dtype=dtype, data=data)


def fold_weight(weight: Tensor, form: WeightFormat, name: str) -> Tensor:
    """The masked weight, dense or packed. Raises MaskError for NaN and Inf."""
    mask = nm_mask(weight, form.pattern, name=name)
    masked = apply_mask(weight, mask)
    if form.dtype is not None:
        masked = masked.to(form.dtype)
    if form.kernel is None:
        return masked
    return find_family(form.kernel.name).pack(masked, mask, form.pattern, form.kernel)


def _samples(weight: Tensor, packed: PackedWeight | None) -> Tensor:
    """About 64 values of a weight: a view of them in it."""
    if packed is not None:
        return packed.data[:0]
    weight = weight.detach()
    # Any order will do, so that channels_last weights need no copy either.
    if not _gapless(weight):
        steps = (slice(None, None, max(1, size // 8)) for size in weight.shape[:2])
        return weight[tuple(steps)]
    flat = weight.as_strided((weight.numel(),), (1,))
    return flat[:: max(1, flat.numel() // _SAMPLES)]


def _as_before(samples: WeightSample) -> bool:
    return torch.equal(samples.now, samples.before)


def _late(weight: Tensor) -> bool:
    """Whether reading the weight's values would be to wait for its device."""
    return weight.device.type != "cpu"


def _gapless(weight: Tensor) -> bool:
    return weight.numel() == 1 + sum(
        (size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True)
    )


class FoldedGraph:
    """Runs a graph with the weights at ``places`` in their folded form."""

    def __init__(
        self,
        run: Any,
        folds: FoldedWeights,
        forms: Mapping[int, WeightFormat],
        names: Mapping[int, str],
    ) -> None:
        self.run = run
        self.folds = folds
        self.forms = forms
        self.names = names

    def __call__(self, *inputs: Any) -> Any:
        given = list(inputs)
        self.folds.catch_up()
        for place, form in self.forms.items():
            given[place] = self.folds.get(given[place], form, self.names[place])
        self.folds.look()
        return self.run(*given)
