"""ResNet-56 for CIFAR-10 (He et al. 2016), whose features Fréchet distances can be taken on.

The weights are a file of the reader's; names are those of the published checkpoints.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsedm_compiler.errors import ConfigError
from sparsedm_compiler.evaluate import FeatureNetwork

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + x); a stride of 2 halves the image and doubles channels.

    The shortcut takes every second pixel then, with zeros in the new channels.
    """

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width // stride, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            new = x.shape[1] // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, new, new))
        return F.relu(y + x)


class ResNet56(nn.Module):
    """The classifier; ``features`` [B, 64] are the inputs of its last layer.

    Takes images [B, 3, H, W] in [-1, 1].
    """

    def __init__(self, blocks: int = 9) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 1) for _ in range(blocks)))
        self.layer2 = nn.Sequential(*(Block(32, 1 if i else 2) for i in range(blocks)))
        self.layer3 = nn.Sequential(*(Block(64, 1 if i else 2) for i in range(blocks)))
        self.linear = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        """Returns [B, 64]."""
        mean, std = (x.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        x = F.relu(self.bn1(self.conv1(((x + 1) / 2 - mean) / std)))
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x))


class Features(nn.Module):
    """The features of a classifier as a network of its own."""

    def __init__(self, network: ResNet56) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network.features(x)


def load_resnet56(path: Path) -> ResNet56:
    """Loads published weights (``{"state_dict": {"module.conv1.weight": ...}}``), in eval mode.

    Raises ConfigError for a file of anything else.
    """
    values = torch.load(path, map_location="cpu", weights_only=True)
    weights = {
        name.removeprefix("module."): value
        for name, value in values.get("state_dict", values).items()
    }
    network = ResNet56()
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(f"{path} does not hold the weights of a CIFAR ResNet-56") from error
    return network.eval()


def make_resnet_features(network: ResNet56) -> FeatureNetwork:
    """Returns the features under their name in results."""
    return FeatureNetwork("ResNet56", Features(network))
