"""Files that appear whole or not at all, and the folder where kernels and timings are kept."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def replace_atomically(
    path: Path, *, shared: bool = False, durable: bool = False
) -> Iterator[Path]:
    """Yields a path to write to; if the block ends well, that file replaces ``path`` at once.

    Args:
        path: The file to write. Its folder is made.
        shared: Whether other processes may write the same file meanwhile: each then writes a
            temporary file of its own, and the last one to end wins. Without it, a temporary file
            that a killed process left is overwritten by the next writer.
        durable: Whether to flush the file to the disk first, so that a power cut leaves the old
            file or the new one.
    """
    owner = f"{os.getpid()}." if shared else ""
    part = path.with_name(f".{path.name}.{owner}part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        if durable:
            flush_to_disk(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def replace_together(path: Path) -> Iterator[Path]:
    """Yields a path of that name in a folder of its own; if the block ends well, all files move.

    What the block wrote into that folder comes to lie beside ``path``, and ``path`` itself last: it
    names the others. Until then nothing is seen of them.
    """
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        yield Path(folder, path.name)
        for part in sorted(Path(folder).iterdir(), key=lambda part: part.name == path.name):
            os.replace(part, path.with_name(part.name))


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, whatever other processes do."""
    with replace_atomically(path, shared=True) as part:
        part.write_bytes(content)


@contextmanager
def taking_turns(path: Path) -> Iterator[None]:
    """Waits until no other process or thread is in such a block of the same path.

    A file beside ``path`` is locked, and stays. Nobody waits where files cannot be locked.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as file:
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def flush_to_disk(path: Path) -> None:
    """Waits until the file or folder is on the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cache_folder(name: str) -> Path:
    """Returns a folder of that name that this process can write to, and makes it.

    It lies under $SPARSEDM_CACHE, else $XDG_CACHE_HOME/sparsedm_compiler, else
    ~/.cache/sparsedm_compiler; where none of them can be written, in the temporary directory.
    """
    for base in list_cache_bases():
        path = Path(base, name)
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        if os.access(path, os.W_OK):
            return path
    return Path(tempfile.mkdtemp(prefix="sparsedm_compiler-"))


def list_cache_bases() -> tuple[Path, Path]:
    """Returns the folder that ``cache_folder`` tries first, and the one in the temporary directory.

    Neither is made.
    """
    preferred = os.environ.get("SPARSEDM_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    user = os.environ.get("USER") if sys.platform == "win32" else os.getuid()
    return (
        Path(preferred or Path(home, "sparsedm_compiler")),
        Path(tempfile.gettempdir(), f"sparsedm_compiler-{user}"),
    )


def explain_unpickling(error: Exception) -> str:
    """Returns the line of a message that names what was refused in a pickled file.

    Around it stands the advice to run the file's code all the same.
    """
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line.removeprefix("WeightsUnpickler error: ") for line in lines if line]
    advice = ("Weights only load failed", "(1)", "(2)", "Check the documentation")
    rest = [line for line in lines if not line.startswith(advice)]
    return rest[0].partition(". Please")[0] if rest else type(error).__name__
