"""Folded weights: masked once, in the form a kernel reads, and again when the weight changes."""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..backends.kernel_family import KernelConfig, WeightFormat
from ..backends.packing import PackedWeight, cast_packed, fold_weight
from ..backends.registry import find_family
from ..graph.names import strip_adapter_prefix
from ..passes import PlannedWeight
from .edit_watch import EditWatcher, WeightSample, sample_values
from .explanations import explain_folded_gradient
from .folded_weight import FoldedWeight, is_asynchronous
from .free_memory import release_after_packing
from .hollow_parameter import hollow_out, is_hollow, make_hollow_class
from .place_check import PlaceCheck

_Pending = tuple[Tensor, str, WeightFormat, KernelConfig | None, torch.device | None]
"""A weight to finalize, its name and form, and the device that it was folded on; None: any."""


class HoldsCheck(Protocol):
    """A graph that keeps a check of the folded weights from one call to the next."""

    def drop_stale_check(self) -> None:
        """Drops the check if weights have been folded or replaced since it was made."""


class FoldedWeights:
    """The folded weights of one model; all its graphs share them.

    A change of a weight is detected by its version counter, its storage, and, for edits through
    ``.data`` that move neither, by 64 of its values spread evenly: before the call on a CPU; on
    another device by a later call, with a warning, since reading them would wait for the device:
    the next call, or the next after a fiftieth of a second.

    ``packed`` holds, by name, the finalized weights. Their parameters are hollow: one NaN seen
    through strides of zero, so that whatever else reads them gives NaN.
    """

    def __init__(self, packed: Mapping[str, PackedWeight] | None = None) -> None:
        self.packed = dict(packed or {})
        self._arrived = set(self.packed)  # from another place, maybe one of other kernels
        self._folded: dict[tuple[int, WeightFormat], FoldedWeight] = {}
        self.generation = 0  # counts what makes folded forms out of date
        self._watcher = EditWatcher()
        self._asks = False  # whether some weights lie on a device that has to be asked
        self._pending: list[_Pending] = []
        self._settled: tuple[int, PlaceCheck] | None = None
        self._checkers: tuple[weakref.ref[HoldsCheck], ...] = ()  # threads read it as it grows

    def __len__(self) -> int:
        """The number of weights that are held in a folded form."""
        return len(self._folded)

    def fold(
        self, plan: Sequence[PlannedWeight], inputs: Sequence[Any], *, finalize: bool
    ) -> tuple[list[PlannedWeight], list[Tensor]]:
        """Folds the weights of a graph as planned.

        Args:
            plan: One row for every pruned weight.
            inputs: The graph's inputs, the weights among them.
            finalize: Whether only the packed form is kept, from the next ``finalize_pending`` on.

        Returns:
            (the rows with the sizes of weights and folded forms, the folded forms).
        """
        rows, forms = [], []
        for row in plan:
            weight = inputs[row.position]
            form = weight
            if not isinstance(weight, FakeTensor):
                form = self.get(weight, row.weight_format, row.name)
                if finalize and _is_exact(row) and self.find_finalized(weight, row.name) is None:
                    job = weight, row.name, row.weight_format, row.kernel, weight.device
                    self._pending.append(job)
            rows.append(replace(row, dense_bytes=weight.nbytes, run_bytes=form.nbytes))
            forms.append(form)
        return rows, forms

    def finalize_pending(self, module: nn.Module) -> None:
        """Keeps only the folded form of the weights that were folded to be finalized.

        Not while a graph is compiled: Dynamo guards on the strides, so the next call compiles
        once more. Weights that are offloaded after their call stay what they are.
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        owned = set(map(id, module.parameters()))
        for weight, name, weight_format, kernel, device in pending:
            if id(weight) in owned and device in (None, weight.device):
                self._finalize(weight, name, weight_format, kernel)
        self._settled = None
        self._watcher.forget()
        self.drop_stale_checks()

    def release_moved(self) -> None:
        """Drops the folded forms of weights that do not lie where they were folded any more."""
        self._settled = None
        self._drop(key for key, fold in [*self._folded.items()] if not fold.is_in_place)

    def release(self, weight: Tensor) -> None:
        """Drops the folded forms of a weight that gets other values, or another place."""
        self._drop(key for key in [*self._folded] if key[0] == id(weight))

    def _drop(self, keys: Iterable[tuple[int, WeightFormat]]) -> None:
        if [self._folded.pop(key, None) for key in keys]:
            self.generation += 1
            self._watcher.forget()
            self.drop_stale_checks()

    def register(self, graph: HoldsCheck) -> None:
        """Makes a graph known that checks whether these weights are as they were folded."""
        self._checkers = (*(ref for ref in self._checkers if ref() is not None), weakref.ref(graph))

    def drop_stale_checks(self) -> None:
        """Frees what checks of earlier generations keep, the memory of replaced weights too."""
        for graph in filter(None, (ref() for ref in self._checkers)):
            graph.drop_stale_check()

    def _finalize(
        self, weight: Tensor, name: str, weight_format: WeightFormat, kernel: KernelConfig | None
    ) -> None:
        folded = self.get(weight, weight_format, name)
        self.generation += 1
        self.release(weight)
        if kernel is None:
            with torch.no_grad():
                weight.copy_(folded)
            return
        shape = tuple(weight.shape)
        self.packed[name] = PackedWeight(weight_format, kernel, shape, weight.dtype, folded)
        hollow_out(weight)

    def detect_edits(self) -> None:
        """Forgets everything folded if a device has reported an edit since the last call."""
        if self._asks and self._watcher.take_report():
            self.generation += 1
            self._folded.clear()
            warnings.warn(
                "weights were edited through .data after they had been folded, and at least one "
                "call still ran what they were; edit them in place under torch.no_grad(), which "
                "is seen at once",
                stacklevel=2,
            )

    def ask_devices(self) -> None:
        """Asks devices other than the CPU whether their weights are still what was folded.

        It takes a few launches, so a quick model asks once in edit_watch.ASK_SECONDS.
        """
        if self._asks and self._watcher.is_due(self.generation):
            self._watcher.ask([held for held in [*self._folded.values()] if held.is_watched])

    def get(self, weight: Tensor, weight_format: WeightFormat, name: str) -> Tensor:
        """Returns the weight in a form. Raises DenseRunError where it requires a gradient."""
        if weight.requires_grad and torch.is_grad_enabled():
            raise explain_folded_gradient(name)
        packed = self.find_finalized(weight, name)
        kept = None if packed is None else (packed.weight_format, packed.data.device)
        if packed is not None and kept == (weight_format, weight.device):
            return packed.data
        state = (0 if weight.is_inference() else weight._version, weight.data_ptr())
        key = id(weight), weight_format
        held = self._folded.get(key)
        if held is not None and held.weight() is weight and held.state == state:
            sample = None if is_asynchronous(weight) else held.sample()
            if sample is None or torch.equal(sample.now, sample.before):
                return held.folded
        self.generation += 1
        del held
        self._folded.pop(key, None)  # freed before there is a new one
        with torch.no_grad():
            source = weight.detach() if packed is None else packed.unpack().to(weight.device)
            folded = fold_weight(source, weight_format, name)
            release_after_packing(weight)
            self._asks |= is_asynchronous(weight)
            before = None
            if packed is None:
                before = sample_values(weight.detach(), spread=is_asynchronous(weight)).clone()
        gone = weakref.ref(weight, lambda _: self._folded.pop(key, None))
        self._folded[key] = FoldedWeight(gone, state, before, folded)
        return folded

    def find_samples(self, weight: Tensor, weight_format: WeightFormat) -> WeightSample | None:
        """Returns values of a folded weight that can be compared without waiting for a device."""
        held = self._folded.get((id(weight), weight_format))
        return None if held is None or is_asynchronous(weight) else held.sample()

    def find_finalized(self, weight: Tensor, name: str) -> PackedWeight | None:
        """Returns the packed form of a hollow weight; None for one that holds its values."""
        packed = self.packed.get(name)
        if packed is None or not is_hollow(weight):
            return None
        return packed

    def settle(self, module: nn.Module) -> None:
        """Hollows out finalized weights again that a copy, a file or a cast has filled with NaN.

        One that its packed form does not suit any more (another device, a dtype its kernel does not
        run) gets its values back, to be folded anew.
        """
        settled = self._settled
        if settled is not None and settled[0] == self.generation and settled[1].holds():
            return
        names = []
        for full_name, weight in module.named_parameters(remove_duplicate=False):
            name = strip_adapter_prefix(full_name)
            packed = self.packed.get(name)
            if packed is None:
                continue
            names.append(full_name)
            known = name not in self._arrived and weight.stride()[0] == 0
            if known and weight.dtype == packed.dtype and weight.device == packed.data.device:
                continue
            self.generation += 1
            self._arrived.discard(name)
            if not weight.is_meta and not is_hollow(weight):
                continue
            if not packed.suits(weight):
                weight.data = packed.unpack().to(weight)
                del self.packed[name]
                continue
            hollow_out(weight)
            if weight.dtype != packed.dtype:
                self.packed[name] = cast_packed(packed, weight.dtype, name)
        self._settled = self.generation, PlaceCheck(module, names)

    def unpack_finalized(self, module: nn.Module) -> None:
        """Gives finalized weights their values back, until after the next call."""
        for name in self._names(module):
            self._refill(module.get_parameter(name), strip_adapter_prefix(name))
        self.packed.clear()

    def _refill(self, weight: Tensor, name: str) -> None:
        packed = self.find_finalized(weight, name)
        self.generation += 1
        weight.__class__ = nn.Parameter
        if packed is not None:  # else unpacked under another name
            weight.data = packed.unpack().to(weight.device, weight.dtype)
            self._pending.append((weight, name, packed.weight_format, packed.kernel, None))

    def list_hollow(self, module: nn.Module) -> list[tuple[Tensor, type[nn.Parameter]]]:
        """Returns the finalized weights, each with the class that it has between calls."""
        weights = {strip_adapter_prefix(n): module.get_parameter(n) for n in self._names(module)}
        return [(w, make_hollow_class(partial(self._refill, name=n))) for n, w in weights.items()]

    def _names(self, module: nn.Module) -> list[str]:
        """Returns the names of finalized weights under which their packed forms are kept."""
        return [
            name
            for name, parameter in module.named_parameters(remove_duplicate=False)
            if self.find_finalized(parameter, strip_adapter_prefix(name)) is not None
        ]

    def iterate_finalized(self, module: nn.Module) -> Iterator[tuple[str, PackedWeight]]:
        """Yields (name in the module, packed form) of finalized weights; all names of tied ones."""
        forms = {
            id(module.get_parameter(name)): self.packed[strip_adapter_prefix(name)]
            for name in self._names(module)
        }
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if id(parameter) in forms:
                yield name, forms[id(parameter)]

    def fill_state_dict(self, module: nn.Module, state: dict[str, Any], prefix: str) -> None:
        """Writes the masked dense values of finalized weights into a state_dict."""
        for name, packed in self.iterate_finalized(module):
            if prefix + name in state and is_hollow(state[prefix + name]):
                state[prefix + name] = packed.unpack()

    def state_dict_without_finalized(self, module: nn.Module) -> dict[str, Tensor]:
        """Returns the state_dict of a module without its finalized weights."""
        left_out = {name for name, _ in self.iterate_finalized(module)}
        hooks, module._state_dict_hooks = module._state_dict_hooks, OrderedDict()
        try:
            state = module.state_dict()
        finally:
            module._state_dict_hooks = hooks
        return {name: tensor for name, tensor in state.items() if name not in left_out}


def _is_exact(row: PlannedWeight) -> bool:
    """Whether the folded form holds the masked weight to the bit."""
    inexact = row.kernel is not None and bool(find_family(row.kernel.name).inexact)
    return not inexact and row.weight_format.dtype is None
