"""Networks as the engine's ops, run op by op in torch: the table of rules, without the kernels.

The table lies in rules, arithmetic, axes, nodes and views; reference runs what it makes.
"""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils._pytree import tree_flatten

from explib import engine
from explib.engine import export, graph, reference, rules
from explib.engine.views import whole
from tests.conftest import needs_compiler
from tests.engine.networks import lively


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


def test_zeros_around_a_plane_are_the_next_convs_and_channels_are_gathered_once():
    kinds = [op.kind for op in traced(BODIES["padded as elsewhere"], torch.randn(1, 3, 9, 10))[0]]
    assert kinds == ["conv", "conv", "pad", "conv"]  # what is cut off stays a step of its own
    twice = Body(lambda net, y: torch.cat([*shuffled(net, y).chunk(2, 1)], 1))
    assert [op.kind for op in traced(twice, torch.randn(1, 3, 9, 10))[0]].count("gather") == 2


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


class Body(nn.Module):
    """A conv, and what a test makes of its result (N, 8, H, W)."""

    def __init__(self, rest, *parts: nn.Module):
        super().__init__()
        self.conv, self.parts, self.rest = nn.Conv2d(3, 8, 3, padding=1), nn.ModuleList(parts), rest
        self.register_buffer("channel", torch.rand(8, 1, 1) + 0.5)
        self.register_buffer("plane", torch.rand(1, 9, 10))

    def forward(self, x):
        return self.rest(self, self.conv(x))


def one(*parts: nn.Module) -> Body:
    """A conv and these layers after it."""
    return Body(lambda net, y: nn.Sequential(*net.parts)(y), *parts)


def shuffled(net, y):
    n, c, h, w = y.shape
    return y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def excited(net, y):
    squeezed = y.mean((2, 3))
    weights = torch.sigmoid(net.parts[0](squeezed)).view(y.size(0), -1, 1, 1)
    return y * weights.expand_as(y)


def mixed(net, y):
    """A block of ConvNeXt, with its axes permuted and back."""
    z = net.parts[0](y.permute(0, 2, 3, 1))
    return y + net.channel * net.parts[2](F.gelu(net.parts[1](z))).permute(0, 3, 1, 2)


def sequence(net, y):
    """Pixels as a sequence, as transformers have it, and the mean of all."""
    z = net.parts[1](net.parts[0](y.flatten(2).transpose(1, 2)))
    return z.transpose(1, 2).reshape(y.shape), z.mean(1)


def attended(net, y):
    """The spatial attention of CBAM."""
    both = torch.cat([y.mean(1, keepdim=True), y.max(1, keepdim=True)[0]], 1)
    return y * net.parts[0](both).sigmoid(), y.mean(1).amax((-1, -2)), y.flatten(2).max(-1)[0]


def responding(net, y):
    """As in ConvNeXt V2, of channels last: one value a channel, which torch makes as (1, 1, C)."""
    z = y.permute(0, 2, 3, 1)
    return z * torch.norm(z, dim=(1, 2), keepdim=True)


def counted(net, y):
    for i in range(3):
        if i % 2 == 0 and y.shape[1] == 8:
            y = y + i
    return y


def overwritten(net, y):
    y[:, :4].mul_(2)
    return y.add_(1)


