"""What is measured, in the order of its worth: in full on a GPU, at toy sizes in a rehearsal."""

from __future__ import annotations

from dataclasses import dataclass

from sparsedm_compiler.autotune.linear_layers import LAYERS, Layer, list_block_layers

PAPER = {
    1: {1: 1.02, 2: 1.01, 4: 1.01},
    2: {1: 1.04, 2: 0.97, 4: 1.01},
    4: {1: 1.23, 2: 1.10, 4: 0.98},
    8: {1: 1.22, 2: 1.17, 4: 1.08},
}
"""The paper's speed-ups: mlp_ratio -> patch size -> 2:4 over eager dense."""


@dataclass(frozen=True, slots=True)
class Block:
    """The U-ViT block of the paper's table; ``side``: of the image that is cut into patches."""

    width: int
    heads: int
    side: int
    ratios: tuple[int, ...]
    patches: tuple[int, ...]
    dtypes: tuple[str, ...]
    batches: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is measured.

    ``models``, ``training``, ``memory``, ``first_calls``: (name in models.py, batch).
    ``compiled``: Inductor with CUDA graphs; else eager, in a rehearsal. ``kernels``: of the models,
    as of ``compile``; gated, but in a rehearsal, where dense would always win. ``seconds``: of one
    comparison of models. ``until``: the end of the section's time, in seconds since 1970.
    """

    device: str
    compiled: bool
    kernels: str
    tokens: tuple[int, ...]
    layers: tuple[Layer, ...]
    op_patterns: tuple[str, ...]
    block: Block
    models: tuple[tuple[str, int], ...]
    model_patterns: tuple[str, ...]
    training: tuple[tuple[str, int], ...]
    train_patterns: tuple[str, ...]
    memory: tuple[tuple[str, int], ...]
    screening: int
    rounds: int
    seconds: float
    first_calls: tuple[tuple[str, int], ...]
    first_variants: tuple[str, ...]
    until: float = 0.0


FULL = Plan(
    device="cuda",
    compiled=True,
    kernels="auto",
    tokens=(4096, 16384, 1024, 256),
    layers=LAYERS,
    op_patterns=("2:4", "1:2@64x16", "1:4@128x16", "1:8@128x16", "1:2@128x32+2:4", "64:2:8"),
    block=Block(8192, 8, 32, (8, 4, 2, 1), (1, 2, 4), ("bfloat16", "float16"), (1, 8)),
    models=(
        ("uvit-s", 32),
        ("dit-quarter", 16),
        ("flux", 1),
        ("uvit-s", 1),
        ("dit", 16),
        ("uvit-l", 8),
        ("dit", 1),
        ("sdxl", 1),
    ),
    model_patterns=("2:4", "1:2@64x16", "1:4@128x16"),
    training=(("dit-quarter", 16), ("uvit-s", 32)),
    train_patterns=("1:4@128x32", "1:2@128x64", "2:4", "1:8", "2:4t"),
    memory=(("dit-quarter", 16),),
    screening=4,
    rounds=21,
    seconds=1.5,
    first_calls=(("dit-quarter", 16), ("uvit-s", 32)),
    first_variants=("dense", "2:4, regional, table", "2:4, regional", "2:4"),
)

TINY = Plan(
    device="cpu",
    compiled=False,
    kernels="sparse",
    tokens=(16, 40),
    layers=(*list_block_layers("toy", 128),),
    op_patterns=("2:4", "1:2@64x16", "1:2@64x32+2:4", "64:2:8", "1:8x64"),
    block=Block(64, 2, 8, (2, 1), (2, 4), ("bfloat16",), (1,)),
    models=(("dit-toy", 2), ("uvit-toy", 1), ("flux-toy", 1)),
    model_patterns=("1:2@64x16", "2:4"),
    training=(("uvit-toy", 2),),
    train_patterns=("1:4@128x32", "2:4", "2:4t"),
    memory=(("uvit-toy", 1),),
    screening=3,
    rounds=5,
    seconds=0.05,
    first_calls=(("dit-toy", 2),),
    first_variants=("dense", "2:4, no kernels"),
)
