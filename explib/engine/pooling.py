"""Rules of the table in rules.py for pools, sums and maxima over axes, and upsampling."""

from collections.abc import Callable
from math import prod

import torch

from explib.engine import arithmetic
from explib.engine.nodes import Node, form_of, pair
from explib.engine.views import View


def maxpool(node: Node) -> View | None:
    x, kernel = node.plane(node["self"]), pair(node["kernel_size"])
    if x is None or node.size is None:
        return None
    return node.add(
        "maxpool", (x.base,), node.size, kernel=kernel, stride=pair(node["stride"], kernel),
        pad=pair(node["padding"]), dilation=pair(node["dilation"]),
    )  # fmt: skip


def avgpool(node: Node) -> View | None:
    x, kernel = node.plane(node["self"]), pair(node["kernel_size"])
    if x is None or node["divisor_override"] is not None:
        return None
    return node.add(
        "avgpool", (x.base,), node.size, kernel=kernel, stride=pair(node["stride"], kernel),
        pad=pair(node["padding"]), before=int(node["count_include_pad"]),
    )  # fmt: skip


def adaptive(kind: str) -> Callable:
    def rule(node: Node) -> View | None:
        x = node.plane(node["self"])
        if x is None or x.sizes == node.size:
            return x
        return node.add(kind, (x.base,), node.size)

    return rule


def over(kind: str, total: bool = False) -> Callable:
    """The rule of a mean or maximum over a channel's pixels, or over the channels of a pixel.

    total: not the mean but the sum.
    """

    def rule(node: Node) -> View | None:
        x, axes = node["self"], node["dim"]
        if not isinstance(x, View) or axes is None or axes == [] or node["dtype"]:
            return None
        own = [node.axis(x, axis) for axis in ([axes] if isinstance(axes, int) else axes)]
        if -1 in own or len(x.shape) not in (1, 3):
            return None
        if len(own) == 1 and (by_pixel := node.along(x, own[0])) is not None:
            return _over_channels(node, kind, by_pixel, own[0], total)
        shape = _pooled(x, {*own})
        if shape is None or node.size is None:
            return None
        y: View | None = node.add(kind, (x.base,), shape)
        if total:
            y = arithmetic.scalar(node, y, prod(x.shape) / prod(shape), 0.0)
        return y and y.reshaped(node.size)

    return rule


def _pooled(x: View, own: set[int]) -> tuple[int, ...] | None:
    """What is left of (C, H, W) without these axes: the whole plane's, or of a plane one."""
    if len(x.shape) != 3:
        return None
    over = View(x.base, x.shape, tuple(d for i, d in enumerate(x.dims) if i in own))
    rest = View(x.base, x.shape, tuple(d for i, d in enumerate(x.dims) if i not in own))
    (channels, height, width), plane = x.shape, prod(x.shape[1:])
    flat = View(x.base, x.shape, (x.channels,)), View(x.base, x.shape, (_run(plane),))
    if over.reshaped([plane]) == flat[1] and rest.reshaped([channels]) == flat[0]:
        return channels, 1, 1
    if len(own) == 1 and form_of(x) == "plane" and len(x.dims) == 3:
        return (channels, 1, width) if own == {1} else (channels, height, 1)
    return None


def _over_channels(node: Node, kind: str, x: View, axis: int, total: bool) -> View | None:
    """A mean or sum as a conv of one filter; a maximum of the halves, and of the halves of that."""
    channels, *plane = (*x.shape, 1, 1)[:3]
    if kind == "adaptive_avg":
        weight = torch.full((1, channels, 1, 1), 1.0 if total else 1 / channels)
        new = node.add("conv", (x.base,), (1, *plane), weight=weight)
    else:
        new = View(x.base, (channels, *plane), x.dims)
        while channels > 1:
            half = (channels + 1) // 2
            ends = [range(half), range(channels - half, channels)]
            parts = [
                node.add("gather", (new.base,), (half, *plane), index=tuple(i)).base for i in ends
            ]
            new, channels = node.add("maximum", tuple(parts), (half, *plane)), half
    dims = [() if i == axis else dim for i, dim in enumerate(x.dims)]
    return View(new.base, (1, *plane), tuple(dims)).reshaped(node.size)


def _run(size: int) -> tuple:
    return ((size, 1),) if size > 1 else ()


def upsampled(kind: str) -> Callable:
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
