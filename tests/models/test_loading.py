"""Any model by one word, with weights from any file, and every misfit named."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.errors import CheckpointError, ConfigError
from sparsedm_compiler.models import UViT, load_weights, open_model, open_with_inputs
from tests.oracle import assert_same

TINY = {"img_size": 8, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [16],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "add_attention": False,
}

OWN = """
import torch
from torch import nn
from sparsedm_compiler.models import UViT

def net(width=4, depth=1):
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)])

def called():
    return net(), (torch.ones(3, 4),), {}

def uvit():
    return UViT(img_size=8, in_chans=1, embed_dim=16, depth=0, num_heads=2)

class made:
    def __init__(self):
        raise TypeError("from the inside")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_models.py").write_text(OWN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_models", raising=False)
    return "own_models"


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_open_model_of_a_preset_class_or_config_applies_options(tmp_path: Path) -> None:
    preset = open_model("uvit-cifar10-small", options={"depth": 0}, device="meta")
    assert (preset.config.depth, preset.config.embed_dim) == (0, 512)
    assert next(preset.parameters()).is_meta
    own = open_model("UViT", options=TINY)
    assert (own.config.depth, own.config.img_size, own.training) == (2, 8, True)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"_class_name": "UNet2DModel", **UNET}))
    for spec, options in ((str(file), {}), (str(tmp_path), {}), ("UNet2DModel", UNET)):
        unet = open_model(spec, options={**options, "out_channels": 2}, device="meta")
        assert (unet.config.in_channels, unet.config.out_channels) == (1, 2)


def test_open_model_with_an_unknown_option_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="U-ViT has no option 'width'"):
        open_model("UViT", options={"width": 8})
    with pytest.raises(ConfigError, match="UNet2DModel has no option 'width'; it has sample_size"):
        open_model("UNet2DModel", options={**UNET, "width": 8})
    (tmp_path / "own.json").write_text(json.dumps({"_class_name": "UNet2DModel", "old": 1, **UNET}))
    assert open_model(str(tmp_path / "own.json")).config.sample_size == 8


def test_open_model_passes_options_to_a_function(own: str) -> None:
    model = open_model(f"{own}:net", options={"width": 6, "depth": 2}, device="meta")
    assert [tuple(layer.weight.shape) for layer in model] == [(6, 6), (6, 6)]
    assert model[0].weight.is_meta
    with pytest.raises(ConfigError, match=r"own_models:net cannot be called with \{'size': 3\}"):
        open_model(f"{own}:net", options={"size": 3})
    with pytest.raises(TypeError, match="from the inside"):
        open_model(f"{own}:made")


def test_open_with_inputs_returns_model_and_inputs(own: str) -> None:
    model, args, kwargs = open_with_inputs(f"{own}:called", device="meta")
    assert model[0].weight.is_meta
    assert args[0].is_meta
    assert (args[0].shape, kwargs) == ((3, 4), {})
    _, (zeros,), _ = open_with_inputs(f"{own}:net", inputs="2x4")
    assert_same(zeros, torch.zeros(2, 4))
    uvit, (x, t), _ = open_with_inputs(f"{own}:uvit")  # of a class whose inputs are known
    assert isinstance(uvit, UViT)
    assert (x.shape, t.shape) == ((1, 1, 8, 8), (1,))
    _, (x, _), _ = open_with_inputs("UViT", options=TINY, batch=3, device="cpu")
    assert (x.shape, x.device.type) == ((3, 1, 8, 8), "cpu")


