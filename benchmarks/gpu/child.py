"""One section in a process of its own: a kernel that takes the GPU's context down takes only that.

    python -m benchmarks.gpu.child ops --log ops.jsonl --until 1700000000

Started again on the same log, it goes on with the case that it died of, without what it was trying.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

LOST = 70
"""The exit code of a process whose GPU answers no more."""


def main(arguments: list[str] | None = None) -> int:
    """Run the cases of a section that are left, while there is time."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("section")
    add("--log", type=Path, required=True)
    add("--until", type=float, required=True, help="seconds since 1970")
    add("--tiny", action="store_true")
    add("--part", type=int, default=0, help="of --parts, the number of the processes that share")
    add("--parts", type=int, default=1)
    options = parser.parse_args(arguments)
    with Log(options.log) as log, prepare(options.tiny) as plan:
        return work(options, log, plan)


class Log:
    """A file of JSON lines that is complete up to the last one, whatever happens."""

    def __init__(self, path: Path) -> None:
        from .case import read

        self.before = read(path)
        self._file = path.open("a")

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def tell(self, **entry: Any) -> None:
        """Write one line, now."""
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()


@contextmanager
def prepare(tiny: bool) -> Iterator[Any]:
    """Torch as all sections want it, and the plan."""
    import torch

    from .plan import FULL, TINY
    from .rehearsal import cuda_families_on_cpu

    torch._dynamo.config.automatic_dynamic_shapes = False
    if not tiny:
        yield FULL
        return
    torch.set_num_threads(1)
    with cuda_families_on_cpu():
        yield TINY


def work(options: argparse.Namespace, log: Log, plan: Any) -> int:
    """0 when all cases were tried or there was no time for more, LOST when the GPU is gone."""
    from .case import format_error
    from .comparing import free_memory, is_device_lost
    from .sections import CASES

    longest = 0.0
    done, avoid = frozenset(log.before.done), frozenset(log.before.tried)
    cases = list(CASES[options.section](replace(plan, until=options.until), avoid))
    for case in cases[options.part :: options.parts]:
        if case.key in done:
            continue
        start = time.time()
        if start + longest / 2 > options.until:
            log.tell(stopped=f"before {case.key}")
            return 0
        log.tell(begin=case.key)
        try:
            for row in case.run(lambda what: log.tell(note=what)):
                log.tell(key=case.key, row=row)
                if time.time() > options.until:
                    log.tell(stopped=f"in {case.key}")
                    break
        except Exception as error:
            print(f"{options.section}: {case.key}: {format_error(error)}", flush=True)
            log.tell(key=case.key, failed=format_error(error))
            if is_device_lost():
                return LOST
        log.tell(end=case.key)
        free_memory()
        longest = max(longest, time.time() - start)
    return 0


if __name__ == "__main__":
    sys.exit(main())
