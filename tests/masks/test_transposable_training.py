"""A pattern like "2:4t" goes wherever a pattern goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsedm_compiler as sdm
from sparsedm_compiler.backends.cpu.family import CpuFamily
from sparsedm_compiler.backends.cpu.format import unpack, why_refused
from sparsedm_compiler.masks.nm_mask import nm_mask
from sparsedm_compiler.train.sr_ste import sr_ste
from tests.autotune.test_select_kernel import Net, X
from tests.oracle import (
    OPTIONS,
    ROUNDING,
    assert_gradients,
    assert_same,
    brute_mask,
    oracle_of,
)
from tests.train.cases import short, student_of, teacher

PATTERN = sdm.Pattern.parse("2:4t")
WEIGHTS = {"plain.weight", "active.weight", "twice.weight", "conv.weight", "line.weight"}


def compiled(mode: str = "train", pattern: str = "2:4t", **options: Any) -> Net:
    return sdm.compile(Net(), pattern, backend="eager", **OPTIONS[mode], **options)


def is_transposable(mask: Tensor, n: int) -> bool:
    tiles = mask.unflatten(0, (-1, 4)).unflatten(2, (-1, 4))
    return bool((tiles.sum(1) == n).all() and (tiles.sum(3) == n).all())


@pytest.mark.parametrize("mode", ["train", "infer", "sparse"])
@pytest.mark.parametrize("text", ["1:4t", "2:4t", "3:4t"])
def test_transposable_model_equals_the_oracle_in_every_mode(mode: str, text: str) -> None:
    student = compiled(mode, text)
    with torch.no_grad():
        out = student(X)
    assert {*sdm.masked_parameters(student)} == WEIGHTS
    assert str(sdm.pattern_of(student)) == text
    assert_same(out, oracle_of(student)(X).detach(), tolerance=ROUNDING[mode])
    kernels = {choice.kernel for choice in sdm.explain(student).choices}
    assert kernels == {"train": set(), "infer": {"dense"}, "sparse": {"cpu_free", "dense"}}[mode]
    assert f" {text}" in str(sdm.explain(student))


def test_transposable_gradients_equal_those_of_the_oracle() -> None:
    student = compiled()
    student(X)
    assert_gradients(student, oracle_of(student), ((X,), {}))


def test_transposable_student_is_saved_and_loaded(tmp_path: Path) -> None:
    student = compiled()
    out = student(X)
    sdm.save(student, tmp_path / "student")
    loaded = sdm.load(tmp_path / "student", Net(), backend="eager")
    assert_same(loaded(X), out)
    assert {pattern for _, pattern in sdm.masked_parameters(loaded).values()} == {PATTERN}


def test_transposable_finalized_weights_are_saved_and_loaded(tmp_path: Path) -> None:
    fast = compiled("sparse", finalize=True)
    with torch.no_grad():
        fast(X)
        out = fast(X)
        assert is_transposable(fast.state_dict()["conv.weight"] != 0, 2)
        sdm.save(fast, tmp_path / "fast")
        assert_same(sdm.load(tmp_path / "fast", Net(), backend="eager")(X), out)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transposable_weight_is_packed_by_the_per_row_kernels(
    kernel: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight = torch.randn(20, 64, *kernel).to(dtype)
    mask = nm_mask(weight, PATTERN)
    dense = (weight * mask).movedim(1, -1).flatten(1)
    assert why_refused(PATTERN, *dense.shape, dtype) is None
    family = CpuFamily()
    for candidate in family.list_candidates(PATTERN, dtype):
        assert candidate.name == "cpu_free"
        assert_same(unpack(family.pack(weight * mask, mask, PATTERN, candidate)), dense)
    assert family.list_candidates(PATTERN, dtype) == family.list_candidates(
        sdm.Pattern.parse("2:4"), dtype
    )


def test_transposable_mask_of_a_convolution_differs_by_position() -> None:
    weight = torch.randn(8, 12, 3, 2, generator=torch.Generator().manual_seed(0))
    mask = nm_mask(weight, PATTERN)
    assert torch.equal(mask, brute_mask(weight, "2:4t"))
    for y, x in ((0, 0), (2, 1)):
        assert torch.equal(mask[..., y, x], nm_mask(weight[..., y, x], PATTERN))
        assert torch.equal(mask[..., y, x].T, nm_mask(weight[..., y, x].T, PATTERN))


def test_transposable_pattern_that_does_not_fit_leaves_the_weight_dense() -> None:
    net = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in ((8, 8), (8, 6), (6, 8), (8, 8))))
    student = sdm.compile(net, "2:4t", policy="all", backend="eager")
    student(torch.randn(2, 8))
    refusals = {row.weight: row.refusal for row in sdm.explain(student).rows}
    assert refusals == {
        "0.weight": None,
        "1.weight": "output width 6 is not a multiple of 4",
        "2.weight": "input width 6 is not a multiple of 4",
        "3.weight": None,
    }


def test_count_macs_of_a_transposable_pattern_equals_the_per_row_one() -> None:
    ours, plain = (sdm.count_macs(Net(), X, pattern=text) for text in ("2:4t", "2:4"))
    assert (ours.dense, ours.sparse) == (plain.dense, plain.sparse)
    assert ours.sparse < ours.dense


def test_repattern_to_a_transposable_pattern_and_back() -> None:
    student = compiled(pattern="2:4")
    plain = student(X)
    for text in ("3:4t", "2:4t"):
        sdm.repattern(student, text)
        assert_same(student(X), oracle_of(student)(X))
        assert {str(p) for _, p in sdm.masked_parameters(student).values()} == {text}
    assert not torch.equal(student(X), plain)
    sdm.repattern(student, "2:4")
    assert_same(student(X), plain)


def test_torch_compile_backend_takes_a_transposable_pattern() -> None:
    options = {"pattern": "2:4t", "backend": "eager"}
    fast = torch.compile(Net(), backend="sparsedm", options=options)
    with torch.no_grad():
        assert_same(fast(X), compiled("infer")(X), tolerance=1e-5)


def test_override_may_be_a_transposable_pattern() -> None:
    student = compiled(pattern="1:4", overrides={"conv": "2:4t"})
    student(X)
    patterns = {name: str(pattern) for name, (_, pattern) in sdm.masked_parameters(student).items()}
    assert patterns == {**dict.fromkeys(WEIGHTS, "1:4"), "conv.weight": "2:4t"}


def test_sr_ste_decays_the_weights_that_a_transposable_mask_prunes() -> None:
    student = compiled()
    student(X)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    sr_ste(optimizer, student, lam=0.25)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, weight in student.named_parameters():
        term = torch.zeros_like(weight)
        if name in WEIGHTS:
            term = 0.125 * before[name] * ~brute_mask(before[name], "2:4t")
        assert_same(weight.detach(), before[name] - term, tolerance=1e-7)


@pytest.mark.parametrize("method", ["sparsedm", "asp", "progressive"])
def test_finetune_with_a_transposable_pattern(method: str) -> None:
    result, student = short(method, student=student_of(teacher(), pattern="2:4t"))
    assert result.losses[-1] > 0
    assert str(result.pattern) == "2:4t"
    for weight, pattern in sdm.masked_parameters(student).values():
        assert pattern == PATTERN
        assert is_transposable(nm_mask(weight, pattern), 2)
        if method == "asp":
            assert bool((weight.detach().eq(0) == ~nm_mask(weight, pattern)).all())
