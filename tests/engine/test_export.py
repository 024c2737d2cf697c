"""Networks as the engine's ops, run op by op in torch: the table of rules, without the kernels."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils._pytree import tree_flatten

from explib.engine import export, graph, reference, rules
from explib.engine.views import whole
from tests.engine.test_engine import lively


def every(op: graph.Op, sources: list) -> bool:
    """Of an engine that has kernels for all its ops."""
    return True


def traced(model: nn.Module, *inputs: torch.Tensor) -> tuple[list[graph.Op], float]:
    """The network's ops, fused, and by how much they miss it, of the largest value."""
    example = inputs if len(inputs) > 1 else inputs[0]
    made, _ = export.trace(model, example)
    ops = graph.fuse(made.ops, graph.names(made.results), made.shapes, every)
    values = dict(zip(made.inputs, inputs, strict=True))
    with torch.no_grad():
        for op in ops:
            values[op.name] = reference.run(op, values, len(inputs[0]))
            if op.kind != "torch":
                assert values[op.name].shape[1:] == op.shape, op
        found = tree_flatten(reference.resolved(made.results, values, len(inputs[0])))[0]
        wanted = tree_flatten(model.eval()(*inputs))[0]
    assert [tuple(v.shape) for v in found] == [tuple(v.shape) for v in wanted]
    pairs = zip(found, wanted, strict=True)
    return ops, max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def left(ops: list[graph.Op]) -> list[str]:
    return [op.why for op in ops if op.kind == "torch" and op.why]


CLASSIFIERS = [
    "alexnet", "vgg11", "vgg11_bn", "resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d",
    "densenet121", "googlenet", "inception_v3", "squeezenet1_0", "squeezenet1_1", "mobilenet_v2",
    "mobilenet_v3_small", "mobilenet_v3_large", "mnasnet0_5", "shufflenet_v2_x0_5",
    "efficientnet_b0", "efficientnet_v2_s", "regnet_x_400mf", "regnet_y_400mf", "convnext_tiny",
]  # fmt: skip
SEGMENTERS = ["fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_torchvisions_classifiers_are_ops_of_the_engine(name):
    torch.manual_seed(0)
    more = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = lively(getattr(torchvision.models, name)(num_classes=10, **more))
    ops, error = traced(model, torch.randn(2, 3, *[75 if name == "inception_v3" else 64] * 2))
    assert left(ops) == [] and error < 1e-4


@pytest.mark.parametrize("name", SEGMENTERS)
def test_torchvisions_segmenters_are_ops_of_the_engine(name):
    torch.manual_seed(0)
    build = getattr(torchvision.models.segmentation, name)
    model = lively(build(weights=None, weights_backbone=None, num_classes=5))
    ops, error = traced(model, torch.randn(2, 3, 65, 70))
    assert left(ops) == [] and error < 1e-4


def conv(channels: int, filters: int, kernel: int = 3, act: type[nn.Module] = nn.SiLU):
    return nn.Sequential(
        nn.Conv2d(channels, filters, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(filters),
        act(),
    )


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.bottom = conv(3, 8, act=nn.ReLU), conv(8, 16, act=nn.LeakyReLU)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.last = nn.Sequential(conv(16, 8, act=nn.ReLU), nn.Conv2d(8, 2, 1))

    def forward(self, x):
        y = self.down(x)
        z = self.up(self.bottom(F.max_pool2d(y, 2)))
        z = F.pad(z, (0, y.shape[3] - z.shape[3], 0, y.shape[2] - z.shape[2]))
        return self.last(torch.cat([y, z], 1))


class Detector(nn.Module):
    """As YOLOv8: chunks, SiLU, pools of one size in a row, nearest upsampling, two heads."""

    def __init__(self):
        super().__init__()
        self.first, self.twice = conv(3, 16), conv(16, 16, 1)
        self.inner = nn.ModuleList(conv(8, 8) for _ in range(2))
        self.joined, self.small = conv(32, 16, 1), conv(16, 16)
        self.pooled, self.merged = conv(64, 16, 1), conv(32, 16)
        self.heads = nn.ModuleList(nn.Conv2d(16, 9, 1) for _ in range(2))

    def forward(self, x):
        parts = list(self.twice(self.first(x)).chunk(2, 1))
        for block in self.inner:
            parts.append(parts[-1] + block(parts[-1]))
        fine = self.joined(torch.cat(parts, 1))
        coarse = [self.small(F.max_pool2d(fine, 2))]
        for _ in range(3):
            coarse.append(F.max_pool2d(coarse[-1], 5, stride=1, padding=2))
        low = self.pooled(torch.cat(coarse, 1))
        fine = self.merged(torch.cat([F.interpolate(low, scale_factor=2), fine], 1))
        heads = [head(y).split((4, 5), 1) for head, y in zip(self.heads, (fine, low), strict=True)]
        return [(boxes, scores.sigmoid()) for boxes, scores in heads]


def test_a_u_net_is_ops_of_the_engine():
    torch.manual_seed(0)
    ops, error = traced(lively(UNet()), torch.randn(2, 3, 21, 18))
    assert left(ops) == [] and error < 1e-4
    assert {"stretch", "pad", "cat"} <= {op.kind for op in ops}


def test_a_detector_is_ops_of_the_engine():
    torch.manual_seed(0)
    ops, error = traced(lively(Detector()), torch.randn(2, 3, 16, 24))
    assert left(ops) == [] and error < 1e-4
    assert {"gather", "upsample_nearest", "cat"} <= {op.kind for op in ops}


def test_every_rule_is_of_an_op_that_torch_has():
    assert [name for name in rules.RULES if not hasattr(torch.ops.aten, name)] == []


def test_a_view_is_what_torch_makes_of_the_same_steps():
    x = torch.arange(2 * 12 * 4 * 6.0).reshape(2, 12, 4, 6)
    view = whole("x", (12, 4, 6)).reshaped([3, 4, 4, 6]).permuted([1, 0, 2, 3])
    wanted = x.reshape(2, 3, 4, 4, 6).transpose(1, 2)
    assert view.sizes == (4, 3, 4, 6) and torch.equal(view.of(x), wanted)
    shuffled = view.reshaped([12, 24]).permuted([1, 0])
    assert torch.equal(shuffled.of(x), wanted.reshape(2, 12, 24).transpose(1, 2))
    assert shuffled.reshaped([12 * 24]).reshaped([8, 3, 12]).permuted([2, 0, 1]).sizes == (12, 8, 3)
    assert whole("x", (12, 4, 6)).reshaped([5, 1]) is None
    one = whole("x", (12, 1, 1))
    assert one.reshaped([12]) == one.reshaped([1, 12]).reshaped([12])
    expanded = one.expanded([12, 4, 6])
    assert torch.equal(expanded.of(x[:, :, :1, :1]), x[:, :, :1, :1].expand(2, 12, 4, 6))
    assert expanded.unexpanded() == one
