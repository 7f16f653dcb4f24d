"""Files that appear whole or not at all, and the folder where kernels and timings are kept."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Where the block is to write: a file that takes the place of ``path`` if the block ends well.

    Makes the folder. What a kill leaves is written over by whoever writes ``path`` next, so two
    processes must not write it at once.
    """
    part = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


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
