"""Detects in-place edits that bypass the version counter (writes through ``.data``).

On a GPU the check is asynchronous, so that an edit is reported by the next call. On a CPU it is one
gather over the addresses of all samples: what a call costs is the number of objects and cache lines
that it touches.
"""

from __future__ import annotations

import ctypes
import operator
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

ASK_SECONDS = 0.02
"""Seconds between two questions about the same samples."""


@dataclass(frozen=True, slots=True, eq=False)
class WeightSample:
    """Some values of a tensor.

    Attributes:
        now: A view of them in the tensor.
        before: A copy of what they were.
    """

    now: Tensor
    before: Tensor


_SAMPLES = 64
"""Values of a weight that are looked at."""

_TURNS = 16
"""Each of the host's samples is compared in parts, one at every call."""

_WORD = 8
"""Bytes of a word, the unit that the host's samples are read in."""


class HostSamples:
    """Samples in the memory of the host, compared in one go.

    Every call looks at a sixteenth of the values of every weight, the next one at others: an edit
    of whole weights is seen by the next call, one of single values some calls later.
    """

    def __init__(self, samples: Sequence[WeightSample]) -> None:
        self._kept = [sample.now for sample in samples]  # whose memory must not be freed
        parts = [_list_words(now) for now in self._kept]
        self._turns: list[tuple[Tensor, Tensor]] = []
        self._turn = 0
        if not parts:
            return
        words = torch.cat(parts)
        first, last = int(words.min()), int(words.max())
        span = (ctypes.c_char * ((last - first + 1) * _WORD)).from_address(first * _WORD)
        self._memory = torch.frombuffer(span, dtype=torch.int64)
        for turn in range(_TURNS):
            index = torch.cat([_take_share(words, turn) for words in parts]) - first
            self._turns.append((index, self._memory.index_select(0, index)))

    def hold(self) -> bool:
        """Returns whether the samples that are looked at now are what they were."""
        if not self._turns:
            return True
        index, before = self._turns[self._turn]
        self._turn = (self._turn + 1) % _TURNS
        return torch.equal(self._memory.index_select(0, index), before)


def _take_share(words: Tensor, turn: int) -> Tensor:
    """Returns the words to compare in one turn; all of them where there are few."""
    return words.tensor_split(_TURNS)[turn] if len(words) >= _TURNS else words


def _list_words(tensor: Tensor) -> Tensor:
    """Returns the addresses of the words that hold the elements of a tensor, in words."""
    offsets = torch.zeros(1, dtype=torch.int64, device="cpu")
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        steps = torch.arange(size, dtype=torch.int64, device="cpu") * stride
        offsets = (offsets[:, None] + steps).flatten()
    words = (offsets * tensor.element_size() + tensor.data_ptr()) // _WORD
    return torch.cat([words[:1], words[1:][words.diff() != 0]])  # neighbours share a word


