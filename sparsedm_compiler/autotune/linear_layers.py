"""Linear layers of well-known diffusion models, by their sizes, for tables of speed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Layer:
    """One linear layer of a model.

    Attributes:
        model: The name of the model.
        name: The name of the layer in a block of that model.
        cols: Input channels.
        rows: Output channels.
        act: The activation behind it, one of ``custom_op.ACTS``.
    """

    model: str
    name: str
    cols: int
    rows: int
    act: str = "none"

    def __str__(self) -> str:
        return f"{self.model} {self.name}"


def list_block_layers(model: str, width: int, act: str = "gelu") -> Iterator[Layer]:
    """Yields the linear layers of a transformer block of that width, with one qkv."""
    yield Layer(model, "fc1", width, 4 * width, act)
    yield Layer(model, "fc2", 4 * width, width)
    yield Layer(model, "qkv", width, 3 * width)
    yield Layer(model, "proj", width, width)


LAYERS = (
    *list_block_layers("DiT-XL/2", 1152, "gelu_tanh"),
    Layer("FLUX", "fc1", 3072, 12288, "gelu_tanh"),
    Layer("FLUX", "fc2", 12288, 3072),
    Layer("FLUX", "out", 15360, 3072),
    Layer("FLUX", "proj", 3072, 3072),
    *list_block_layers("U-ViT-L", 1024),
    Layer("SD3", "fc1", 1536, 6144, "gelu_tanh"),
    Layer("SD3", "fc2", 6144, 1536),
    Layer("SD3", "proj", 1536, 1536),
    *list_block_layers("U-ViT-S", 512),
)
"""In the order of their worth on a card: ``sparsedm bench --layers`` and benchmarks/gpu."""
