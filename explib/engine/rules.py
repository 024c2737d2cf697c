"""The one table from torch's aten ops to the engine's: RULES.

A rule takes a Node and makes ops of it, and returns the value (a View); or None, and torch runs it.
Adding an op is a function and a line of the table.
"""

from collections.abc import Callable
from math import inf, prod
from typing import Any

import torch

from explib.engine import arithmetic, axes, pooling
from explib.engine.nodes import Node, floats, pair
from explib.engine.views import View

# Layers with weights


def _conv(node: Node) -> View | None:
    if node["transposed"]:
        return _transposed(node)
    x, weight, bias = node.plane(node["input"]), floats(node["weight"]), node["bias"]
    if x is None or weight is None or weight.ndim != 4 or node.size is None:
        return None
    if bias is not None and floats(bias) is None:
        return None
    dilation, given = pair(node["dilation"]), node["padding"]
    if given in ("same", "valid"):
        share = 1 if given == "same" else 0
        sides = zip(dilation, weight.shape[2:], strict=True)
        pad = tuple(share * d * (k - 1) // 2 for d, k in sides)
    else:
        pad = pair(given)
    return node.add(
        "conv", (x.base,), node.size, weight=weight, bias=bias, kernel=tuple(weight.shape[2:]),
        stride=pair(node["stride"]), pad=pad, dilation=dilation, groups=node["groups"],
    )  # fmt: skip


def _transposed(node: Node) -> View | None:
    """A transposed conv: zeros between the pixels, and the conv whose gradient it is, reversed."""
    x, weight, bias = node.plane(node["input"]), floats(node["weight"]), node["bias"]
    if x is None or weight is None or weight.ndim != 4 or node.size is None:
        return None
    if bias is not None and floats(bias) is None:
        return None
    groups, stride, dilation = node["groups"], pair(node["stride"]), pair(node["dilation"])
    channels, filters, *kernel = weight.shape
    weight = weight.reshape(groups, channels // groups, filters, *kernel).transpose(1, 2)
    weight = weight.reshape(groups * filters, channels // groups, *kernel).flip(2, 3).contiguous()
    if stride != (1, 1):
        plane = ((size - 1) * step + 1 for size, step in zip(x.shape[1:], stride, strict=True))
        x = node.add("stretch", (x.base,), (channels, *plane), stride=stride)
    sides = zip(dilation, kernel, pair(node["padding"]), strict=True)
    return node.add(
        "conv", (x.base,), node.size, weight=weight, bias=bias, kernel=tuple(kernel),
        pad=tuple(d * (k - 1) - p for d, k, p in sides), dilation=dilation, groups=groups,
    )  # fmt: skip


def _linear(node: Node) -> View | None:
    """A linear layer over the channels: of many pixels, a conv 1x1."""
    x, weight, bias = node.along(node["input"], -1), floats(node["weight"]), node["bias"]
    if x is None or weight is None or weight.ndim != 2:
        return None
    if bias is not None and floats(bias) is None:
        return None
    shape = (len(weight), *x.shape[1:])
    if prod(shape[1:]) == 1:
        new = node.add("linear", (x.base,), shape, weight=weight, bias=bias)
    else:
        weight = weight[:, :, None, None]
        new = node.add("conv", (x.base,), shape, weight=weight, bias=bias)
    return View(new.base, shape, (*x.dims[:-1], new.channels))


def _normalized(node: Node) -> View | None:
    """A BatchNorm with statistics of its own."""
    mean, var = floats(node["running_mean"]), floats(node["running_var"])
    if mean is None or var is None or node["training"]:
        return None
    weight, bias = floats(node["weight"]), floats(node["bias"])
    scale = (var + node["eps"]).rsqrt() * (1 if weight is None else weight)
    shift = -mean * scale + (0 if bias is None else bias)
    return arithmetic.affine(node, node["input"], 0, scale, shift)


def _first(rule: Callable) -> Callable:
    """A rule for an op that returns more than one tensor, of which only the first is used."""

    def first(node: Node):
        if node.used - {0}:
            return None
        node.size = node.sizes[0]
        value = rule(node)
        return None if value is None else (value, None, None)

    return first


def _layernorm(node: Node) -> View | None:
    weight, bias = floats(node["weight"]), floats(node["bias"])
    x = node.along(node["input"], -1) if len(node["normalized_shape"]) == 1 else None
    if x is None or list(node["normalized_shape"]) != [x.shape[0]]:
        return None
    weight = torch.ones(x.shape[0], dtype=torch.float32) if weight is None else weight
    bias = torch.zeros(x.shape[0], dtype=torch.float32) if bias is None else bias
    return node.like(x, "layernorm", weight=weight, bias=bias, alpha=float(node["eps"]))


def _groupnorm(node: Node) -> View | None:
    """A norm with the statistics of each image, of groups of channels or of every one."""
    x, groups = node.plane(node["input"]), node["num_groups"]
    if x is None or node["use_input_stats"] is False:
        return None
    weight, bias = floats(node["weight"]), floats(node["bias"])
    weight = torch.ones(x.shape[0], dtype=torch.float32) if weight is None else weight
    bias = torch.zeros(x.shape[0], dtype=torch.float32) if bias is None else bias
    return node.add(
        "groupnorm", (x.base,), x.shape, weight=weight, bias=bias, alpha=float(node["eps"]),
        groups=groups or x.shape[0],
    )  # fmt: skip


# Activations


def _act(act: str, alpha: Callable | float = 0.0, beta: Callable | float = 0.0) -> Callable:
    """The rule of an activation; alpha, beta: numbers, or what makes them of the node."""

    def rule(node: Node) -> View | None:
        if not isinstance(node["self"], View):
            return None
        both = [float(v(node) if callable(v) else v) for v in (alpha, beta)]
        return node.like(node["self"], "act", act=act, alpha=both[0], beta=both[1])

    return rule


def _clamp(node: Node) -> View | None:
    """Between two numbers: ReLU and ReLU6 by their names."""
    low, high = (node[a] if a in node.args else node[b] for a, b in _BOUNDS)
    if not all(bound is None or isinstance(bound, (int, float)) for bound in (low, high)):
        return None
    low, high = float(-inf if low is None else low), float(inf if high is None else high)
    act = {(0.0, inf): "relu", (0.0, 6.0): "relu6"}.get((low, high))
    return (_act(act) if act else _act("clamp", low, high))(node)


_BOUNDS = (("min", "min_val"), ("max", "max_val"))


def _gelu(node: Node) -> View | None:
    return _act("gelu_tanh" if node["approximate"] == "tanh" else "gelu")(node)


def _elu(node: Node) -> View | None:
    plain = node["scale"] == node["input_scale"] == 1
    return _act("elu", node["alpha"])(node) if plain else None


def _selu(node: Node) -> View | None:
    """By torch's constants, or of celu by its alpha."""
    alpha = node["alpha"]
    if alpha is not None:
        node.args["self"] = arithmetic.scalar(node, node["self"], 1 / alpha, 0.0)
    y = _act("elu", 1.6732632423543772 if alpha is None else 1.0)(node)
    return y and arithmetic.scalar(node, y, alpha or 1.0507009873554805, 0.0)


def _prelu(node: Node) -> View | None:
    slope = floats(node["weight"])
    if slope is None:
        return None
    if slope.numel() == 1:
        return _act("leaky", float(slope))(node)
    x = node.along(node["self"], 0)
    return None if x is None else node.like(x, "act", act="prelu", slope=slope)


# Sampling


def _pixel_shuffle(node: Node) -> View | None:
    """Channels as the pixels of a finer plane: the transposed conv that sets them there."""
    x, factor = node.plane(node["self"]), node["upscale_factor"]
    if x is None:
        return None
    ones = torch.eye(factor**2).reshape(factor**2, 1, factor, factor)
    groups = x.shape[0] // factor**2
    node.args |= dict(input=x, weight=ones.repeat(groups, 1, 1, 1), bias=None, groups=groups)
    node.args |= dict(stride=factor, padding=0, dilation=1)
    return _transposed(node)


def _pixel_unshuffle(node: Node) -> View | None:
    """The pixels of a coarser plane as channels: the conv that picks them."""
    x, factor = node.plane(node["self"]), node["downscale_factor"]
    if x is None:
        return None
    ones = torch.eye(factor**2).reshape(factor**2, 1, factor, factor)
    node.args |= dict(input=x, weight=ones.repeat(x.shape[0], 1, 1, 1), groups=x.shape[0])
    node.args |= dict(stride=factor, padding=0, dilation=1)
    return _conv(node)


def _largest(node: Node) -> Any:
    """Of two values, or along axes; the places of the largest are not found."""
    if node["other"] is not None:
        return arithmetic.maximum(node)
    return None if node["dim"] is None else _first(pooling.over("adaptive_max"))(node)


RULES: dict[str, Callable[[Node], Any]] = {
    name: rule
    for rule, names in {
        _conv: "conv2d convolution",
        _transposed: "conv_transpose2d",
        _linear: "linear",
        _normalized: "batch_norm",
        _first(_normalized): "_native_batch_norm_legit_no_training",
        _layernorm: "layer_norm",
        _first(_layernorm): "native_layer_norm",
        _groupnorm: "group_norm instance_norm",
        _act("relu"): "relu",
        _act("relu6"): "relu6",
        _act("silu"): "silu",
        _act("hardswish"): "hardswish",
        _act("hardsigmoid"): "hardsigmoid",
        _act("sigmoid"): "sigmoid",
        _act("tanh"): "tanh",
        _act("mish"): "mish",
        _act("leaky", lambda node: node["negative_slope"]): "leaky_relu",
        _clamp: "clamp clamp_min clamp_max hardtanh",
        _gelu: "gelu",
        _elu: "elu",
        _selu: "selu celu",
        _prelu: "prelu",
        arithmetic.add: "add",
        arithmetic.subtract: "sub subtract",
        arithmetic.subtract_from: "rsub",
        arithmetic.multiply: "mul multiply",
        arithmetic.divide: "div divide",
        arithmetic.maximum: "maximum",
        arithmetic.power: "pow square",
        (lambda node: arithmetic.scalar(node, node["self"], -1.0, 0.0)): "neg negative",
        pooling.maxpool: "max_pool2d",
        _first(pooling.maxpool): "max_pool2d_with_indices",
        pooling.avgpool: "avg_pool2d",
        pooling.adaptive("adaptive_avg"): "adaptive_avg_pool2d _adaptive_avg_pool2d",
        _first(pooling.adaptive("adaptive_max")): "adaptive_max_pool2d",
        pooling.over("adaptive_avg"): "mean",
        pooling.over("adaptive_avg", total=True): "sum",
        pooling.over("adaptive_max"): "amax",
        _largest: "max",
        pooling.upsampled("upsample_nearest"): "upsample_nearest2d",
        pooling.upsampled("upsample_bilinear"): "upsample_bilinear2d",
        axes.slice: "slice",
        axes.narrow: "narrow",
        axes.select: "select",
        axes.split: "chunk split split_with_sizes",
        axes.indexed: "index index_select",
        axes.flip: "flip",
        axes.repeated: "repeat repeat_interleave",
        axes.gated: "glu",
        axes.zeros: "zeros_like new_zeros",
        _pixel_shuffle: "pixel_shuffle",
        _pixel_unshuffle: "pixel_unshuffle",
        axes.shuffle: "channel_shuffle native_channel_shuffle",
        axes.cat: "cat concat concatenate",
        axes.pad: "pad constant_pad_nd",
        axes.same: (
            "contiguous clone alias detach to _to_copy type_as lift_fresh_copy "
            "dropout feature_dropout alpha_dropout feature_alpha_dropout"
        ),
        axes.reshaped: (
            "view reshape flatten unflatten squeeze unsqueeze _unsafe_view view_as reshape_as"
        ),
        axes.expanded: "expand expand_as",
        axes.permuted: "permute transpose",
    }.items()
    for name in names.split()
}
"""The rule of each aten op, by its name without overload; in place or not is the same."""
