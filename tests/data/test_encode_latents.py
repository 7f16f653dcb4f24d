"""Images to latents and back by a tiny AutoencoderKL, against the autoencoder itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors import safe_open
from torch import Tensor, nn

from sparsedm_compiler.data import (
    Batch,
    ImageData,
    LatentData,
    TensorData,
    decode_latents,
    encode_latents,
    open_data,
)
from sparsedm_compiler.errors import DataError

SCALE, SHIFT = 0.5, 0.25
CONTEXT = torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def vae() -> Any:
    return autoencoder(scaling_factor=SCALE, shift_factor=SHIFT)


def autoencoder(**config: Any) -> Any:
    """A tiny AutoencoderKL at random weights, in train mode, with a dropout that would show."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        found = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            **config,
        )
    for resnet in (found.encoder.mid_block.resnets[0], found.decoder.mid_block.resnets[0]):
        resnet.dropout = nn.Dropout(0.5)
    return found.train()


def images(labels: bool = True) -> TensorData:
    drawn = torch.randint(256, (7, 3, 8, 6), generator=torch.Generator().manual_seed(0))
    return TensorData(drawn.byte(), torch.tensor([0, 1, 2, 0, 1, 2, 0]) if labels else None)


@torch.no_grad()
def means(vae: Any) -> Tensor:
    """The means as the autoencoder itself gives them, neither scaled nor shifted."""
    vae.eval()
    found: Tensor = vae.encode(images().fetch(range(7))[0]).latent_dist.mean
    vae.train()
    return found


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
def test_encoded_and_decoded_latents_equal_the_autoencoder(
    dtype: torch.dtype, close: float, vae: Any, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "x.safetensors"
    encode_latents(vae, images(), path, batch_size=3, dtype=dtype, progress=False)
    data = open_data(path)
    found, labels = data.fetch(range(7))
    mean = means(vae)
    torch.testing.assert_close(found, (mean - SHIFT) * SCALE, rtol=close, atol=close)
    assert isinstance(labels, Tensor)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert (data.shape, data.classes) == ((4, 4, 3), 3)
    decoded = decode_latents(vae, found, batch_size=2)
    assert vae.training
    with torch.no_grad():
        truth = vae.eval().decode(mean).sample.clamp(-1, 1)
    vae.train()
    torch.testing.assert_close(decoded, truth, rtol=0, atol=10 * close)
    assert not decoded.requires_grad
    with safe_open(path, framework="pt") as file:
        assert file.get_slice("latents").get_dtype() == {4: "F32", 2: "F16"}[dtype.itemsize]


def test_encoding_and_decoding_restore_the_mode_of_the_autoencoder(
    vae: Any, tmp_path: Path
) -> None:
    for training in (True, False):
        vae.train(training)
        encode_latents(vae, images(), tmp_path / "x.safetensors", progress=False)
        decode_latents(vae, torch.zeros(1, 4, 2, 2))
        assert vae.training is training
    vae.train()


def test_decode_latents_clamps_images() -> None:
    loud = autoencoder()
    with torch.no_grad():
        loud.decoder.conv_out.weight.mul_(100)
    found = decode_latents(loud, torch.randn(2, 4, 4, 4))
    assert (found.shape, found.dtype) == ((2, 3, 8, 8), torch.float32)
    assert (found.min(), found.max()) == (-1, 1)


def test_encoding_uses_the_dtype_of_the_autoencoder(vae: Any, tmp_path: Path) -> None:
    half = autoencoder(scaling_factor=SCALE, shift_factor=SHIFT).to(torch.bfloat16)
    path = tmp_path / "x.safetensors"
    encode_latents(half, images(), path, dtype=torch.float32, progress=False)
    found = open_data(path).fetch(range(7))[0]
    truth = (means(vae) - SHIFT) * SCALE
    torch.testing.assert_close(found, truth, rtol=0.1, atol=0.1)
    assert not torch.allclose(found, truth, rtol=1e-4, atol=1e-4)
    assert decode_latents(half, found).dtype == torch.float32
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_metadata_names_autoencoder_and_scaling_without_folders(tmp_path: Path) -> None:
    for name, noted in (("maker/model", "maker/model"), (str(tmp_path / "my-vae"), "my-vae")):
        model = autoencoder(scaling_factor=SCALE)
        model.register_to_config(_name_or_path=name)
        path = tmp_path / "x.safetensors"
        encode_latents(model, images(), path, progress=False)
        data = LatentData(path)
        assert (data.scaling_factor, data.shift_factor, data.vae) == (SCALE, 0.0, noted)
        assert str(tmp_path).encode() not in path.read_bytes()


def test_encode_latents_writes_the_number_of_classes(vae: Any, tmp_path: Path) -> None:
    data = images()
    data.classes = 10
    encode_latents(vae, data, tmp_path / "x.safetensors", progress=False)
    assert open_data(tmp_path / "x.safetensors").classes == 10


def test_encode_latents_writes_conditions_instead_of_labels(vae: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    given = {"context": CONTEXT, "y": torch.arange(7)}
    encode_latents(vae, images(False), path, batch_size=3, conditions=given, progress=False)
    torch.testing.assert_close(open_data(path).fetch([6, 2])[1], pick(given, [6, 2]))
    own = TensorData(images().images, {"context": CONTEXT})
    encode_latents(vae, own, path, batch_size=3, progress=False)
    torch.testing.assert_close(open_data(path).fetch([6, 2])[1], {"context": CONTEXT[[6, 2]]})
    with pytest.raises(DataError, match="condition of their own"):
        encode_latents(vae, images(), path, conditions=given, progress=False)
    with pytest.raises(DataError, match=r"'context' \[6, 2, 3\] has no row for each of 7"):
        encode_latents(vae, images(False), path, conditions={"context": CONTEXT[1:]})


def test_encode_latents_of_nested_conditions_raises(vae: Any, tmp_path: Path) -> None:
    nested = {"added_cond_kwargs": {"text_embeds": CONTEXT}}
    data = TensorData(images(False).images, nested)
    found = data.fetch([1])[1]
    torch.testing.assert_close(found, {"added_cond_kwargs": {"text_embeds": CONTEXT[1:2]}})
    with pytest.raises(DataError, match="'added_cond_kwargs' holds names of its own"):
        encode_latents(vae, data, tmp_path / "x.safetensors", progress=False)


def pick(given: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    return {name: tensor[rows] for name, tensor in given.items()}


class Breaks(ImageData):
    """Raises in the middle."""

    shape, classes = (3, 8, 6), None

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __len__(self) -> int:
        return 7

    def fetch(self, numbers: Sequence[int]) -> Batch:
        if 5 in numbers:
            raise self.error
        return images(False).fetch(numbers)


@pytest.mark.parametrize("error", [DataError("image 5 cannot be read"), KeyboardInterrupt()])
def test_interrupted_encoding_leaves_no_file(
    error: BaseException, vae: Any, tmp_path: Path
) -> None:
    with pytest.raises(type(error)):
        encode_latents(vae, Breaks(error), tmp_path / "x.safetensors", batch_size=2, progress=False)
    assert not [*tmp_path.iterdir()]
    assert vae.training


def test_encode_latents_to_nan_or_inf_raises(tmp_path: Path) -> None:
    huge = autoencoder(scaling_factor=1e9)
    with pytest.raises(DataError, match=r"among 0 to 4 was encoded to NaN or Inf; .* float32"):
        encode_latents(huge, images(), tmp_path / "x.safetensors", batch_size=5, progress=False)
    assert not [*tmp_path.iterdir()]


def test_encode_latents_of_a_misfit_raises(vae: Any, tmp_path: Path) -> None:
    def refuses(message: str, model: Any = vae, **change: Any) -> None:
        asked = {"data": images(), "path": tmp_path / "x.safetensors", "progress": False, **change}
        with pytest.raises(DataError, match=message):
            encode_latents(model, **asked)

    refuses("AutoencoderTiny is no AutoencoderKL", AutoencoderTiny())
    refuses("latents_mean", autoencoder(latents_mean=[0.0] * 4))
    refuses("safetensors file, not to 'x.npz'", path=tmp_path / "x.npz")
    refuses("float16 or torch.float32, not torch.bfloat16", dtype=torch.bfloat16)
    refuses("batch_size 0 is not positive", batch_size=0)
    refuses(r"\[1, 8, 8\] do not fit .* 3 channels", data=TensorData(torch.zeros(1, 1, 8, 8)))
    refuses(r"\[3, 8, 7\] .* multiples of 2", data=TensorData(torch.zeros(1, 3, 8, 7)))
    refuses(r"\[3, 7, 8\] .* multiples of 2", data=TensorData(torch.zeros(1, 3, 7, 8)))
    for latents in (torch.zeros(1, 3, 4, 4), torch.zeros(4, 4, 4)):
        with pytest.raises(DataError, match=r"are not \[n, 4, h, w\]"):
            decode_latents(vae, latents)
    assert not [*tmp_path.iterdir()]
