"""The one table from torch's aten ops to the engine's: RULES.

A rule takes a Node and makes ops of it, and returns the value (a View); or None, and torch runs it.
Adding an op is a function and a line of the table.
"""

from collections.abc import Callable
from math import inf, prod
from typing import Any

import torch

from explib.engine import arithmetic, axes
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


def _prelu(node: Node) -> View | None:
    slope = floats(node["weight"])
    if slope is None:
        return None
    if slope.numel() == 1:
        return _act("leaky", float(slope))(node)
    x = node.along(node["self"], 0)
    return None if x is None else node.like(x, "act", act="prelu", slope=slope)


# Pooling and sampling


def _maxpool(node: Node) -> View | None:
    x, kernel = node.plane(node["self"]), pair(node["kernel_size"])
    if x is None or node.size is None:
        return None
    return node.add(
        "maxpool", (x.base,), node.size, kernel=kernel, stride=pair(node["stride"], kernel),
        pad=pair(node["padding"]), dilation=pair(node["dilation"]),
    )  # fmt: skip


def _avgpool(node: Node) -> View | None:
    x, kernel = node.plane(node["self"]), pair(node["kernel_size"])
    if x is None or node["divisor_override"] is not None:
        return None
    return node.add(
        "avgpool", (x.base,), node.size, kernel=kernel, stride=pair(node["stride"], kernel),
        pad=pair(node["padding"]), before=int(node["count_include_pad"]),
    )  # fmt: skip


def _adaptive(kind: str) -> Callable:
    def rule(node: Node) -> View | None:
        x = node.plane(node["self"])
        if x is None or x.sizes == node.size:
            return x
        return node.add(kind, (x.base,), node.size)

    return rule


def _over_plane(kind: str) -> Callable:
    """The rule of a mean or maximum over all the pixels of each channel."""

    def rule(node: Node) -> View | None:
        x, axes = node["self"], node["dim"]
        if not isinstance(x, View) or not axes or len(x.shape) != 3 or node["dtype"]:
            return None
        own = {node.axis(x, axis) for axis in ([axes] if isinstance(axes, int) else axes)}
        over = View(x.base, x.shape, tuple(d for i, d in enumerate(x.dims) if i in own))
        rest = View(x.base, x.shape, tuple(d for i, d in enumerate(x.dims) if i not in own))
        plane, channels = prod(x.shape[1:]), x.shape[0]
        if -1 in own or over.reshaped([plane]) is None or rest.reshaped([channels]) is None:
            return None
        flat = View(x.base, x.shape, (x.channels,)), View(x.base, x.shape, (_run(plane),))
        if rest.reshaped([channels]) != flat[0] or over.reshaped([plane]) != flat[1]:
            return None
        return node.add(kind, (x.base,), (channels, 1, 1)).reshaped(node.size)

    return rule


def _run(size: int) -> tuple:
    return ((size, 1),) if size > 1 else ()


def _upsampled(kind: str) -> Callable:
    def rule(node: Node) -> View | None:
        x = node.plane(node["self"] if "self" in node.args else node["input"])
        if x is None or node.size is None:
            return None
        if "scale_factors" in node.args:
            scales = node["scale_factors"]
        else:
            scales = node["scales_h"], node["scales_w"]
        alpha, beta = (float(scale or 0) for scale in scales or (0, 0))
        before = int(bool(node["align_corners"]))
        return node.add(kind, (x.base,), node.size, alpha=alpha, beta=beta, before=before)

    return rule


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
        _act("relu"): "relu",
        _act("relu6"): "relu6",
        _act("silu"): "silu",
        _act("hardswish"): "hardswish",
        _act("hardsigmoid"): "hardsigmoid",
        _act("sigmoid"): "sigmoid",
        _act("tanh"): "tanh",
        _act("leaky", lambda node: node["negative_slope"]): "leaky_relu",
        _clamp: "clamp clamp_min clamp_max hardtanh",
        _gelu: "gelu",
        _elu: "elu",
        _prelu: "prelu",
        arithmetic.add: "add",
        arithmetic.subtract: "sub subtract",
        arithmetic.subtract_from: "rsub",
        arithmetic.multiply: "mul multiply",
        arithmetic.divide: "div divide",
        (lambda node: arithmetic.scalar(node, node["self"], -1.0, 0.0)): "neg negative",
        _maxpool: "max_pool2d",
        _first(_maxpool): "max_pool2d_with_indices",
        _avgpool: "avg_pool2d",
        _adaptive("adaptive_avg"): "adaptive_avg_pool2d _adaptive_avg_pool2d",
        _first(_adaptive("adaptive_max")): "adaptive_max_pool2d",
        _over_plane("adaptive_avg"): "mean",
        _over_plane("adaptive_max"): "amax",
        _upsampled("upsample_nearest"): "upsample_nearest2d",
        _upsampled("upsample_bilinear"): "upsample_bilinear2d",
        axes.slice: "slice",
        axes.narrow: "narrow",
        axes.select: "select",
        axes.split: "chunk split split_with_sizes",
        axes.indexed: "index index_select",
        axes.flip: "flip",
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
