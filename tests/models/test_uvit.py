"""The reference U-ViT is the published one: token order, arithmetic, doors."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsedm_compiler.errors import ConfigError, DataError
from sparsedm_compiler.models import UViT, UViTConfig
from sparsedm_compiler.models.uvit import embed_timesteps, expand_timesteps, unpatchify

TINY = {"img_size": 8, "in_chans": 3, "embed_dim": 16, "depth": 4, "num_heads": 2, "pos_std": 0.5}


def tiny(**options: Any) -> UViT:
    torch.manual_seed(0)
    return UViT(**{**TINY, **options})


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def inputs_of(module: nn.Module) -> list[tuple[Tensor, ...]]:
    """Filled with what ``module`` is called with."""
    seen: list[tuple[Tensor, ...]] = []
    module.register_forward_hook(lambda _, args, __: seen.append(args))
    return seen


def outputs_of(module: nn.Module) -> list[Tensor]:
    """Filled with what ``module`` returns."""
    seen: list[Tensor] = []
    module.register_forward_hook(lambda _, __, output: seen.append(output))
    return seen


def test_tokens_are_label_time_patches_plus_positions() -> None:
    model, x, y = tiny(depth=0, num_classes=10), images(), torch.tensor([3, 9])
    seen = inputs_of(model.mid_block)
    model(x, torch.tensor([5, 700]), y)
    tokens = seen[0][0] - model.pos_embed
    torch.testing.assert_close(tokens[:, 0], model.label_emb(y))
    torch.testing.assert_close(tokens[:, 1], embed_timesteps(torch.tensor([5, 700]), 16))
    torch.testing.assert_close(tokens[:, 2:], model.patch_embed(x))


def test_tokens_are_time_context_patches_plus_positions() -> None:
    model, x = tiny(depth=0, clip_dim=24, num_clip_token=5), images()
    context = torch.randn(2, 5, 24)
    seen = inputs_of(model.mid_block)
    model(x, 5, context=context)
    tokens = seen[0][0] - model.pos_embed
    torch.testing.assert_close(tokens[:, 0], embed_timesteps(torch.tensor([5, 5]), 16))
    torch.testing.assert_close(tokens[:, 1:6], model.context_embed(context))
    torch.testing.assert_close(tokens[:, 6:], model.patch_embed(x))


def test_patches_are_read_row_by_row() -> None:
    model, x = tiny(), images()
    weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
    expected = torch.einsum("bcij,dcij->bd", x[:, :, 2:4, 6:8], weight) + bias
    torch.testing.assert_close(model.patch_embed(x)[:, 1 * 4 + 3], expected)


def test_embed_timesteps_is_cosines_then_sines() -> None:
    wave = embed_timesteps(torch.tensor([0, 37]), 9)
    assert wave.shape == (2, 9)
    assert wave[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0]
    for i in range(4):
        angle = 37 * 10000 ** (-i / 4)
        assert wave[1, i].item() == pytest.approx(math.cos(angle), abs=1e-5)
        assert wave[1, 4 + i].item() == pytest.approx(math.sin(angle), abs=1e-5)


def test_unpatchify_puts_pixels_back() -> None:
    config, x = UViTConfig(img_size=12, patch_size=3, in_chans=2), torch.randn(2, 2, 12, 12)
    tokens = [
        [
            image[:, row : row + 3, column : column + 3].permute(1, 2, 0).flatten()
            for row in range(0, 12, 3)
            for column in range(0, 12, 3)
        ]
        for image in x
    ]
    stacked = torch.stack([torch.stack(image) for image in tokens])
    assert torch.equal(unpatchify(stacked, config), x)


def test_block_is_prenorm_attention_then_mlp() -> None:
    model = tiny()
    layer, x = model.mid_block, torch.randn(2, 5, 16)
    normed = F.layer_norm(x, (16,))
    q, k, v = (
        (normed @ part.T).reshape(2, 5, 2, 8).transpose(1, 2)
        for part in layer.attn.qkv.weight.chunk(3)
    )
    mixed = (q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1) @ v
    x1 = x + layer.attn.proj(mixed.transpose(1, 2).reshape(2, 5, 16))
    hidden = F.gelu(layer.mlp.fc1(F.layer_norm(x1, (16,))))
    torch.testing.assert_close(layer(x), x1 + layer.mlp.fc2(hidden))


def test_long_skips_are_last_in_first_out_and_come_second() -> None:
    model = tiny()
    early = [outputs_of(blk) for blk in (*model.in_blocks, model.mid_block, *model.out_blocks)]
    merged = [inputs_of(blk.skip_linear) for blk in model.out_blocks]
    model(images(), 3)
    in0, in1, mid, out0, _ = (seen[0] for seen in early)
    assert torch.equal(merged[0][0][0], torch.cat([mid, in1], dim=-1))
    assert torch.equal(merged[1][0][0], torch.cat([out0, in0], dim=-1))


def test_the_last_layers_are_norm_decoder_and_conv() -> None:
    model = tiny(num_classes=10)
    last, ending = outputs_of(model.out_blocks[-1]), inputs_of(model.final_layer)
    result = model(images(), 3, torch.tensor([0, 1]))
    tokens = model.decoder_pred(F.layer_norm(last[0], (16,)))
    image = unpatchify(tokens[:, 2:], model.config)
    assert torch.equal(ending[0][0], image)
    assert torch.equal(result, model.final_layer(image))
    assert not hasattr(tiny(conv=False).final_layer, "weight")


@pytest.mark.parametrize(
    "timestep",
    [7, 7.0, torch.tensor(7), torch.tensor(7.0), torch.tensor([7]), torch.tensor([7, 7])],
    ids=str,
)
def test_a_timestep_may_be_a_number_or_a_tensor(timestep: Tensor | float) -> None:
    model, x = tiny(), images()
    expected = model(x, torch.tensor([7.0, 7.0], dtype=torch.float64))
    assert torch.equal(model(x, timestep), expected)
    assert not torch.equal(model(x, 8), expected)


def test_each_sample_has_its_own_timestep() -> None:
    model, x = tiny(), images()
    both = model(x, torch.tensor([1, 900]))
    torch.testing.assert_close(both[:1], model(x[:1], 1))
    torch.testing.assert_close(both[1:], model(x[1:], 900))


def test_expand_timesteps_stays_on_the_device_of_x() -> None:
    assert expand_timesteps(3, torch.empty(2, 1, device="meta")).device.type == "meta"


@pytest.mark.parametrize("how", ["option", "method"])
def test_gradient_checkpointing_equals_plain_and_recomputes(how: str) -> None:
    plain, x = tiny(mlp_time_embed=True), images()
    saver = tiny(mlp_time_embed=True, use_checkpoint=how == "option")
    if how == "method":
        saver.enable_gradient_checkpointing()
    calls = outputs_of(saver.mid_block.norm1)
    expected, output = plain(x, 3), saver(x, 3)
    assert torch.equal(output, expected)
    expected.square().sum().backward()
    output.square().sum().backward()
    assert len(calls) == 2
    for (name, one), two in zip(plain.named_parameters(), saver.parameters(), strict=True):
        assert one.grad is not None, name
        assert torch.equal(one.grad, two.grad), name
    saver.disable_gradient_checkpointing()
    saver(x, 3).sum().backward()
    assert len(calls) == 3


def test_config_rebuilds_the_model() -> None:
    model = tiny(num_classes=10, mlp_ratio=2.0, qkv_bias=True, skip=False, conv=False)
    twin = UViT(model.config)
    twin.load_state_dict(model.state_dict())
    y = torch.tensor([1, 2])
    assert torch.equal(twin(images(), 3, y), model(images(), 3, y))
    assert pickle.loads(pickle.dumps(model.config)) == model.config
    assert copy.deepcopy(model).config == model.config
    assert UViT(model.config, depth=0).config.depth == 0
    assert [blk.skip_linear for blk in model.out_blocks] == [None, None]


def test_initial_positions_have_the_deviation_pos_std() -> None:
    for std in (0.02, 0.5):
        assert tiny(img_size=32, pos_std=std).pos_embed.std().item() == pytest.approx(std, rel=0.1)


def test_output_dtype_follows_the_model() -> None:
    assert tiny(mlp_time_embed=True).bfloat16()(images().bfloat16(), 3).dtype == torch.bfloat16
    assert tiny(mlp_time_embed=True).double()(images().double(), 3).dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"img_size": 9}, "img_size 9 of a U-ViT is not a multiple of patch_size 2"),
        ({"embed_dim": 15}, "embed_dim 15 of a U-ViT is not a multiple of num_heads 2"),
        ({"in_chans": 0}, "in_chans 0 of a U-ViT is not >= 1"),
        ({"depth": -1}, "depth -1 of a U-ViT is negative"),
        ({"num_classes": 10, "clip_dim": 8}, "not both"),
        ({"dept": 3}, "no option 'dept'; it has img_size"),
    ],
    ids=str,
)
def test_uvit_with_bad_options_raises(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        tiny(**options)


@pytest.mark.parametrize(
    ("options", "call", "says"),
    [
        ({}, {"x": torch.zeros(1, 3, 16, 16)}, r"\[1, 3, 16, 16\] are not \[B, 3, 8, 8\]"),
        ({}, {"x": torch.zeros(3, 8, 8)}, r"\[3, 8, 8\] are not"),
        ({}, {"x": torch.zeros(1, 4, 8, 8)}, r"\[1, 4, 8, 8\] are not"),
        ({}, {"timesteps": torch.zeros(3)}, r"timesteps \[3\] are neither one number nor \[2\]"),
        ({}, {"timesteps": torch.zeros(2, 1)}, r"timesteps \[2, 1\] are neither"),
        ({}, {"y": torch.tensor([1, 2])}, "without class labels y"),
        ({"num_classes": 10}, {}, r"needs class labels y, a tensor \[2\]; got none"),
        ({"num_classes": 10}, {"y": torch.tensor([1])}, r"y \[1\] are not \[2\]"),
        ({"num_classes": 10}, {"context": torch.zeros(1)}, "y, a tensor"),
        ({"clip_dim": 8}, {}, r"needs text tokens context, a tensor \[2, 77, 8\]; got none"),
        ({"clip_dim": 8}, {"context": torch.zeros(2, 77, 4)}, r"context \[2, 77, 4\] are not"),
    ],
    ids=str,
)
def test_uvit_with_bad_inputs_raises(
    options: dict[str, Any], call: dict[str, Any], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        tiny(**options)(**{"x": images(), "timesteps": 3, **call})


def test_an_out_block_without_its_skip_raises() -> None:
    with pytest.raises(DataError, match="without its skip"):
        tiny().out_blocks[0](torch.zeros(1, 4, 16))
