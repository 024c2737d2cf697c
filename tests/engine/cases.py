"""Every op that the engine has a kernel for, on planes that fit no tile, against torch."""

from collections.abc import Iterator

import torch

from explib.engine import build, plan, quantization, reference
from explib.engine.graph import Op

PLANES = ((13, 9), (17, 28), (7, 30), (5, 5), (2, 3), (2, 2), (1, 1))
WIDE = 76, 110, 150, 300  # channels of which the nearest cache holds fewer points of a row each
BOUNDS = {torch.float32: 1e-5, torch.float16: 0.03, torch.bfloat16: 0.03, torch.int8: 1e-5}
Shape = tuple[int, ...]
Case = tuple[str, Op, list[Shape]]


def made(size: int, kernel: int, stride: int, pad: int, dilation: int = 1) -> int:
    return (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1


def windowed(kind: str, shape: Shape, filters: int, kernel, stride, pad, dilation=(1, 1), **more):
    """An op whose output has the size that torch gives it."""
    sides = zip(shape[1:], kernel, stride, pad, dilation, strict=True)
    plane = tuple(made(*side) for side in sides)
    fields = dict(kernel=kernel, stride=stride, pad=pad, dilation=dilation, **more)
    return Op(kind, "y", ("x",), (filters, *plane), **fields) if min(plane) > 0 else None


def convs(shape: Shape) -> Iterator[Case]:
    """Convs of every kind, with and without a second input and an activation."""
    channels, random = shape[0], torch.Generator().manual_seed(1)
    one, two, none, depth = (1, 1), (2, 2), (0, 0), channels
    for kernel, stride, pad, dilation, groups, each in (
        ((1, 1), one, none, one, 1, 5), ((1, 1), two, none, one, 1, 5),
        ((1, 1), one, one, one, 1, 5), ((1, 1), one, none, one, 2, 3),
        ((1, 1), one, none, one, depth, 1), ((1, 1), (3, 1), none, one, 1, 5),
        ((3, 3), one, one, one, 1, 7), ((3, 3), two, one, one, 1, 7),
        ((3, 3), (3, 3), one, one, 1, 7), ((3, 3), one, none, one, 1, 7),
        ((3, 3), two, none, one, 1, 7), ((3, 3), one, two, two, 1, 5),
        ((3, 3), one, (6, 6), (6, 6), 1, 5), ((3, 3), two, two, two, 1, 5),
        ((3, 3), one, one, one, 2, 3), ((3, 3), two, one, one, 2, 3),
        ((5, 5), one, two, one, 1, 5), ((7, 7), two, (3, 3), one, 1, 5),
        ((9, 9), one, (4, 4), one, 1, 3), ((1, 7), one, (0, 3), one, 1, 5),
        ((7, 1), one, (3, 0), one, 1, 5), ((2, 2), two, none, one, 1, 5),
        ((4, 4), (4, 4), none, one, 1, 5), ((2, 3), (1, 2), (1, 0), one, 2, 2),
        ((3, 3), one, one, one, depth, 1), ((3, 3), two, one, one, depth, 1),
        ((3, 3), one, none, one, depth, 2), ((3, 3), two, none, one, depth, 1),
        ((5, 5), one, two, one, depth, 1), ((5, 5), two, two, one, depth, 2),
        ((7, 7), one, (3, 3), one, depth, 1), ((3, 5), (1, 2), (1, 2), one, depth, 1),
        ((3, 3), one, two, two, depth, 1), ((3, 3), (3, 3), one, one, depth, 1),
    ):  # fmt: skip
        filters = each * groups
        weight = torch.randn(filters, channels // groups, *kernel, generator=random)
        weight *= torch.rand(filters, channels // groups, 1, 1, generator=random) < 0.7
        bias = torch.randn(filters, generator=random)
        more = dict(weight=weight, bias=bias, groups=groups)
        op = windowed("conv", shape, filters, kernel, stride, pad, dilation, **more)
        if op is None:
            continue
        name = f"{kernel} stride {stride} pad {pad} dilation {dilation} groups {groups}"
        yield f"conv {name}", op, [shape]
        both = dict(vars(op), inputs=("x", "z"), act="silu")
        yield f"conv {name} + z, silu", Op(**both), [shape, op.shape]


def many(plane: Shape) -> Iterator[Case]:
    """Convs with kernels enough for Winograd's points, along columns alone and along both axes."""
    sizes = [(13, 1, 0.8), (24, 2, 0.8), (20, 1, 1.0)]
    if plane == (17, 28):
        sizes += [(WIDE[0], 1, 9 / WIDE[0]), *((n, 1, 20 / n) for n in WIDE)]
    for channels, groups, density in sizes:
        random = torch.Generator().manual_seed(5)
        weight = 0.2 * torch.randn(channels, channels // groups, 3, 3, generator=random)
        weight *= torch.rand(*weight.shape[:2], 1, 1, generator=random) < density
        more = dict(weight=weight, bias=torch.linspace(-1, 1, channels), groups=groups)
        for act, inputs in (("", ("x",)), ("relu", ("x", "z"))):
            made = Op("conv", "y", inputs, (channels, *plane), kernel=(3, 3), pad=(1, 1), act=act,
                      **more)  # fmt: skip
            shapes = [(channels, *plane)] * len(inputs)
            yield f"conv (3, 3) of {channels} channels, {groups} groups {act}", made, shapes


ACTS = {
    "relu": {}, "relu6": {}, "silu": {}, "hardswish": {}, "hardsigmoid": {}, "sigmoid": {},
    "gelu": {}, "gelu_tanh": {}, "leaky": {"alpha": 0.1}, "elu": {"alpha": 0.7}, "tanh": {},
    "mish": {},
    "clamp": {"alpha": -0.3, "beta": 0.4}, "prelu": {"slope": torch.linspace(-0.5, 0.5, 6)},
}  # fmt: skip


def pixelwise(shape: Shape) -> Iterator[Case]:
    """Ops that make each pixel of one, or of one a value, and every activation."""
    channels = shape[0]
    vector, other = torch.linspace(-1, 2, channels), torch.linspace(3, -1, channels)
    weight = 0.1 * torch.randn(6, channels, 3, 3, generator=torch.Generator().manual_seed(2))
    for act, more in ACTS.items():
        yield f"act {act}", Op("act", "y", ("x",), shape, act=act, **more), [shape]
        pad = dict(kernel=(3, 3), pad=(1, 1))
        op = Op("conv", "y", ("x",), (6, *shape[1:]), weight=weight, act=act, **pad, **more)
        yield f"conv, {act}", op, [shape]
        for stride in (1, 2):
            deep = windowed("conv", shape, 6, (3, 3), (stride, stride), (1, 1), act=act, groups=6,
                            weight=weight[:, :1], **more)  # fmt: skip
            yield f"depthwise conv of stride {stride}, {act}", deep, [shape]
        linear = Op("linear", "y", ("x",), (6,), weight=weight[:, :, 0, 0], act=act, **more)
        yield f"linear, {act}", linear, [shape[:1]]
    affine = dict(weight=vector, bias=other)
    for act in ("", "silu", "sigmoid"):
        yield f"affine, {act}", Op("affine", "y", ("x",), shape, act=act, **affine), [shape]
        for kind in ("add", "sub", "mul", "div", "maximum"):
            for beside in dict.fromkeys((shape, (channels, 1, 1), (1, *shape[1:]), (1, 1, 1))):
                op = Op(kind, "y", ("x", "z"), shape, act=act)
                yield f"{kind} {beside}, {act}", op, [shape, beside]
    yield "x + x", Op("add", "y", ("x", "x"), shape), [shape]
    yield "scalar", Op("scalar", "y", ("x",), shape, alpha=-0.7, beta=1.3), [shape]
    yield "layernorm", Op("layernorm", "y", ("x",), shape, alpha=1e-6, **affine), [shape]
    for groups in (1, 2, channels):
        op = Op("groupnorm", "y", ("x",), shape, alpha=1e-3, groups=groups, **affine)
        yield f"groupnorm {groups}", op, [shape]


def pools(shape: Shape) -> Iterator[Case]:
    for kernel, stride, pad, dilation in (
        ((2, 2), (2, 2), (0, 0), (1, 1)), ((3, 3), (2, 2), (1, 1), (1, 1)),
        ((3, 3), (1, 1), (1, 1), (1, 1)), ((2, 3), (2, 1), (0, 1), (1, 1)),
        ((3, 3), (1, 1), (1, 1), (2, 2)), ((5, 5), (3, 3), (2, 2), (1, 1)),
    ):  # fmt: skip
        for kind in ("maxpool", "avgpool"):
            for before in (0, 1) if kind == "avgpool" and dilation == (1, 1) else (0,):
                if kind == "avgpool" and dilation != (1, 1):
                    continue
                op = windowed(kind, shape, shape[0], kernel, stride, pad, dilation, before=before)
                if op is None:
                    continue
                name = f"{kind} {kernel} {stride} {pad} {dilation} {before}"
                yield name, op, [shape]
                sides = zip(shape[1:], kernel, stride, pad, dilation, op.shape[1:], strict=True)
                # one more where it begins within the input or the padding before it
                more = [n + ((s + p - 1) // st >= n) for s, _, st, p, _, n in sides]
                if tuple(more) != op.shape[1:]:
                    larger = Op(**dict(vars(op), shape=(shape[0], *more)))
                    yield f"{name} ceil_mode", larger, [shape]
    for size in ((1, 1), (2, 3), (3, 1), (7, 7)):
        for kind in ("adaptive_avg", "adaptive_max"):
            yield f"{kind} {size}", Op(kind, "y", ("x",), (shape[0], *size)), [shape]


def moved(shape: Shape) -> Iterator[Case]:
    """Ops that put pixels elsewhere."""
    channels, height, width = shape
    for size in ((2 * height, 2 * width), (3 * height, width + 2), (height, max(width - 2, 1))):
        op = Op("upsample_nearest", "y", ("x",), (channels, *size))
        yield f"nearest {size}", op, [shape]
        for corners in (0, 1):
            op = Op("upsample_bilinear", "y", ("x",), (channels, *size), before=corners)
            yield f"bilinear {size} {corners}", op, [shape]
    for kind in ("upsample_nearest", "upsample_bilinear"):
        size = int(height * 1.7), int(width * 2.5)
        op = Op(kind, "y", ("x",), (channels, *size), alpha=1.7, beta=2.5)
        yield f"{kind} by a factor", op, [shape]
    for index in ((2, 0, 5, 5), (1, 2, 3), (4,), tuple(range(channels))[::-1]):
        op = Op("gather", "y", ("x",), (len(index), height, width), index=index)
        yield f"gather {index}", op, [shape]
    wide = (channels + 3, height + 3, width + 1)
    yield "pad", Op("pad", "y", ("x",), wide, pad=(1, 0), before=2, alpha=0.7), [shape]
    yield "pad below", Op("pad", "y", ("x",), (channels, height + 1, width + 2)), [shape]
    yield "nothing of it", Op("pad", "y", ("x",), wide, before=-channels), [shape]
    for mode in ("reflect", "replicate", "circular"):
        far = {"reflect": [s - 1 for s in shape[1:]], "circular": shape[1:]}.get(mode, (3, 4))
        top, left = (min(3, n) for n in far)
        round_it = (channels, height + top + min(1, far[0]), width + left)
        yield mode, Op(f"pad_{mode}", "y", ("x",), round_it, pad=(top, left)), [shape]
    stretched = (channels, 2 * height - 1, 3 * width - 2)
    yield "stretch", Op("stretch", "y", ("x",), stretched, stride=(2, 3)), [shape]
    if height > 2 and width > 2:
        half = (channels, (height + 1) // 2, (width - 1 + 1) // 2)
        yield "slice", Op("slice", "y", ("x",), half, stride=(2, 2), pad=(0, -1)), [shape]
        part = (channels, height - 2, width - 1)
        yield "slice of neighbours", Op("slice", "y", ("x",), part, pad=(-1, -1)), [shape]
    flat = Op("flatten", "y", ("x",), (channels * height * width,))
    yield "flatten", flat, [shape]
    joined = Op("cat", "y", ("x", "z", "x"), (2 * channels + 2, height, width))
    yield "cat", joined, [shape, (2, height, width)]


def cases(plane: tuple[int, int]) -> Iterator[Case]:
    shape = (6, *plane)
    for some in (convs, pixelwise, pools, moved):
        yield from some(shape)
    yield from many(plane)
    if plane == (5, 5):
        yield from many((7, 8))  # of four tiles


def surrounded(op: Op, shapes: list[Shape], dtype: torch.dtype) -> list[Op]:
    """The op, and a conv that also reads what lies around the op's result; quantized for int8."""
    assert plan.native(op, shapes), op
    ops = [op]
    if len(op.shape) == 3:
        weight = torch.ones(1, op.shape[0], 3, 3)
        around = dict(weight=weight, kernel=(3, 3), pad=(1, 1))
        ops.append(Op("conv", "sum", ("y",), (1, *op.shape[1:]), **around))
    if dtype != torch.int8:
        return ops
    inputs = named(op, shapes)
    return quantization.quantized(ops, inputs, {made.name for made in ops}, [drawn(op, inputs, 33)])


def named(op: Op, shapes: list[Shape]) -> dict[str, Shape]:
    return dict(zip(dict.fromkeys(op.inputs), shapes, strict=True))


def network(ops: list[Op], shapes: list[Shape], dtype: torch.dtype, threads: int) -> plan.Network:
    """What `surrounded` makes, to be run."""
    outputs = [made.name for made in ops]
    fast = plan.Network(ops, named(ops[0], shapes), outputs, dtype=dtype, threads=threads)
    fast.ops = ops
    return fast


def drawn(op: Op, inputs: dict[str, Shape], count: int) -> dict[str, torch.Tensor]:
    """Random inputs of an op, divisors apart from zero."""
    random = torch.Generator().manual_seed(1)
    values = {name: torch.randn(33, *s, generator=random)[:count] for name, s in inputs.items()}
    if op.kind == "div":
        values["z"] = values["z"].sign() * (values["z"].abs() + 0.5)
    return values


@torch.no_grad()
def error(fast: plan.Network, op: Op, count: int) -> float:
    """By how much the op and the conv behind it miss torch's, as a share of what is allowed.

    That is a code of int8 (what lies between two may become either), else BOUNDS of the largest
    value. Each op is given what the engine itself made before it.
    """
    values = drawn(op, fast.inputs, count)
    ops, bound = fast.ops, BOUNDS[fast.dtype]
    if op.scales:
        codes = map(quantization.Code, op.scales, op.zeros)
        values |= {
            n: quantization.coded(values[n], c) for n, c in zip(op.inputs, codes, strict=False)
        }
    found = dict(zip(fast.outputs, fast(*values.values()), strict=True))
    most = 0.0
    for made in ops:
        wanted, own = reference.run(made, values, count), found[made.name]
        step = made.scales[-1] if made.scales else 0.0
        allowed = 1.01 * step or bound * float(wanted.abs().max().clamp(min=1e-3))
        most = max(most, float((own - wanted).abs().max()) / allowed)
        values[made.name] = own
    return most


def sweep_ops(batches: tuple[int, ...], planes=PLANES) -> int:
    """Compare every op with torch, in both layouts; returns the number of comparisons."""
    compared, lib = 0, build.library()
    for dtype in (t for t in build.TYPES if build.computes(lib, t)):
        for plane in planes:
            for name, op, shapes in cases(plane):
                ops = surrounded(op, shapes, dtype)
                for threads in (1, 3):
                    fast = network(ops, shapes, dtype, threads)
                    for count in batches:
                        off = error(fast, ops[0], count)
                        assert off < 1, (name, shapes, dtype, threads, count, off)
                        compared += 1
    return compared
