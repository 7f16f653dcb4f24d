"""Patterns like "1:2@64x16" and "1:2@64x32+2:4" go wherever a pattern goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsedm_compiler as sdm
from sparsedm_compiler.backends.cpu.family import CpuFamily
from sparsedm_compiler.backends.cpu.format import unpack
from sparsedm_compiler.backends.cpu.isa import select_isa
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

TEXTS = ("1:2@8x4", "1:4@16x4", "1:2@8x8+2:4")
WEIGHTS = {"plain.weight", "active.weight", "twice.weight", "conv.weight", "line.weight"}
every_text = pytest.mark.parametrize("text", TEXTS)


def compile_net(text: str, mode: str = "train", **options: Any) -> Net:
    return sdm.compile(Net(), text, backend="eager", **OPTIONS[mode], **options)


@every_text
@pytest.mark.parametrize("mode", ["train", "infer", "sparse"])
def test_block_model_equals_the_oracle_in_every_mode(mode: str, text: str) -> None:
    student = compile_net(text, mode)
    with torch.no_grad():
        out = student(X)
    assert {*sdm.masked_parameters(student)} == WEIGHTS
    assert str(sdm.pattern_of(student)) == text
    assert_same(out, oracle_of(student)(X).detach(), tolerance=ROUNDING[mode])
    sparse = "cpu_free" if "+" in text else "cpu_shared"
    kernels = {choice.kernel for choice in sdm.explain(student).choices}
    assert kernels == {"train": set(), "infer": {"dense"}, "sparse": {sparse, "dense"}}[mode]
    assert f" {text}" in str(sdm.explain(student))


@every_text
def test_block_gradients_equal_those_of_the_oracle(text: str) -> None:
    student = compile_net(text)
    student(X)
    assert_gradients(student, oracle_of(student), ((X,), {}))


@every_text
def test_sr_ste_of_blocks_decays_the_pruned_weights_alone(text: str) -> None:
    student = compile_net(text)
    student(X)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    sr_ste(optimizer, student, lam=0.5)
    before = {name: weight.detach().clone() for name, weight in student.named_parameters()}
    for weight in student.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for name, weight in student.named_parameters():
        old = before[name]
        pruned = ~brute_mask(old, text) if name in WEIGHTS else torch.zeros_like(old).bool()
        assert_same(weight.detach(), torch.where(pruned, old - 0.5 * old, old))


@every_text
def test_block_student_is_saved_and_loaded(text: str, tmp_path: Path) -> None:
    student = compile_net(text)
    out = student(X)
    sdm.save(student, tmp_path / "student")
    loaded = sdm.load(tmp_path / "student", Net(), backend="eager")
    assert_same(loaded(X), out)
    patterns = {pattern for _, pattern in sdm.masked_parameters(loaded).values()}
    assert patterns == {sdm.Pattern.parse(text)}


@every_text
def test_finalized_block_weights_are_saved_and_loaded(text: str, tmp_path: Path) -> None:
    fast = compile_net(text, "sparse", finalize=True)
    with torch.no_grad():
        fast(X)
        out = fast(X)
        plain = Net().conv.weight
        assert_same(fast.state_dict()["conv.weight"], plain * brute_mask(plain, text))
        sdm.save(fast, tmp_path / "fast")
        assert_same(sdm.load(tmp_path / "fast", Net(), backend="eager")(X), out)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("1:2@16x8", {"cpu_shared", "cpu_wide"}),
        ("1:4@32x16", {"cpu_shared", "cpu_wide"}),
        ("1:2@8x8", {"cpu_shared"}),
        ("1:2@1x8", {"cpu_free"}),
        ("1:2@16x8+2:4", {"cpu_free"}),
    ],
)
def test_block_weight_is_packed_by_the_kernels_of_what_it_implies(
    text: str, names: set[str], dtype: torch.dtype, kernel: tuple[int, ...]
) -> None:
    family, pattern = CpuFamily(), sdm.Pattern.parse(text)
    weight = torch.randn(32, 2 * pattern.width, *kernel).to(dtype)
    mask = nm_mask(weight, pattern)
    dense = (weight * mask).movedim(1, -1).flatten(1)
    assert family.why_refused(pattern, *dense.shape, dtype) is None
    candidates = family.list_candidates(pattern, dtype)
    if dtype == torch.float32 or select_isa() == "plain":
        names = names - {"cpu_wide"}
    assert {candidate.name for candidate in candidates} == names
    for candidate in candidates:
        assert_same(unpack(family.pack(weight * mask, mask, pattern, candidate)), dense)


@pytest.mark.parametrize(
    ("text", "shape", "why"),
    [
        ("1:2@16x256+2:4", (16, 512), "groups of 512 are wider than the 256 columns"),
        ("1:2@16x256", (16, 512), None),
        ("2:2@16x16", (16, 32), "keeps everything"),
        ("2:2@16x16+2:4", (16, 32), None),
    ],
)
def test_why_refused_of_blocks_is_that_of_the_kernels_that_run_them(
    text: str, shape: tuple[int, int], why: str | None
) -> None:
    refusal = CpuFamily().why_refused(sdm.Pattern.parse(text), *shape, torch.float32)
    assert refusal is None if why is None else why in str(refusal)


def test_blocks_that_do_not_fit_leave_the_weight_dense() -> None:
    net = nn.Sequential(*(nn.Linear(a, b) for a, b in ((8, 8), (8, 6), (6, 8), (8, 8))))
    student = sdm.compile(net, "1:2@4x4", policy="all", backend="eager")
    student(torch.randn(2, 8))
    assert {row.weight: row.refusal for row in sdm.explain(student).rows} == {
        "0.weight": None,
        "1.weight": "output width 6 is not a multiple of the 4 rows of a block",
        "2.weight": "input width 6 is not a multiple of the 8 columns of 2 blocks",
        "3.weight": None,
    }


@pytest.mark.parametrize(("text", "plain"), [("1:2@8x4", "1:2"), ("1:2@8x8+2:4", "1:4")])
def test_count_macs_of_blocks_equals_the_per_row_pattern_of_their_density(
    text: str, plain: str
) -> None:
    ours, theirs = (sdm.count_macs(Net(), X, pattern=pattern) for pattern in (text, plain))
    assert (ours.dense, ours.sparse) == (theirs.dense, theirs.sparse)
    assert ours.sparse < ours.dense


def test_overrides_give_single_weights_block_patterns() -> None:
    student = compile_net("2:4", overrides={"conv*": "1:2@8x4", "line*": "1:2@8x8+2:4"})
    out = student(X)
    patterns = {name: str(row[1]) for name, row in sdm.masked_parameters(student).items()}
    assert patterns["conv.weight"] == "1:2@8x4"
    assert patterns["line.weight"] == "1:2@8x8+2:4"
    assert patterns["plain.weight"] == "2:4"
    assert_same(out, oracle_of(student)(X))


def test_repattern_to_blocks_and_back() -> None:
    student = compile_net("2:4")
    plain = student(X)
    for text in TEXTS:
        sdm.repattern(student, text)
        assert_same(student(X), oracle_of(student)(X))
        assert {str(p) for _, p in sdm.masked_parameters(student).values()} == {text}
    sdm.repattern(student, "2:4")
    assert_same(student(X), plain)


@every_text
def test_torch_compile_backend_takes_a_block_pattern(text: str) -> None:
    fast = torch.compile(Net(), backend="sparsedm", options={"pattern": text, "backend": "eager"})
    with torch.no_grad():
        assert_same(fast(X), compile_net(text, "infer")(X), tolerance=1e-5)


@pytest.mark.parametrize(("method", "text"), [("asp", "1:2@4x4+2:4"), ("progressive", "1:4@8x2")])
def test_finetune_with_a_block_pattern_ends_with_its_masks(method: str, text: str) -> None:
    pattern = sdm.Pattern.parse(text)
    result, student = short(method, student=student_of(teacher(), pattern=text))
    assert result.losses[-1] > 0
    assert result.pattern == text
    masked = sdm.masked_parameters(student)
    assert masked
    for weight, own in masked.values():
        assert own == pattern
        if method == "asp":
            assert_same(weight.detach().ne(0), brute_mask(weight, pattern))
