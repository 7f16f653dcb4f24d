"""The script that encodes images once: latents and labels in a file that trains."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import AutoencoderKL
from torchvision.utils import save_image

from sparsedm_compiler.data import decode_latents, open_autoencoder, open_data

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("encode_latents")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str, str]:
    """An autoencoder, images of two classes, and the file to write."""
    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "vae")
    for number, name in enumerate(("cats", "dogs", "cats")):
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        save_image(torch.rand(3, 10, 12), tmp_path / "photos" / name / f"{number}.png")
    return str(tmp_path / "vae"), str(tmp_path / "photos"), str(tmp_path / "out.safetensors")


def test_encode_latents_keeps_the_labels(
    script: ModuleType, folders: tuple[str, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    vae, photos, out = folders
    assert script.main(["--vae", vae, "--data", photos, "--out", out, "--size", "8"]) == 0
    assert capsys.readouterr().out == f"wrote 3 latents to {out}\n"
    data, images = open_data(out), open_data(photos, size=8)
    latents, labels = data.fetch(range(3))
    assert labels.tolist() == images.fetch(range(3))[1].tolist() == [0, 0, 1]
    model = open_autoencoder(vae)
    with torch.no_grad():
        mean = model.encode(images.fetch(range(3))[0]).latent_dist.mean
    expected = (mean * model.config.scaling_factor).half().float()
    torch.testing.assert_close(latents, expected, rtol=1e-2, atol=1e-3)
    assert decode_latents(model, latents).shape == (3, 3, 8, 8)


@pytest.mark.parametrize("wrong", ["--vae", "--data", "--out"])
def test_encode_latents_with_a_bad_request_prints_one_line(
    script: ModuleType,
    folders: tuple[str, str, str],
    wrong: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = dict(zip(("--vae", "--data", "--out"), folders, strict=True))
    given[wrong] = str(tmp_path / "gone")
    assert script.main([part for pair in given.items() for part in pair]) == 2
    assert "encode_latents: " in capsys.readouterr().err
    assert not Path(folders[2]).exists()
