"""A small network of equal blocks, and what may be wrong with one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Attention without heads and an MLP; ``change`` is applied to what goes in."""

    def __init__(self, width: int, change: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.change = change

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        if self.change is not None:
            x = self.change(x)
        y = self.norm(x) * scale
        x = x + F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class Stack(nn.Module):
    """An embedding whose output lies transposed in memory, ``depth`` blocks, a last layer."""

    def __init__(self, depth: int = 3, width: int = 16, changes: Any = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, width, 2, stride=2)
        wrong = dict(changes)
        self.blocks = nn.ModuleList(Block(width, wrong.get(index)) for index in range(depth))
        self.scale, self.last = nn.Linear(4, width), nn.Linear(width, 5)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        scale = self.scale(condition).unsqueeze(1)
        for block in self.blocks:
            tokens = block(tokens, scale)
        return self.last(tokens)


def stack_inputs(batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, 3, 8, 8, generator=generator),
        torch.randn(batch, 4, generator=generator),
    )
