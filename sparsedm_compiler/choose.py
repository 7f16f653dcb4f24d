"""Measured gating: every kernel that could run a weight is timed beside dense, the fastest wins."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .backends.cpu.engine import engine
from .backends.cpu.library import unavailable, version
from .backends.cpu.ops import activate
from .backends.cpu.packed import refusal
from .cache import folder, write
from .config import Config
from .facts import Choice
from .folding import Form, fold_weight
from .passes.find_uses import Use
from .passes.lower_sparse import kernel_call
from .pattern import Pattern

MARGIN = 0.96
"""A sparse kernel must take less than this part of dense's time: a tie goes to dense."""

_ROUNDS = 5
_LEAST_SECONDS, _MOST_SECONDS = 0.03, 1.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sparse kernel with its settings: columns per block, vectors of tokens per tile."""

    kernel: str
    width: int
    tile: int

    @property
    def wide(self) -> bool:
        """Whether it reads the packed layout for bfloat16."""
        return self.kernel == "cpu_wide"


@dataclass(slots=True)
class Search:
    """The seconds that one model may still spend on measuring."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Chosen:
    """A Choice with what carries it out: the form of the weight, and the tile (0 for dense)."""

    choice: Choice
    form: Form
    tile: int = 0


def candidates(pattern: Pattern, dtype: torch.dtype) -> tuple[Candidate, ...]:
    """The kernels for a pattern, in the settings that won somewhere (benchmarks/sparse.py)."""
    if pattern.rows > 1 and not pattern.vnm:
        shared = tuple(Candidate("cpu_shared", *each) for each in ((512, 4), (512, 5), (2048, 2)))
        wide = dtype == torch.bfloat16 and pattern.rows % 16 == 0 and engine() != "plain"
        return (*(Candidate("cpu_wide", 2048, tile) for tile in (3, 6) if wide), *shared)
    settings = (((64, 6), (96, 5)), ((96, 5), (128, 5)), ((128, 5), (192, 4)), ((192, 5), (256, 4)))
    place = sum(pattern.density < bound for bound in (0.4, 0.2, 0.1))
    return tuple(Candidate("cpu_free", width, tile) for width, tile in settings[place])


def choose(
    weight: Tensor,
    name: str,
    pattern: Pattern,
    uses: tuple[Use, ...] | str,
    config: Config,
    search: Search,
) -> Chosen:
    """The kernel for a weight, with the reason: pinned, the only one, or the fastest measured."""
    asked = config.kernel_of(name)
    why_not, able = _able(weight, pattern, uses, config, asked)
    dense = Form(pattern)
    if isinstance(uses, str) or not able:
        return Chosen(_choice(name, weight, uses, "dense", why_not), dense)
    if asked != "auto":
        return _sparse(name, weight, pattern, uses, able[0], "pinned by kernels=")
    times = _times(weight, name, pattern, uses, able, search)
    if times is None:
        why = f"not measured: search_seconds={config.search_seconds:g} were spent"
        return Chosen(_choice(name, weight, uses, "dense", why), dense)
    best = min(able, key=lambda each: times[_key(each)])
    measured = {"dense_ms": times["dense"], "sparse_ms": times[_key(best)]}
    if times[_key(best)] >= MARGIN * times["dense"]:
        why = f"{best.kernel} was not faster"
        return Chosen(_choice(name, weight, uses, "dense", why, **measured), dense)
    return _sparse(name, weight, pattern, uses, best, "fastest measured", **measured)


def _able(
    weight: Tensor, pattern: Pattern, uses: tuple[Use, ...] | str, config: Config, asked: str
) -> tuple[str, tuple[Candidate, ...]]:
    """Why dense, and the kernels that could run the weight; none if there is a reason."""
    if isinstance(uses, str):
        return uses, ()
    if asked == "dense":
        return "pinned by kernels=", ()
    if isinstance(weight, FakeTensor) or weight.device.type != "cpu":
        return f"no sparse kernel for {weight.device.type} tensors yet", ()
    dtypes = {use.dtype for use in uses}
    if len(dtypes) > 1:
        return "it runs in more than one dtype", ()
    dtype = dtypes.pop()
    why_not = unavailable() or refusal(pattern, *_matrix(weight), dtype)
    if why_not is not None:
        return why_not, ()
    found = tuple(each for each in candidates(pattern, dtype) if each.kernel not in config.forbid)
    if asked in ("auto", "sparse"):
        return "every kernel for it is in forbid=", found
    found = tuple(each for each in found if each.kernel == asked)
    return f"{asked!r}, asked by kernels=, does not run pattern {pattern}", found


