"""GoogLeNet for 32 x 32 images (1521.76 M multiply-adds); every conv has a bias."""

import torch
from torch import nn

# block: input channels, 1x1, (reduction, 3x3), (reduction, "5x5"), pool projection
BLOCKS = {
    "a3": (192, 64, (96, 128), (16, 32), 32),
    "b3": (256, 128, (128, 192), (32, 96), 64),
    "a4": (480, 192, (96, 208), (16, 48), 64),
    "b4": (512, 160, (112, 224), (24, 64), 64),
    "c4": (512, 128, (128, 256), (24, 64), 64),
    "d4": (512, 112, (144, 288), (32, 64), 64),
    "e4": (528, 256, (160, 320), (32, 128), 128),
    "a5": (832, 256, (160, 320), (32, 128), 128),
    "b5": (832, 384, (192, 384), (48, 128), 128),
}


def _units(channels: int, *convs: tuple[int, int]) -> list[nn.Module]:
    """Conv, BatchNorm and ReLU for each (filters, kernel size)."""
    layers = []
    for filters, kernel in convs:
        layers += [
            nn.Conv2d(channels, filters, kernel, padding=kernel // 2),
            nn.BatchNorm2d(filters),
            nn.ReLU(inplace=True),
        ]
        channels = filters
    return layers


class Inception(nn.Module):
    """Four branches side by side; the "5x5" branch is two convs 3x3."""

    def __init__(self, channels, ones, threes, fives, pooled):
        super().__init__()
        self.branch1 = nn.Sequential(*_units(channels, (ones, 1)))
        self.branch2 = nn.Sequential(*_units(channels, (threes[0], 1), (threes[1], 3)))
        self.branch3 = nn.Sequential(*_units(channels, (fives[0], 1), (fives[1], 3), (fives[1], 3)))
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1), *_units(channels, (pooled, 1))
        )

    def forward(self, x):
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class GoogLeNet(nn.Module):
    """A conv 3x3 to 192 filters, nine inception blocks, global average pooling, a linear layer."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.pre_layers = nn.Sequential(*_units(3, (192, 3)))
        for name, sizes in BLOCKS.items():
            setattr(self, f"inception_{name}", Inception(*sizes))
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.linear = nn.Linear(1024, num_classes)

    def forward(self, x):
        x = self.pre_layers(x)
        for name in BLOCKS:
            if name in ("a4", "a5"):
                x = self.maxpool(x)
            x = getattr(self, f"inception_{name}")(x)
        return self.linear(x.mean((2, 3)))


def build(num_classes: int = 10) -> nn.Module:
    """A GoogLeNet with fresh weights."""
    return GoogLeNet(num_classes)


def rate_groups(names: list[str]) -> list[list[str]]:
    """One rate for the first conv and one per block: for all its convs but the 1x1 reductions."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if not name.endswith(("branch2.0", "branch3.0")):
            groups.setdefault(name.split(".")[0], []).append(name)
    return list(groups.values())
