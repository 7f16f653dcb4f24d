"""What a kernel sees of the tokens: a matrix of whole multiples, contiguous and aligned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsedm_compiler.backends.cuda.token_padding import ALIGN, apply_to_tokens
from tests.oracle import assert_same


@pytest.mark.parametrize("leading", [(1,), (8,), (3, 3), (2, 2, 4), ()])
@pytest.mark.parametrize("multiple", [8, 16])
def test_apply_to_tokens_pads_to_a_multiple_with_zeros(
    leading: tuple[int, ...], multiple: int
) -> None:
    seen: list[Tensor] = []
    x = torch.randn(*leading, 4)

    def double(flat: Tensor) -> Tensor:
        seen.append(flat)
        return torch.cat((flat, flat), 1)

    out = apply_to_tokens(x, 8, multiple, double)
    assert_same(out, torch.cat((x, x), -1))
    tokens = x[..., 0].numel()
    assert seen[0].shape == (tokens + -tokens % multiple, 4)
    assert 0 <= len(seen[0]) - tokens < multiple
    assert not seen[0][tokens:].any()
    assert (seen[0].data_ptr() == x.data_ptr()) == (tokens % multiple == 0)


def test_align_at_an_odd_address_copies() -> None:
    x = torch.randn(8 * 4 + 1)[1:].view(8, 4)
    assert x.data_ptr() % ALIGN

    def check(flat: Tensor) -> Tensor:
        assert flat.data_ptr() % ALIGN == 0
        return flat

    assert_same(apply_to_tokens(x, 4, 8, check), x)
    assert_same(apply_to_tokens(x.t(), 8, 4, check), x.t())


def test_apply_to_tokens_without_tokens_does_not_run_the_kernel() -> None:
    def never(flat: Tensor) -> Tensor:
        raise AssertionError(flat.shape)

    assert apply_to_tokens(torch.randn(2, 0, 4), 6, 8, never).shape == (2, 0, 6)
