"""``sparsedm macs``: model options and dry runs; see tests/examples/test_count_macs.py too."""

from __future__ import annotations

import json

from tests.cli.conftest import Shell


def test_macs_option_changes_the_model(shell: Shell) -> None:
    one, two = (
        json.loads(shell("macs", "--model", "own:net", "--option", f"depth={n}", "--json").out)
        for n in (2, 4)
    )
    block = 12 * 16 * 16 * 5  # qkv, proj, fc1 and fc2 of five tokens
    assert two["dense"] - one["dense"] == 2 * block + 2 * 16 * 16 * 5  # and a skip of 2 * 16
    result = shell("macs", "--model", "uvit-cifar10-small", "--option", "depht=4")
    assert "sparsedm macs: U-ViT has no option 'depht'" in result.reason
    assert "is not section.name=value" in shell("macs", "--model", "x", "--option", "y").reason


def test_macs_dry_run_makes_the_model_and_counts_nothing(shell: Shell) -> None:
    result = shell.dry("macs", "--model", "own:net", "--pattern", "2:4t", "--pattern", "1:8")
    assert result.out.splitlines()[:-1] == ["would count own:net at 2:4t, 1:8"]
    assert "no preset" in shell.dry("macs", "--model", "unknown").reason
    assert "policy 'mine'" in shell.dry("macs", "--model", "own:net", "--policy", "mine").reason
    assert "would print the presets" in shell.dry("macs", "--list").out
