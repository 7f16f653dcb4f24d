"""A small captured graph with its plan, for tests of passes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from sparsedm_compiler import Pattern
from sparsedm_compiler.backends.kernel_family import KernelConfig, WeightFormat
from sparsedm_compiler.backends.registry import find_family
from sparsedm_compiler.graph.capture import CapturedGraph, capture
from sparsedm_compiler.passes import PlannedWeight, Status, find_uses


class Three(nn.Module):
    """A tied, a checkpointed and an untouched layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8, bias=False)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.b, self.a(x), use_reentrant=False)
        return self.tied(x)


class Mlp(nn.Module):
    """Two layers with an activation between them, and one that nothing masks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, 16)
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc2(F.gelu(self.fc1(x))))


class Autocast(nn.Module):
    """A float32 layer that multiplies in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.fc(x)


@dataclass(frozen=True)
class Case:
    """A captured graph, its plan, and the inputs it takes."""

    captured: CapturedGraph
    plan: tuple[PlannedWeight, ...]
    inputs: tuple[Tensor, ...]

    @property
    def gm(self) -> fx.GraphModule:
        return self.captured.gm


def capture_model(model: nn.Module, x: Tensor) -> CapturedGraph:
    graph = capture(model, x)
    assert graph is not None
    return graph


def plan_masks(
    graph: CapturedGraph, *names: str, pattern: str = "2:4"
) -> tuple[PlannedWeight, ...]:
    """The plan that masks the weights of these names, and runs no kernel."""
    parsed, rows = Pattern.parse(pattern), []
    for position, node in enumerate(graph.gm.graph.find_nodes(op="placeholder")):
        known = graph.names.get(node, ())
        if known and known[0] in names:
            shape = tuple(node.meta["example_value"].shape)
            fmt = WeightFormat(parsed)
            row = PlannedWeight(node, position, known[0], parsed, shape, find_uses(node), fmt)
            rows.append(row)
    assert len(rows) == len(names)
    return tuple(rows)


def plan_kernel(plan: tuple[PlannedWeight, ...], kernel: KernelConfig) -> tuple[PlannedWeight, ...]:
    """The same plan with every weight run by a kernel."""
    return tuple(
        row.run_sparse(
            kernel,
            replace(row.weight_format, kernel=kernel.untiled),
            status=Status.PINNED,
            reason="pinned by a test",
        )
        for row in plan
    )


def first_kernel(name: str, pattern: str, dtype: torch.dtype = torch.float32) -> KernelConfig:
    """A kernel of that name in the first setting that its family has for the pattern."""
    return find_family(name).list_candidates(Pattern.parse(pattern), dtype)[0]


def print_calls(gm: fx.GraphModule) -> str:
    """One line for every node but placeholders and the output."""
    return "\n".join(
        f"{node.name} = {node._pretty_print_target(node.target)}{node.args}"
        for node in gm.graph.nodes
        if node.op not in ("placeholder", "output")
    )
