"""What a pattern costs: students of one dense model, trained for equally many images each.

A U-ViT of U-ViT-S's width, without classes, on images that are not trained on elsewhere here. The
dense model is trained first; then a dense copy and one copy per pattern, pruned at one stroke, go
on from there, each on the same images with the same noise. The mask is fixed ("asp"), so that all
of them run one compiled step: weights are masked once, and the gradients of pruned ones at every
step. How many images there are is decided by the time of a step, before the first copy.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.masks.nm_mask import nm_mask
from sparsedm_compiler.models import UViT

from .case import DATA, HELD_OUT, Case, Row, Tell
from .plan import Plan, Students

DENSE = "dense"
_WARMUP, _PROBED, _SAFETY = 3, 5, 0.85
_DRAWS = 4
"""Noise levels per held-out image."""


@dataclass(frozen=True, slots=True)
class Images:
    """The images of all runs, on the device. ``about``: what they are."""

    train: Tensor
    held_out: Tensor
    about: str


def cases(plan: Plan, avoid: frozenset[str]) -> Iterator[Case]:
    """One: all students, as they must be trained alike."""
    yield Case("students", partial(compare, plan, avoid))


def compare(plan: Plan, avoid: frozenset[str], tell: Tell) -> Iterator[Row]:
    """The row of all students, with one more each time."""
    about = plan.students
    row: Row = {"width": about.width, "depth": about.depth, "patterns": {}}
    try:
        images = open_images(plan)
    except sdm.SparseDMError as why:
        yield {**row, "refused": f"{why}"}
        return
    torch.manual_seed(0)
    side, channels = images.train.shape[-1], images.train.shape[1]
    sizes = {"img_size": side, "in_chans": channels, "embed_dim": about.width}
    model = UViT(**sizes, depth=about.depth, num_heads=about.heads).to(plan.device)
    trainer = Trainer(model, images, plan)
    tell("the dense model")
    images_each = trainer.plan_budget()
    row |= {"data": images.about, "parameters": sum(p.numel() for p in model.parameters())}
    row |= {"held_out": len(images.held_out), "batch": about.batch, **images_each}
    trainer.train(images_each["teacher_images"], seed=1)
    row["teacher_loss"] = trainer.measure_loss()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for text in (DENSE, *about.patterns):
        if text in avoid:
            row["patterns"][text] = {"refused": "the process died of it"}
            continue
        tell(text)
        model.load_state_dict(start)
        masks = {} if text == DENSE else find_masks(model, text, trainer.example)
        trainer.train(images_each["images"], seed=2, masks=masks)
        row["patterns"][text] = {"loss": trainer.measure_loss(), "kept": measure_kept(model, masks)}
        print(f"quality: {text}: held-out loss {row['patterns'][text]['loss']:.4f}", flush=True)
        yield row


def open_images(plan: Plan) -> Images:
    """The images that the environment names, else scikit-learn's digits. Raises SparseDMError."""
    spec = os.environ.get(DATA) or "digits"
    other = os.environ.get(HELD_OUT) or f"{spec.removesuffix(':train')}:test"
    train, held_out = read_images(spec), read_images(other)[: plan.students.held_out]
    about = f"{os.path.basename(spec)}, {len(train)} images"
    return Images(train.to(plan.device), held_out.to(plan.device), about)


def read_images(spec: str) -> Tensor:
    """The images of a source as one tensor [n, C, H, W] in [-1, 1].

    An archive of arrays, "train_images" [n, H, W, C] of bytes or "test_images", is read without the
    packages that other sources need. Raises SparseDMError.
    """
    path, _, split = spec.partition(".npz")
    name = f"{split.removeprefix(':') or 'train'}_images"
    if spec.endswith((".npz", ".npz:train", ".npz:test")) and os.path.exists(f"{path}.npz"):
        with np.load(f"{path}.npz", allow_pickle=False) as arrays:
            if name in arrays.files:
                return torch.from_numpy(arrays[name]).permute(0, 3, 1, 2).float() / 127.5 - 1
    from sparsedm_compiler.data import open_data

    data = open_data(spec, labels=False)
    return data.fetch(range(len(data)))[0].float()


