"""The one table from torch's aten ops to the engine's: RULES.

A rule takes a Node and makes ops of it, and returns the value (a View); or None, and torch runs it.
Adding an op is a function and a line of the table.
"""

from collections.abc import Callable
from itertools import accumulate, pairwise
from math import inf, prod
from typing import Any

import torch

from explib.engine.graph import Op
from explib.engine.views import View, whole


class Made:
    """The ops made so far."""

    def __init__(self):
        self.ops: list[Op] = []
        self._settled: dict[View, View] = {}
        self._names: set[str] = set()

    def add(self, kind: str, name: str, inputs: tuple[str, ...], shape: tuple, **fields) -> View:
        """One more op, and its value."""
        own, count = name, 0
        while own in self._names:
            own, count = f"{name}.{count + 1}", count + 1
        self._names.add(own)
        self.ops.append(Op(kind, own, inputs, tuple(shape), **fields))
        return whole(own, shape)

    def settled(self, view: View, label: str) -> View | None:
        """A view as one whose axes are the engine's, by a gather or a flatten where it takes one.

        Those are (C, H, W), (H, W, C), and (C,) of what has but one pixel. None for others.
        """
        if _form(view):
            return view
        if view not in self._settled:
            found = self._gathered(view, label) or self._flat(view, label)
            if found is None:
                return None
            self._settled[view] = found
        return self._settled[view]

    def _gathered(self, view: View, label: str) -> View | None:
        """Channels in another order."""
        if len(view.shape) != 3:
            return None
        plane = prod(view.shape[1:])
        for last in (False, True):
            form = whole(view.base, view.shape, last)
            axis = 2 if last else 0
            rest = [dim for i, dim in enumerate(view.dims) if i != axis]
            if len(view.dims) != 3 or rest != [d for i, d in enumerate(form.dims) if i != axis]:
                continue
            if all(step and step % plane == 0 for _, step in view.dims[axis]):
                index = [0]
                for n, step in view.dims[axis]:
                    index = [i + step // plane * j for i in index for j in range(n)]
                new = self.add(
                    "gather", f"{view.base}.gather", (view.base,), view.shape,
                    index=tuple(index), label=label,
                )  # fmt: skip
                return whole(new.base, view.shape, last)
        return None

    def _flat(self, view: View, label: str) -> View | None:
        """All of a plane in one axis."""
        if len(view.shape) != 3 or view.dims != whole("", (prod(view.shape),)).dims:
            return None
        shape = (prod(view.shape),)
        return self.add("flatten", f"{view.base}.flatten", (view.base,), shape, label=label)


def _form(view: View) -> str:
    """Which of the engine's orders the axes of a view have; "" where none."""
    if len(view.shape) not in (1, 3):
        return ""
    if len(view.dims) == 1:
        return "flat" if prod(view.shape[1:]) == 1 and view.dims[0] == view.channels else ""
    shape = (*view.shape, 1, 1)[:3]
    forms = {"plane": whole("", shape).dims, "last": whole("", shape, last=True).dims}
    return next((form for form, dims in forms.items() if dims == view.dims), "")


_AXIS = {"plane": 0, "last": 2, "flat": 0}  # of the channels


class Node:
    """A call of an aten op as the rules see it.

    args: by the names of its schema; tensors are a View, an Other, or a torch.Tensor that is known.
    size: the result's shape without batch, None where it is no batch of float tensors; of several
    results, sizes has those. used: which of several results somebody reads.
    """

    def __init__(self, made: Made, name: str, label: str, args: dict, sizes: list, used: set[int]):
        self.made, self.name, self.label, self.args = made, name, label, dict(args)
        self.sizes, self.used = sizes, used
        self.size: Any = sizes[0] if len(sizes) == 1 else None

    def __getitem__(self, name: str) -> Any:
        return self.args.get(name)

    def add(self, kind: str, inputs: tuple[str, ...], shape: tuple, **fields) -> View:
        """An op of this node, and its value."""
        return self.made.add(kind, self.name, inputs, shape, label=self.label, **fields)

    def settled(self, value: Any) -> View | None:
        """A value with its axes in one of the engine's orders, if that can be."""
        return self.made.settled(value, self.label) if isinstance(value, View) else None

    def plane(self, value: Any) -> View | None:
        """A value as (C, H, W), if that can be."""
        view = self.settled(value)
        return view if view and len(view.dims) == 3 and _form(view) == "plane" else None

    def along(self, value: Any, axis: int) -> View | None:
        """A value whose channels are that axis (the batch not counted)."""
        for view in (value, self.settled(value)):
            if not isinstance(view, View) or len(view.shape) not in (1, 3) or not view.dims:
                continue
            if view.dims[axis] == view.channels:
                return view
        return None

    def axis(self, view: View, axis: int) -> int:
        """An axis of the tensor as one of the view, which has no batch: -1 for the batch."""
        return axis % (len(view.dims) + 1) - 1

    def like(self, view: View, kind: str, *others: str, **fields) -> View | None:
        """An op whose result has the axes of its input."""
        if len(view.shape) not in (1, 3):
            return None
        new = self.add(kind, (view.base, *others), view.shape, **fields)
        return View(new.base, view.shape, view.dims)


def _float(value: Any) -> torch.Tensor | None:
    """A known tensor of floats."""
    known = isinstance(value, torch.Tensor) and value.dtype == torch.float32
    return value.detach() if known else None


def _pair(value: Any, default: tuple[int, int] | None = None) -> tuple[int, int]:
    """Two numbers for one, or for two."""
    if isinstance(value, (list, tuple)):
        values = tuple(value) or default
        assert values is not None
        return values if len(values) == 2 else values * 2  # type: ignore[return-value]
    return value, value


# Layers with weights


def _conv(node: Node) -> View | None:
    if node["transposed"]:
        return _transposed(node)
    x, weight, bias = node.plane(node["input"]), _float(node["weight"]), node["bias"]
    if x is None or weight is None or weight.ndim != 4 or node.size is None:
        return None
    if bias is not None and _float(bias) is None:
        return None
    dilation, given = _pair(node["dilation"]), node["padding"]
    if given in ("same", "valid"):
        share = 1 if given == "same" else 0
        sides = zip(dilation, weight.shape[2:], strict=True)
        pad = tuple(share * d * (k - 1) // 2 for d, k in sides)
    else:
        pad = _pair(given)
    return node.add(
        "conv", (x.base,), node.size, weight=weight, bias=bias, kernel=tuple(weight.shape[2:]),
        stride=_pair(node["stride"]), pad=pad, dilation=dilation, groups=node["groups"],
    )  # fmt: skip


def _transposed(node: Node) -> View | None:
    """A transposed conv: zeros between the pixels, and the conv whose gradient it is, reversed."""
    x, weight, bias = node.plane(node["input"]), _float(node["weight"]), node["bias"]
    if x is None or weight is None or weight.ndim != 4 or node.size is None:
        return None
    if bias is not None and _float(bias) is None:
        return None
    groups, stride, dilation = node["groups"], _pair(node["stride"]), _pair(node["dilation"])
    channels, filters, *kernel = weight.shape
    weight = weight.reshape(groups, channels // groups, filters, *kernel).transpose(1, 2)
    weight = weight.reshape(groups * filters, channels // groups, *kernel).flip(2, 3).contiguous()
    if stride != (1, 1):
        sides = zip(x.shape[1:], stride, strict=True)
        shape = (channels, *((size - 1) * step + 1 for size, step in sides))
        x = node.add("stretch", (x.base,), shape, stride=stride)
    sides = zip(dilation, kernel, _pair(node["padding"]), strict=True)
    return node.add(
        "conv", (x.base,), node.size, weight=weight, bias=bias, kernel=tuple(kernel),
        pad=tuple(d * (k - 1) - p for d, k, p in sides), dilation=dilation, groups=groups,
    )  # fmt: skip


def _linear(node: Node) -> View | None:
    """A linear layer over the channels: of many pixels, a conv 1x1."""
    x, weight, bias = node.along(node["input"], -1), _float(node["weight"]), node["bias"]
    if x is None or weight is None or weight.ndim != 2:
        return None
    if bias is not None and _float(bias) is None:
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
    mean, var = _float(node["running_mean"]), _float(node["running_var"])
    if mean is None or var is None or node["training"]:
        return None
    weight, bias = _float(node["weight"]), _float(node["bias"])
    scale = (var + node["eps"]).rsqrt() * (1 if weight is None else weight)
    shift = -mean * scale + (0 if bias is None else bias)
    return _affine(node, node["input"], 0, scale, shift)


def _first(rule: Callable) -> Callable:
    """A rule for an op that returns more than one tensor, of which only the first is used."""

    def first(node: Node):
        if node.used - {0}:
            return None
        node.size = node.sizes[0]
        value = rule(node)
        return None if value is None else (value, None, None)

    return first


def _affine(node: Node, value: Any, axis: int, scale, shift) -> View | None:
    """Scale and shift (C,) along an axis."""
    x = node.along(value, axis)
    return None if x is None else node.like(x, "affine", weight=scale, bias=shift)


def _layernorm(node: Node) -> View | None:
    weight, bias = _float(node["weight"]), _float(node["bias"])
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
    low, high = -inf if low is None else low, inf if high is None else high
    act = {(0, inf): "relu", (0, 6): "relu6"}.get((low, high))
    return (_act(act) if act else _act("clamp", low, high))(node)


_BOUNDS = (("min", "min_val"), ("max", "max_val"))


def _gelu(node: Node) -> View | None:
    return _act("gelu_tanh" if node["approximate"] == "tanh" else "gelu")(node)


def _elu(node: Node) -> View | None:
    plain = node["scale"] == node["input_scale"] == 1
    return _act("elu", node["alpha"])(node) if plain else None


def _prelu(node: Node) -> View | None:
    slope = _float(node["weight"])
    if slope is None:
        return None
    if slope.numel() == 1:
        return _act("leaky", float(slope))(node)
    x = node.along(node["self"], 0)
    return None if x is None else node.like(x, "act", act="prelu", slope=slope)


# Arithmetic


def _scalar(node: Node, value: Any, alpha: float, beta: float) -> View | None:
    return node.like(value, "scalar", alpha=alpha, beta=beta) if isinstance(value, View) else None


def _add(node: Node) -> View | None:
    one, other, factor = node["self"], node["other"], node["alpha"]
    factor = 1 if factor is None else factor
    if not isinstance(one, View):
        if factor != 1 and isinstance(other, View):
            other = _scalar(node, other, factor, 0)
        one, other, factor = other, one, 1
    if isinstance(other, View):
        other = other if factor == 1 else _scalar(node, other, factor, 0)
        return _both(node, "add", one, other)
    return _with_known(node, one, None, other, factor)


def _subtract(node: Node) -> View | None:
    """x - alpha * y."""
    node.args["alpha"] = -(1 if node["alpha"] is None else node["alpha"])
    return _add(node)


def _subtract_from(node: Node) -> View | None:
    """y - alpha * x."""
    node.args["self"], node.args["other"] = node["other"], node["self"]
    return _subtract(node)


def _multiply(node: Node) -> View | None:
    one, other = node["self"], node["other"]
    one, other = (one, other) if isinstance(one, View) else (other, one)
    if isinstance(other, View):
        return _both(node, "mul", one, other)
    return _with_known(node, one, other, None)


def _divide(node: Node) -> View | None:
    by = node["other"]
    if node["rounding_mode"] is not None or isinstance(by, View) or not _known(by):
        return None
    return _with_known(node, node["self"], 1 / by if by is not None else None, None)


def _known(value: Any) -> bool:
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
        return _scalar(node, x, alpha, 0.0 if shift is None else factor * float(shift))
    known = torch.as_tensor(values[0], dtype=torch.float32)
    shape = (*[1] * (len(x.dims) + 1 - known.ndim), *known.shape)
    long = [axis for axis, size in enumerate(shape) if size > 1]
    if len(long) != 1 or long[0] == 0:
        return None
    known = known.reshape(-1)
    one, none = torch.ones_like(known), torch.zeros_like(known)
    pair = (known, none) if shift is None else (one, factor * known)
    return _affine(node, x, long[0] - 1, *pair)


def _both(node: Node, kind: str, one: Any, other: Any) -> View | None:
    """An op on two values; one of them may be repeated over the other's channels or plane."""
    if not isinstance(one, View) or not isinstance(other, View) or node.size is None:
        return None
    if one.dims == other.dims and one.shape == other.shape:
        return node.like(one, kind, other.base)
    one, other = (node.settled(value.unexpanded()) for value in (one, other))
    if one is None or other is None:
        return None
    if one.sizes != node.size:
        one, other = other, one
    if one.sizes != node.size or len(one.dims) != len(other.dims):
        return None
    form = _form(one)
    if one.sizes == other.sizes and form == _form(other):
        return node.like(one, kind, other.base)
    channel, plane = (node.size[_AXIS[form]], 1, 1), (1, *one.shape[1:])
    for shape in (channel, plane):
        wanted = whole(other.base, shape, last=form == "last")
        if len(one.dims) == 3 and other.sizes == wanted.sizes and other.dims == wanted.dims:
            return node.like(one, kind, other.base)
    return None


# Pooling and sampling


def _maxpool(node: Node) -> View | None:
    x, kernel = node.plane(node["self"]), _pair(node["kernel_size"])
    if x is None or node.size is None:
        return None
    return node.add(
        "maxpool", (x.base,), node.size, kernel=kernel, stride=_pair(node["stride"], kernel),
        pad=_pair(node["padding"]), dilation=_pair(node["dilation"]),
    )  # fmt: skip


def _avgpool(node: Node) -> View | None:
    x, kernel = node.plane(node["self"]), _pair(node["kernel_size"])
    if x is None or node["divisor_override"] is not None:
        return None
    return node.add(
        "avgpool", (x.base,), node.size, kernel=kernel, stride=_pair(node["stride"], kernel),
        pad=_pair(node["padding"]), before=int(node["count_include_pad"]),
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


# Channels, rows and columns


def _gather(node: Node, x: View, index: list[int]) -> View:
    """Channels of a value that is settled."""
    shape = (len(index), *x.shape[1:])
    return _formed(node.add("gather", (x.base,), shape, index=tuple(index)), _form(x))


def _formed(value: View, form: str) -> View:
    """A value with its axes in that order."""
    flat = View(value.base, value.shape, (value.channels,))
    return flat if form == "flat" else whole(value.base, (*value.shape, 1, 1)[:3], form == "last")


def _taken(node: Node, value: Any, axis: int, index: range) -> View | None:
    """Every so many channels, rows or columns of a value."""
    x = node.settled(value)
    if x is None:
        return None
    form = _form(x)
    axis = (axis - _AXIS[form]) % len(x.dims)  # of (C, H, W)
    if len(index) == x.shape[axis] and index.step == 1:
        return x
    if axis == 0:
        return _gather(node, x, list(index))
    shape = tuple(len(index) if i == axis else size for i, size in enumerate(x.shape))
    stride, pad = [1, 1], [0, 0]
    stride[axis - 1], pad[axis - 1] = index.step, -index.start
    return _formed(node.add("slice", (x.base,), shape, stride=tuple(stride), pad=tuple(pad)), form)


def _slice(node: Node) -> View | None:
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


def _narrow(node: Node) -> View | None:
    x, start, length = node["self"], node["start"], node["length"]
    if not isinstance(x, View) or not isinstance(start, int) or not isinstance(length, int):
        return None
    axis = node.axis(x, node["dim"])
    start %= x.sizes[axis] if start < 0 else 2**62
    return None if axis == -1 else _taken(node, x, axis, range(start, start + length))


def _select(node: Node) -> View | None:
    x, index = node["self"], node["index"]
    axis = node.axis(x, node["dim"]) if isinstance(x, View) else -1
    if axis == -1 or not isinstance(index, int) or node.size is None:
        return None
    index %= x.sizes[axis]
    taken = _taken(node, x, axis, range(index, index + 1))
    return None if taken is None else taken.reshaped(node.size)


def _split(node: Node) -> list[View] | None:
    """Of chunk and of every split: consecutive parts."""
    x = node["self"]
    axis = node.axis(x, node["dim"] or 0) if isinstance(x, View) else -1
    if axis == -1 or None in node.sizes:
        return None
    ends = [0, *accumulate(size[axis] for size in node.sizes)]
    parts = [_taken(node, x, axis, range(*pair)) for pair in pairwise(ends)]
    return None if None in parts else parts  # type: ignore[return-value]


def _indexed(node: Node) -> View | None:
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
    if x is None or not _form(x):
        return None
    return _gather(node, x, [int(i) % x.shape[0] for i in index])


def _flip(node: Node) -> View | None:
    axes = node["dims"]
    x = node["self"]
    if not isinstance(x, View) or len(axes) != 1 or node.axis(x, axes[0]) == -1:
        return None
    x = node.along(x, node.axis(x, axes[0]))
    return None if x is None or not _form(x) else _gather(node, x, [*range(x.shape[0])][::-1])


def _shuffle(node: Node) -> View | None:
    x, groups = node.plane(node["self"]), node["groups"]
    if x is None:
        return None
    view = x.reshaped([groups, x.shape[0] // groups, *x.shape[1:]])
    return view and view.permuted([1, 0, 2, 3]).reshaped(x.shape)


def _cat(node: Node) -> View | None:
    """A concatenation of channels."""
    views = [node.settled(tensor) for tensor in node["tensors"]]
    if None in views or not views:
        return None
    forms = {_form(view) for view in views}  # type: ignore[arg-type]
    form = forms.pop()
    if forms or node.axis(views[0], node["dim"] or 0) != _AXIS[form]:  # type: ignore[arg-type]
        return None
    shape = (sum(view.shape[0] for view in views), *views[0].shape[1:])  # type: ignore[union-attr]
    new = node.add("cat", tuple(view.base for view in views), shape)  # type: ignore[union-attr]
    return _formed(new, form)


def _pad(node: Node) -> View | None:
    """A constant around the plane, and around the channels."""
    x, sides, value = node.plane(node["self"]), [*node["pad"]], node["value"]
    if x is None or node["mode"] not in (None, "constant") or len(sides) > 6:
        return None
    sides += [0] * (6 - len(sides))
    if not all(isinstance(side, int) for side in sides):
        return None
    return node.add(
        "pad", (x.base,), node.size, pad=(sides[2], sides[0]), before=sides[4],
        alpha=float(value or 0),
    )  # fmt: skip


# What only renames


def _same(node: Node) -> View | None:
    """The very values, in the same axes."""
    x = node["self"] if "self" in node.args else node["input"]
    return x if isinstance(x, View) and x.sizes == node.size and not node["train"] else None


def _reshaped(node: Node) -> View | None:
    x = node["self"]
    return x.reshaped(node.size) if isinstance(x, View) and node.size is not None else None


def _expanded(node: Node) -> View | None:
    x = node["self"]
    return x.expanded(node.size) if isinstance(x, View) and node.size is not None else None


def _permuted(node: Node) -> View | None:
    x, order = node["self"], node["dims"]
    if not isinstance(x, View):
        return None
    if order is None:  # of transpose
        order = list(range(len(x.dims) + 1))
        one, other = (axis % len(order) for axis in (node["dim0"], node["dim1"]))
        order[one], order[other] = other, one
    axes = [node.axis(x, axis) for axis in order]
    return x.permuted(axes[1:]) if axes[0] == -1 else None


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
        _add: "add",
        _subtract: "sub subtract",
        _subtract_from: "rsub",
        _multiply: "mul multiply",
        _divide: "div divide",
        (lambda node: _scalar(node, node["self"], -1.0, 0.0)): "neg negative",
        _maxpool: "max_pool2d",
        _first(_maxpool): "max_pool2d_with_indices",
        _avgpool: "avg_pool2d",
        _adaptive("adaptive_avg"): "adaptive_avg_pool2d _adaptive_avg_pool2d",
        _first(_adaptive("adaptive_max")): "adaptive_max_pool2d",
        _over_plane("adaptive_avg"): "mean",
        _over_plane("adaptive_max"): "amax",
        _upsampled("upsample_nearest"): "upsample_nearest2d",
        _upsampled("upsample_bilinear"): "upsample_bilinear2d",
        _slice: "slice",
        _narrow: "narrow",
        _select: "select",
        _split: "chunk split split_with_sizes",
        _indexed: "index index_select",
        _flip: "flip",
        _shuffle: "channel_shuffle native_channel_shuffle",
        _cat: "cat concat concatenate",
        _pad: "pad constant_pad_nd",
        _same: (
            "contiguous clone alias detach to _to_copy type_as lift_fresh_copy "
            "dropout feature_dropout alpha_dropout feature_alpha_dropout"
        ),
        _reshaped: (
            "view reshape flatten unflatten squeeze unsqueeze _unsafe_view view_as reshape_as"
        ),
        _expanded: "expand expand_as",
        _permuted: "permute transpose",
    }.items()
    for name in names.split()
}
"""The rule of each aten op, by its name without overload; in place or not is the same."""
