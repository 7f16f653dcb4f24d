"""``python -m tests.backends.cuda.compile_kernels 90`` compiles for cards that need not be there.

Triton brings the assembler, so only the launch is left out. What the interpreter cannot show is
checked here: that the code compiles, spills next to nothing, reads memory in vectors and uses the
tensor cores. A process of its own: Triton is told of a GPU that may not be there.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sparsedm_compiler.backends.cuda.finish import finish_sums
from sparsedm_compiler.backends.cuda.quantize import KINDS, run_quantize_rows
from sparsedm_compiler.backends.gather.format import pack, require_layout
from sparsedm_compiler.backends.gather.ops import Tile, list_tiles, run_linear
from sparsedm_compiler.backends.wgmma.launch_training import (
    compute_weight_gradient,
    pack_transposed_weight,
    pack_weight,
)
from sparsedm_compiler.backends.wgmma.training import parse_blocks
from sparsedm_compiler.backends.wgmma.transposed import find_blocks, why_dense_gradient
from sparsedm_compiler.masks.nm_mask import nm_mask
from sparsedm_compiler.masks.triton_mask import mask_by_triton
from sparsedm_compiler.patterns import Pattern

_CAPABILITY = int(sys.argv[1]) if len(sys.argv) > 1 else 90
_SPILL = 64  # bytes per thread
_SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}[_CAPABILITY]  # bytes per block
_DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

MASKS = (
    *("2:4", "1:8", "3:4", "16:32", "1:32", "32:64", "7:13", "2048:16384"),
    *("1:8x16", "4:32x128", "3:5x48", "1:128x128", "64:2:8", "64:3:8", "128:2:64"),
    *("1:2@64x16", "1:4@128x16", "1:4@128x32", "3:5@48x6", "1:2@64x32+2:4", "1:3@16x24+1:8"),
)
TYPES = (torch.bfloat16, torch.float32)[: 1 + (_CAPABILITY == 90)]  # float16's code is bfloat16's
BLOCKS = ("1:4@128x32", "1:2@128x64", "1:8@64x16", "1:2@64x16")
GATHERS = ("1:8x16", "2:4x48", "1:4x128", "1:2@64x16", "1:4@128x48", "1:2@128x64+2:4")[
    :: 1 if _CAPABILITY == 90 else 2
]


class _Driver:
    """As much of Triton's driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", _CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only() -> list[Any]:
    """From here on, a launch compiles and no more; the list grows by what was compiled."""
    compiled: list[Any] = []
    run = JITFunction.run

    def warm(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))

    driver.set_active(_Driver())
    JITFunction.run = warm
    return compiled


