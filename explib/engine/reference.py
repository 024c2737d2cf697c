"""Every op of the engine in torch: what runs an op without a kernel, and what kernels are held to.

Values are float32 tensors (N, *shape) by name.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from explib.engine.graph import Call, Op, Other, Size
from explib.engine.views import View


def run(op: Op, values: dict[str, Any], batch: int) -> Any:
    """The result of an op on these values; of kind torch, whatever its call returns."""
    if op.call is not None:
        args, kwargs = resolved((op.call.args, op.call.kwargs), values, batch)
        return op.call.function(*args, **kwargs)
    found = _made(op, [values[name] for name in op.inputs])
    if op.scales:
        found = coded(found, op.scales[-1], op.zeros[-1])
    return found.reshape(batch, *op.shape)


def coded(x: torch.Tensor, scale: float, zero: int) -> torch.Tensor:
    """What int8 keeps of x: scale * (code - zero), the code of 0 to 255; of a scale of 0, x."""
    return x if scale == 0 else ((x * (1 / scale) + zero).round().clamp(0, 255) - zero) * scale


def shape(op: Op, sources: list[tuple[int, ...]]) -> tuple[int, ...]:
    """What torch makes of inputs of these shapes, all without batch; nothing is computed.

    Whatever torch raises for an op that cannot be.
    """
    tensors: dict[str, Any] = {
        name: v.to("meta") for name, v in vars(op).items() if isinstance(v, torch.Tensor)
    }
    inputs = [torch.empty(2, *source, device="meta") for source in sources]
    return tuple(_made(replace(op, **tensors), inputs).shape[1:])


def _made(op: Op, inputs: list[torch.Tensor]) -> torch.Tensor:
    found = KINDS[op.kind](op, *map(_planes, inputs))
    return ACTS[op.act](op, found) if op.kind in ACTIVE and op.act else found


def resolved(arguments: Any, values: dict[str, Any], batch: int) -> Any:
    """Arguments or results with tensors and numbers for what stands for them."""

    def leaf(value: Any) -> Any:
        if isinstance(value, View):
            return value.of(values[value.base])
        if isinstance(value, Other):
            return values[value.name]
        return value.of(batch) if isinstance(value, Size) else value

    return tree_map(leaf, arguments, is_leaf=lambda v: isinstance(v, (View, Other, Size, Call)))


def _planes(x: torch.Tensor) -> torch.Tensor:
    """(N, C) as (N, C, 1, 1)."""
    return x[:, :, None, None] if x.ndim == 2 else x


def _channels(value: torch.Tensor | None) -> torch.Tensor:
    assert value is not None
    return value.reshape(1, -1, 1, 1)


def _surrounded(op: Op, x: torch.Tensor, value: float = 0.0) -> torch.Tensor:
    """The part of the plane that the windows of an op cover, `value` where that is outside."""
    sides: list[int] = []
    for i in (1, 0):
        reach = (op.shape[1 + i] - 1) * op.stride[i] + op.dilation[i] * (op.kernel[i] - 1) + 1
        sides += [op.pad[i], reach - op.pad[i] - x.shape[2 + i]]
    return F.pad(x, sides, value=value)


def _conv(op: Op, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
    assert op.weight is not None
    x = _surrounded(op, x)
    y = F.conv2d(x, op.weight, op.bias, op.stride, 0, op.dilation, op.groups)
    return y if other is None else y + other


def _linear(op: Op, x: torch.Tensor) -> torch.Tensor:
    assert op.weight is not None
    return F.linear(x.flatten(1), op.weight, op.bias)[:, :, None, None]


def _maxpool(op: Op, x: torch.Tensor) -> torch.Tensor:
    x = _surrounded(op, x, -torch.inf)
    return F.max_pool2d(x, op.kernel, op.stride, 0, op.dilation)


def _avgpool(op: Op, x: torch.Tensor) -> torch.Tensor:
    """The sum over each window, over how many pixels it has: padding counts up to its own edge."""
    one = torch.ones_like(x[:1, :1])
    if op.before:
        one = F.pad(one, (op.pad[1], op.pad[1], op.pad[0], op.pad[0]), value=1.0)
        counted = _surrounded(_unpadded(op), one)
    else:
        counted = _surrounded(op, one)
    total, size = (
        F.avg_pool2d(v, op.kernel, op.stride, divisor_override=1)
        for v in (_surrounded(op, x), counted)
    )
    return total / size


def _unpadded(op: Op) -> Op:
    return Op(op.kind, "", (), op.shape, kernel=op.kernel, stride=op.stride)


def _affine(op: Op, x: torch.Tensor) -> torch.Tensor:
    return x * _channels(op.weight) + _channels(op.bias)


def _layernorm(op: Op, x: torch.Tensor) -> torch.Tensor:
    y = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], op.weight, op.bias, op.alpha)
    return y.permute(0, 3, 1, 2)


def _upsampled(op: Op, x: torch.Tensor) -> torch.Tensor:
    factors = (op.alpha or None, op.beta or None)
    if op.kind == "upsample_nearest":
        return torch.ops.aten.upsample_nearest2d(x, op.shape[1:], *factors)
    return torch.ops.aten.upsample_bilinear2d(x, op.shape[1:], bool(op.before), *factors)


def _windowed(op: Op, x: torch.Tensor) -> torch.Tensor:
    """Of slice and pad."""
    back = op.shape[0] - op.before - x.shape[1]
    inside = _surrounded(op, x, op.alpha)[:, :, :: op.stride[0], :: op.stride[1]]
    return F.pad(inside, (0, 0, 0, 0, op.before, back), value=op.alpha)


def _around(op: Op, x: torch.Tensor) -> torch.Tensor:
    """Of pad_reflect, pad_replicate and pad_circular."""
    (top, left), (height, width) = op.pad, x.shape[2:]
    sides = (left, op.shape[2] - left - width, top, op.shape[1] - top - height)
    return F.pad(x, sides, mode=op.kind.removeprefix("pad_"))


def _stretched(op: Op, x: torch.Tensor) -> torch.Tensor:
    y = x.new_zeros(len(x), *op.shape)
    y[:, :, :: op.stride[0], :: op.stride[1]] = x
    return y


KINDS: dict[str, Callable[..., torch.Tensor]] = {
    "conv": _conv,
    "linear": _linear,
    "maxpool": _maxpool,
    "avgpool": _avgpool,
    "adaptive_avg": lambda op, x: F.adaptive_avg_pool2d(x, op.shape[1:]),
    "adaptive_max": lambda op, x: F.adaptive_max_pool2d(x, op.shape[1:]),
    "affine": _affine,
    "add": lambda op, x, y=None: x + (x if y is None else y),
    "mul": lambda op, x, y=None: x * (x if y is None else y),
    "sub": lambda op, x, y: x - y,
    "div": lambda op, x, y: x / y,
    "maximum": lambda op, x, y=None: torch.maximum(x, x if y is None else y),
    "scalar": lambda op, x: op.alpha * x + op.beta,
    "act": lambda op, x: x,
    "layernorm": _layernorm,
    "groupnorm": lambda op, x: torch.group_norm(x, op.groups, op.weight, op.bias, op.alpha),
    "upsample_nearest": _upsampled,
    "upsample_bilinear": _upsampled,
    "gather": lambda op, x: x[:, list(op.index)],
    "slice": _windowed,
    "pad": _windowed,
    "pad_reflect": _around,
    "pad_replicate": _around,
    "pad_circular": _around,
    "stretch": _stretched,
    "cat": lambda op, *parts: torch.cat(parts, 1),
    "flatten": lambda op, x: x.flatten(1),
}
ACTIVE = ("conv", "linear", "affine", "add", "sub", "mul", "div", "maximum", "act")

ACTS: dict[str, Callable[[Op, torch.Tensor], torch.Tensor]] = {
    "relu": lambda op, x: F.relu(x),
    "relu6": lambda op, x: F.relu6(x),
    "silu": lambda op, x: F.silu(x),
    "hardswish": lambda op, x: F.hardswish(x),
    "hardsigmoid": lambda op, x: F.hardsigmoid(x),
    "sigmoid": lambda op, x: x.sigmoid(),
    "gelu": lambda op, x: F.gelu(x),
    "gelu_tanh": lambda op, x: F.gelu(x, approximate="tanh"),
    "leaky": lambda op, x: F.leaky_relu(x, op.alpha),
    "prelu": lambda op, x: x.where(x > 0, x * _channels(op.slope)),
    "elu": lambda op, x: F.elu(x, op.alpha),
    "tanh": lambda op, x: x.tanh(),
    "mish": lambda op, x: F.mish(x),
    "clamp": lambda op, x: x.clamp(op.alpha, op.beta),
}
