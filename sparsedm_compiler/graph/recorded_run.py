"""An eager run as one flat list of ops: the graph of a forward that no single graph holds.

Analyses read it as they read a captured graph, so that what they decide on a weight does not depend
on whether hooks or Python values break the forward into several graphs.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.eval_frame import skip_code

from ..errors import CaptureError
from .capture import Names, copy_forward
from .eager_watch import EagerMode, is_compiling_here, name_read, run_undone
from .flat_graph import Op, classify_step, link_users, may_write, trace_parameter
from .op_table import OP_TABLE
from .written_parameters import WrittenParameters


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """The ops of one eager run.

    Attributes:
        ops: All of them in order, each tensor that no op has made before its first reader.
        parameters: Those that are parameters of the module, with their names.
        inputs: Those that came from elsewhere and are no buffers: inputs of the call.
    """

    ops: tuple[Op, ...]
    parameters: dict[Op, Names]
    inputs: frozenset[Op]


class RecordingStopped(BaseException):
    """Ends a run that is to be undone before a backward: it has none, and gradients would stay."""


class RunRecorder(EagerMode):
    """A mode that records the ops that run eagerly while it is on, without their values.

    ``report``: called with the names of every parameter that is a factor of a product.
    """

    written: WrittenParameters

    def __init__(self, module: nn.Module, report: Callable[[Names], None] | None = None) -> None:
        super().__init__(module)
        self._report = report
        self.written = WrittenParameters(module)
        self._graph = fx.Graph()
        self._ops: list[Op] = []
        self._parameters: dict[Op, Names] = {}
        self._by_name: dict[str, Op] = {}
        self._inputs: set[Op] = set()
        self._made: dict[int, tuple[weakref.ref[Tensor], Op]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.backward, torch.autograd.grad):
            raise RecordingStopped
        self.written.note(func, args)
        out = func(*args, **(kwargs or {}))
        if not is_compiling_here():
            self._record(func, args, kwargs or {}, out)
        return out

    def finish(self, out: Any = None) -> RecordedRun:
        """Returns what was recorded of a run; ``out`` is its result."""
        self._add("output", "output", (self._map(out),))
        link_users(self._ops)
        return RecordedRun(tuple(self._ops), self._parameters, frozenset(self._inputs))

    def _record(self, func: Any, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
        parts = [out] if isinstance(out, Tensor) else out if isinstance(out, (tuple, list)) else ()
        results = [part for part in parts if isinstance(part, Tensor)]
        if not results and not may_write(func):
            return  # a size, a dtype, a Python value
        read = name_read(func)
        if read is not func:
            if not classify_step(read) and self._find_names(args[0], multiplied=True):
                args = ()  # its gradient, its data: neither the weight nor made of an input
            func, args = getattr, (*args[:1], read)
        op = self._add("call_function", func, self._map(args), self._map(kwargs), out)
        for index, part in enumerate(results):
            made = op
            if len(parts) > 1 or part is not out:
                made = self._add("call_function", operator.getitem, (op, index), {}, part)
            self._made[id(part)] = weakref.ref(part), made
        if self._report is not None and func in OP_TABLE:
            readings = (trace_parameter(factor, self._parameters) for factor in op.inputs)
            for reading in filter(None, readings):
                self._report(self._parameters[reading.parameter])

    def _add(
        self, kind: str, target: Any, args: Any = (), kwargs: Any = None, value: Any = None
    ) -> Op:
        name = target if isinstance(target, str) else target.__name__
        node = self._graph.create_node(kind, target, name=name.strip("_"))
        node.meta["example_value"] = _describe(value)
        op = Op(node.name, node, args, kwargs or {})
        self._ops.append(op)
        return op

    def _map(self, tree: Any) -> Any:
        """Returns nested arguments with ops instead of tensors."""
        if isinstance(tree, Tensor):
            return self._find_op(tree)
        if isinstance(tree, (tuple, list)):
            return tuple(map(self._map, tree))
        if isinstance(tree, dict):
            return {key: self._map(value) for key, value in tree.items()}
        if isinstance(tree, slice):
            return slice(*map(self._map, (tree.start, tree.stop, tree.step)))
        return tree

    def _find_op(self, tensor: Tensor) -> Op:
        """Returns the op that a tensor is the result of; one for a parameter, buffer or input."""
        names = self._find_names(tensor, multiplied=True)
        if names:
            if names[0] not in self._by_name:
                op = self._by_name[names[0]] = self._add("placeholder", "weight", value=tensor)
                self._parameters[op] = names
            return self._by_name[names[0]]
        made = self._made.get(id(tensor))
        if made is not None and made[0]() is tensor:
            return made[1]
        op = self._add("placeholder", "x", value=tensor)
        self._made[id(tensor)] = weakref.ref(tensor), op
        if not any(tensor is buffer for buffer in self._module.buffers()):
            self._inputs.add(op)
        return op


def _describe(value: Any) -> Any:
    """Returns what analyses read of a value, without its memory: meta tensors and parameters.

    Of an offloaded model each layer's weights are on its device for its own call alone.
    """
    if isinstance(value, (tuple, list)):
        return tuple(map(_describe, value))
    if type(value) is nn.Parameter:
        return nn.Parameter(_describe(value.detach()), value.requires_grad)
    if isinstance(value, nn.Parameter) or not isinstance(value, Tensor) or value.is_nested:
        return value
    if value.layout is torch.strided:
        size, stride = value.shape, value.stride()
        return torch.empty_strided(size, stride, dtype=value.dtype, device="meta")
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


# Dynamo may inline a mode into a graph it captures, but must not make a graph of the mode itself.
skip_code(RunRecorder.__torch_function__.__code__)


def record_run(module: nn.Module, *args: Any, **kwargs: Any) -> RecordedRun:
    """Runs the module's own forward eagerly, undone, and returns its ops.

    Raises CaptureError for a forward that takes gradients itself.
    """
    recorder = RunRecorder(module)
    try:
        return recorder.finish(run_undone(recorder, module, copy_forward(module), args, kwargs))
    except RecordingStopped:
        raise CaptureError(
            f"the forward of {type(module).__name__} takes gradients itself, so that its products "
            "are not known before it has run"
        ) from None
