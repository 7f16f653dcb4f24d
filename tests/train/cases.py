"""A tiny teacher, students of it, and short runs of which everything is known."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.diffusion import generator_at
from sparsedm_compiler.models import UViT
from sparsedm_compiler.train import FinetuneResult, finetune, run_log
from sparsedm_compiler.train.methods import METHODS

CLASSES = 3
SPARSE = [name for name, method in METHODS.items() if method.sparse and name != "untrained"]


def teacher(seed: int = 0) -> UViT:
    """A U-ViT of one block of 8-wide tokens, with a class more than the data have."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return UViT(
            img_size=4, in_chans=1, embed_dim=8, depth=0, num_heads=2, num_classes=CLASSES + 1
        )


class Plain(nn.Module):
    """Three linear layers over pixels, class and time: captured in a fifth of a U-ViT's time."""

    def __init__(self) -> None:
        super().__init__()
        self.label = nn.Embedding(CLASSES + 1, 16)
        self.first, self.middle, self.last = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        time = (timesteps.to(x.dtype) / 1000).unsqueeze(1)
        hidden = self.middle(torch.tanh(self.first(x.flatten(1)) + self.label(y) + time))
        return self.last(torch.tanh(hidden)).view_as(x)


def plain_teacher() -> Plain:
    """A network for runs whose subject is not the network."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return Plain()


def data(count: int = 40) -> tuple[Tensor, Tensor]:
    images = torch.randn(count, 1, 4, 4, generator=generator_at("cases"))
    return images, torch.arange(count) % CLASSES


def student_of(model: nn.Module, method: str = "sparsedm", pattern: str = "1:4") -> nn.Module:
    """What a method trains."""
    if METHODS[method].sparse:
        return sdm.compile(model, pattern=pattern, backend="eager")
    return copy.deepcopy(model)


@contextmanager
def empty_curves() -> Iterator[None]:
    """Inside, curves.png is written empty: matplotlib takes longer than a short run does."""

    def save_empty(path: Path, runs: Mapping[str, Any]) -> None:
        assert all(runs.values())
        path.write_bytes(b"")

    real = run_log.save_curves
    run_log.save_curves = save_empty
    try:
        yield
    finally:
        run_log.save_curves = real


def short(
    method: str = "sparsedm", out: Path | None = None, *, curves: bool = False, **options: Any
) -> tuple[FinetuneResult, nn.Module]:
    """Twelve steps of a method, with something of everything; the result and the student.

    ``curves``: whether curves.png is drawn; else it is empty.
    """
    model = options.pop("teacher", None) or teacher()
    images = options.pop("data", None) or data()
    student = options.pop("student", None) or student_of(model, method)
    given: dict[str, Any] = {
        "batch_size": 8,
        "lr": 1e-2,
        "held_out": tuple(part[:8] for part in data()),
        "held_out_every": 24,
        "save_every": 24,
        "log_every": 16,
        "flip": True,
        "drop_condition": 0.2,
        "null_label": CLASSES,
        "max_grad_norm": 0.5,
        "progress": False,
        **({} if method == "untrained" else {"images": 96}),
        **options,
    }
    with nullcontext() if curves else empty_curves():
        return finetune(student, model, images, method=method, out=out, **given), student


def weights(model: nn.Module) -> list[Tensor]:
    return [weight.detach().clone() for weight in model.parameters()]


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log without what the clock decides."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]
