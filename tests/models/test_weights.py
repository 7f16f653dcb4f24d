"""Published U-ViT checkpoints load strictly: every name and shape, written out by rule."""

from __future__ import annotations

import pytest

from sparsedm_compiler.models import UViT, preset


def linear(name: str, out: int, into: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), **({f"{name}.bias": (out,)} if bias else {})}


def norm(name: str, dim: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def block(name: str, dim: int, skip: bool = False) -> dict[str, tuple[int, ...]]:
    return {
        **norm(f"{name}.norm1", dim),
        **linear(f"{name}.attn.qkv", 3 * dim, dim, bias=False),
        **linear(f"{name}.attn.proj", dim, dim),
        **norm(f"{name}.norm2", dim),
        **linear(f"{name}.mlp.fc1", 4 * dim, dim),
        **linear(f"{name}.mlp.fc2", dim, 4 * dim),
        **(linear(f"{name}.skip_linear", dim, 2 * dim) if skip else {}),
    }


def published(dim: int, half: int, tokens: int, channels: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published checkpoint, patch size 2, without its options."""
    listing = {
        "pos_embed": (1, tokens, dim),
        "patch_embed.proj.weight": (dim, channels, 2, 2),
        "patch_embed.proj.bias": (dim,),
        **block("mid_block", dim),
        **norm("norm", dim),
        **linear("decoder_pred", 4 * channels, dim),
    }
    for index in range(half):
        listing |= block(f"in_blocks.{index}", dim)
        listing |= block(f"out_blocks.{index}", dim, skip=True)
    return listing


def final(channels: int) -> dict[str, tuple[int, ...]]:
    return {"final_layer.weight": (channels, channels, 3, 3), "final_layer.bias": (channels,)}


CHECKPOINTS = {
    "uvit-cifar10-small": published(512, 6, 1 + 256, 3) | final(3),
    "uvit-imagenet256-large": published(1024, 10, 2 + 256, 4)
    | final(4)
    | {"label_emb.weight": (1001, 1024)},
    "uvit-imagenet256-huge": published(1152, 14, 2 + 256, 4) | {"label_emb.weight": (1001, 1152)},
    "uvit-mscoco-small": published(512, 6, 1 + 77 + 256, 4)
    | final(4)
    | linear("context_embed", 512, 768),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_uvit_has_names_and_shapes_of_published_checkpoints(name: str) -> None:
    model, _, _ = preset(name)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == (
        CHECKPOINTS[name]
    )


def test_uvit_time_mlp_has_published_names() -> None:
    plain, timed = (UViT(embed_dim=8, depth=0, mlp_time_embed=flag) for flag in (False, True))
    added = timed.state_dict().keys() - plain.state_dict().keys()
    assert added == {f"time_embed.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
