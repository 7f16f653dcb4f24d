"""vnm.cu, thread by thread on the emulator, against float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsedm_compiler import KernelError
from sparsedm_compiler.backends.custom_op import ACTS
from sparsedm_compiler.backends.vnm.ops import reference_linear, run_linear
from tests.backends.cpu.cases import activated
from tests.backends.vnm.emulated import emulate, needs_compiler
from tests.backends.vnm.vnm_cases import HALVES, SMALL, Held, held

pytestmark = needs_compiler


def assert_close(out: Tensor, x: Tensor, case: Held, bias: Tensor | None, act: str) -> None:
    """Within (k + 2) units of float32 of the sum of magnitudes, and one rounding of the result."""
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[x.dtype]
    weight, given = case.dense.double(), x.double().reshape(-1, x.shape[-1])
    shift = torch.zeros(len(weight)).double() if bias is None else bias.double()
    exact = given @ weight.t() + shift
    sums = given.abs() @ weight.abs().t() + shift.abs()
    value = activated(exact, act)
    steps = case.dense.shape[1] * case.pattern.n // case.pattern.m + 2
    bound = 1.13 * steps * 2.0**-24 * sums + 1e-6 * (1 + exact.abs()) * (act != "none")
    bound = bound + unit * value.abs() + 2.0**-24
    found = out.reshape(-1, len(weight)).double()
    excess = (found - value).abs() - bound
    assert bool((excess <= 0).all()), float(excess.max())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("text", "rows", "cols", "tokens", "tile"),
    [
        ("64:2:8", 128, 96, 50, SMALL),  # half a step left over
        ("64:2:8", 192, 448, 70, (64, 2, 2, 2)),  # half a block of rows left over, the ring turns
        ("128:2:16", 128, 128, 9, (32, 2, 1, 4)),  # one step, fewer than stages
        ("32:2:4", 96, 40, 33, (32, 2, 2, 3)),
        ("16:1:8", 48, 64, 8, (32, 4, 1, 2)),
        ("48:2:16", 96, 160, 65, (32, 4, 2, 3)),  # V is no power of two
        ("16:2:10", 32, 80, 17, SMALL),  # a step is no multiple of 16 rows of the tile
        ("32:1:32", 32, 512, 1, SMALL),
    ],
)
def test_vnm_linear_on_the_emulator_matches_float64(
    text: str,
    rows: int,
    cols: int,
    tokens: int,
    tile: tuple[int, int, int, int],
    dtype: torch.dtype,
) -> None:
    case = held(text, rows, cols, dtype)
    x = torch.randn(tokens, cols).to(dtype)
    arguments = case.arguments(tile, feature_major=(dtype == torch.float16) == (tokens % 2 == 0))
    out = run_linear(x, case.packed, None, rows, "none", **arguments, launch=emulate)
    assert_close(out, x, case, None, "none")
    assert (
        out.stride() == reference_linear(x, case.packed, None, rows, "none", **arguments).stride()
    )


@pytest.mark.parametrize("act", ACTS)
def test_vnm_linear_applies_bias_and_activation(act: str) -> None:
    for dtype, wide in zip(HALVES, (act in ACTS[:2], act in ACTS[2:]), strict=True):
        case = held("64:2:8", 128, 64, dtype)
        x, bias = torch.randn(20, 64).to(dtype), torch.randn(128)
        bias = bias if wide else bias.to(dtype)
        for run in (partial(run_linear, launch=emulate), reference_linear):
            assert_close(
                run(x, case.packed, bias, 128, act, **case.arguments()), x, case, bias, act
            )


def layouts(dtype: torch.dtype) -> dict[str, Tensor]:
    """[2, 15, 64] activations lying in memory in several ways."""
    x = torch.randn(2, 15, 64).to(dtype)
    turned = torch.zeros(64, 32, dtype=dtype)
    turned[:, :30] = x.view(30, 64).t()
    odd = torch.zeros(64, 31, dtype=dtype)
    odd[:, :30] = x.view(30, 64).t()
    return {
        "row-major": x,
        "feature-major": turned.t()[:30].unflatten(0, (2, 15)),
        "feature-major, lines not aligned": odd.t()[:30].unflatten(0, (2, 15)),
        "feature-major, begun elsewhere": torch.cat([turned.view(-1)[:1], turned.view(-1)])[1:]
        .view(64, 32).t()[:30].unflatten(0, (2, 15)),
        "rows apart": torch.cat([x, x], -1)[..., :64],
        "every second": x.repeat_interleave(2, -1)[..., ::2],
        "batches apart": torch.stack([x, x], 1)[:, 0],
        "one for all": x[:1].expand(2, -1, -1),
    }  # fmt: skip


@pytest.mark.parametrize("name", layouts(torch.float16))
def test_vnm_linear_takes_activations_of_any_strides(name: str) -> None:
    torch.manual_seed(1)
    case = held("64:2:8", 64, 64, torch.float16)
    x = layouts(torch.float16)[name]
    out = run_linear(x, case.packed, None, 64, "none", **case.arguments(), launch=emulate)
    assert out.shape == (2, 15, 64)
    assert_close(out, x, case, None, "none")


def test_vnm_linear_does_not_copy_feature_major_activations() -> None:
    names = []

    def launch(build: object, *rest: object) -> None:
        names.append(build.name)  # type: ignore[attr-defined]

    case = held("64:2:8", 64, 64, torch.float16)
    for name, x in layouts(torch.float16).items():
        names.clear()
        run_linear(x, case.packed, None, 64, "none", **case.arguments(), launch=launch)
        row_major = name in ("row-major", "rows apart", "batches apart", "one for all")
        turned = ["to_feature_major"] * row_major
        assert names == [*turned, "vnm_linear"], name


def test_vnm_linear_output_feeds_the_next_layer_without_a_copy() -> None:
    first, second = held("64:2:8", 64, 64, torch.float16), held("64:2:8", 64, 64, torch.float16, 1)
    x = torch.randn(21, 64).half()
    middle = run_linear(
        x, first.packed, None, 64, "silu", **first.arguments(SMALL, True), launch=emulate
    )
    assert middle.stride() == (1, 24)
    out = run_linear(middle, second.packed, None, 64, "none", **second.arguments(), launch=emulate)
    assert_close(out, middle, second, None, "none")


@pytest.mark.parametrize("feature_major", [False, True])
def test_vnm_linear_of_more_tokens_than_a_grid_holds_is_launched_in_parts(
    feature_major: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsedm_compiler.backends.vnm.ops._MOST_BLOCKS", 1)
    case, grids = held("64:2:8", 64, 64, torch.float16), []

    def launch(build: Any, arguments: Any, grid: tuple[int, int]) -> None:
        grids.append(grid[1])
        emulate(build, arguments, grid)

    x = torch.randn(3, 25, 64).half()
    setting = case.arguments(SMALL, feature_major)
    out = run_linear(x, case.packed, None, 64, "none", **setting, launch=launch)
    assert_close(out, x, case, None, "none")
    assert set(grids) == {1}
    assert out.stride() == ((25, 1, 80) if feature_major else (25 * 64, 64, 1))


def test_vnm_linear_is_the_same_for_any_order_of_threads() -> None:
    case = held("64:2:8", 128, 320, torch.bfloat16)
    x = torch.randn(40, 320).bfloat16()
    outs = [
        run_linear(
            x,
            case.packed,
            None,
            128,
            "none",
            **case.arguments(),
            launch=partial(emulate, seed=seed),
        )
        for seed in range(4)
    ]
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_vnm_linear_ignores_columns_that_no_row_keeps() -> None:
    """Columns that a block did not choose may hold anything."""
    case = held("64:2:8", 64, 64, torch.bfloat16)
    x = torch.randn(9, 64).bfloat16()
    clean = run_linear(x, case.packed, None, 64, "none", **case.arguments(), launch=emulate)
    x[:, case.dense.abs().sum(0) == 0] = float("nan")
    assert torch.equal(
        run_linear(x, case.packed, None, 64, "none", **case.arguments(), launch=emulate), clean
    )


def test_vnm_linear_without_tokens_or_with_bad_arguments() -> None:
    case = held("64:2:8", 64, 64, torch.float16)
    empty = torch.empty(0, 64, dtype=torch.float16)
    assert run_linear(
        empty, case.packed, None, 64, "none", **case.arguments(), launch=emulate
    ).shape == (0, 64)
    x = torch.randn(3, 64).half()
    with pytest.raises(KernelError, match="is not one of 128 x 64 to 64:2:8"):
        run_linear(x, case.packed, None, 128, "none", **case.arguments(), launch=emulate)
    for bias in (torch.zeros(1).half(), torch.zeros(64).bfloat16()):
        with pytest.raises(KernelError, match="is not one value for each of 64 rows"):
            run_linear(x, case.packed, bias, 64, "none", **case.arguments(), launch=emulate)
