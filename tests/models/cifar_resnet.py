"""The ResNet for 32x32 images of He et al. 2015, arXiv:1512.03385, section 4.2, with shortcuts of type A."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut without parameters."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.grown = stride, (width - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return torch.relu(y + nn.functional.pad(shortcut, (0, 0, 0, 0, self.grown, self.grown)))


class CifarResNet(nn.Module):
    """Images (batch, 3, 32, 32), normalised with ``MEAN`` and ``STD`` -> logits (batch, classes).

    Args:
        depth: layers with weights, 6n + 2; default 20.
        classes: size of the output; default 10.
    """

    def __init__(self, depth: int = 20, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks = (depth - 2) // 6
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, classes)

    def forward(self, pixels: Float[Tensor, "batch 3 32 32"]) -> Float[Tensor, "batch classes"]:
        x = torch.relu(self.bn1(self.conv1(pixels)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def _stage(before: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(before, width, stride)
    return nn.Sequential(first, *(Block(width, width, 1) for _ in range(blocks - 1)))


def load_cifar_resnet(folder: str | Path) -> CifarResNet:
    """The trained network of a folder with ``config.json`` and ``model.safetensors``, in evaluation mode."""
    settings = json.loads(Path(folder, "config.json").read_text())
    model = CifarResNet(settings["depth"], settings["num_classes"])
    weights = load_file(Path(folder, "model.safetensors"))
    counters = {name: value for name, value in model.state_dict().items() if "num_batches" in name}
    model.load_state_dict(counters | weights)
    return model.eval()
