"""Files that appear whole or not at all, and the folder where kernels and timings are kept."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_atomically(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yields the path of a temporary file that replaces ``path`` if the block ends well.

    Makes the folder. A temporary file left by a killed process is overwritten by the next writer,
    so this is not safe for concurrent writers. ``durable``: flush the file to the disk first, so
    that a power cut leaves the old file or the new one.
    """
    part = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        if durable:
            flush_to_disk(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def flush_to_disk(path: Path) -> None:
    """Waits until the file or folder is on the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cache_folder(name: str) -> Path:
    """A folder of that name, made if need be, that this process can write to.

    Under $SPARSEDM_CACHE, else $XDG_CACHE_HOME/sparsedm_compiler, else ~/.cache/sparsedm_compiler;
    where none of them can be written, one that lasts for this machine's uptime.
    """
    asked = os.environ.get("SPARSEDM_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    user = f"sparsedm_compiler-{os.getuid() if hasattr(os, 'getuid') else os.environ.get('USER')}"
    for base in (asked or Path(home, "sparsedm_compiler"), Path(tempfile.gettempdir(), user)):
        path = Path(base, name)
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        if os.access(path, os.W_OK):
            return path
    return Path(tempfile.mkdtemp(prefix="sparsedm_compiler-"))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, whatever other processes do."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    os.replace(part, path)
