"""A small classifier of the study's own images, whose features Fréchet distances are taken on."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from sparsedm_compiler.data import ImageData
from sparsedm_compiler.evaluate import FeatureNetwork

NAME = "SmallResNet"
BATCH = 128


class Block(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x)))))), halving the image where ``stride`` is 2."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList((nn.BatchNorm2d(width), nn.BatchNorm2d(width)))
        self.short = nn.Conv2d(width_in, width, 1, stride, bias=False) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[1](self.second(F.relu(self.norms[0](self.first(x)))))
        return F.relu(y + (x if self.short is None else self.short(x)))


class SmallResNet(nn.Module):
    """A classifier of small images; ``features`` [B, 64] are the inputs of its last layer."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 24, 3, 1, 1, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            Block(24, 24, 1),
            Block(24, 48, 2),
            Block(48, 64, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.classes = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(self.features(x))


def load_judge(path: Path, data: ImageData, epochs: int, device: str = "cpu") -> SmallResNet:
    """Loads the classifier at ``path``; trains it on ``data`` first where there is none."""
    assert data.classes is not None
    torch.manual_seed(0)
    network = SmallResNet(data.shape[0], data.classes)
    if path.exists():
        network.load_state_dict(load_file(path))
        return network.to(device).eval()
    network.to(device)
    steps = epochs * (len(data) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in tqdm(range(epochs), desc=f"train {NAME}", unit="epoch"):
        for rows in torch.randperm(len(data))[: len(data) // BATCH * BATCH].split(BATCH):
            images, labels = data.fetch(rows.tolist())
            assert isinstance(labels, Tensor)
            images, labels = images.to(device), labels.to(device)
            if torch.rand(()) < 0.5:
                images = images.flip(-1)
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels, label_smoothing=0.1).backward()
            optimizer.step()
            rate.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.cpu() for name, value in network.state_dict().items()}, path)
    return network.eval()


@torch.no_grad()
def measure_accuracy(network: nn.Module, data: ImageData) -> float:
    """Returns the share of ``data`` that is classified correctly."""
    right, device = 0, next(network.parameters()).device
    for rows in torch.arange(len(data)).split(BATCH):
        images, labels = data.fetch(rows.tolist())
        assert isinstance(labels, Tensor)
        right += int((network(images.to(device)).argmax(1).cpu() == labels).sum())
    return right / len(data)


def make_feature_network(network: SmallResNet) -> FeatureNetwork:
    """Returns the features of the classifier under their name in results."""
    return FeatureNetwork(NAME, network.features)
