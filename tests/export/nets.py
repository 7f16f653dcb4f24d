"""A small net with every kind of layer that ONNX stores in its own way, and its inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import sparsedm_compiler as sdm
from tests.oracle import OPTIONS

NAMES = ("tokens.weight", "again.weight", "rows.weight", "plane.weight", "line.weight")
"""Its pruned weights: all but the first and the last layer, and the tied one once."""


class Layers(nn.Module):
    """Linear on tokens (MatMul) and on rows (Gemm), one tied, Conv2d before batch norm, Conv1d."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)
        self.tokens, self.again = nn.Linear(16, 32, bias=False), nn.Linear(32, 16)
        self.rows, self.twin = nn.Linear(8, 16), nn.Linear(8, 16)
        self.twin.weight = self.rows.weight
        self.plane, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.line = nn.Conv1d(16, 16, 1)

    def forward(self, x: Tensor, t: Tensor, *, scale: Tensor | None = None) -> dict[str, Tensor]:
        """x: [batch, 16, 16] tokens; t: [batch, 8]; scale: [] or None."""
        h = self.again(torch.nn.functional.gelu(self.tokens(self.first(x))))
        h = h + self.rows(t)[:, None] + self.twin(t[:, None])
        h = h if scale is None else h * scale
        planes = self.norm(self.plane(h.transpose(1, 2).reshape(-1, 16, 4, 4)))
        return {"x": self.last(self.line(planes.flatten(2)).transpose(1, 2)), "planes": planes}


def make_layers() -> Layers:
    """Returns the net in eval(), seeded, with statistics in its batch norm."""
    torch.manual_seed(0)
    net = Layers()
    net.norm.running_mean.normal_()  # type: ignore[union-attr]
    net.norm.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return net.eval()


def make_call(batch: int = 2, seed: int = 1) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Returns the inputs of one call."""
    generator = torch.Generator().manual_seed(seed)
    x, t = torch.randn(batch, 16, 16, generator=generator), torch.randn(batch, 8)
    return (x, t), {"scale": torch.tensor(0.5)}


def make_student(mode: str = "train", **options: Any) -> nn.Module:
    """Returns the net compiled to 2:4, called once."""
    student = sdm.compile(
        make_layers(), "2:4", **{"backend": "eager", "policy": "all", **OPTIONS[mode], **options}
    )
    args, kwargs = make_call()
    with torch.no_grad():
        student(*args, **kwargs)
    return student


def run_onnx(path: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Returns the outputs of onnxruntime on a CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    tensors = [x.numpy() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    feed = dict(zip([node.name for node in session.get_inputs()], tensors, strict=True))
    return [torch.from_numpy(np.asarray(out)) for out in session.run(None, feed)]
