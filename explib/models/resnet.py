"""He et al.'s CIFAR ResNets (6n+2 layers, option-A shortcuts) and torchvision's ResNet-50."""

from functools import partial

import torch.nn.functional as F
from torch import nn

from explib.errors import extra


class BasicBlock(nn.Module):
    """Two convs 3x3. The shortcut has no weights: it subsamples and zero-pads the channels."""

    def __init__(self, channels: int, filters: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.stride, self.pad = stride, (filters - channels) // 2

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride != 1 or self.pad:
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class ResNet(nn.Module):
    """A first conv, three stages of `blocks` blocks with 16, 32 and 64 filters, a linear layer."""

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module

    def __init__(self, blocks: int, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        channels = 16
        for stage, filters in enumerate((16, 32, 64), start=1):
            layers = []
            for block in range(blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                layers.append(BasicBlock(channels, filters, stride))
                channels = filters
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def build(num_classes: int = 10, depth: int = 56) -> nn.Module:
    """A CIFAR ResNet of `depth` = 6n+2 layers with fresh weights."""
    return ResNet((depth - 2) // 6, num_classes)


build_56, build_110 = (partial(build, depth=depth) for depth in (56, 110))


def build_50(num_classes: int = 1000) -> nn.Module:
    """torchvision's ResNet-50, unchanged, with fresh weights."""
    with extra():
        from torchvision.models import resnet50  # brings the compiler of torch: seconds
    return resnet50(num_classes=num_classes)


def rate_groups_50(names: list[str]) -> list[list[str]]:
    """ResNet-50's published order: the stem, then in each stage the shortcut conv first."""

    def place(name):
        stage = name.split(".")[0]
        return stage != "conv1", stage, ".downsample." not in name

    return [[name] for name in sorted(names, key=place)]
