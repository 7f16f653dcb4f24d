"""sparsedm::vnm_linear as torch sees it: schema, fake, gradient, compilers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparsedm_compiler.backends.vnm.ops import vnm_linear_op
from tests.backends.vnm.vnm_cases import SMALL, held
from tests.oracle import assert_same


@pytest.mark.parametrize("feature_major", [False, True])
def test_vnm_linear_passes_opcheck(feature_major: bool) -> None:
    case = held("64:2:8", 64, 64, torch.bfloat16)
    x = torch.randn(2, 5, 64).bfloat16().requires_grad_()
    bias = torch.randn(64).bfloat16()
    arguments = {"act": "gelu", **case.arguments(SMALL, feature_major)}
    torch.library.opcheck(vnm_linear_op, (x, case.packed, bias, 64), arguments)


def test_vnm_linear_under_inductor_keeps_feature_major_activations() -> None:
    case = held("64:2:8", 64, 64, torch.bfloat16)
    turned, plain = case.arguments(SMALL, True), case.arguments(SMALL)

    def run(x: Tensor) -> Any:
        middle = vnm_linear_op(x, case.packed, None, 64, "silu", **turned)
        return vnm_linear_op(middle * 2, case.packed, None, 64, "none", **plain)

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for tokens in (6, 13):
        x = torch.randn(2, tokens, 64).bfloat16()
        assert_same(compiled(x), run(x))
