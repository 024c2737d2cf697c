"""VGG-16 with BatchNorm for 32 x 32 images (313.46 M multiply-adds)."""

from collections import OrderedDict

from torch import nn

WIDTHS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)


class VGG(nn.Module):
    """13 convs 3x3 with BatchNorm and ReLU, then two linear layers."""

    def __init__(self, num_classes: int):
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        channels = 3
        for i, width in enumerate(WIDTHS):
            if not isinstance(width, int):
                layers[f"pool{i}"] = nn.MaxPool2d(2)
                continue
            layers[f"conv{i}"] = nn.Conv2d(channels, width, 3, padding=1)
            layers[f"norm{i}"] = nn.BatchNorm2d(width)
            layers[f"relu{i}"] = nn.ReLU(inplace=True)
            channels = width
        layers["pool"] = nn.AvgPool2d(2)
        self.features = nn.Sequential(layers)
        self.classifier = nn.Sequential(
            OrderedDict(
                linear1=nn.Linear(512, 512),
                norm1=nn.BatchNorm1d(512),
                relu1=nn.ReLU(inplace=True),
                linear2=nn.Linear(512, num_classes),
            )
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


def build(num_classes: int = 10) -> nn.Module:
    """A VGG-16 with fresh weights."""
    return VGG(num_classes)
