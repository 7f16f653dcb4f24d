"""``run_group``: a function in several processes that talk through gloo and never hang."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing import forkserver, set_forkserver_preload
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

SECONDS = 400
ROOT = Path(__file__).parents[1]


def run_group(function: Callable[[int, Path], None], folder: Path, processes: int = 2) -> None:
    """Runs ``function(rank, folder)`` in each of the processes; raises if one of them fails.

    They are forked from one process of this test process that has imported ``tests.preload`` and
    done nothing else.
    """
    start_server()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as printed:
        args = (function, folder, processes, store.port, dict(os.environ), printed)
        try:
            start_processes(member, args, nprocs=processes, start_method="forkserver")
        finally:
            for path in sorted(Path(printed).iterdir()):
                sys.stderr.write(path.read_text(errors="replace"))


def start_server() -> None:
    """Starts the process that forks, unless it runs; it finds the tests from the root alone."""
    folder = Path.cwd()
    set_forkserver_preload(["tests.preload"])
    try:
        os.chdir(ROOT)
        forkserver.ensure_running()
    finally:
        os.chdir(folder)


def member(
    rank: int,
    function: Callable[[int, Path], None],
    folder: Path,
    processes: int,
    port: int,
    environment: Mapping[str, str],
    printed: str,
) -> None:
    """Runs one process of the group, with the environment and what it prints of its own."""
    output = os.open(Path(printed) / str(rank), os.O_WRONLY | os.O_CREAT)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.environ.clear()
    os.environ.update(environment)
    faulthandler.dump_traceback_later(SECONDS, exit=True)  # a hang says where it hangs
    torch.set_num_threads(1)
    limit = timedelta(seconds=SECONDS)
    # loopback by name: gloo else asks a resolver for this host, which a sandbox may not have
    os.environ["GLOO_SOCKET_IFNAME"] = next(
        name for _, name in socket.if_nameindex() if name.startswith("lo")
    )
    # set by launchers, read by Accelerate
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"}
    store = dist.TCPStore("127.0.0.1", port, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=limit)
    function(rank, folder)
    dist.barrier()
    os._exit(0)  # the threads of gloo and the interpreter's exit can wait for each other
