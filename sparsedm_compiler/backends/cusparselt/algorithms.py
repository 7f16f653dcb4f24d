"""The algorithms of cuSPARSELt that run on this machine, tried in a process of their own.

The library's own search, and single algorithms in some dtypes, stop a card with an illegal
instruction (0.8.0, float16, H100), after which the process can use the card no more. So each is run
once elsewhere, and those that return the right numbers are kept on disk as candidates.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ...fileio import cache_folder, taking_turns, write_atomically
from ...progress import announce
from ..cuda.device import CudaDevice, describe_machine, find_device
from .ops import DEFAULT, CuSparseLtSetting, multiply

_MOST = 64
_LAST = 8
"""Algorithms refused one after the other, behind which there are no more."""
_SECONDS = 60
_SHAPES = ((144, 256, 512), (1024, 512, 256))
"""(tokens, rows, columns) that each is tried on."""
_OUT_DTYPES = {
    torch.int8: (torch.bfloat16, torch.int32),
    torch.float8_e4m3fn: (torch.bfloat16, torch.float32),
}
"""What 8 bits are asked for: the output's dtype, or the bare sums where that is another one."""


def find_algorithms(dtype: torch.dtype) -> tuple[int, ...]:
    """Returns the algorithms that run on the current device, the library's default among them."""
    return _find_algorithms(dtype, find_device())


@cache
def _find_algorithms(dtype: torch.dtype, device: CudaDevice | None) -> tuple[int, ...]:
    if device is None:
        return (DEFAULT.algorithm,)
    name = str(dtype).removeprefix("torch.")
    about = repr((describe_machine(), name, _SHAPES, _OUT_DTYPES.get(dtype)))
    path = cache_folder("cusparselt") / f"{hashlib.sha256(about.encode()).hexdigest()[:24]}.json"
    known = _read(path)
    if known is not None:
        return known
    with taking_turns(path):
        return _read(path) or _search(name, path)


def _search(name: str, path: Path) -> tuple[int, ...]:
    """Tries the algorithms, and keeps on disk which of them run."""
    with announce(f"trying the algorithms of cuSPARSELt in {name}, once on this machine"):
        sound = _try_in_processes(name)
    if sound is None:
        return (DEFAULT.algorithm,)
    algorithms = tuple(sorted({DEFAULT.algorithm, *sound}))
    write_atomically(path, json.dumps(algorithms).encode())
    return algorithms


def _read(path: Path) -> tuple[int, ...] | None:
    """Returns the algorithms that a file lists; None where there is no such file."""
    try:
        return tuple(map(int, json.loads(path.read_bytes())))
    except (OSError, ValueError, TypeError):
        return None


def _try_in_processes(name: str) -> tuple[int, ...] | None:
    """Runs ``main`` until it came to its end, each time behind the algorithm that it died of.

    One that dies at once, behind another that died, has come to where there are no more. Where the
    time was up, the machine may have been busy: that algorithm is tried once more. Returns those
    that were right, or None where no process could use the card, as another time one may.
    """
    sound, start = set[int](), 0
    slow: int | None = None
    while start < _MOST:
        trial = _run_main(name, start)
        sound |= trial.sound
        if trial.stopped and slow != trial.last:
            slow, start = trial.last, max(start, trial.last)
            continue
        if trial.last < start:  # it tried none
            return None if trial.stopped or not sound else tuple(sorted(sound))
        died_at_once = trial.last == start > 0 and not trial.stopped and slow != start
        if trial.ended or died_at_once:
            return tuple(sorted(sound)) if sound or trial.ended else None
        start = trial.last + 1
    return tuple(sorted(sound)) or None


@dataclass(frozen=True, slots=True)
class Trial:
    """What a process said that ran ``main``.

    ``last``: the algorithm that it began last, or -1; ``ended``: whether it came to its end;
    ``stopped``: whether its time was up before.
    """

    sound: frozenset[int]
    last: int
    ended: bool
    stopped: bool


def _run_main(name: str, start: int) -> Trial:
    """Returns what ``main`` did in a new process."""
    device = torch.cuda.current_device() if torch.cuda.is_available() else 0
    command = [sys.executable, "-m", __name__, name, str(device), str(start)]
    printed, stopped = b"", False
    try:
        printed = subprocess.run(
            command, stdout=subprocess.PIPE, timeout=_SECONDS, env=_make_environment()
        ).stdout
    except subprocess.TimeoutExpired as expired:
        printed, stopped = expired.stdout or b"", True
    except OSError:
        pass
    words = [line.split() for line in printed.decode(errors="replace").splitlines()]
    said = [(line[0], int(line[-1])) for line in words if len(line) == 2]
    return Trial(
        frozenset(number for word, number in said if word == "sound"),
        max((number for word, number in said if word == "begin"), default=-1),
        ["end"] in words,
        stopped,
    )


def _make_environment() -> dict[str, str]:
    """Returns the environment in which a new process imports the package that runs here."""
    paths = [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def main(name: str, device: int, start: int) -> None:
    """Prints "begin k" before it tries algorithm k, "sound k" where it was right, then "end"."""
    torch.cuda.set_device(device)
    dtype, refused = getattr(torch, name), 0
    torch.manual_seed(0)
    for algorithm in range(start, _MOST):
        print("begin", algorithm, flush=True)
        try:
            right = all(_is_right(algorithm, dtype, *shape) for shape in _SHAPES)
            refused = 0
        except (torch.AcceleratorError, torch.OutOfMemoryError):
            os._exit(1)  # its destructors would wait for the card
        except RuntimeError:
            right, refused = False, refused + 1
        if right:
            print("sound", algorithm, flush=True)
        if refused == _LAST:
            break
    print("end", flush=True)


def _is_right(algorithm: int, dtype: torch.dtype, tokens: int, rows: int, cols: int) -> bool:
    """Returns whether an algorithm gives the right numbers, in every dtype that is asked of it."""
    weight, x = _draw(dtype, rows, cols), _draw(dtype, tokens, cols)
    weight.view(rows, -1, 4)[..., 2:] = 0
    exact = x @ weight.t()
    packed = torch._cslt_compress(weight.to(dtype))
    for out_dtype in _OUT_DTYPES.get(dtype, (None,)):
        out = multiply(packed, x.to(dtype), None, CuSparseLtSetting(algorithm), out_dtype).float()
        torch.cuda.synchronize()
        if not (out - exact).norm() <= 1e-2 * exact.norm():
            return False
    return True


def _draw(dtype: torch.dtype, rows: int, cols: int) -> Tensor:
    """Returns random numbers of a dtype, as float32."""
    numbers = torch.randn(rows, cols, device="cuda")
    return (16 * numbers if dtype is torch.int8 else numbers).to(dtype).float()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