def find_masks(model: UViT, pattern: str, example: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The masks of all weights that ``compile`` prunes at its defaults, by parameter name."""
    student = sdm.compile(model, pattern, backend="eager")
    with torch.no_grad():
        student(*example)
    return {
        name: nm_mask(weight.detach(), kind).to(weight.dtype)
        for name, (weight, kind) in sdm.masked_parameters(student).items()
    }


def measure_kept(model: nn.Module, masks: Mapping[str, Tensor]) -> float:
    """The share of the pruned matrices that is not zero. Raises where a pruned weight has moved."""
    if not masks:
        return 1.0
    weights = {name: model.get_parameter(name).detach() for name in masks}
    if any(bool((weights[name][masks[name] == 0] != 0).any()) for name in masks):
        raise RuntimeError("a pruned weight has moved")
    kept = sum(int((weight != 0).sum()) for weight in weights.values())
    return kept / sum(weight.numel() for weight in weights.values())


class Trainer:
    """Trains one model again and again by one compiled step: eps prediction, AdamW, cosine."""

    def __init__(self, model: UViT, images: Images, plan: Plan) -> None:
        self.model, self.images, self.plan = model, images, plan
        self.about: Students = plan.students
        self.run: Any = torch.compile(model) if plan.compiled else model
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device=plan.device)
        self.signal = (1 - betas).cumprod(0).float()
        x = images.train[:1]
        self.example = x, torch.zeros(1, device=plan.device)

    def plan_budget(self) -> dict[str, int]:
        """How many images the dense model and every copy see, by the time of a step."""
        start = time.time()
        self.train(_WARMUP * self.about.batch, seed=0)
        begin = self._now()
        self.train(_PROBED * self.about.batch, seed=0)
        step = (self._now() - begin) / _PROBED
        copies, before = 1 + len(self.about.patterns), self._now()
        self.measure_loss()
        scoring = (copies + 1) * (self._now() - before)
        left = _SAFETY * max(0.0, self.plan.until - time.time() - scoring)
        steps = min(left / step, self.about.most_images / self.about.batch)
        teacher = max(1, int(self.about.teacher_share * steps))
        each = max(1, int((1 - self.about.teacher_share) * steps / copies))
        print(f"quality: {1e3 * step:.1f} ms a step, ready in {begin - start:.0f} s", flush=True)
        return {"teacher_images": teacher * self.about.batch, "images": each * self.about.batch}

    def _now(self) -> float:
        if self.plan.device == "cuda":
            torch.cuda.synchronize()
        return time.time()

    def train(self, images: int, seed: int, masks: Mapping[str, Tensor] | None = None) -> None:
        """Trains on so many images, which the seed decides; masked weights stay as they are."""
        draw = torch.Generator(self.plan.device).manual_seed(seed)
        pairs = [(self.model.get_parameter(name), mask) for name, mask in (masks or {}).items()]
        with torch.no_grad():
            for weight, mask in pairs:
                weight.mul_(mask)
        optimizer = torch.optim.AdamW(
            self.model.parameters(), self.about.lr, betas=(0.9, 0.99), weight_decay=0.0
        )
        steps = max(1, images // self.about.batch)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = self.about.lr * schedule((step + 1) / steps)
            self._draw_loss(self._pick(draw), draw).backward()
            if pairs:
                gradients = [weight.grad for weight, _ in pairs if weight.grad is not None]
                torch._foreach_mul_(gradients, [mask for _, mask in pairs])
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def _pick(self, draw: torch.Generator) -> Tensor:
        """A batch of images, half of them flipped."""
        count, device = self.about.batch, self.plan.device
        index = torch.randint(len(self.images.train), (count,), generator=draw, device=device)
        x = self.images.train[index]
        flipped = torch.rand(count, 1, 1, 1, generator=draw, device=device) < 0.5
        return torch.where(flipped, x.flip(3), x)

    def _draw_loss(self, x: Tensor, draw: torch.Generator) -> Tensor:
        """The squared error of the predicted noise, at a noise level per image."""
        count, device = len(x), self.plan.device
        times = torch.randint(1000, (count,), generator=draw, device=device)
        noise = torch.randn(x.shape, generator=draw, device=device)
        signal = self.signal[times].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * x + (1 - signal).sqrt() * noise
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            out = self.run(noisy, times.float())
        return F.mse_loss(out.float(), noise)

    def measure_loss(self) -> float:
        """The mean error on the held-out images, the same noise for all, in whole batches.

        With gradients that are dropped, so that nothing is compiled anew.
        """
        draw = torch.Generator(self.plan.device).manual_seed(12345)
        images = self.images.held_out.repeat(_DRAWS, 1, 1, 1)
        batches = images.repeat(math.ceil(self.about.batch / len(images)), 1, 1, 1).split(
            self.about.batch
        )
        whole = [batch for batch in batches if len(batch) == self.about.batch]
        losses = [self._draw_loss(batch, draw).detach() for batch in whole]
        return float(torch.stack(losses).mean())


def schedule(done: float) -> float:
    """The learning rate over its peak: up within a twentieth, then a cosine to zero."""
    return min(done / 0.05, 1.0) * 0.5 * (1 + math.cos(math.pi * done))
