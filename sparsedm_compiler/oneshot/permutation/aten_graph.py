"""The call of a model as one graph of aten ops before autograd, with its parameters by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ...compiler.lookup import analyse_layers
from ...errors import ConfigError, GraphError
from ...graph.capture import CapturedGraph, capture_inputs, map_parameter_names


@dataclass(frozen=True, slots=True)
class AtenGraph:
    """A graph of aten ops, in which linear, convolution, norms and attention are one op each.

    Attributes:
        gm: The graph; every node has the shape of its value in ``meta["val"]``.
        parameters: The placeholders that are parameters, with the first name of each.
        buffers: The placeholders that are buffers that a state_dict holds, with their names.
    """

    gm: fx.GraphModule
    parameters: Mapping[fx.Node, str]
    buffers: Mapping[fx.Node, str]


def capture_call(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[CapturedGraph, list[Any]]:
    """Captures one call of a model; returns the graph and the values of its placeholders.

    Raises:
        ConfigError: The forward takes several graphs.
    """
    with torch.no_grad(), analyse_layers(model):
        captured = capture_inputs(model, *args, **kwargs)
    if captured is None:
        raise ConfigError(
            f"{type(model).__name__} takes several graphs (its forward asks tensors for Python "
            "values), so it is not known which of its channels go together"
        )
    return captured


def trace_aten(model: nn.Module, captured: CapturedGraph, inputs: list[Any]) -> AtenGraph:
    """Traces a captured call to aten ops, which runs it once.

    Raises:
        GraphError: It cannot be traced.
    """
    try:
        with torch.no_grad():
            gm = make_fx(captured.gm, pre_dispatch=True)(*inputs)
    except Exception as error:
        first = (str(error).splitlines() or ["no reason"])[0]
        raise GraphError(
            f"the graph of {type(model).__name__} cannot be traced to aten ops: {first}"
        ) from error
    names = {key: own[0] for key, own in map_parameter_names(model).items()}
    state = {id(x): name for name, x in model.state_dict(keep_vars=True).items()}
    parameters, buffers = {}, {}
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        if id(value) in names:
            parameters[node] = names[id(value)]
        elif isinstance(value, Tensor) and id(value) in state:
            buffers[node] = state[id(value)]
    return AtenGraph(gm, parameters, buffers)
