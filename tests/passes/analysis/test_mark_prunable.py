"""Every decision and the sentence of every refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.models import UViT
from sparsedm_compiler.passes import COMPUTED


class Net(nn.Module):
    """One layer per rule, between a first and a last one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 1)
        self.plain = nn.Conv2d(8, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 16, 1, groups=4)
        self.turned = nn.ConvTranspose2d(16, 6, 1)
        self.narrow = nn.Conv2d(6, 8, 1)
        self.table = nn.Embedding(8, 8)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.odd = nn.Linear(8, 12)
        self.last = nn.Linear(12, 4)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        x = self.grouped(self.depthwise(self.plain(self.first(x))))
        x = self.narrow(self.turned(x)).mean((2, 3)) + self.table(label)
        x = nn.functional.linear(x, self.table.weight)
        return self.last(self.odd(self.normed(x)))


INPUTS = (torch.randn(2, 8, 4, 4), torch.tensor([1, 2]))


def refusals(pattern: str = "2:4", **options: Any) -> dict[str, str | None]:
    student = sdm.compile(Net(), pattern, backend="eager", **options)
    student(*INPUTS)
    return {row.weight: row.refusal for row in sdm.explain(student).rows}


def test_a_sentence_for_each_refusal() -> None:
    found = refusals()
    assert found == {
        "first.weight": "first op of the graph",
        "plain.weight": None,
        "depthwise.weight": "depthwise convolution",
        "grouped.weight": "grouped convolution (4 groups)",
        "turned.weight": "transposed convolution",
        "narrow.weight": "input width 6 is not a multiple of 4",
        "table.weight": found["table.weight"],
        "from normed.parametrizations.weight.original1": COMPUTED,
        "odd.weight": None,
        "last.weight": "last op of the graph",
    }
    assert "it is also read by" in str(found["table.weight"])


def test_shared_rows_must_divide_the_output() -> None:
    found = refusals("2:4x8")
    assert found["odd.weight"] == "output width 12 is not a multiple of the 8 shared rows"
    assert found["plain.weight"] is None


def test_policy_all_keeps_no_end_dense() -> None:
    found = refusals(policy="all")
    assert found["first.weight"] is None
    assert found["last.weight"] is None
    assert found["depthwise.weight"] == "depthwise convolution"


@pytest.mark.parametrize("keep", ["plain", "pl*", ["plain.weight"], lambda name: "plain" in name])
def test_keep_dense(keep: Any) -> None:
    found = refusals(keep_dense=keep)
    assert "kept dense by keep_dense=" in str(found["plain.weight"])
    assert found["odd.weight"] is None


def test_overrides_mix_patterns() -> None:
    student = sdm.compile(Net(), "2:4", overrides={"odd": "1:8", "p*": "1:2"}, backend="eager")
    student(*INPUTS)
    patterns = {name: str(p) for name, (_, p) in sdm.masked_parameters(student).items()}
    assert patterns == {"odd.weight": "1:8", "plain.weight": "1:2"}


@pytest.mark.parametrize("option", ["keep_dense", "overrides"])
def test_a_glob_that_names_nothing_is_an_error(option: str) -> None:
    value: Any = {"plane": "1:8"} if option == "overrides" else ["plane"]
    with pytest.raises(sdm.ConfigError, match=r"'plane' names no parameter .* near it: plain"):
        sdm.compile(Net(), "2:4", **{option: value})


def test_a_glob_near_a_parameter_of_the_model_itself_is_told_its_name() -> None:
    net = Net()
    net.shift = nn.Parameter(torch.zeros(8))
    with pytest.raises(sdm.ConfigError, match=r"near it: shift, last"):
        sdm.compile(net, "2:4", overrides={"shifts": "1:8"})


def test_nothing_to_prune_is_an_error() -> None:
    student = sdm.compile(nn.Sequential(nn.Linear(6, 6)), "2:4", backend="eager")
    with pytest.raises(sdm.ConfigError, match="no weight of Sequential is pruned to 2:4"):
        student(torch.randn(1, 6))


def test_policy_uvit_is_the_authors_layer_set() -> None:
    model = UViT(img_size=8, in_chans=4, embed_dim=16, depth=2, num_heads=2, mlp_time_embed=True)
    report = sdm.count_macs(model, torch.randn(1, 4, 8, 8), torch.tensor([1]), policy="uvit")
    pruned = {row.name.rpartition(".")[2] for row in report.rows if row.pattern}
    dense = {row.name for row in report.rows if row.refusal}
    assert pruned == {"qkv", "proj", "fc1", "fc2"} - {"patch_embed.proj"}
    assert dense == {
        *("patch_embed.proj", "time_embed.0", "time_embed.2", "out_blocks.0.skip_linear"),
        *("decoder_pred", "final_layer"),
    }


def test_one_decision_for_a_tied_weight_and_every_use_counts() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8, bias=False) for _ in range(3))
            self.b.weight = self.c.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.b(self.a(x))))

    student = sdm.compile(Tied(), "2:4", policy="all", backend="eager")
    student(torch.randn(1, 8))
    assert [row.weight for row in sdm.explain(student).rows] == ["a.weight", "b.weight"]
    with_ends = sdm.count_macs(Tied(), torch.randn(1, 8))
    assert {row.refusal for row in with_ends.rows if row.name == "b"} == {"last op of the graph"}
    assert with_ends.dense == with_ends.sparse == 4 * 64
