"""Every kind of model called by ``predict`` as it is called by hand."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sparsedm_compiler.diffusion import predict
from sparsedm_compiler.diffusion.predict import read_signature
from sparsedm_compiler.errors import DataError
from tests.zoo import FAMILIES, Family, sample_of

LEVELS = {"flux": 1000.0}
"""What the zoo's times must be multiplied by to be noise levels."""


def called(family: Family) -> tuple[nn.Module, Tensor, Tensor, dict[str, Any], Tensor]:
    """(model, x, noise levels, condition by name, the prediction made by hand)."""
    model, args, kwargs = family.make(batch=2)
    with torch.no_grad():
        expected = sample_of(model(*args, **kwargs))
    named = dict(kwargs)
    x, t = args[0], named.pop("timestep") if "timestep" in named else args[1]
    if len(args) > 2:
        named["encoder_hidden_states"] = args[2]
    return model, x, t * LEVELS.get(family.name, 1.0), named, expected


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_predict_with_a_mapping_equals_a_call_by_hand(family: Family) -> None:
    model, x, t, named, expected = called(family)
    with torch.no_grad():
        found = predict(model, x, t, named)
    assert found.shape == x.shape
    torch.testing.assert_close(found, expected[:, : x.shape[1]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in ("uvit", "dit")])
def test_predict_with_a_tensor_passes_class_labels(family: Family) -> None:
    model, x, t, named, expected = called(family)
    with torch.no_grad():
        found = predict(model, x, t, *named.values())
    torch.testing.assert_close(found, expected[:, : x.shape[1]], rtol=0, atol=0)


class Passes(nn.Module):
    """A wrapper that knows nothing of what it wraps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("wrap", [AveragedModel, Passes, lambda m: Passes(AveragedModel(m))])
def test_predict_of_a_wrapper_equals_the_wrapped_model(wrap: Any) -> None:
    family = next(family for family in FAMILIES if family.name == "sd3")
    model, x, t, named, expected = called(family)
    with torch.no_grad():
        torch.testing.assert_close(predict(wrap(model), x, t, named), expected, rtol=0, atol=0)


def test_predict_of_an_instance_forward_uses_the_signature_of_the_class() -> None:
    family = next(family for family in FAMILIES if family.name == "sd3")
    model, x, t, named, expected = called(family)
    inner = copy.copy(model)
    model.__dict__["forward"] = lambda *args, **kwargs: inner(*args, **kwargs)
    with torch.no_grad():
        torch.testing.assert_close(predict(model, x, t, named), expected, rtol=0, atol=0)


class Answers(nn.Module):
    """Returns whatever ``answer`` makes of its input."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Any:
        return self.answer(x)


X, T = torch.arange(12.0).reshape(2, 2, 3), torch.zeros(2)


@pytest.mark.parametrize(
    "answer",
    [
        lambda x: x,
        lambda x: (x, None),
        lambda x: [x],
        lambda x: SimpleNamespace(sample=x),
        lambda x: torch.cat([x, -x], dim=1),
        lambda x: (torch.cat([x, -x], dim=1),),
    ],
)
def test_predict_accepts_tensors_tuples_and_outputs_with_sample(answer: Any) -> None:
    assert torch.equal(predict(Answers(answer), X, T), X)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda x: x[:, :1], r"predicted \[2, 1, 3\] for inputs \[2, 2, 3\]"),
        (lambda x: torch.cat([x, x], dim=2), r"predicted \[2, 2, 6\]"),
        (lambda x: torch.cat([x, x, x], dim=1), r"predicted \[2, 6, 3\]"),
        (lambda x: x.transpose(1, 2), r"predicted \[2, 3, 2\]"),
        (lambda x: None, "returned a NoneType"),
        (lambda x: OrderedDict(a=x), "returned a OrderedDict"),
        (lambda x: (), "returned a tuple"),
    ],
)
def test_predict_of_a_wrong_shape_or_type_raises(answer: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        predict(Answers(answer), X, T)


def test_predict_with_a_name_the_forward_does_not_take_raises() -> None:
    model = Answers(lambda x: x)
    with pytest.raises(DataError, match=r"names context, text, not for Answers; .* takes y"):
        predict(model, X, T, {"text": T, "y": T, "context": T})
    with pytest.raises(DataError, match="names t, not"):
        predict(model, X, T, {"t": T})
    sd3 = next(family for family in FAMILIES if family.name == "sd3").build()
    with pytest.raises(DataError, match="names timestep, not for SD3"):
        predict(sd3, X, T, {"timestep": T})
    assert read_signature(Passes(nn.Linear(1, 1))).names is None  # nothing is known, all may pass


class Late(nn.Module):
    """Takes its time third, after a condition."""

    def forward(self, x: Tensor, c: Tensor | None, t: Tensor) -> Tensor:
        return x + t[:, None, None] if c is None else x + c[:, None, None]


def test_predict_passes_a_late_time_by_name() -> None:
    assert torch.equal(predict(Late(), X, T, torch.ones(2)), X + 1)
    assert torch.equal(predict(Late(), X, T + 5, {"c": None}), X + 5)


def test_time_scales_are_known_without_importing_models() -> None:
    code = (
        "from sparsedm_compiler.diffusion.predict import TIME_SCALES; "
        "print(sorted(TIME_SCALES.items()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    classes = ("AuraFlowTransformer2DModel", "FluxTransformer2DModel")
    assert run.stdout.strip() == str([(name, 1e-3) for name in classes])