def sample_values(weight: Tensor, *, spread: bool) -> Tensor:
    """Returns a view of about 64 values of a weight.

    ``spread``: evenly, which a device gathers fastest. In the host's memory four neighbours at
    each of 16 places are seen by reading 16 cache lines.
    """
    # Any order will do, so that channels_last weights need no copy either.
    if not _is_gapless(weight):
        steps = (slice(None, None, max(1, size // 8)) for size in weight.shape[:2])
        return weight[tuple(steps)]
    flat = weight.as_strided((weight.numel(),), (1,))
    if spread or len(flat) < _SAMPLES:
        return flat[:: max(1, len(flat) // _SAMPLES)]
    rows = flat[: len(flat) // _TURNS * _TURNS].view(_TURNS, -1)
    return rows[:, : _SAMPLES // _TURNS]


def _is_gapless(weight: Tensor) -> bool:
    return weight.numel() == 1 + sum(
        (size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True)
    )


class _DeviceSamples:
    """Samples on one device, compared there; the answer is read once it has come.

    Pinned memory and events are made once, being slow to make.
    """

    def __init__(self, before: Sequence[Tensor]) -> None:
        self._before = torch.cat([values.reshape(-1) for values in before])
        self._is_cuda = self._before.is_cuda
        self._answer = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=self._is_cuda)
        self._event = torch.cuda.Event() if self._is_cuda else None  # type: ignore[no-untyped-call]
        self._owed = False

    def ask(self, samples: Sequence[Tensor]) -> None:
        """Asks whether the samples are what they were, unless an answer is still owed."""
        if self._owed or self._is_capturing():
            return  # launches would become part of a CUDA graph, in which no answer can be read
        changed = torch.cat([now.reshape(-1) for now in samples]).ne(self._before).any()
        self._answer.copy_(changed, non_blocking=self._is_cuda)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._before.device))
        self._owed = True

    def take_report(self) -> bool:
        """Returns whether an answer has come that says that a sample has changed."""
        if not self._owed or self._is_capturing():  # to query an event would end the capture
            return False
        if self._event is not None and not self._event.query():  # type: ignore[no-untyped-call]
            return False
        self._owed = False
        return bool(self._answer)

    def _is_capturing(self) -> bool:
        return self._is_cuda and torch.cuda.is_current_stream_capturing()


class Watched(Protocol):
    """A weight whose edits are to be seen."""

    before: Tensor | None

    def sample(self) -> WeightSample | None:
        """Returns values of the weight, as they are and were; None where it is gone."""


class _Watch:
    """Weights that are asked for together. Of those that stay, views are kept."""

    def __init__(self, before: Sequence[Tensor]) -> None:
        self.before = before
        self.views: Sequence[Tensor] | None = None
        groups: dict[torch.device, list[int]] = {}
        for number, values in enumerate(before):
            groups.setdefault(values.device, []).append(number)
        with torch.inference_mode(False):  # answers are written in later calls
            self._devices = [
                (_DeviceSamples([before[k] for k in group]), group) for group in groups.values()
            ]

    def ask(self, views: Sequence[Tensor]) -> None:
        """Asks every device that owes no answer whether its samples are what they were."""
        for samples, group in self._devices:
            samples.ask([views[k] for k in group])

    def take_report(self) -> bool:
        """Returns whether an answer says that a sample has changed; reports each answer once."""
        reports = [samples.take_report() for samples, _ in self._devices]
        return any(reports)


class EditWatcher:
    """Compares samples on their devices and reads the answers once they are there."""

    def __init__(self) -> None:
        self._watch: _Watch | None = None
        self._asked, self._asked_at = -1, 0.0

    def is_due(self, generation: int) -> bool:
        """Returns whether to ask now: samples of another generation at once, the same later."""
        now = time.perf_counter()
        if self._asked == generation and now - self._asked_at < ASK_SECONDS:
            return False
        self._asked, self._asked_at = generation, now
        return True

    def take_report(self) -> bool:
        """Returns whether an answer says that a sample has changed; reports each answer once."""
        watch = self._watch
        return watch is not None and watch.take_report()

    def forget(self) -> None:
        """Drops all samples, and the answers that are owed."""
        self._watch = None

    def ask(self, weights: Sequence[Watched]) -> None:
        """Asks whether weights are what they were.

        To make the views of all weights takes longer than to ask. They are kept from the second
        question on: weights that are offloaded are folded anew before that, and views would hold
        their memory.
        """
        before = [weight.before for weight in weights if weight.before is not None]
        watch, views = self._watch, None
        if watch is not None and _are_same(watch.before, before):
            views = watch.views
        else:
            watch = None
        if views is None:
            samples = [weight.sample() for weight in weights]
            views = [sample.now for sample in samples if sample is not None]
            if len(views) < len(before):
                return  # one is moved at this moment: the next call folds it anew
        if watch is None:
            self._watch = watch = _Watch(before)
        else:
            watch.views = views
        watch.ask(views)


def _are_same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(map(operator.is_, first, second))