def _sparse(
    name: str,
    weight: Tensor,
    pattern: Pattern,
    uses: tuple[Use, ...],
    candidate: Candidate,
    why: str,
    **measured: float,
) -> Chosen:
    choice = _choice(name, weight, uses, candidate.kernel, why, **measured)
    dtype = None if uses[0].dtype == weight.dtype else uses[0].dtype
    return Chosen(choice, Form(pattern, dtype, candidate.width, candidate.wide), candidate.tile)


def _choice(
    name: str,
    weight: Tensor,
    uses: tuple[Use, ...] | str,
    kernel: str,
    why: str,
    dense_ms: float | None = None,
    sparse_ms: float | None = None,
) -> Choice:
    inputs = () if isinstance(uses, str) else tuple(use.inputs for use in uses)
    return Choice(name, inputs, kernel, why, dense_ms, sparse_ms)


def _matrix(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight[0].numel()


# ------------------------------------------------------------------ measuring


def _times(
    weight: Tensor,
    name: str,
    pattern: Pattern,
    uses: tuple[Use, ...],
    able: Sequence[Candidate],
    search: Search,
) -> dict[str, float] | None:
    """Milliseconds of dense and of every candidate, from disk if they were measured before."""
    path = folder("choices") / f"{_digest(weight, pattern, uses)}.json"
    found = _read(path)
    if found is not None and all(_key(each) in found for each in able):
        return found
    if search.seconds <= 0:
        return None
    start = time.perf_counter()
    with torch.no_grad():
        measured = _measure(weight.detach(), name, pattern, uses, able)
    search.seconds -= time.perf_counter() - start
    write(path, json.dumps(measured).encode())
    return measured


def _measure(
    weight: Tensor, name: str, pattern: Pattern, uses: tuple[Use, ...], able: Sequence[Candidate]
) -> dict[str, float]:
    dtype = uses[0].dtype
    inputs = [_input(use) for use in uses]
    dense = fold_weight(weight, Form(pattern, dtype), name)
    calls: dict[str, Callable[[], Any]] = {
        "dense": lambda: [run_dense(use, x, dense) for use, x in zip(uses, inputs, strict=True)]
    }
    for each in able:
        packed = fold_weight(weight, Form(pattern, dtype, each.width, each.wide), name)
        calls[_key(each)] = _sparse_calls(uses, inputs, packed, weight.shape[0], each.tile)
    return interleaved(calls)


def _sparse_calls(
    uses: tuple[Use, ...], inputs: list[Tensor], packed: Tensor, rows: int, tile: int
) -> Callable[[], Any]:
    return lambda: [
        run_sparse(use, x, packed, rows, tile) for use, x in zip(uses, inputs, strict=True)
    ]


def interleaved(calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median milliseconds of each call, taken in turns so that a busy machine slows all alike."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    while True:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
        spent, rounds = time.perf_counter() - begin, len(times["dense"])
        if (rounds >= _ROUNDS and spent > _LEAST_SECONDS) or spent > _MOST_SECONDS:
            return {name: 1e3 * median(each) for name, each in times.items()}


def run_dense(use: Use, x: Tensor, weight: Tensor) -> Tensor:
    """What the model does without a kernel."""
    if use.kernel:
        out = F.conv2d(x, weight, None, use.stride, use.padding, use.dilation)
    else:
        out = F.linear(x, weight)
    return activate(out, use.act)


def run_sparse(use: Use, x: Tensor, packed: Tensor, rows: int, tile: int) -> Tensor:
    """What ``lower_sparse`` makes of it."""
    out: Tensor
    op, how = kernel_call(use, tile)
    out = op(x, packed, None, rows, *how)
    return out


def _input(use: Use) -> Tensor:
    x = torch.randn(use.inputs, dtype=torch.float32, device="cpu").to(use.dtype)
    return x.contiguous(memory_format=torch.channels_last) if use.channels_last else x


# ------------------------------------------------------------------ what is kept on disk


def _key(candidate: Candidate) -> str:
    return f"{candidate.kernel}/{candidate.width}/{candidate.tile}"


def _digest(weight: Tensor, pattern: Pattern, uses: tuple[Use, ...]) -> str:
    """Of all that a time depends on."""
    machine = (_cpu(), torch.__version__, version(), engine(), torch.get_num_threads())
    capability = torch.backends.cpu.get_cpu_capability()
    calls = [
        (u.inputs, str(u.dtype), u.channels_last, u.kernel, u.stride, u.padding, u.dilation, u.act)
        for u in uses
    ]
    about = (machine, capability, tuple(weight.shape), str(pattern), calls)
    return hashlib.sha256(repr(about).encode()).hexdigest()[:24]


@cache
def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "CPU part")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _read(path: Path) -> dict[str, float] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    good = isinstance(found, dict) and all(isinstance(ms, float) for ms in found.values())
    return found if good and "dense" in found else None
