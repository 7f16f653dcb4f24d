"""First and last layers, skip connections and the critical path of small known networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.models import UViT


class CrossAttention(nn.Module):
    """Two blocks that read the same context: no layer is its sole entry."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.inp = nn.Linear(8, 8)
        self.mix = nn.ModuleList(nn.Linear(8, 8) for _ in range(blocks))
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.inp(x)
        for mix in self.mix:
            x = x + mix(context)
        return self.out(x)


def test_first_and_last() -> None:
    found = sdm.topology(CrossAttention(), torch.randn(1, 8), torch.randn(1, 8))
    assert found.first == {"inp"}
    assert found.last == {"out"}


def test_a_context_with_one_reader_has_a_first_layer() -> None:
    found = sdm.topology(CrossAttention(blocks=1), torch.randn(1, 8), torch.randn(1, 8))
    assert found.first == {"inp", "mix.0"}


def test_skips_and_critical_path() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.small = nn.Linear(8, 8), nn.Linear(8, 8)
            self.up, self.down, self.b = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            y = self.down(torch.relu(self.up(x))) + self.small(x)
            return self.b(torch.cat([x, y], dim=-1))

    found = sdm.topology(Net(), torch.randn(1, 8))
    assert found.critical_path == ("a", "up", "down", "b")
    assert found.critical_macs == 64 + 256 + 256 + 128
    assert found.macs == {"a": 64, "up": 256, "down": 256, "small": 64, "b": 128}
    assert [source for source, _ in found.skips] == ["a"]
    assert all(merge.startswith("cat") for _, merge in found.skips)


def test_the_long_skips_of_a_uvit() -> None:
    model = UViT(img_size=8, patch_size=2, in_chans=1, embed_dim=16, depth=4, num_heads=2)
    found = sdm.topology(model, torch.randn(1, 1, 8, 8), torch.tensor([3]))
    assert found.first == {"patch_embed.proj"}
    assert found.last == {"final_layer"}
    assert "mid_block.mlp.fc1" in found.critical_path
    layers = {*found.macs}
    assert {"out_blocks.0.skip_linear", "in_blocks.1.attn.qkv"} <= layers
    # Every block has two residual additions; each of the two long skips is one edge more.
    assert len(found.skips) >= 2 * 5
