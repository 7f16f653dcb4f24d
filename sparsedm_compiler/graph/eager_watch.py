"""Products that run eagerly: those that a graph break leaves outside of every captured graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.eval_frame import skip_code
from torch.overrides import TorchFunctionMode

from .capture import Names, copy_forward, map_parameter_names
from .flat_graph import classify_step
from .op_table import OP_TABLE, OpEntry


@dataclass(frozen=True, slots=True)
class EagerProduct:
    """One call of an op of the table in an eager run.

    Attributes:
        entry: The op's entry in the table.
        values: The arguments by name.
        out: The result.
        names: Names of those arguments that are parameters, by argument name.
    """

    entry: OpEntry
    values: Mapping[str, Any]
    out: Any
    names: Mapping[str, Names]


class EagerWatch(TorchFunctionMode):
    """A mode that reports every op of the table that runs eagerly while it is on.

    Ops inside compiled graphs are not reported, only those of Python that Dynamo left outside.
    """

    def __init__(self, module: nn.Module, report: Callable[[EagerProduct], None]) -> None:
        super().__init__()
        self.names = map_parameter_names(module)
        self.report = report
        self.kept: list[Tensor] = []  # casts and views of parameters: ids stay theirs while held

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        entry = OP_TABLE.get(func)
        if entry is None:
            self._follow(func, args, out)
        else:
            values = entry.bind(args, kwargs or {})
            tensors = {k: v for k, v in values.items() if isinstance(v, Tensor)}
            names = {k: self.names[id(v)] for k, v in tensors.items() if id(v) in self.names}
            self.report(EagerProduct(entry, values, out, names))
        return out

    def _follow(self, func: Any, args: Any, out: Any) -> None:
        """Gives a cast or view of a parameter the names of that parameter."""
        names = self.names.get(id(args[0])) if args else None
        if names and classify_step(func):
            for part in out if isinstance(out, (tuple, list)) else (out,):
                self.names[id(part)] = names
                self.kept.append(part)


# Dynamo may inline the mode into a graph it captures, but must not make a graph of the mode itself.
skip_code(EagerWatch.__torch_function__.__code__)


def record_eager_products(module: nn.Module, *args: Any, **kwargs: Any) -> list[EagerProduct]:
    """Runs the module's own forward eagerly and returns its calls of ops of the table, in order.

    The run leaves no trace: no gradients, and the random state and buffers are restored.
    """
    products: list[EagerProduct] = []
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    forward = copy_forward(module)
    with torch.no_grad(), torch.random.fork_rng(), EagerWatch(module, products.append):
        torch._dynamo.disable(forward)(module, *args, **kwargs)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])
    return products
