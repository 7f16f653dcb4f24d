"""The models that are timed: ours, diffusers' where it is installed, and stand-ins of plain torch.

A stand-in has the linear layers of the published model, shape for shape, the same attention and the
same activations, with random weights; rotary positions and position tables are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsedm_compiler.models import UViT, example_inputs
from sparsedm_compiler.models.presets import find_preset
from sparsedm_compiler.models.uvit import embed_timesteps

from .case import Case, Row

Call = tuple[tuple[Any, ...], dict[str, Any]]
WAVES = 256


@dataclass(frozen=True, slots=True)
class Entry:
    """A model to time. ``policy``: as of ``compile``; "all" for stacks of blocks without ends."""

    title: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module, int], Call]
    policy: str = "structural"


class DiTBlock(nn.Module):
    """A block of Peebles & Xie 2023: adaLN-Zero, one qkv, GELU by tanh."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        parts = self.modulation(F.silu(condition)).unsqueeze(1).chunk(6, dim=-1)
        shift, scale, gate, shift2, scale2, gate2 = parts
        q, k, v = self.qkv(self.norm(x) * (1 + scale) + shift).chunk(3, dim=-1)
        x = x + gate * self.proj(attention(q, k, v, self.heads))
        hidden = F.gelu(self.fc1(self.norm(x) * (1 + scale2) + shift2), approximate="tanh")
        return x + gate2 * self.fc2(hidden)


