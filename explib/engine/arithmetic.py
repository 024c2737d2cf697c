"""Rules for sums and products, of two values or with what is known beforehand."""

from typing import Any

import torch

from explib.engine.nodes import CHANNELS, Node, form_of
from explib.engine.views import View, whole


def affine(node: Node, value: Any, axis: int, scale, shift) -> View | None:
    """Scale and shift (C,) along an axis."""
    x = node.along(value, axis)
    return None if x is None else node.like(x, "affine", weight=scale, bias=shift)


def scalar(node: Node, value: Any, alpha: float, beta: float) -> View | None:
    """alpha * x + beta."""
    return node.like(value, "scalar", alpha=alpha, beta=beta) if isinstance(value, View) else None


def add(node: Node) -> View | None:
    """x + alpha * y."""
    one, other, factor = node["self"], node["other"], node["alpha"]
    factor = 1 if factor is None else factor
    if not isinstance(one, View):
        if factor != 1 and isinstance(other, View):
            other = scalar(node, other, factor, 0)
        one, other, factor = other, one, 1
    if isinstance(other, View):
        other = other if factor == 1 else scalar(node, other, factor, 0)
        return _both(node, "add", one, other)
    return _with_known(node, one, None, other, factor)


def subtract(node: Node) -> View | None:
    """x - alpha * y."""
    if node["alpha"] in (None, 1):
        found = _both(node, "sub", node["self"], node["other"])
        if found is not None:
            return found
    node.args["alpha"] = -(1 if node["alpha"] is None else node["alpha"])
    return add(node)


def subtract_from(node: Node) -> View | None:
    """y - alpha * x."""
    node.args["self"], node.args["other"] = node["other"], node["self"]
    return subtract(node)


def multiply(node: Node) -> View | None:
    """x * y."""
    one, other = node["self"], node["other"]
    one, other = (one, other) if isinstance(one, View) else (other, one)
    if isinstance(other, View):
        return _both(node, "mul", one, other)
    return _with_known(node, one, other, None)


def divide(node: Node) -> View | None:
    """x / y."""
    by = node["other"]
    if node["rounding_mode"] is not None:
        return None
    if isinstance(by, View):
        return _both(node, "div", node["self"], by)
    if not _known(by):
        return None
    return _with_known(node, node["self"], 1 / by, None)


def maximum(node: Node) -> View | None:
    """The larger of x and y."""
    return _both(node, "maximum", node["self"], node["other"])


def power(node: Node) -> View | None:
    """x * x, of square and pow."""
    x = node["self"]
    squared = isinstance(x, View) and node["exponent"] in (None, 2)
    return node.like(x, "mul", x.base) if squared else None


def _known(value: Any) -> bool:
    """Whether a divisor is known, and nowhere zero."""
    if isinstance(value, torch.Tensor):
        return bool((value != 0).all())
    return isinstance(value, (int, float)) and value != 0


def _with_known(node: Node, x: Any, scale: Any, shift: Any, factor: float = 1) -> View | None:
    """x * scale + factor * shift, with numbers or known tensors, one value a channel at most."""
    if not isinstance(x, View) or node.size != x.sizes:
        return None
    values = [v for v in (scale, shift) if v is not None]
    if not all(isinstance(v, (int, float, torch.Tensor)) for v in values):
        return None
    if all(v.numel() == 1 if isinstance(v, torch.Tensor) else True for v in values):
        alpha = 1.0 if scale is None else float(scale)
        return scalar(node, x, alpha, 0.0 if shift is None else factor * float(shift))
    known = torch.as_tensor(values[0], dtype=torch.float32)
    shape = (*[1] * (len(x.dims) + 1 - known.ndim), *known.shape)
    long = [axis for axis, size in enumerate(shape) if size > 1]
    if len(long) != 1 or long[0] == 0:
        return None
    known = known.reshape(-1)
    one, none = torch.ones_like(known), torch.zeros_like(known)
    pair = (known, none) if shift is None else (one, factor * known)
    return affine(node, x, long[0] - 1, *pair)


def _both(node: Node, kind: str, one: Any, other: Any) -> View | None:
    """An op on two values; of the second, one value may be all of a channel's, a pixel's or all.

    Of sums and products, either is the second.
    """
    if not isinstance(one, View) or not isinstance(other, View) or node.size is None:
        return None
    if one.dims == other.dims and one.shape == other.shape:
        return node.like(one, kind, other.base)
    one, other = (node.settled(value.unexpanded()) for value in (one, other))
    if one is None or other is None:
        return None
    if one.sizes != node.size and kind in ("add", "mul", "maximum"):
        one, other = other, one
    one = _spread(node, one)
    if one.sizes != node.size or len(one.dims) != len(other.dims):
        return None
    form = form_of(one)
    for beside in (other, _spread(node, other)):
        if one.sizes == beside.sizes and form == form_of(beside):
            return node.like(one, kind, beside.base)
        for shape in ((node.size[CHANNELS[form]], 1, 1), (1, *one.shape[1:]), (1, 1, 1)):
            wanted = whole(beside.base, shape, last=form == "last")
            own = (*beside.shape, 1, 1)[:3]  # (1, 1, C) may have a channel's axes, too
            if len(one.dims) == 3 and own == shape and beside.dims == wanted.dims:
                return node.like(one, kind, beside.base)
    return None


def _spread(node: Node, view: View) -> View:
    """One row or column of each channel as a whole plane, where that is what it stands for."""
    if len(view.dims) != 3 or form_of(view) != "plane" or view.shape[1:] == (1, 1):
        return view
    channels, *plane = node.size
    fits = all(own in (1, size) for own, size in zip(view.shape[1:], plane, strict=True))
    if not fits or [*view.shape[1:]] == plane or view.shape[0] not in (1, channels):
        return view
    return node.add("upsample_nearest", (view.base,), (view.shape[0], *plane))
