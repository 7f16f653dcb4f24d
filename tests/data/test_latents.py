"""Latents from safetensors files that the safetensors package wrote."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sparsedm_compiler.data import LatentData, open_data
from sparsedm_compiler.errors import DataError
from tests.data.cases import ops_of

LATENTS = 3 * torch.randn(6, 4, 3, 2, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([2, 0, 1, 1, 0, 2], dtype=torch.int32)
CONTEXT = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(1))


def written(folder: Path, *, notes: dict[str, str] | None = None, **tensors: Tensor) -> str:
    path = folder / "x.safetensors"
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, path, notes)
    return str(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_latents_and_labels_of_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    data = open_data(written(tmp_path, latents=LATENTS.to(dtype), labels=LABELS))
    found, labels = data.fetch([5, 0, 5, 2])
    torch.testing.assert_close(found, LATENTS.to(dtype).float()[[5, 0, 5, 2]], rtol=0, atol=0)
    assert isinstance(labels, Tensor)
    assert (labels.tolist(), labels.dtype) == ([2, 2, 2, 1], torch.int64)
    assert (len(data), data.shape, data.classes) == (6, (4, 3, 2), 3)
    assert ops_of(data, range(6)) == ops_of(data, range(1))


def test_latents_with_named_conditions(tmp_path: Path) -> None:
    mask = torch.arange(30).reshape(6, 5) % 2 == 0
    path = written(
        tmp_path, latents=LATENTS, condition__context=CONTEXT.half(), condition__mask=mask
    )
    data = open_data(path)
    _, found = data.fetch([4, 1])
    assert isinstance(found, dict)
    truth = {"context": CONTEXT.half().float()[[4, 1]], "mask": mask[[4, 1]]}
    torch.testing.assert_close(found, truth, rtol=0, atol=0)
    assert data.classes is None
    assert open_data(path, labels=False).fetch([0])[1] is None


def test_latents_with_deviations_return_their_means(tmp_path: Path) -> None:
    data = open_data(written(tmp_path, latents=LATENTS, std=torch.ones_like(LATENTS)))
    assert torch.equal(data.fetch([1])[0], LATENTS[1:2])
    assert data.fetch([1])[1] is None


def test_latents_with_labels_and_limit(tmp_path: Path) -> None:
    path = written(tmp_path, latents=LATENTS, labels=LABELS)
    data = open_data(path, limit=2)
    assert (len(data), data.classes) == (2, 3)
    assert len(open_data(path, limit=99)) == 6
    with pytest.raises(IndexError):
        data.fetch([2])
    data = open_data(path, labels=False)
    assert (data.classes, data.fetch([0])[1]) == (None, None)


def test_latents_read_scaling_and_classes_from_metadata(tmp_path: Path) -> None:
    notes = {"scaling_factor": "0.18215", "shift_factor": "0.1", "vae": "a", "classes": "10"}
    data = LatentData(Path(written(tmp_path, latents=LATENTS, labels=LABELS, notes=notes)))
    assert (data.scaling_factor, data.shift_factor, data.vae) == (0.18215, 0.1, "a")
    assert data.classes == 10
    bare = LatentData(Path(written(tmp_path, latents=LATENTS)))
    assert (bare.scaling_factor, bare.shift_factor, bare.vae) == (None, None, None)
    assert LatentData(Path(written(tmp_path, latents=LATENTS, notes=notes))).classes is None
    with pytest.raises(DataError, match="scaling_factor = 'x', no number"):
        open_data(written(tmp_path, latents=LATENTS, notes={"scaling_factor": "x"}))


def test_pickled_latent_data_holds_no_latents(tmp_path: Path) -> None:
    big = torch.zeros(6, 4, 64, 64)
    data = open_data(written(tmp_path, latents=big, labels=LABELS))
    sent = pickle.dumps(data)
    assert len(sent) < 10_000
    assert torch.equal(pickle.loads(sent).fetch([0])[0], big[:1])


def test_fetch_of_nan_latents_names_the_image(tmp_path: Path) -> None:
    broken = LATENTS.clone()
    broken[4, 0, 0, 0] = torch.inf
    data = open_data(written(tmp_path, latents=broken))
    data.fetch([0, 5])
    with pytest.raises(DataError, match="image 4 hold NaN or Inf"):
        data.fetch([5, 4])


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"weight": LATENTS}, "holds weight, no 'latents'"),
    ({"latents": LATENTS[0, 0]}, r"latents \[3, 2\]"),
    ({"latents": LATENTS.int()}, "of type I32 are not"),
    ({"latents": LATENTS[:0]}, r"latents \[0, 4, 3, 2\]"),
    ({"latents": LATENTS, "labels": LABELS[:5]}, r"labels \[5\] of type I32 does not go with 6"),
    ({"latents": LATENTS, "labels": LABELS.float()}, "float32 are not the numbers"),
    ({"latents": LATENTS, "labels": LABELS - 1}, "label -1"),
    ({"latents": LATENTS, "labels": torch.tensor(1)}, r"labels \[\] of type I64"),
    ({"latents": LATENTS, "std": LATENTS[:5].clone()}, r"std \[5, 4, 3, 2\]"),
    ({"latents": LATENTS, "condition__a": CONTEXT[:5]}, r"condition.a \[5, 5, 3\]"),
    ({"latents": LATENTS, "condition__a": CONTEXT[:, :0]}, r"condition.a \[6, 0, 3\]"),
    ({"latents": LATENTS, "condition__a": CONTEXT.cfloat()}, "of type C64"),
    ({"latents": LATENTS, "labels": LABELS, "condition__a": CONTEXT}, "labels and condition.a"),
]


@pytest.mark.parametrize(("tensors", "message"), WRONG, ids=[message for _, message in WRONG])
def test_latents_file_that_does_not_fit_raises(
    tensors: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        open_data(written(tmp_path, **tensors))


def test_resizing_latents_raises(tmp_path: Path) -> None:
    square = written(tmp_path, latents=LATENTS[..., :2, :].contiguous())
    assert open_data(square, size=2).shape == (4, 2, 2)
    for path, size in ((square, 4), (written(tmp_path, latents=LATENTS), 3)):
        with pytest.raises(DataError, match=f"cannot be resized to {size}"):
            open_data(path, size=size)


def test_latents_file_that_is_cut_off_raises(tmp_path: Path) -> None:
    path = Path(written(tmp_path, latents=LATENTS))
    data = open_data(path)
    path.write_bytes(path.read_bytes()[:-8])
    for act in (lambda: open_data(path), lambda: data.fetch([0])):
        with pytest.raises(DataError, match=r"cannot read .*x\.safetensors"):
            act()
