"""The kernel library compiled for another CPU and run by an emulator, in the place of this CPU's.

Debian's packages ``g++-aarch64-linux-gnu`` and ``qemu-user`` have what it needs.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

from sparsedm_compiler.backends.cpu.abi import KernelArguments
from sparsedm_compiler.backends.cpu.build import HERE, list_flags
from sparsedm_compiler.backends.cpu.format import HEADER, TYPES, Layout

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def why_no_emulation() -> str | None:
    """Returns what is missing here to emulate, None if nothing is."""
    missing = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
    return f"needs {' and '.join(missing)}" if missing else None


def build(folder: Path) -> Path:
    """Compiles the kernels with emulated.cpp into one program without libraries."""
    out = folder / "emulated"
    sources = [HERE / "kernel.cpp", HERE / "pack.cpp", Path(__file__).with_name("emulated.cpp")]
    flags = [flag for flag in list_flags("aarch64", "DEFAULT") if flag not in ("-shared", "-fPIC")]
    flags += ["-Werror", "-fopenmp", "-static", f"-I{HERE}"]
    subprocess.run([COMPILER, *flags, *map(str, sources), "-o", str(out)], check=True)
    return out


class EmulatedLibrary:
    """What ``load_library`` returns, but that each call runs in the emulator, on copies."""

    def __init__(self, program: Path) -> None:
        self._process = subprocess.Popen(
            [EMULATOR, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._isa = self._read(16).rstrip(b"\0")

    def close(self) -> None:
        """Ends the process."""
        with self._process:
            pass

    def sdm_isa(self) -> bytes:
        return self._isa

    def sdm_run(self, reference: Any) -> int:
        call: KernelArguments = reference._obj
        out = (call.out, find_output_size(call))
        self._send(b"r" + bytes(call))
        for address, size in list_inputs(call):
            self._send_bytes(address, size)
        self._send(out[1].to_bytes(8, "little"))
        return self._receive(*out)

    def sdm_pack(self, weight: int, mask: int, packed: int) -> int:
        layout = read_header(packed)
        values = layout.rows * layout.cols
        size = layout.locate_sections()[1]
        self._send(b"p")
        self._send_bytes(weight, values * layout.dtype.itemsize)
        self._send_bytes(mask, values)
        self._send_bytes(packed, size)
        return self._receive(packed, size)

    def _send(self, content: bytes) -> None:
        assert self._process.stdin
        self._process.stdin.write(content)

    def _send_bytes(self, address: int | None, size: int) -> None:
        if address is None:
            return self._send((-1).to_bytes(8, "little", signed=True))
        self._send(size.to_bytes(8, "little") + ctypes.string_at(address, size))

    def _receive(self, address: int, size: int) -> int:
        assert self._process.stdin
        self._process.stdin.flush()
        failed = int.from_bytes(self._read(4), "little", signed=True)
        ctypes.memmove(address, self._read(size), size)
        return failed

    def _read(self, size: int) -> bytes:
        assert self._process.stdout
        content = self._process.stdout.read(size)
        assert len(content) == size, "the emulated kernels crashed"
        return content


def read_header(address: int) -> Layout:
    """Reads what the packed weight at an address is laid out as; its size is not known yet."""
    return Layout.from_fields(HEADER.unpack(ctypes.string_at(address, HEADER.size)))


def find_output_size(call: KernelArguments) -> int:
    """Returns the bytes of the output of a call."""
    rows, item = read_header(call.weight).rows, TYPES[call.x_type].itemsize
    if call.form:
        return call.images * rows * call.out_height * call.out_width * item
    return max(0, (call.tokens - 1) * call.out_stride + rows) * item


def list_inputs(call: KernelArguments) -> list[tuple[int | None, int]]:
    """Returns address and bytes of the tensors a call reads, in the order of emulated.cpp."""
    layout, item = read_header(call.weight), TYPES[call.x_type].itemsize
    whole = call.images * call.channels * call.height * call.width
    rows = max(0, (call.tokens - 1) * call.x_stride + layout.cols)
    offsets = max(0, (call.images - 1) * call.offset_stride + call.channels)
    return [
        (call.weight, layout.locate_sections()[1]),
        (call.x, (whole if call.form else rows) * item),
        (call.bias, layout.rows * TYPES[call.bias_type].itemsize),
        (call.offset, 4 * offsets),
        (call.norm_weight, 4 * call.channels),
        (call.norm_bias, 4 * call.channels),
    ]
