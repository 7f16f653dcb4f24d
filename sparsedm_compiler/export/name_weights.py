"""Names in an ONNX graph: those of the parameters, also transposed, and of the batch size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import CaptureError
from ..graph.capture import Names
from ..patterns import Pattern

TRANSPOSED = ".T"
"""What follows the name of a weight that the file holds transposed."""


def name_weights(graph: Any, patterns: Mapping[Names, Pattern]) -> dict[str, Pattern]:
    """``Transpose(w) -> w.T``, a constant, for every weight; edits an onnx_ir graph.

    ``torch.onnx`` would fold these transposes into constants with names of its own.

    Args:
        graph: The graph of ``torch.onnx`` before its optimizer, which names weights as the model.
        patterns: The patterns of pruned parameters, by all names that a parameter has.

    Returns:
        The patterns of pruned constants by their names in the graph.

    Raises:
        CaptureError: If the graph does not read a pruned parameter.
    """
    for name, value in [*graph.initializers.items()]:
        if len(value.shape) == 2:
            _fold_transposes(graph, name, value)
    read = {name for name, value in graph.initializers.items() if value.uses()}
    declared = {}
    for names, pattern in patterns.items():
        forms = read & {form for name in names for form in (name, name + TRANSPOSED)}
        if not forms:
            raise CaptureError(f"the ONNX graph would not be sparse: it does not read {names[0]}")
        declared.update(dict.fromkeys(sorted(forms), pattern))
    return declared


def _fold_transposes(graph: Any, name: str, value: Any) -> None:
    """Gives the transposes of a matrix one constant in their place."""
    import onnx_ir

    nodes = [use.node for use in value.uses() if use.node.op_type == "Transpose"]
    if not nodes:
        return
    tensor = onnx_ir.tensor_adapters.TorchTensor(_read(value).T.contiguous(), name + TRANSPOSED)
    turned = onnx_ir.Value(
        name=name + TRANSPOSED,
        shape=onnx_ir.Shape([*value.shape][::-1]),
        type=value.type,
        const_value=tensor,
    )
    graph.register_initializer(turned)
    for node in nodes:
        node.outputs[0].replace_all_uses_with(turned)
        graph.remove(node, safe=True)


def _read(value: Any) -> Tensor:
    """Returns the values of an initializer that ``torch.onnx`` made of a parameter."""
    tensor: Tensor = value.const_value.raw
    return tensor.detach()


def name_batch(graph: Any, name: str = "batch") -> None:
    """Calls the first dimension of the first input that has a dynamic one ``batch`` everywhere."""
    import onnx_ir

    firsts = [value.shape[0] for value in graph.inputs if value.shape is not None and value.shape]
    symbol = next((str(dim.value) for dim in firsts if not isinstance(dim, int)), None)
    values = [*graph.inputs, *(out for node in graph for out in node.outputs)]
    for value in values:
        for i, dim in enumerate(value.shape or ()):
            if not isinstance(dim, int) and dim.value == symbol:
                value.shape[i] = onnx_ir.SymbolicDim(name)
