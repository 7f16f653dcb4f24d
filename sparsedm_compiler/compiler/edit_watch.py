"""Edits that no counter tells of, found one call late: an accelerator is asked, not waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class WeightSample:
    """Some values of a tensor: ``now``, a view of them in it, and a copy of what they were."""

    now: Tensor
    before: Tensor


@dataclass(slots=True)
class _PendingAnswer:
    """What a device is asked: whether these samples differ; ``ready``: whether it has answered."""

    changed: Tensor
    ready: Callable[[], bool]


class EditWatcher:
    """Compares samples on their devices, and learns the answers when they are there."""

    def __init__(self) -> None:
        self._asked: dict[torch.device, _PendingAnswer] = {}
        self._known: tuple[WeightSample, ...] = ()
        self._before: dict[torch.device, Tensor] = {}

    def found(self) -> bool:
        """Whether an answer has come that a sample has changed; each answer is told once."""
        ready = {device: look for device, look in self._asked.items() if look.ready()}
        for device in ready:
            del self._asked[device]
        return any(bool(look.changed) for look in ready.values())

    def look(self, samples: Sequence[WeightSample]) -> None:
        """Ask every device whether its samples are what they were, but for those still asked."""
        if self._known != tuple(samples):
            self._known, self._asked = tuple(samples), {}
            self._before = {
                device: _joined(each.before for each in held)
                for device, held in _by_device(samples).items()
            }
        for device, held in _by_device(samples).items():
            if device not in self._asked and not _capturing(device):
                changed = _joined(each.now for each in held).ne(self._before[device]).any()
                self._asked[device] = _ask(changed)


def _by_device(samples: Sequence[WeightSample]) -> dict[torch.device, list[WeightSample]]:
    found: dict[torch.device, list[WeightSample]] = {}
    for each in samples:
        found.setdefault(each.now.device, []).append(each)
    return found


def _joined(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _ask(changed: Tensor) -> _PendingAnswer:
    if changed.device.type != "cuda":
        return _PendingAnswer(changed, lambda: True)
    answer = torch.empty((), dtype=torch.bool, pin_memory=True)
    answer.copy_(changed, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(changed.device))
    return _PendingAnswer(answer, event.query)


def _capturing(device: torch.device) -> bool:
    """Whether what is launched now becomes part of a CUDA graph, in which nothing can be asked."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
