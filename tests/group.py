"""``run_group``: a function in several processes that talk through gloo and never hang."""

from __future__ import annotations

import faulthandler
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

SECONDS = 400


def run_group(function: Callable[[int, Path], None], folder: Path, processes: int = 2) -> None:
    """Runs ``function(rank, folder)`` in each of the processes; raises if one of them fails."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(
        member, args=(function, folder, processes, store.port), nprocs=processes, join=True
    )


def member(
    rank: int, function: Callable[[int, Path], None], folder: Path, processes: int, port: int
) -> None:
    """Runs one process of the group."""
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
