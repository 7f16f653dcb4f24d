"""Feature networks: loading by name, accepted outputs, collecting from a stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsedm_compiler.diffusion import generator_at, image_batches
from sparsedm_compiler.diffusion.image_batches import round_to_uint8
from sparsedm_compiler.errors import ConfigError, DataError
from sparsedm_compiler.evaluate import FeatureNetwork, extract_features, load_network
from sparsedm_compiler.evaluate.features import check_network, collect_features

IMAGES = torch.rand(10, 1, 2, 2, generator=generator_at("images")) * 2.2 - 1.1


@pytest.mark.parametrize(
    "shape",
    [
        lambda x: x.flatten(1),
        lambda x: x.flatten(1)[:, :, None, None],
        lambda x: (x.flatten(1), "more"),
        lambda x: [x],
    ],
)
def test_extract_features_accepts_tensors_maps_tuples_and_lists(shape: Any) -> None:
    assert torch.equal(extract_features(shape, IMAGES, batch_size=3), IMAGES.flatten(1))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda x: x.mean((1, 2, 3)), r"returned \[10\] for 10 images, not \[10, d\]"),
        (lambda x: x.flatten(1)[:4], r"returned \[4, 4\] for 10 images"),
        (lambda x: {"features": x}, "returned a dict, not a tensor"),
        (lambda x: (), "returned a tuple"),
    ],
)
def test_extract_features_of_other_outputs_raises_data_error(wrong: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        extract_features(wrong, IMAGES)


def test_extract_features_by_a_function_records_no_gradients() -> None:
    weight = torch.ones(4, requires_grad=True)
    assert not extract_features(lambda x: x.flatten(1) * weight, IMAGES).requires_grad


def test_collect_features_returns_moments_and_first_features() -> None:
    pixels = FeatureNetwork("Pixels", lambda x: x.flatten(1))
    shown = round_to_uint8(IMAGES).flatten(1)
    collected = collect_features(pixels, image_batches(IMAGES, batch_size=4), stored=6)
    assert collected.moments is not None
    assert collected.moments.count == 10
    torch.testing.assert_close(collected.moments.mean, shown.double().mean(0))
    assert collected.numbers.tolist() == [*range(6)]
    assert torch.equal(collected.stored, shown[:6])
    second = collect_features(pixels, image_batches(IMAGES, batch_size=4, share=(1, 2)), stored=6)
    assert second.numbers.tolist() == [4, 5]
    assert torch.equal(second.stored, shown[4:6])
    nothing = collect_features(pixels, image_batches(IMAGES, batch_size=4, share=(4, 5)), stored=6)
    assert nothing.moments is None
    assert len(nothing.stored) == len(nothing.numbers) == 0


def test_collect_features_of_broken_images_raises_data_error() -> None:
    pixels = FeatureNetwork("Pixels", lambda x: x.flatten(1))
    broken = IMAGES.clone()
    broken[7] = torch.nan  # which no byte can be
    with pytest.raises(DataError, match="images 4 to 7 hold NaN or Inf"):
        collect_features(pixels, image_batches(broken, batch_size=4))
    with pytest.raises(DataError, match="for 3 numbers"):
        collect_features(pixels, [(range(3), IMAGES)])


class Pixels(nn.Module):
    """The pixels as features."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


MODULE = Pixels()
NUMBER = 3


def make() -> nn.Module:
    return Pixels()


def made_function() -> Any:
    return lambda x: x.flatten(1)


def named() -> FeatureNetwork:
    return FeatureNetwork("Named", Pixels())


def demanding(width: int, depth: int) -> nn.Module:
    return nn.Linear(width, depth)


def features(images: Tensor) -> Tensor:
    return images.flatten(1)


def features_of_one_channel(images: Tensor) -> Tensor:
    return nn.functional.conv2d(images, torch.ones(1, 1, 1, 1)).flatten(1)


def wide(width: int) -> nn.Module:
    return nn.Linear(width, width)


def wrong() -> int:
    return 3


@pytest.mark.parametrize(
    ("attribute", "name"),
    [
        ("make", "Pixels"),
        ("Pixels", "Pixels"),
        ("MODULE", "Pixels"),
        ("made_function", "made_function"),
        ("features", "features"),
        ("named", "Named"),
    ],
)
def test_load_network_by_import_path(attribute: str, name: str) -> None:
    loaded = load_network(f"{__name__}:{attribute}")
    assert loaded.name == name
    assert torch.equal(extract_features(loaded.network, IMAGES), IMAGES.flatten(1))
    assert load_network(f"{__name__}:{attribute}", name="Mine").name == "Mine"


def test_load_network_moves_modules_to_the_device() -> None:
    identity = load_network("torch.nn:Identity", device="meta").network
    assert isinstance(identity, nn.Identity)
    linear = load_network(f"{__name__}:linear", device="meta").network
    assert isinstance(linear, nn.Linear)
    assert linear.weight.device.type == "meta"


def linear() -> nn.Module:
    return nn.Linear(2, 2)


def test_load_network_of_an_invalid_name_raises_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no feature network is called 'vgg'; known: inception"):
        load_network("vgg")
    with pytest.raises(ConfigError, match=r"cannot import 'not.there:f'"):
        load_network("not.there:f")
    with pytest.raises(ConfigError, match="demanding takes 2 arguments: a feature network is a "):
        load_network(f"{__name__}:demanding")
    with pytest.raises(ConfigError, match=r"torch\.nn:Linear takes 2 arguments: a feature network"):
        load_network("torch.nn:Linear")
    with pytest.raises(ConfigError, match="wrong returned int: a feature network is a module or"):
        load_network(f"{__name__}:wrong")
    with pytest.raises(ConfigError, match="is not a function but 3"):
        load_network(f"{__name__}:NUMBER")
    with pytest.raises(ConfigError, match="no layer of 65 features; it has 64, 192, 768, 2048"):
        load_network(f"inception-65:{tmp_path}")


def test_check_network_of_a_function_that_takes_no_images_says_the_contract() -> None:
    check_network(load_network(f"{__name__}:features"), (3, 8, 8))
    check_network(load_network(f"{__name__}:make"), (3, 8, 8))
    says = r"features_of_one_channel cannot be called with images \[3, 8, 8\]: RuntimeError: .*; a "
    with pytest.raises(DataError, match=says + "feature network is"):
        check_network(load_network(f"{__name__}:features_of_one_channel"), (3, 8, 8))
    with pytest.raises(DataError, match=r"wide cannot be called with images .* a feature network"):
        check_network(load_network(f"{__name__}:wide"), (3, 8, 8))
    with pytest.raises(DataError, match="returned a dict, not a tensor; a feature network is"):
        check_network(FeatureNetwork("x", lambda images: {}), (3, 8, 8))
