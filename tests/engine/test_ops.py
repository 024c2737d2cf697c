"""The engine's kernels against torch, op by op and for every classification CNN of torchvision.

Where windows lie and what is gathered comes from geometry.
"""

from math import isqrt

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from explib import engine
from explib.engine import build, lists, plan, reference
from explib.engine.graph import Op
from tests.conftest import needs_compiler
from tests.engine import cases
from tests.engine.cases import PLANES, network, surrounded, sweep_ops, windowed
from tests.engine.networks import error, lively

pytestmark = needs_compiler


@pytest.mark.parametrize("plane", PLANES)
def test_every_op_gives_torch_its_result_in_both_layouts(plane):
    types = [dtype for dtype in build.TYPES if build.computes(build.library(), dtype)]
    assert sweep_ops((1, 3, 33), [plane]) > 900 * len(types)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (7, 2)])
@pytest.mark.parametrize("threads", [1, 3])
def test_depthwise_convs_of_large_planes_are_computed_in_bands(kernel, stride, threads):
    """int8: threads share the channels where they are many enough, else the rows."""
    shape, square = (5, 200, 250), (kernel, kernel)
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(5, 1, *square, generator=random)
    weight[2] = 0
    more = dict(weight=weight, bias=torch.linspace(-1, 1, 5), groups=5, act="relu")
    pad = (kernel // 2, kernel // 2)
    op = windowed("conv", shape, 5, square, (stride, stride), pad, **more)
    both = Op(**dict(vars(op), inputs=("x", "z")))
    for made, shapes in ((op, [shape]), (both, [shape, op.shape])):
        ops = surrounded(made, shapes, torch.int8)
        assert cases.error(network(ops, shapes, torch.int8, threads), ops[0], 1) < 1


def run(op: Op, x: torch.Tensor) -> torch.Tensor:
    return plan.Network([op], {"x": tuple(x.shape[1:])}, ["y"], dtype=torch.float32, threads=1)(x)[
        0
    ]


@pytest.mark.parametrize(
    ("act", "exact", "bound"),
    [
        ("sigmoid", torch.sigmoid, 4e-7),
        ("silu", nn.functional.silu, 4e-7),
        ("elu", torch.expm1, 4e-7),
        ("tanh", torch.tanh, 5e-7),
    ],
)
def test_activations_are_as_exact_as_floats_allow(act, exact, bound):
    """Relative to the value itself, from the smallest floats to where it is constant."""
    x = torch.cat([torch.linspace(-87, 87, 100_000), torch.logspace(-30, 0, 999)])
    x = torch.cat([x, -x])
    x = x[x < 0] if act == "elu" else x
    found = run(Op("act", "y", ("x",), (1, 1, len(x)), act=act, alpha=1.0), x[None, None, None])
    wanted = exact(x.double())
    assert ((found.flatten().double() - wanted) / wanted).abs().max() < bound


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh"])
def test_gelu_is_exact_to_its_argument(act):
    x = torch.linspace(-12, 12, 100_000)
    found = run(Op("act", "y", ("x",), (1, 1, len(x)), act=act), x[None, None, None]).flatten()
    approximate = "tanh" if act == "gelu_tanh" else "none"
    wanted = nn.functional.gelu(x.double(), approximate=approximate)
    assert ((found.double() - wanted) / x.double().abs().clamp(min=1)).abs().max() < 3e-7


# of gelu torch itself makes NaN of infinity
@pytest.mark.parametrize("act", [a for a in plan.ACTS if a not in ("", "prelu", "gelu")])
@pytest.mark.parametrize("count", [1, 16])
def test_activations_keep_nan_and_infinity_as_torch_does(act, count):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 0.0])
    op = Op("act", "y", ("x",), (1, 2, 3), act=act, alpha=0.5, beta=2.0)
    values = {"x": x.reshape(1, 1, 2, 3).expand(count, -1, -1, -1)}
    torch.testing.assert_close(
        run(op, values["x"]), reference.run(op, values, count), equal_nan=True
    )


