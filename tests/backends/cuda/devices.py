"""The fixture ``device``: a test runs on the CPU by references, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from tests.backends.cuda.here import on_cpu


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        on_cpu(monkeypatch)
    name: str = request.param
    return name
