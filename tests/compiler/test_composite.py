"""Weights inside composite nodes: nn.MultiheadAttention and the fused encoder layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from tests.oracle import OPTIONS, assert_gradients, assert_same, oracle_of


class Blocks(nn.Module):
    """Two encoder layers and a cross-attention with projections of its own widths."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.cross = nn.MultiheadAttention(16, 2, kdim=8, vdim=24, batch_first=True)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        out: Tensor = self.cross(self.encoder(x), keys, values)[0]
        return out


def call() -> tuple[tuple[Tensor, ...], dict[str, object]]:
    shapes = ((2, 3, 16), (2, 5, 8), (2, 5, 24))
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes), {}


EXPECTED = {
    f"encoder.layers.{i}.{name}.weight"
    for i in range(2)
    for name in ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")
}
EXPECTED = {name.replace("in_proj.weight", "in_proj_weight") for name in EXPECTED}
EXPECTED |= {f"cross.{name}_proj_weight" for name in "qkv"} | {"cross.out_proj.weight"}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_weights_of_a_composite_node_when_run_are_all_masked(mode: str, training: bool) -> None:
    """Without gradients and in eval, torch swaps in the fused layer: it must be masked too."""
    torch.manual_seed(0)
    student = sdm.compile(Blocks(), "2:4", policy="all", **OPTIONS[mode], backend="eager").train(
        training
    )
    args, _ = call()
    with torch.no_grad():
        out = student(*args)
        assert {*sdm.explain(student).masked} == EXPECTED
        # matmul folds its batch only for weights that ask for no gradient, as masked ones here.
        assert_same(out, oracle_of(student).requires_grad_(False)(*args))
    if not training:
        operators = {row.op for row in sdm.explain(student).rows}
        assert operators == {"encoder_layer", "multi_head_attention"}


def test_gradients_of_a_composite_node_in_training_reach_every_weight() -> None:
    torch.manual_seed(0)
    student = sdm.compile(Blocks(), "2:4", policy="all", backend="eager")
    student(*call()[0])
    assert_gradients(student, oracle_of(student), call())


def test_in_projection_of_attention_when_in_keep_dense_stays_dense() -> None:
    student = sdm.compile(
        Blocks(), "2:4", policy="all", keep_dense=["*.in_proj_weight"], backend="eager"
    )
    student(*call()[0])
    assert {*sdm.explain(student).masked} == {n for n in EXPECTED if "in_proj" not in n}
