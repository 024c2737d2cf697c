"""Rules for ops that compute nothing: channels, rows and columns chosen, axes renamed."""

from itertools import accumulate, pairwise
from typing import Any

import torch

from explib.engine.nodes import CHANNELS, Node, form_of, formed
from explib.engine.views import View


def _gather(node: Node, x: View, index: list[int]) -> View:
    """Channels of a value that is settled; of those of another value, at once."""
    shape, source = (len(index), *x.shape[1:]), node.made.of.get(x.base)
    if source is not None and source.kind == "gather":
        index, inputs = [source.index[i] for i in index], source.inputs
    else:
        inputs = (x.base,)
    return formed(node.add("gather", inputs, shape, index=tuple(index)), form_of(x))


def _taken(node: Node, value: Any, axis: int, index: range) -> View | None:
    """Every so many channels, rows or columns of a value."""
    x = node.settled(value)
    if x is None:
        return None
    form = form_of(x)
    axis = (axis - CHANNELS[form]) % len(x.dims)  # of (C, H, W)
    if len(index) == x.shape[axis] and index.step == 1:
        return x
    if axis == 0:
        return _gather(node, x, list(index))
    shape = tuple(len(index) if i == axis else size for i, size in enumerate(x.shape))
    stride, pad = [1, 1], [0, 0]
    stride[axis - 1], pad[axis - 1] = index.step, -index.start
    return formed(node.add("slice", (x.base,), shape, stride=tuple(stride), pad=tuple(pad)), form)


def slice(node: Node) -> View | None:
    x = node["self"]
    if not isinstance(x, View):
        return None
    axis, start, end = node.axis(x, node["dim"] or 0), node["start"], node["end"]
    step = 1 if node["step"] is None else node["step"]
    if not all(number is None or isinstance(number, int) for number in (start, end, step)):
        return None
    if axis == -1:  # all of the batch, whatever it is
        every = start in (None, 0) and step == 1 and (end is None or end >= 2**62)
        return x if every and node.size == x.sizes else None
    return _taken(node, x, axis, range(x.sizes[axis])[start:end:step])


def narrow(node: Node) -> View | None:
    x, start, length = node["self"], node["start"], node["length"]
    if not isinstance(x, View) or not isinstance(start, int) or not isinstance(length, int):
        return None
    axis = node.axis(x, node["dim"])
    start %= x.sizes[axis] if start < 0 else 2**62
    return None if axis == -1 else _taken(node, x, axis, range(start, start + length))


def select(node: Node) -> View | None:
    x, index = node["self"], node["index"]
    axis = node.axis(x, node["dim"]) if isinstance(x, View) else -1
    if axis == -1 or not isinstance(index, int) or node.size is None:
        return None
    index %= x.sizes[axis]
    taken = _taken(node, x, axis, range(index, index + 1))
    return None if taken is None else taken.reshaped(node.size)


def split(node: Node) -> list[View] | None:
    """Of chunk and of every split: consecutive parts."""
    x = node["self"]
    axis = node.axis(x, node["dim"] or 0) if isinstance(x, View) else -1
    if axis == -1 or None in node.sizes:
        return None
    ends = [0, *accumulate(size[axis] for size in node.sizes)]
    parts = [_taken(node, x, axis, range(*pair)) for pair in pairwise(ends)]
    return None if None in parts else parts  # type: ignore[return-value]


def indexed(node: Node) -> View | None:
    """Channels by a known index, as x[:, index] or index_select."""
    x, index, axis = node["self"], node["index"], node["dim"]
    if isinstance(node["indices"], (list, tuple)):
        found = [i for i, index in enumerate(node["indices"]) if index is not None]
        if len(found) != 1:
            return None
        axis, index = found[0], node["indices"][found[0]]
    known = isinstance(index, torch.Tensor) and index.ndim == 1
    if not isinstance(x, View) or not known or index.dtype not in (torch.int64, torch.int32):
        return None
    x = node.along(x, node.axis(x, axis)) if node.axis(x, axis) != -1 else None
    if x is None or not form_of(x):
        return None
    return _gather(node, x, [int(i) % x.shape[0] for i in index])


def flip(node: Node) -> View | None:
    axes = node["dims"]
    x = node["self"]
    if not isinstance(x, View) or len(axes) != 1 or node.axis(x, axes[0]) == -1:
        return None
    x = node.along(x, node.axis(x, axes[0]))
    return None if x is None or not form_of(x) else _gather(node, x, [*range(x.shape[0])][::-1])


