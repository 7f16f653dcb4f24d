"""Conditions in files; in rows they are tested beside guidance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparsedm_compiler.diffusion.condition import read_condition
from sparsedm_compiler.errors import DataError


def test_read_condition_returns_the_tensors_of_a_file(tmp_path: Path) -> None:
    given = {"context": torch.randn(2, 3), "scale": torch.tensor(2.0)}
    save_file(given, tmp_path / "a.safetensors")
    torch.testing.assert_close(read_condition(tmp_path / "a.safetensors"), given, rtol=0, atol=0)


def test_read_condition_of_a_broken_or_empty_file_raises(tmp_path: Path) -> None:
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    save_file({}, tmp_path / "empty.safetensors")
    for name, says in (
        ("gone.safetensors", r"cannot read the condition .*gone"),
        ("noise.safetensors", r"cannot read the condition .*noise"),
        ("empty.safetensors", r"empty\.safetensors holds no tensors"),
    ):
        with pytest.raises(DataError, match=says):
            read_condition(tmp_path / name)
