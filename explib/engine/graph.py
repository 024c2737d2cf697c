"""A network as a list of ops, and what belongs together fused into one."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from explib.engine.views import View


@dataclass(frozen=True)
class Op:
    """One op of the engine, or one call left to torch (kind `torch`).

    inputs: names of values. shape: the output's without the batch, (C, H, W) or (C,), which is as
    (C, 1, 1). Windows and planes: the output at (y, x) begins to read its input at (y * stride -
    pad); what lies outside is zero, and how far that goes at the bottom and at the right follows
    from the shapes.

    conv: weight (F, C / groups, KH, KW); a second input is added before `act`. linear: weight (F,
    C). maxpool; avgpool (before: whether padding counts, as torch counts it). adaptive_avg,
    adaptive_max: to the output's plane. affine: weight * x + bias per channel, each (C,). add, sub,
    mul, div, maximum: of two inputs; the second has the output's shape, one value a channel (C, 1,
    1), one plane (1, H, W), or one value (1, 1, 1). scalar: alpha * x + beta. act: `act` alone.
    layernorm: over the channels of each pixel, with weight and bias (C,), alpha is eps. groupnorm:
    the same over each of `groups` of channels, all pixels at once. upsample_nearest,
    upsample_bilinear (before: align_corners; alpha, beta: scale factors of rows and columns where
    they were given, else 0 and the ratio of the sizes counts). gather: channels `index` of the
    input. slice, pad: input[c - before, y * stride - pad, x * stride - pad], `alpha` where that is
    outside; pad_reflect, pad_replicate, pad_circular: the pixel that torch has there. stretch:
    zeros between pixels, `stride` - 1 of them. cat: channels of the inputs, one after the other.
    flatten: (C, H, W) to (C * H * W,). copy, load and store are of the plan.

    act: relu, relu6, silu, hardswish, hardsigmoid, sigmoid, gelu, gelu_tanh, leaky (alpha: slope),
    prelu (slope: (C,)), elu (alpha), tanh, mish, clamp (alpha: least, beta: most), or none; as the
    last step of conv, linear, affine, add, sub, mul, div and maximum.
    """

    kind: str
    name: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    weight: torch.Tensor | None = field(default=None, compare=False)
    bias: torch.Tensor | None = field(default=None, compare=False)
    slope: torch.Tensor | None = field(default=None, compare=False)
    steps: torch.Tensor | None = field(default=None, compare=False)  # of int8 weights
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    act: str = ""
    alpha: float = 0.0
    beta: float = 0.0
    index: tuple[int, ...] = ()
    before: int = 0
    scales: tuple[float, ...] = ()  # of int8: of the inputs and the result, and what codes 0 has;
    zeros: tuple[int, ...] = ()  # a scale of 0: the result stays float
    label: str = ""  # the layer or node of the network that it comes from, and its op
    why: str = ""  # of torch: what keeps it from being another kind
    call: "Call | None" = field(default=None, compare=False)  # of torch: what to call


@dataclass(frozen=True)
class Other:
    """A value that is no batch of float tensors: only torch computes with it."""

    name: str


@dataclass(frozen=True)
class Size:
    """A number that depends on the batch: a sympy expression, and its symbols for the batch."""

    expression: Any
    symbols: tuple

    def of(self, batch: int) -> int:
        """The number for a batch."""
        return int(self.expression.subs(dict.fromkeys(self.symbols, batch)))


@dataclass(frozen=True)
class Call:
    """A function and its arguments, in which View, Other and Size stand for what is not known."""

    function: Callable
    args: tuple
    kwargs: dict


@dataclass(frozen=True)
class Graph:
    """A network as ops in order.

    inputs: names of the values of its tensors, as its forward takes them, flattened. results: what
    it returns, flattened, as in a Call; form: how to put them together (a TreeSpec).
    """

    ops: list[Op]
    inputs: list[str]
    shapes: dict[str, tuple[int, ...]]  # of the inputs that are batches of float tensors
    results: list[Any]
    form: Any


def names(values: Any) -> set[str]:
    """The values that arguments or results are made of."""
    if isinstance(values, View):
        return {values.base}
    if isinstance(values, Other):
        return {values.name}
    if isinstance(values, dict):
        return names(list(values.values()))
    return set().union(*map(names, values)) if isinstance(values, (list, tuple)) else set()


def living(ops: Sequence[Op], results: set[str]) -> list[Op]:
    """The ops that the results need."""
    needed, kept = set(results), []
    for op in reversed(ops):
        if op.name in needed:
            kept.append(op)
            needed |= {*op.inputs}
    return kept[::-1]


Native = Callable[[Op, list[tuple[int, ...]]], bool]
"""Whether the engine has a kernel for an op whose inputs have these shapes."""


def fuse(made: Sequence[Op], kept: set[str], shapes: dict[str, tuple], native: Native) -> list[Op]:
    """Scale and shift, a residual, an activation, and slices as parts of the op before them.

    And zeros around a plane as part of the conv behind them.

    kept: values that are needed outside the list, and so cannot vanish. shapes: of the values that
    come from outside. Ops with a kernel are not fused into one without. A fused op has the name of
    the last value it makes.
    """
    uses = Counter(name for op in made for name in op.inputs)
    shapes = shapes | {op.name: op.shape for op in made}

    def runs(op: Op) -> bool:
        return op.kind != "torch" and native(op, [shapes[name] for name in op.inputs])

    fused: dict[str, Op] = {}
    for op in made:
        both = op
        for name in dict.fromkeys(op.inputs):
            if name not in fused or name in kept or uses[name] > 1:
                continue
            rest = tuple(n for n in op.inputs if n != name)
            host = fused[name]
            one = _together(host, op, shapes)
            if one is not None and (runs(one) or not runs(op if host.kind == "pad" else host)):
                # it moves here, where its other input is there too; nothing between used it
                both = replace(one, name=op.name, inputs=host.inputs + rest)
                del fused[name]
                break
        fused[op.name] = both
    return list(fused.values())


def _together(host: Op, op: Op, shapes: dict[str, tuple]) -> Op | None:
    """`op` and `host`, whose only user it is, as one."""
    plain = not host.act and len(host.inputs) == 1
    if op.kind == "act" and not host.act and host.kind in _ACTIVE:
        return _acting(host, op)
    alike = all(shapes[name] == op.shape for name in (host.name, *op.inputs))
    if op.kind == "add" and host.kind == "conv" and plain and alike:
        return _acting(host, op)
    if op.kind in ("affine", "scalar") and host.kind in ("conv", "linear", "affine") and plain:
        return _scaled(host, op)
    if op.kind in ("slice", "pad") and host.kind == "slice":
        return _sliced(host, op)
    if op.kind == "conv" and host.kind == "pad" and _is_rim(host, shapes[host.inputs[0]]):
        return replace(op, pad=(op.pad[0] + host.pad[0], op.pad[1] + host.pad[1]))
    return None


def _is_rim(pad: Op, source: tuple) -> bool:
    """Whether it puts zeros around a plane, and cuts nothing off."""
    plain = pad.stride == (1, 1) and pad.alpha == 0 and pad.shape[0] == source[0]
    ends = [size + p for size, p in zip(source[1:], pad.pad, strict=True)]
    inside = all(end <= size for end, size in zip(ends, pad.shape[1:], strict=True))
    return plain and pad.before == 0 and min(pad.pad) >= 0 and inside


def _acting(host: Op, op: Op) -> Op:
    return replace(host, act=op.act, slope=op.slope, alpha=op.alpha, beta=op.beta)


_ACTIVE = ("conv", "linear", "affine", "add", "sub", "mul", "div", "maximum")


def _scaled(host: Op, op: Op) -> Op | None:
    """A conv, linear layer, scale and shift with another scale and shift per channel behind it."""
    weight = host.weight
    assert weight is not None
    if op.kind == "scalar":
        scale, shift = weight.new_tensor(op.alpha), weight.new_tensor(op.beta)
    else:
        assert op.weight is not None and op.bias is not None
        scale, shift = op.weight, op.bias
    column = scale.reshape(-1, *[1] * (weight.ndim - 1))
    bias = shift.expand(len(weight)) if host.bias is None else host.bias * scale + shift
    scaled = replace(host, weight=weight * column, bias=bias)
    return scaled if op.kind == "scalar" else _acting(scaled, op)


def _sliced(host: Op, op: Op) -> Op | None:
    """Two slices as one; and a slice with channels of zeros around it."""
    plane = op.shape[1:] == host.shape[1:] and op.pad == (0, 0) and op.stride == (1, 1)
    if op.kind == "pad" and not plane:
        return None  # what lies beyond a slice is not what lies beyond its input
    return replace(
        host,
        kind=op.kind,
        shape=op.shape,
        stride=(host.stride[0] * op.stride[0], host.stride[1] * op.stride[1]),
        pad=(
            host.pad[0] + op.pad[0] * host.stride[0],
            host.pad[1] + op.pad[1] * host.stride[1],
        ),
        before=op.before,
        alpha=op.alpha,
    )
