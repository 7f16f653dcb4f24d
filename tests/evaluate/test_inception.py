"""Our Fréchet distance against pytorch-fid's own command, with weights drawn at random."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from sparsedm_compiler.data import open_data
from sparsedm_compiler.diffusion import generator_at, image_batches
from sparsedm_compiler.errors import DataError
from sparsedm_compiler.evaluate import (
    extract_features,
    load_network,
    load_statistics,
    prepare_reference,
    save_statistics,
    score_images,
)
from sparsedm_compiler.evaluate.inception import hash_file
from sparsedm_compiler.reporting import save_images

COMMAND = """
import runpy, sys
from sparsedm_compiler.optional_deps import mend_torchvision
mend_torchvision()
for line in sys.argv[1:]:
    sys.argv = ["pytorch_fid", *line.split("|"), "--num-workers", "0", "--device", "cpu"]
    runpy.run_module("pytorch_fid", run_name="__main__")
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TORCH_HOME that holds weights where pytorch-fid looks for its own."""
    import torchvision
    from pytorch_fid import inception

    folder = tmp_path_factory.mktemp("home")
    with (
        torch.random.fork_rng([]),
        patch.object(inception, "load_state_dict_from_url", lambda *_, **__: {}),
        patch.object(torchvision.models.Inception3, "load_state_dict", lambda *_: None),
    ):
        torch.manual_seed(0)
        network = inception.fid_inception_v3()
        for module in network.modules():
            if isinstance(module, nn.Conv2d):  # torch's own weights let every feature die away
                nn.init.kaiming_normal_(module.weight)
    path = folder / "hub" / "checkpoints" / inception.FID_WEIGHTS_URL.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.save(network.state_dict(), path)
    return folder


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoints folder of torch.hub, with the weights."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(home))
    return home / "hub" / "checkpoints"


def drawn(name: str) -> Tensor:
    coarse = torch.rand(14, 3, 6, 6, generator=generator_at(name)) * 2.2 - 1.1
    return interpolate(coarse, (32, 32), mode="bilinear") * (0.8 if name == "b" else 1)


def pytorch_fid(*lines: tuple[str | Path, ...]) -> str:
    """What pytorch-fid's command prints for these lines of arguments, one after the other."""
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *("|".join(map(str, line)) for line in lines)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_score_images_equals_the_command_of_pytorch_fid(hub: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_images(tmp_path / name, range(14), drawn(name))
    network = load_network("inception-64")
    (score,) = score_images(
        network, image_batches(drawn("a")), reference=tmp_path / "b", sampler="none"
    )
    a, b, kept = (tmp_path / name for name in ("a", "b", "theirs.npz"))
    printed = pytorch_fid((a, b, "--dims", "64"), ("--save-stats", b, kept, "--dims", "64"))
    theirs = float(printed.partition("FID:")[2].split()[0])
    assert theirs > 0.1
    assert score.value == pytest.approx(theirs, rel=1e-4)
    assert (score.metric, score.count, score.reference_count) == ("FD", 14, 14)

    # their statistics and ours, each read by the other
    save_statistics(
        tmp_path / "ours.npz",
        prepare_reference(network, str(tmp_path / "b"), progress=False).statistics,
    )
    for file, count in (("theirs.npz", None), ("ours.npz", 14)):
        (again,) = score_images(
            network, image_batches(drawn("a")), reference=tmp_path / file, sampler="none"
        )
        assert again.value == pytest.approx(theirs, rel=1e-4)
        assert again.reference_count == count
    ours, held = (load_statistics(tmp_path / name) for name in ("ours.npz", "theirs.npz"))
    torch.testing.assert_close(*(torch.tensor(x.covariance) for x in (ours, held)))


def test_inception_features_equal_those_of_pytorch_fid(hub: Path, tmp_path: Path) -> None:
    from pytorch_fid.inception import InceptionV3

    network = load_network("inception")
    assert network.name == f"InceptionV3@{hash_file(next(hub.iterdir()))[:8]}"
    theirs = InceptionV3([3]).eval()  # from the same file, through torch.hub
    grey = drawn("a")[:2, :1]
    ours = extract_features(network.network, grey)
    with torch.no_grad():
        expected = theirs((grey.repeat(1, 3, 1, 1) + 1) / 2)[0]
    assert ours.shape == (2, 2048)
    torch.testing.assert_close(ours, expected.flatten(1))
    with pytest.raises(DataError, match=r"\[2, 4, 8, 8\] are not \[B, 1 or 3, H, W\]"):
        extract_features(network.network, torch.zeros(2, 4, 8, 8))


def test_inception_with_published_weights_has_the_plain_name(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sparsedm_compiler.evaluate.inception.hash_file", lambda path: "6726825d" + "0" * 56
    )
    assert load_network("inception-192").name == "InceptionV3-192"
    assert load_network("inception").name == "InceptionV3"


def test_inception_without_valid_weights_raises_data_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    words = (
        r"no InceptionV3 weights at .*checkpoints.pt_inception-2015-12-05-6726825d.pth, and nothing"
        r" is downloaded here: get https://github.com/.*\.pth on .* inception:PATH/pt_inception"
    )
    with pytest.raises(DataError, match=words):
        load_network("inception")
    with pytest.raises(DataError, match=r"no InceptionV3 weights at .*other.pth"):
        load_network(f"inception:{tmp_path / 'other.pth'}")
    path = tmp_path / "weights.pth"
    for held, words in (
        ({"conv.weight": torch.zeros(1)}, "does not hold the weights of InceptionV3"),
        ([torch.zeros(1)], "is no state_dict"),
        (Path("x"), "cannot read the InceptionV3 weights"),
    ):
        torch.save(held, path)
        with pytest.raises(DataError, match=words):
            load_network(f"inception:{path}")
    path.write_bytes(b"no zip")
    with pytest.raises(DataError, match="cannot read the InceptionV3 weights"):
        load_network(f"inception:{path}")


def test_score_images_accepts_paths_and_data_as_reference(tmp_path: Path) -> None:
    save_images(tmp_path, range(14), drawn("a"))
    pixels = load_network(f"{__name__}:Pixels")
    values = [
        score_images(pixels, image_batches(drawn("b")), reference=reference, sampler="none")[
            0
        ].value
        for reference in (tmp_path, str(tmp_path), open_data(tmp_path))
    ]
    assert values[0] == values[1] == values[2] > 0.01


class Pixels(nn.Module):
    """The mean and the top left colours of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean((2, 3)), x[:, :, 0, 0]], dim=1)