BODIES = {
    "an even kernel": one(nn.Conv2d(8, 4, 2)),
    "a flat kernel": one(nn.Conv2d(8, 4, (1, 7), padding=(0, 3)), nn.Conv2d(4, 4, (3, 1), (2, 1))),
    "dilated": one(nn.Conv2d(8, 4, 3, dilation=2, padding=2)),
    "padded to the same": one(nn.Conv2d(8, 4, 4, padding="same"), nn.Conv2d(4, 4, 3)),
    "depthwise": one(nn.Conv2d(8, 16, 3, 2, 1, groups=8), nn.Conv2d(16, 4, 1, groups=4)),
    "transposed": one(nn.ConvTranspose2d(8, 4, 3, 2, 1, output_padding=1)),
    "transposed in groups": one(
        nn.ConvTranspose2d(8, 12, (3, 2), (1, 3), (2, 0), groups=4, dilation=2)
    ),
    "norms": one(nn.BatchNorm2d(8), nn.PReLU(8), nn.BatchNorm2d(8, affine=False)),
    "activations": one(
        nn.ReLU6(), nn.Conv2d(8, 8, 1), nn.SiLU(), nn.Hardswish(), nn.Hardsigmoid(), nn.Tanh(),
        nn.GELU(), nn.GELU("tanh"), nn.LeakyReLU(0.2), nn.ELU(0.7), nn.PReLU(), nn.Sigmoid(),
        nn.Hardtanh(0.3, 0.6), nn.Mish(), nn.SELU(), nn.CELU(0.7),
    ),
    "norms of each image": one(
        nn.GroupNorm(2, 8), nn.InstanceNorm2d(8), nn.InstanceNorm2d(8, affine=True),
        nn.GroupNorm(1, 8, affine=False),
    ),
    "gated": one(nn.GLU(1)),
    "squares": Body(lambda net, y: y.square() + torch.relu(y) ** 2),
    "attended": Body(attended, nn.Conv2d(2, 1, 7, padding=3)),
    "responding": Body(responding),
    "the larger": Body(
        lambda net, y: torch.maximum(y, y.amax(1, keepdim=True) - 1) + torch.max(y, -y)
    ),
    "sums": Body(
        lambda net, y: (y.sum((2, 3)), y.sum(1), y.sum((-1, -2), True), y.sum((2, 3)).sum(1))
    ),
    "strips": Body(
        lambda net, y: (y * (y.mean(3, True) + y.mean(2, True)), y - y.amax(3, True), y.mean(2))
    ),
    "finer and coarser": one(nn.PixelShuffle(2), nn.Conv2d(2, 2, 1), nn.PixelUnshuffle(2)),
    "repeated": Body(lambda net, y: (y.repeat(1, 3, 1, 1), y.repeat_interleave(2, 1))),
    "beside zeros": Body(
        lambda net, y: torch.cat(
            [y, torch.zeros_like(y[:, :3]), y.new_zeros(y.shape[0], 2, 9, 10)], 1
        )
    ),
    "mirrored": one(
        nn.ReflectionPad2d((1, 2, 3, 0)), nn.ReplicationPad2d((0, 3, 2, 1)), nn.CircularPad2d(2),
        *(nn.Conv2d(8, 8, 3, padding=1, padding_mode=m) for m in ("reflect", "circular")),
    ),
    "clamps": Body(lambda net, y: y.clamp(min=0) + y.clamp(max=0.1) + torch.clamp_min(y, -0.1)),
    "pooling": one(nn.MaxPool2d(3, 2, ceil_mode=True), nn.AvgPool2d(2, ceil_mode=True)),
    "padded pools": one(nn.AvgPool2d(3, 2, 1), nn.AvgPool2d((3, 2), 2, 1, ceil_mode=True)),
    "uncounted padding": one(nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)),
    "dilated pool": one(nn.MaxPool2d((3, 2), 1, 1, dilation=(1, 2))),
    "adaptive pools": one(
        nn.AdaptiveAvgPool2d((4, 3)), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(32, 5)
    ),
    "maximum": Body(lambda net, y: y.amax((2, 3), True) + y.mean((-1, -2), keepdim=True)),
    "upsampled": one(nn.Upsample(scale_factor=1.5), nn.Upsample((7, 9), mode="bilinear")),
    "corners": one(nn.Upsample((17, 5), mode="bilinear", align_corners=True)),
    "excited": Body(excited, nn.Linear(8, 8)),
    "mixed": Body(mixed, nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)),
    "a sequence": Body(sequence, nn.LayerNorm(8), nn.Linear(8, 8)),
    "shuffled": Body(shuffled),
    "shuffled by torch": one(nn.ChannelShuffle(4)),
    "chunks": Body(lambda net, y: torch.cat([*y.chunk(3, 1)][::-1], 1)),
    "splits": Body(lambda net, y: [part * 2 for part in y.split([1, 5, 2], 1)]),
    "slices": Body(lambda net, y: y[:, 1:7:2, 2:, ::3] * y[:, -3:, :-2, 1::3].mean((2, 3), True)),
    "slices of slices": Body(lambda net, y: y[:, :, 1::2, 1:][:, :, 1:, ::4]),
    "subsampled": Body(lambda net, y: F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 2, 3))),
    "picked": Body(lambda net, y: (y[:, 2], y[:, [3, 1, 1]], y.flip(1), y[..., 1])),
    "narrowed": Body(lambda net, y: (y.narrow(1, 2, 3), y.narrow(3, -4, 2), y[:, -1])),
    "padded": one(nn.ZeroPad2d((1, 2, 0, 3)), nn.ConstantPad2d((-1, 1, 1, -2), 0.5)),
    "padded as elsewhere": one(
        nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.ZeroPad2d((1, -1, 0, 2)),
        nn.Conv2d(8, 4, 3),
    ),
    "padded slices": Body(lambda net, y: F.pad(y[:, :, ::2, ::2], (1, 1, 1, 1))),
    "scalars": Body(lambda net, y: 1 - 2 * y + y / 4 - (y - 3) + torch.add(y, y, alpha=0.5) - -y),
    "known": Body(lambda net, y: (y - net.channel) / net.channel + y * net.channel.view(8, 1, 1)),
    "products": Body(lambda net, y: y * y.mean(1, keepdim=True) + y * y),
    "quotients": Body(
        lambda net, y: (y / (1 + y.exp()), (y * y + 2) / (y * y + 1).mean((2, 3), True))
    ),
    "differences": Body(
        lambda net, y: [(y - m, m - y) for m in (y.mean((2, 3), True), y.mean((1, 2, 3), True))]
    ),
    "axes of one": Body(
        lambda net, y: y.mean((2, 3), True).squeeze(-1).squeeze(-1).unsqueeze(1).flatten(1)
    ),
    "control flow": Body(counted),
    "overwritten": Body(overwritten),
}  # fmt: skip
IN_TORCH = {
    "responding": ("(linalg_vector_norm)", "(mul)"),
    "quotients": ("(exp)",),
    "differences": ("(mean)",),
    "overwritten": ("(slice_scatter)",),
}


@pytest.mark.parametrize("body", BODIES)
def test_whatever_is_computed_is_an_op_of_the_engine(body):
    torch.manual_seed(0)
    model = lively(BODIES[body])
    ops, error = traced(model, torch.randn(3, 3, 9, 10))
    assert error < 1e-5
    assert all(any(op in why for op in IN_TORCH.get(body, ())) for why in left(ops)), left(ops)


@needs_compiler
@pytest.mark.filterwarnings("ignore:.*runs? in torch")
@pytest.mark.parametrize("body", BODIES)
def test_compiled_it_is_the_same_at_any_batch(body):
    torch.manual_seed(0)
    model = lively(BODIES[body])
    fast = engine.compile(model, torch.zeros(1, 3, 9, 10))
    assert fast.report["engine"] == "native"
    for count in (1, 2, 17):
        x = torch.randn(count, 3, 9, 10)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
