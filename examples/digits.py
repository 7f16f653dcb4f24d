"""Parts that the examples share: scikit-learn's digits, a U-ViT for them, and a classifier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm.auto import tqdm

from sparsedm_compiler.models import UViT

TEACHER = Path(__file__).with_name("digits_teacher.safetensors")
CLASSES = 10


@dataclass(frozen=True, slots=True)
class Digits:
    """Images [n, 1, 8, 8] in [-1, 1] with labels [n]; ``test`` is never trained on."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @staticmethod
    def load() -> Digits:
        """Loads the bundled 1797 digits in a fixed split: 1437 to train on, 360 held out."""
        bundled = load_digits()
        parts = train_test_split(
            bundled.images, bundled.target, test_size=360, stratify=bundled.target, random_state=0
        )
        x, held_x = (torch.tensor(part, dtype=torch.float32)[:, None] / 8 - 1 for part in parts[:2])
        y, held_y = (torch.tensor(part) for part in parts[2:])
        return Digits((x, y), (held_x, held_y))


def digits_uvit() -> UViT:
    """Returns the U-ViT of the examples, 0.67 M parameters, with random weights."""
    return UViT(
        img_size=8,
        patch_size=2,
        in_chans=1,
        embed_dim=96,
        depth=5,
        num_heads=4,
        num_classes=CLASSES,
        conv=False,
        mlp_time_embed=True,
        pos_std=1.0,
    )


class DigitsCNN(nn.Module):
    """A small classifier of the digits; ``features`` returns the 64 inputs of its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 4 * 4, 64),
            nn.ReLU(),
        )
        self.classes = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits [B, 10] of images [B, 1, 8, 8]."""
        return self.classes(self.features(x))


def train_judge(digits: Digits, *, epochs: int = 30, progress: bool = True) -> DigitsCNN:
    """Trains a DigitsCNN on the train split, in a few seconds; returns it in eval mode.

    Noise, shifts by one pixel and smoothed labels keep it from learning its training digits by
    heart, which would put them farther from the held-out ones than they are.
    """
    (x, y), batch = digits.train, 64
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        judge = DigitsCNN()
        optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.1)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, epochs * -(-len(x) // batch))
        for _ in tqdm(range(epochs), desc="train DigitsCNN", unit="epoch", disable=not progress):
            for rows in torch.randperm(len(x)).split(batch):
                seen = shift_images(x[rows]) + 0.3 * torch.randn_like(x[rows])
                optimizer.zero_grad()
                F.cross_entropy(judge(seen), y[rows], label_smoothing=0.1).backward()
                optimizer.step()
                rate.step()
    return judge.eval()


def shift_images(images: Tensor) -> Tensor:
    """Shifts ``images`` [B, 1, 8, 8] by at most one pixel, all alike."""
    down, right = torch.randint(3, (2,)).tolist()
    return F.pad(images, (1, 1, 1, 1), value=-1.0)[:, :, down : down + 8, right : right + 8]


@torch.no_grad()
def measure_agreement(judge: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """Returns the share of ``images`` that ``judge`` classifies as their ``labels``."""
    return (judge(images.clamp(-1, 1)).argmax(1) == labels).float().mean().item()