def spilled(kernel: Any) -> int:
    """Bytes of stack per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(_DISASSEMBLER), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", said)
    assert found, said
    return int(found[1])


def check(kernel: Any, what: object) -> None:
    assert spilled(kernel) <= _SPILL, (what, spilled(kernel))
    assert kernel.metadata.shared <= _SHARED_MEMORY, (what, kernel.metadata.shared)


def check_masks(compiled: list[Any]) -> None:
    for text in MASKS:
        pattern = Pattern.parse(text)
        for dtype in TYPES:
            weight = torch.empty(4 * pattern.height, 16 * pattern.width, 3, 3, dtype=dtype)
            for view in (weight[..., 0, 0].contiguous(), weight) if dtype is TYPES[0] else ():
                mask_by_triton(view, pattern)
                check(compiled[-1], (text, dtype))
            mask_by_triton(weight.to(memory_format=torch.channels_last), pattern)
            check(compiled[-1], (text, dtype))
            if pattern.width in (4, 8, 16, 32, 64):  # a group is 8 bytes or more, side by side
                code = compiled[-1].asm["ptx"]
                assert "ld.global.v" in code, (text, dtype)
                assert "st.global.v" in code, (text, dtype)


def check_gathers(compiled: list[Any]) -> None:
    for text in GATHERS:
        pattern = Pattern.parse(text)
        layout = require_layout(pattern)
        rows, cols = 2 * pattern.height, 200 * pattern.width
        for dtype in TYPES:
            weight = torch.randn(rows, cols).to(dtype)
            packed, bias = pack(weight, nm_mask(weight, pattern), pattern), torch.zeros(rows)
            for tile in list_tiles(layout, dtype):
                if tile.shared_bytes(dtype) > _SHARED_MEMORY or tile.swapped > (_CAPABILITY == 90):
                    continue
                first = len(compiled)
                run_linear(weight, packed, bias, rows, "gelu_tanh", text, tile)
                for kernel in compiled[first:]:
                    check(kernel, (text, dtype, tile))
                if layout.run > 1:
                    check_copies(compiled[first], tile, dtype)
                check_core(compiled[first].asm["ptx"], tile, dtype)


def check_core(code: str, tile: Tile, dtype: torch.dtype) -> None:
    """The tensor cores multiply, where there are any for the dtype."""
    first = tile.rows if tile.swapped else tile.tokens  # a warpgroup multiplies 64 at once
    core = "wgmma.mma_async" if _CAPABILITY == 90 and first >= 64 else "mma.sync"
    assert (core in code) == (dtype != torch.float32), (dtype, tile)


def check_copies(kernel: Any, tile: Tile, dtype: torch.dtype) -> None:
    """Columns in runs are copied 16 bytes at a time, into as much memory as the tile says."""
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, (0x\w+)", kernel.asm["ptx"])
    assert copies.count("0x10") > 8, (dtype, tile)
    taken = kernel.metadata.shared
    assert taken <= tile.shared_bytes(dtype) + 1024, (dtype, tile, taken)


def check_quantize(compiled: list[Any]) -> None:
    """x is read, and bytes are written, in vectors; the card rounds to e4m3."""
    vector = torch.zeros(1152)
    for kind in KINDS if _CAPABILITY >= 89 else ("int8",):
        for cols in (512, 1152, 4608, 12288, 15360, 1 << 15):
            x = torch.zeros(64, cols, dtype=torch.bfloat16)
            run_quantize_rows(x, kind, "none", "none", None, None, None, None, 0.0)
            check(compiled[-1], (kind, cols))
            code = compiled[-1].asm["ptx"]
            assert "ld.global.v4" in code, (kind, cols)
            assert "st.global.v" in code, (kind, cols)
            assert ("cvt.rn.satfinite.e4m3x2.f32" in code) == (kind == "fp8"), (kind, cols)
        x = torch.zeros(2, 32, 1152, dtype=torch.bfloat16)
        modulated = [vector.expand(2, 1152)] * 2
        run_quantize_rows(x, kind, "gelu", "layer", vector, vector, *modulated, 1e-6)
        check(compiled[-1], (kind, "layer"))


def check_finish(compiled: list[Any]) -> None:
    out, scales = torch.zeros(64, 4608, dtype=torch.bfloat16), (torch.zeros(64), torch.zeros(4608))
    for sums in (out, out.float(), out.int()):
        finish_sums(sums, scales, scales[1], "gelu", out)
        check(compiled[-1], sums.dtype)
        assert "ld.global.v4" in compiled[-1].asm["ptx"], sums.dtype


def check_training(compiled: list[Any]) -> None:
    for text in BLOCKS:
        pattern = parse_blocks(text)
        rows, cols, tokens = 2 * pattern.rows, 512, 4096
        weight = torch.randn(rows, cols)
        blocks = find_blocks(nm_mask(weight, pattern), pattern)
        pack_weight(weight, blocks, pattern, torch.bfloat16)
        check(compiled[-1], (text, "pack"))
        assert "st.global.v4" in compiled[-1].asm["ptx"], text
        if why_dense_gradient(pattern) is None:
            pack_transposed_weight(weight, blocks, pattern, torch.bfloat16)
            check(compiled[-1], (text, "pack transposed"))
            code = compiled[-1].asm["ptx"]
            assert "ld.global.v4" in code, text
            assert "st.global.v4" in code, text
        for tokens in (4096, 16):
            grad, x = (torch.empty(tokens, size, dtype=torch.bfloat16) for size in (rows, cols))
            compute_weight_gradient(grad, x, blocks, pattern)
            check(compiled[-1], (text, tokens))
            code = compiled[-1].asm["ptx"]
            assert "wgmma.mma_async" in code, (text, tokens)
            assert not re.search(r"cp\.async\.ca", code), (text, tokens)  # 16 bytes at once


if __name__ == "__main__":
    kernels = compile_only()
    if _CAPABILITY == 90:
        check_masks(kernels)
    check_gathers(kernels)
    if _CAPABILITY == 90:
        check_training(kernels)
    check_quantize(kernels)
    check_finish(kernels)
    print(f"{len(kernels)} kernels compiled for compute capability {_CAPABILITY / 10}")
