"""The errors of this package: one base class, and one subclass per kind of cause."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SparseDMError(Exception):
    """Base of every error of this package.

    The message names the wrong value, where it is, and how to go on.
    """


class PatternError(SparseDMError, ValueError):
    """A sparsity pattern that is not valid, or does not fit the weight it is applied to."""


class ConfigError(SparseDMError, ValueError):
    """An option that does not exist, is out of range, or needs something that is not there."""


class MaskError(SparseDMError, ValueError):
    """A weight that cannot be masked, e.g. because it holds NaN or Inf."""


class CaptureError(SparseDMError, RuntimeError):
    """A forward that could not be captured as a graph."""


class DenseRunError(SparseDMError, RuntimeError):
    """A call of a compiled model that would run, or has run, without its masks."""


class GraphError(SparseDMError, RuntimeError):
    """A rewritten graph that is not valid: a bug of this package, please report it."""


class CheckpointError(SparseDMError, RuntimeError):
    """A file that cannot be saved, or does not fit the model it is loaded into."""


class KernelError(SparseDMError, RuntimeError):
    """A kernel that cannot be built, loaded or run on this machine."""


class PackError(SparseDMError, ValueError):
    """Bytes that are not a packed weight, or are one of another version of the format."""


class DataError(SparseDMError, ValueError):
    """Training or evaluation data of the wrong kind, shape or range."""


class StoppedError(SparseDMError, RuntimeError):
    """A run stopped by a signal (SIGTERM, Ctrl-C); it has been saved and can be resumed."""


def suggest(name: str, known: Iterable[str], otherwise: str) -> str:
    """Returns the end of a message about an unknown ``name``: the closest names, else all.

    >>> suggest("lrr", ["lr", "beta"], "it has"), suggest("size", ["lr", "beta"], "it has")
    ('did you mean lr?', 'it has lr, beta')
    """
    names = [*known]
    close = get_close_matches(name, names, n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"{otherwise} {', '.join(names)}"
