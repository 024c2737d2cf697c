"""Names of networks and criteria as people read them."""

NOT_MEASURED = "not measured yet"
NAMES = {
    "vgg_16_bn": "VGG-16",
    "resnet_56": "ResNet-56",
    "resnet_110": "ResNet-110",
    "googlenet": "GoogLeNet",
    "resnet_50": "ResNet-50",
}
# (way, survivors), from chance to structure
WAY_NAMES = {
    ("random", ""): "random kernels",
    ("bn", ""): "lowest-γ filters",
    ("A", "random"): "A, random survivors",
    ("B", "random"): "B, random survivors",
    ("matched", ""): "random, B's norms",
    ("A", "l1"): "A, L1 survivors",
    ("B", "l1"): "B, L1 survivors",
    ("l1", ""): "L1 kernels",
    ("filters", ""): "filters, group L1",
}