@pytest.mark.parametrize("dtype", build.TYPES[:3])
def test_consecutive_channels_are_read_where_they_lie(dtype):
    if not build.computes(build.library(), dtype):
        pytest.skip(f"this processor does not compute in {dtype}")
    half = dict(shape=(3, 5, 7), kind="gather", inputs=("x",))
    ops = [
        Op(name="a", index=(0, 1, 2), **half),
        Op(name="b", index=(3, 4, 5), **half),
        Op("act", "c", ("b",), (3, 5, 7), act="silu"),
        Op("cat", "y", ("a", "c", "b"), (9, 5, 7)),
    ]
    shapes = {"x": (6, 5, 7)}
    _, _, listed = plan.places(ops, shapes, ["y", "b"])
    assert [op.kind for op in listed] == ["act", "copy", "copy"]  # of a and b into y
    fast = plan.Network(ops, shapes, ["y", "b"], dtype=dtype, threads=2)
    for count in (1, 33):
        x = torch.randn(count, 6, 5, 7)
        found, b = fast(x)
        wanted = torch.cat([x[:, :3], nn.functional.silu(x[:, 3:]), x[:, 3:]], 1)
        bound = 1e-6 if dtype == torch.float32 else 0.03
        assert (found - wanted).abs().max() < bound and (b - x[:, 3:]).abs().max() < bound


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("side", [3, 7, isqrt(lists.ALIKE_POINTS) + 1])
def test_filters_in_the_order_of_their_kernels_give_each_its_own_result(side, threads):
    """Small maps: more filters than are computed at once, and channels than stand together."""
    random = torch.Generator().manual_seed(side)
    filters, channels = (
        2 * build.at_once(build.library()) + 70,
        2 * build.chunk(build.library(), side * side) + 5,
    )
    weight = torch.randn(filters, channels, 1, 1, generator=random)
    share = torch.linspace(0, 1, filters)[:, None, None, None]  # from none of them to all
    weight *= torch.rand(filters, channels, 1, 1, generator=random) < share
    op = Op("conv", "y", ("x",), (filters, side, side), weight=weight, act="relu")
    fast = plan.Network(
        [op], {"x": (channels, side, side)}, ["y"], dtype=torch.float32, threads=threads
    )
    for count in (1, 16):
        x = torch.randn(count, channels, side, side, generator=random)
        wanted = nn.functional.conv2d(x, weight).relu()
        assert (fast(x)[0] - wanted).abs().max() < 1e-5 * wanted.max()


CHEAP = ("mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1")
TRANSFORMERS = ("vit", "swin", "maxvit")
CNNS = [
    name
    for name in torchvision.models.list_models(module=torchvision.models)
    if not name.startswith(TRANSFORMERS)
]
LARGE = {"inception_v3": 75}  # the smallest images that it takes


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in CHEAP else pytest.mark.zoo) for n in CNNS],
)
def test_torchvisions_classifiers_run_without_torch(name):
    torch.manual_seed(0)
    more = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = lively(torchvision.models.get_model(name, num_classes=10, **more))
    side = LARGE.get(name, 64)
    fast = engine.compile(model, torch.zeros(1, 3, side, side), fallback=False)
    assert fast.report["engine"] == "native" and fast.report["fallbacks"] == []
    for count in (1, 17):
        assert error(model, fast, torch.randn(count, 3, side, side)) < 1e-4


