"""Conditions in rows, and guidance against its formula in two separate calls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsedm_compiler.diffusion import Guidance, predict
from sparsedm_compiler.diffusion.condition import (
    check_count,
    map_condition,
    move_condition,
    stack_conditions,
    take_rows,
)
from sparsedm_compiler.diffusion.guidance import apply_guidance
from sparsedm_compiler.errors import ConfigError, DataError
from tests.zoo import FAMILIES


class Counting(nn.Module):
    """Predicts its input times its condition, and remembers the batch sizes it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, text: Tensor | None = None
    ) -> Tensor:
        self.seen.append(len(x))
        assert t.shape == (len(x),)
        given = y if text is None else text.mean((1, 2))
        return x * given[:, None] + t[:, None]


X, T = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 4.0]]), torch.tensor([1.0, 2.0, 3.0])


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guidance_with_a_null_label_equals_its_formula_in_one_batch(scale: float) -> None:
    model, y = Counting(), torch.tensor([1, 2, 3])
    found = apply_guidance(model, X, T, y, Guidance(scale, null=7))
    null = X * 7 + T[:, None]
    cond = X * y[:, None] + T[:, None]
    torch.testing.assert_close(found, null + scale * (cond - null))
    assert model.seen == [6]


def test_guidance_with_named_null_tensors_equals_its_formula() -> None:
    model = Counting()
    text = torch.arange(12.0).reshape(3, 2, 2)
    guidance = Guidance(3.0, null={"text": torch.full((2, 2), -1.0)})
    found = apply_guidance(model, X, T, {"text": text}, guidance)
    cond, null = (X * v[:, None] + T[:, None] for v in (text.mean((1, 2)), -torch.ones(3)))
    torch.testing.assert_close(found, null + 3 * (cond - null))
    assert model.seen == [6]


def test_guidance_of_a_unet_equals_two_separate_calls() -> None:
    family = next(family for family in FAMILIES if family.name == "unet_condition")
    model, (x, t, text), _ = family.make(batch=2)
    null = torch.zeros_like(text[0])
    with torch.no_grad():
        cond = predict(model, x, t, {"encoder_hidden_states": text})
        free = predict(model, x, t, {"encoder_hidden_states": 0 * text})
        guidance = Guidance(4.0, null={"encoder_hidden_states": null})
        found = apply_guidance(model, x, t, {"encoder_hidden_states": text}, guidance)
    torch.testing.assert_close(found, free + 4 * (cond - free), rtol=1e-4, atol=1e-5)


def test_apply_guidance_of_a_bfloat16_model_returns_float32() -> None:
    y = torch.tensor([1, 2, 3])
    half = X.bfloat16(), T.bfloat16(), y
    assert apply_guidance(Counting(), *half, None).dtype == torch.float32
    assert apply_guidance(Counting(), *half, Guidance(2.0, null=0)).dtype == torch.float32


def test_guidance_that_does_not_fit_raises() -> None:
    for scale in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"guidance scale {scale}"):
            Guidance(scale, null=0)
    with pytest.raises(DataError, match=r"guidance 2.0 without a condition"):
        apply_guidance(Counting(), X, T, None, Guidance(2.0, null=0))
    with pytest.raises(DataError, match=r"null label 7 fits no condition \{text\}"):
        apply_guidance(Counting(), X, T, {"text": torch.ones(3, 2, 2)}, Guidance(2.0, null=7))
    null = {"words": torch.ones(2, 2)}
    with pytest.raises(DataError, match=r"\{text\} and \{words\} make no one batch"):
        apply_guidance(Counting(), X, T, {"text": torch.ones(3, 2, 2)}, Guidance(2.0, null=null))
    null = {"text": torch.ones(5, 2)}
    with pytest.raises(DataError, match=r"\[3, 2, 2\] and \[3, 5, 2\] make no one batch"):
        apply_guidance(Counting(), X, T, {"text": torch.ones(3, 2, 2)}, Guidance(2.0, null=null))


NESTED = {"a": torch.arange(4), "more": {"b": torch.arange(8.0).reshape(4, 2)}}


def test_rows_moves_and_stacks_of_a_nested_condition() -> None:
    part = take_rows(NESTED, range(1, 3))
    assert torch.equal(part["a"], torch.tensor([1, 2]))
    assert torch.equal(part["more"]["b"], torch.tensor([[2.0, 3.0], [4.0, 5.0]]))
    moved = move_condition(NESTED, torch.zeros(1, dtype=torch.bfloat16))
    assert (moved["a"].dtype, moved["more"]["b"].dtype) == (torch.int64, torch.bfloat16)
    both = stack_conditions(part, take_rows(NESTED, range(0, 1)))
    assert both["a"].tolist() == [1, 2, 0]
    assert both["more"]["b"].shape == (3, 2)


def test_conditions_of_a_wrong_type_or_count_raise() -> None:
    check_count(NESTED, 4)
    with pytest.raises(DataError, match=r"the condition 'more' 'b' \[4, 2\] has no row .* 3"):
        check_count({"a": torch.arange(3), "more": NESTED["more"]}, 3)
    with pytest.raises(DataError, match=r"the condition \[\] has no row for each of 2"):
        check_count(torch.tensor(5), 2)
    with pytest.raises(DataError, match="of type str is neither"):
        check_count({"text": "a cat"}, 1)
    with pytest.raises(DataError, match="of type list is neither"):
        map_condition(lambda part: part, [1, 2])
    with pytest.raises(DataError, match=r"a tensor \[2\] and \{a\}"):
        stack_conditions(torch.ones(2), {"a": torch.ones(2)})