class DiT(nn.Module):
    """DiT on latents [B, 4, side, side]; predicts noise (and, thrown away, variances)."""

    def __init__(self, width: int, depth: int, heads: int, side: int = 32) -> None:
        super().__init__()
        self.side = side
        self.embed = nn.Conv2d(4, width, 2, stride=2)
        self.time = nn.Sequential(nn.Linear(WAVES, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(1001, width)
        self.positions = nn.Parameter(torch.randn(1, side * side // 4, width) * 0.02)
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation, self.out = nn.Linear(width, 2 * width), nn.Linear(width, 2 * 2 * 8)

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        condition = self.time(embed_timesteps(timesteps, WAVES).to(x.dtype)) + self.label(labels)
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.modulation(F.silu(condition)).unsqueeze(1).chunk(2, dim=-1)
        tokens = self.out(self.norm(tokens) * (1 + scale) + shift)
        image = tokens.transpose(1, 2).unflatten(2, (self.side // 2, self.side // 2))
        return F.pixel_shuffle(image, 2).chunk(2, dim=1)[0]


class Stream(nn.Module):
    """Image or text in a double block of FLUX: its own weights, one attention over both."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 6 * width)
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def begin(self, x: Tensor, condition: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(q, k, v) and the six modulations."""
        parts = self.modulation(F.silu(condition)).unsqueeze(1).chunk(6, dim=-1)
        normed = self.norm(x) * (1 + parts[1]) + parts[0]
        return (self.q(normed), self.k(normed), self.v(normed)), parts

    def end(self, x: Tensor, mixed: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """What the attention and the MLP add."""
        x = x + parts[2] * self.proj(mixed)
        normed = self.norm(x) * (1 + parts[4]) + parts[3]
        return x + parts[5] * self.fc2(F.gelu(self.fc1(normed), approximate="tanh"))


class Double(nn.Module):
    """A double-stream block of FLUX."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.image, self.text = Stream(width), Stream(width)

    def forward(self, image: Tensor, text: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        ours, image_parts = self.image.begin(image, condition)
        theirs, text_parts = self.text.begin(text, condition)
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(theirs, ours, strict=True))
        mixed, words = attention(q, k, v, self.heads), text.shape[1]
        image = self.image.end(image, mixed[:, words:], image_parts)
        return image, self.text.end(text, mixed[:, :words], text_parts)


class Single(nn.Module):
    """A single-stream block of FLUX: attention and MLP side by side, one linear behind both."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 3 * width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(5 * width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(condition)).unsqueeze(1).chunk(3, dim=-1)
        normed = self.norm(x) * (1 + scale) + shift
        mixed = attention(self.q(normed), self.k(normed), self.v(normed), self.heads)
        hidden = F.gelu(self.fc(normed), approximate="tanh")
        return x + gate * self.out(torch.cat([mixed, hidden], dim=-1))


class Flux(nn.Module):
    """A stack of FLUX's blocks, over [B, image tokens, width] and [B, text tokens, width]."""

    def __init__(self, width: int, heads: int, doubles: int, singles: int) -> None:
        super().__init__()
        self.width = width
        self.doubles = nn.ModuleList(Double(width, heads) for _ in range(doubles))
        self.singles = nn.ModuleList(Single(width, heads) for _ in range(singles))

    def forward(self, image: Tensor, text: Tensor, condition: Tensor) -> Tensor:
        for block in self.doubles:
            image, text = block(image, text, condition)
        tokens = torch.cat([text, image], dim=1)
        for block in self.singles:
            tokens = block(tokens, condition)
        return tokens[:, text.shape[1] :]


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """[B, tokens, width] each -> the same, by so many heads."""
    parts = (tensor.unflatten(2, (heads, -1)).transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)


def _dit_inputs(model: nn.Module, batch: int) -> Call:
    assert isinstance(model, DiT)
    steps = torch.arange(batch) + 500.0
    return (torch.randn(batch, 4, model.side, model.side), steps, torch.arange(batch) % 1000), {}


def _flux_inputs(image: int, text: int) -> Callable[[nn.Module, int], Call]:
    def inputs(model: nn.Module, batch: int) -> Call:
        assert isinstance(model, Flux)
        sizes = ((image, model.width), (text, model.width), (model.width,))
        return tuple(torch.randn(batch, *size) for size in sizes), {}

    return inputs


def _known(model: nn.Module, batch: int) -> Call:
    return example_inputs(model, batch=batch)


def _dit() -> Entry:
    if find_spec("diffusers") is None:
        return Entry("DiT-XL/2, stand-in", lambda: DiT(1152, 28, 16), _dit_inputs)
    return Entry("DiT-XL/2", find_preset("dit-xl-2").build, _known)


ENTRIES = {
    "uvit-s": Entry("U-ViT-S CIFAR10", find_preset("uvit-cifar10-small").build, _known),
    "uvit-l": Entry("U-ViT-L ImageNet256", find_preset("uvit-imagenet256-large").build, _known),
    "dit": _dit(),
    "dit-quarter": Entry(
        "7 of DiT-XL/2's 28 blocks, stand-in", lambda: DiT(1152, 7, 16), _dit_inputs
    ),
    "flux": Entry(
        "2 + 4 of FLUX's 19 + 38 blocks, stand-in",
        lambda: Flux(3072, 24, 2, 4),
        _flux_inputs(4096, 512),
        policy="all",
    ),
    "sdxl": Entry("SDXL UNet", find_preset("sdxl").build, _known),
    "uvit-toy": Entry(
        "toy U-ViT",
        lambda: UViT(img_size=8, embed_dim=128, depth=2, num_heads=2, patch_size=2),
        _known,
    ),
    "dit-toy": Entry("toy DiT", lambda: DiT(128, 2, 2, side=8), _dit_inputs),
    "flux-toy": Entry("toy FLUX", lambda: Flux(128, 2, 1, 1), _flux_inputs(16, 8), policy="all"),
}
"""By name."""

NEEDS_DIFFUSERS = ("sdxl",)


def open_model(name: str, batch: int, device: str, dtype: torch.dtype) -> tuple[nn.Module, Call]:
    """A named model in eval() with random weights, and one call of it."""
    entry = ENTRIES[name]
    torch.manual_seed(0)
    with torch.device(device):
        model = entry.build().to(dtype).eval()
        call = entry.inputs(model, batch)
    return model, cast(call, dtype)


def per_model(
    models: Iterable[tuple[str, int]], compare: Callable[..., Iterator[Row]]
) -> Iterator[Case]:
    """A case for each (model, batch), which ``compare`` takes first."""
    for name, batch in models:
        yield Case(f"{ENTRIES[name].title}, batch {batch}", partial(compare, (name, batch)))


def cast(call: Call, dtype: torch.dtype) -> Call:
    """The same call with its noise and text in another dtype."""
    converted: Call = torch.utils._pytree.tree_map(
        lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, call
    )
    return converted