@pytest.mark.parametrize(
    ("side", "channels", "kept", "stride", "in_blocks", "alone"),
    [(7, 16, 7, 1, True, None), (7, 20, 19, 1, True, None), (7, 16, 2, 1, False, False),
     (7, 16, 3, 1, "columns", False), (6, 16, 16, 2, False, False), (28, 16, 4, 1, None, True),
     (28, 16, 3, 1, "columns", False),
     (13, 260, 7, 1, True, None), (3, 20, 19, 1, False, None),
     (8, 16, 4, 1, None, "four"), (6, 17, 16, 1, None, "four"), (7, 16, 3, 1, None, False)],
)  # fmt: skip
def test_winograd_where_planes_and_kernels_are_enough(
    side, channels, kept, stride, in_blocks, alone
):
    """None: as wide as the vectors are; "columns": where blocks go by columns alone, too.

    "four": of single images where four tiles are half a vector.
    """
    library = build.library()
    by_columns = bool(library.explib_winograd_by_columns())
    four = bool(library.explib_winograd_four(*2 * [(side - 1) // stride + 1]))
    assert four == (6 <= side // stride <= 8 and build.block(library, torch.float32) == 8)
    alone = (four or None) if alone == "four" else alone
    in_blocks = by_columns if in_blocks == "columns" else in_blocks
    weight = torch.zeros(channels, channels, 3, 3)
    weight[:, :kept] = torch.randn(channels, kept, 3, 3)
    plane = ((side - 1) // stride + 1,) * 2
    more = dict(kernel=(3, 3), stride=(stride, stride), pad=(1, 1), weight=weight)
    conv = Op("conv", "y", ("x",), (channels, *plane), **more)

    def made(dtype: torch.dtype, blocks: bool = True) -> dict:
        target = lists.Target(library, dtype, 1, blocks)
        return lists.kernels(weight.numpy(), conv, (channels, side, side), target)

    full, several = made(torch.float32), {"winograd", "winograd_columns"}
    assert in_blocks is None or bool(several & {*full}) == in_blocks
    if several & {*full}:  # with 16 registers columns alone, up to so many kernels of a filter
        columns = by_columns and kept < 18
        assert several & {*full} == {"winograd_columns" if columns else "winograd"}
    assert alone is None or ("winograd_alone" in full) == alone
    assert not several & {*made(torch.float32, blocks=False), *made(torch.bfloat16)}
    # single images of a network in bfloat16 are computed in float32
    for other in (made(torch.float32, blocks=False), made(torch.bfloat16)):
        assert ("winograd_alone" in other) == ("winograd_alone" in full)
    names = several | {"winograd_alone"}
    assert not names & {*made(torch.int8), *made(torch.float16)}
    own = weight[full["order"][0], :kept].numpy()
    # the weights at the points 0 and infinity are those of the corners, or of the rows' ends
    for name in {"winograd", "winograd_alone"} & {*full}:
        spread = full[name].swapaxes(0, 1)[:kept]
        if four and name == "winograd_alone":  # rows 0 and 5, 1 and 2, 3 and 4 together
            rows = spread.swapaxes(2, 3).reshape(-1, 6, 6)
            spread = rows[:, [0, 2, 3, 4, 5, 1]]
        spread = spread.reshape(-1, 6, 6)
        assert spread[:, 5, 5] == pytest.approx(own[:, 2, 2], rel=1e-6)
        assert spread[:, 0, 0] == pytest.approx(own[:, 0, 0], rel=1e-6)
    if "winograd_columns" in full:
        first, second = full["winograd_columns"][:, :kept]
        assert first[:, :, 0] == pytest.approx(own[:, 0], rel=1e-6)
        assert second[:, :, 2] == pytest.approx(own[:, 2], rel=1e-6)


@pytest.mark.parametrize(("side", "blocks"), [(8, True), (512, False)])
def test_kernels_are_spread_to_points_where_images_go_in_blocks(side, blocks):
    shape, weight = (16, side, side), torch.ones(16, 16, 3, 3)
    conv = Op("conv", "y", ("x",), shape, kernel=(3, 3), pad=(1, 1), weight=weight)
    target = plan.Network([conv], {"x": shape}, ["y"], dtype=torch.float32, threads=1)._target
    assert target.blocks == blocks


def test_channels_that_the_same_filters_keep_share_words():
    filters = {0, 1}, {2, 3}, {4}, {0, 1, 4}, {2, 3}, {4, 5}  # of each channel those that keep it
    keep = np.array([[f in kept for kept in filters] for f in range(6)])
    pairs = lists._partners(keep).reshape(-1, 2)
    assert {frozenset(pair) for pair in pairs.tolist()} == {
        frozenset(p) for p in [(0, 3), (1, 4), (2, 5)]
    }
    for channels in (2, 100):  # also where none has a partner of its own, or all are alike
        for density in (0, 0.3, 1):
            keep = np.random.default_rng(1).random((64, channels)) < density
            order = lists._partners(keep)
            assert sorted(order) == list(range(channels))
            one, other = keep[:, order[::2]], keep[:, order[1::2]]
            assert (one | other).sum() <= (keep[:, ::2] | keep[:, 1::2]).sum()