def test_open_model_loads_weights_of_every_file_type(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = tensors(UViT(**TINY))
    save_file(expected, tmp_path / "w.safetensors")
    for name in ("w.pt", "w.pth", "w.bin"):
        torch.save(expected, tmp_path / name)
    for path in sorted(tmp_path.iterdir()):
        for given in (path, str(path)):
            found = tensors(open_model("UViT", options=TINY, weights=given))
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_open_model_loads_the_latent_weights_of_a_saved_student(tmp_path: Path) -> None:
    student = sdm.compile(UViT(**TINY), "2:4", backend="eager")
    sdm.save(student, tmp_path / "s.safetensors")
    found = tensors(open_model("UViT", options=TINY, weights=tmp_path / "s.safetensors"))
    expected = tensors(student)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.b.weight = self.a.weight
        self.register_buffer("count", torch.tensor(3))


def test_load_weights_accepts_tied_weights_under_one_name(tmp_path: Path) -> None:
    weight, count = torch.ones(2, 2), torch.tensor(5)
    save_file({"b.weight": weight, "count": count}, tmp_path / "w.safetensors")
    model = load_weights(Tied(), tmp_path / "w.safetensors")
    assert_same(model.a.weight, weight)
    assert_same(model.count, count)
    save_file({"b.weight": weight}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit this Tied; missing: count$"):
        load_weights(Tied(), tmp_path / "w.safetensors")


def test_load_weights_of_a_misfit_names_the_tensors(tmp_path: Path) -> None:
    given = tensors(UViT(**TINY))
    given["extra"] = given.pop("pos_embed")
    given["norm.weight"] = torch.zeros(3)
    save_file(given, tmp_path / "w.safetensors")
    says = (
        r"w\.safetensors does not fit this UViT; missing: pos_embed; unknown: extra; "
        r"of another shape: norm\.weight is \[3\], not \[16\]"
    )
    for device in ("cpu", "meta"):
        with pytest.raises(CheckpointError, match=says):
            open_model("UViT", options=TINY, weights=tmp_path / "w.safetensors", device=device)
    save_file({f"x{n}": torch.zeros(1) for n in range(9)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="unknown: x0, x1, x2 and 6 more"):
        open_model("UViT", options=TINY, weights=tmp_path / "w.safetensors")


def test_load_weights_of_a_file_without_weights_raises(tmp_path: Path) -> None:
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    (tmp_path / "noise.pth").write_bytes(b"noise")
    torch.save({"ema": {"a": torch.zeros(1)}, "step": 3}, tmp_path / "nested.pth")
    torch.save([1], tmp_path / "list.pth")
    torch.save(nn.Linear(1, 1), tmp_path / "module.pth")
    for name, says in (
        ("gone.safetensors", r"cannot read weights from .*gone"),
        ("gone.pth", r"cannot read weights from .*gone"),
        ("noise.safetensors", r"cannot read weights from .*noise"),
        ("noise.pth", r"cannot read weights from .*noise"),
        ("module.pth", r"cannot read weights from .*module"),
        ("nested.pth", "holds a dict of ema, step, not a state_dict: save the state_dict"),
        ("list.pth", "holds no dict, not a state_dict"),
    ):
        with pytest.raises(CheckpointError, match=says):
            open_model("UViT", options=TINY, weights=tmp_path / name)


def test_open_model_of_a_diffusers_directory_loads_its_weights(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    torch.manual_seed(1)
    saved = UNet2DModel(**UNET)
    saved.save_pretrained(tmp_path)
    expected = tensors(saved)
    found = tensors(open_model(str(tmp_path)))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert next(open_model(str(tmp_path), device="meta").parameters()).is_meta
    other = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    save_file(other, tmp_path / "other.safetensors")
    assert not open_model(str(tmp_path), weights=tmp_path / "other.safetensors").conv_in.bias.any()
    expected.pop("conv_in.bias")
    save_file(expected, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"do not fit its UNet2DModel.*conv_in\.bias"):
        open_model(str(tmp_path))
    open_model(str(tmp_path), device="meta")  # reads no weights
    open_model(str(tmp_path), weights=tmp_path / "other.safetensors")  # nor here those


def test_open_model_of_a_uvit_directory_loads_its_weights(tmp_path: Path) -> None:
    expected = tensors(UViT(**TINY))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UViT", **TINY}))
    save_file(expected, tmp_path / "diffusion_pytorch_model.safetensors")
    found = tensors(open_model(str(tmp_path)))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