def repeated(node: Node) -> View | None:
    """Channels again: all of them, as by repeat, or one by one, as by repeat_interleave."""
    x, times, axis = node["self"], node["repeats"], node["dim"]
    if not isinstance(x, View):
        return None
    if each := axis is not None:
        axis = node.axis(x, axis)
    else:
        times = times if isinstance(times, (list, tuple)) else []
        axes = [i for i, n in enumerate(times) if n != 1]
        if len(axes) != 1 or len(times) != len(x.dims) + 1:
            return None
        axis, times = axes[0] - 1, times[axes[0]]
    x = node.along(x, axis) if axis != -1 and isinstance(times, int) else None
    if x is None or not form_of(x):
        return None
    index = [i for i in range(x.shape[0]) for _ in range(times if each else 1)]
    return _gather(node, x, index * (1 if each else times))


def gated(node: Node) -> View | None:
    """One half times the sigmoid of the other."""
    x, axis = node["self"], node.axis(node["self"], node["dim"])
    half = x.sizes[axis] // 2
    if axis == -1:
        return None
    one, gate = (_taken(node, x, axis, range(at, at + half)) for at in (0, half))
    if one is None or gate is None:
        return None
    gate = node.like(gate, "act", act="sigmoid")
    return gate and node.like(one, "mul", gate.base)


def zeros(node: Node) -> View | None:
    """Zeros beside a value of any shape: a plane around it, with nothing of it inside."""
    x = node.settled(node["self"])
    if x is None or node.size is None or len(node.size) != 3:
        return None
    return node.add("pad", (x.base,), node.size, before=-x.shape[0])


def shuffle(node: Node) -> View | None:
    x, groups = node.plane(node["self"]), node["groups"]
    if x is None:
        return None
    view = x.reshaped([groups, x.shape[0] // groups, *x.shape[1:]])
    return view and view.permuted([1, 0, 2, 3]).reshaped(x.shape)


def cat(node: Node) -> View | None:
    """A concatenation of channels."""
    found = [node.settled(tensor) for tensor in node["tensors"]]
    views = [view for view in found if view is not None]
    forms = {form_of(view) for view in views}
    if len(views) < len(found) or len(forms) != 1:
        return None
    form = forms.pop()
    if node.axis(views[0], node["dim"] or 0) != CHANNELS[form]:
        return None
    shape = (sum(view.shape[0] for view in views), *views[0].shape[1:])
    return formed(node.add("cat", tuple(view.base for view in views), shape), form)


def pad(node: Node) -> View | None:
    """A constant around the plane and the channels; or the plane mirrored or repeated."""
    x, sides, value = node.plane(node["self"]), [*node["pad"]], node["value"]
    mode = node["mode"] or "constant"
    if x is None or len(sides) > 6:
        return None
    if mode != "constant":
        if len(sides) != 4 or not all(isinstance(side, int) and side >= 0 for side in sides):
            return None
        return node.add(f"pad_{mode}", (x.base,), node.size, pad=(sides[2], sides[0]))
    sides += [0] * (6 - len(sides))
    if not all(isinstance(side, int) for side in sides):
        return None
    return node.add(
        "pad", (x.base,), node.size, pad=(sides[2], sides[0]), before=sides[4],
        alpha=float(value or 0),
    )  # fmt: skip


# What only renames


def same(node: Node) -> View | None:
    """The very values, in the same axes."""
    x = node["self"] if "self" in node.args else node["input"]
    return x if isinstance(x, View) and x.sizes == node.size and not node["train"] else None


def reshaped(node: Node) -> View | None:
    x = node["self"]
    return x.reshaped(node.size) if isinstance(x, View) and node.size is not None else None


def expanded(node: Node) -> View | None:
    x = node["self"]
    return x.expanded(node.size) if isinstance(x, View) and node.size is not None else None


def permuted(node: Node) -> View | None:
    x, order = node["self"], node["dims"]
    if not isinstance(x, View):
        return None
    if order is None:  # of transpose
        order = list(range(len(x.dims) + 1))
        one, other = (axis % len(order) for axis in (node["dim0"], node["dim1"]))
        order[one], order[other] = other, one
    axes = [node.axis(x, axis) for axis in order]
    return x.permuted(axes[1:]) if axes[0] == -1 else None
