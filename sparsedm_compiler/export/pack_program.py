"""An exported program -> the same program whose pruned weights run by sparse kernels."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves, tree_unflatten

from ..autotune.measure import AutotuneBudget
from ..backends.packing import fold_weight
from ..compiler.folded_weights import FoldedWeights
from ..compiler.guarded_forward import SparseForward
from ..compiler.lower import plan_weights
from ..errors import CaptureError
from ..graph.capture import CapturedGraph, map_parameter_names
from ..passes import Plan, run_passes
from .trace import Example

_CONSTANTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class PackedProgram(nn.Module):
    """A module that runs a graph on its own constants and the inputs of a call.

    Its forward has the signature of the exported model's, so that calls look the same.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        constants: Sequence[Tensor],
        out_spec: Any,
        signature: inspect.Signature,
    ) -> None:
        super().__init__()
        self.gm = gm
        self.names = [f"constant_{i}" for i in range(len(constants))]
        for name, tensor in zip(self.names, constants, strict=True):
            self.register_buffer(name, tensor)

        def forward(*args: Any, **kwargs: Any) -> Any:
            values = [self.get_buffer(name) for name in self.names]
            return tree_unflatten(self.gm(*values, *tree_leaves((args, kwargs))), out_spec)

        forward.__signature__ = signature  # type: ignore[attr-defined]
        self.forward = forward


def pack_program(
    program: ExportedProgram, forward: SparseForward, example: Example
) -> tuple[PackedProgram, Plan]:
    """Rewrites an exported program as a compiled model in mode "infer" would run it.

    Args:
        program: The plain model with masked weights, as ``torch.export`` holds it.
        forward: The compiled model: its decisions, and its options that choose kernels.
        example: The call that was exported; kernels are measured at its shapes.

    Returns:
        (the module to export anew, what runs every pruned weight).

    Raises:
        CaptureError: If the forward writes to buffers of the model.
    """
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise CaptureError(
            f"{type(forward.module).__name__} writes to its buffers or inputs, which a package "
            "with sparse kernels does not: export it dense"
        )
    gm = copy.deepcopy(program.graph_module)
    inputs = list_constants(program)
    targets = {spec.arg.name: str(spec.target) for spec in signature.input_specs}
    placeholders = gm.graph.find_nodes(op="placeholder")[: len(inputs)]
    own = map_parameter_names(forward.module).values()
    aliases = {name: names for names in own for name in names}
    names = {node: aliases.get(targets[node.name], ("",)) for node in placeholders}
    calls = [*inputs, *tree_leaves((example.args, dict(example.kwargs)))]
    config = replace(forward.config, mode="infer", finalize=False)
    plan = plan_weights(
        CapturedGraph(gm, names),
        calls,
        forward.decisions,
        config,
        FoldedWeights(),
        AutotuneBudget(config.autotune_seconds),
    )
    run_passes(gm, plan, "infer")
    for row in plan:
        if row.kernel is not None:
            weight = inputs[row.position]
            inputs[row.position] = fold_weight(weight, row.weight_format, row.name)
    return PackedProgram(gm, inputs, program.call_spec.out_spec, forward.__signature__), plan


def list_constants(program: ExportedProgram) -> list[Tensor]:
    """Returns the values of the first placeholders: parameters, buffers and constants."""
    stored: Mapping[str, Any] = {**program.constants, **program.state_dict}
    specs = [s for s in program.graph_signature.input_specs if s.kind in _CONSTANTS]
    return [stored[str(spec.target)].detach() for spec in specs]
