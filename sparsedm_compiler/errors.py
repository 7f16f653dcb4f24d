"""Every error of this package: one base, one subclass per door."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SparseDMError(Exception):
    """Base of every error raised here; the message names the value, the place and the way out."""


class PatternError(SparseDMError, ValueError):
    """A sparsity pattern that cannot be read, or does not fit the weight it is applied to."""


class ConfigError(SparseDMError, ValueError):
    """An option that does not exist, or that names nothing in the model."""


class MaskError(SparseDMError, ValueError):
    """A weight that cannot be masked, e.g. because it holds NaN or Inf."""


class CaptureError(SparseDMError, RuntimeError):
    """A forward that could not be captured as a graph."""


class DenseRunError(SparseDMError, RuntimeError):
    """A call that would have run, or has run, without its masks."""


class GraphError(SparseDMError, RuntimeError):
    """A rewritten graph that is not legal: a bug of this package, worth a report."""


class CheckpointError(SparseDMError, RuntimeError):
    """A file that cannot be saved, or does not fit the model it is loaded into."""


class KernelError(SparseDMError, RuntimeError):
    """A kernel that cannot be built, loaded or run here."""


class PackError(SparseDMError, ValueError):
    """Bytes that are no packed weight, or not one of this version."""


class DataError(SparseDMError, ValueError):
    """Training or evaluation data of the wrong kind, shape or range."""


class StoppedError(SparseDMError, RuntimeError):
    """A run that was asked to stop (SIGTERM, Ctrl-C) and has saved itself; it can be resumed."""


def suggest(name: str, known: Iterable[str], otherwise: str) -> str:
    """The end of a message about an unknown ``name``: those it is close to, else all there are.

    >>> suggest("lrr", ["lr", "beta"], "it has"), suggest("size", ["lr", "beta"], "it has")
    ('did you mean lr?', 'it has lr, beta')
    """
    names = [*known]
    close = get_close_matches(name, names, n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"{otherwise} {', '.join(names)}"
