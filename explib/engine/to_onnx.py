"""A graph as ONNX: the dense network, its pruned kernels as zeros, for other runtimes.

Each op of the engine becomes the ONNX ops that make the same values, for any batch. The packages
are of the extra `peers`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch

from explib.engine import geometry
from explib.engine.geometry import chw
from explib.engine.graph import Graph, Op
from explib.engine.views import View, whole
from explib.errors import extra
from explib.files import write_bytes

OPSET = 18


def write(
    path: str | Path,
    graph: Graph,
    inputs: Sequence[str] = (),
    outputs: Sequence[str] = (),
) -> Path:
    """Write a graph, fused or not, as an ONNX file for any batch; returns the path.

    inputs, outputs: their names in the file; by default those of the network's arguments, and
    `output`, `output.1` and so on. Of results only tensors are outputs. NotImplementedError, naming
    the ops, for those that are no ops of the engine.
    """
    with extra("peers"):
        import onnx
        from onnx import TensorProto, helper, numpy_helper
    left = [op.label for op in graph.ops if op.kind == "torch" and op.label]
    if left:
        raise NotImplementedError(f"{', '.join(left[:3])}: no op of the engine, and so not of ONNX")
    own = [*inputs] or [*graph.shapes]
    made = _Nodes(dict(zip(graph.shapes, own, strict=True)), dict(graph.shapes))
    for op in graph.ops:
        made.shapes[op.name] = op.shape
        _write_op(made, op)
    views = [value for value in graph.results if isinstance(value, View)]
    names = [*outputs] or ["output" + (f".{i}" if i else "") for i in range(len(views))]
    for name, view in zip(names, views, strict=True):
        made.add("Identity", _viewed(made, view), name=name)
    nodes = [
        helper.make_node(kind, takes, [name], **more) for kind, takes, name, more in made.nodes
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "explib",
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *shape])
                for name, shape in zip(own, graph.shapes.values(), strict=True)
            ],
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *view.sizes])
                for name, view in zip(names, views, strict=True)
            ],
            [numpy_helper.from_array(array, name) for name, array in made.constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=8,  # what runtimes of some years read, too
    )
    onnx.checker.check_model(model)
    return write_bytes(path, model.SerializeToString())


class _Nodes:
    """ONNX nodes so far: (kind, inputs, output, attributes), and what is constant."""

    def __init__(self, names: dict[str, str], shapes: dict[str, tuple[int, ...]]):
        self.nodes: list[tuple[str, list[str], str, dict]] = []
        self.constants: dict[str, np.ndarray] = {}
        self.names, self.shapes = names, shapes  # names in the file of the graph's values

    def add(self, kind: str, *inputs: str, name: str = "", **attributes) -> str:
        """One more node, and the name of its output."""
        name = name or f"_{len(self.nodes)}"
        self.nodes.append((kind, [*inputs], name, attributes))
        return name

    def constant(self, value: Any, kind: Any = np.float32) -> str:
        name = f"_c{len(self.constants)}"
        array = value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        self.constants[name] = np.ascontiguousarray(array, kind)
        return name

    def ints(self, values: Any) -> str:
        return self.constant(values, np.int64)

    def plane(self, value: str) -> str:
        """A value of the graph as (N, C, H, W)."""
        own = self.names[value]
        return own if len(self.shapes[value]) == 3 else self.shaped(own, chw(self.shapes[value]))

    def shaped(self, own: str, shape: Sequence[int]) -> str:
        return self.add("Reshape", own, self.ints([-1, *shape]))


def _write_op(made: _Nodes, op: Op) -> None:
    source = chw(made.shapes[op.inputs[0]])
    own = _KINDS[op.kind](made, op, source, *map(made.plane, op.inputs))
    if op.act:
        own = _act(made, op, own)
    made.names[op.name] = own if len(op.shape) == 3 else made.shaped(own, op.shape)


def _sides(op: Op, source: geometry.Shape) -> tuple[list[int], list[int]]:
    """Of rows and columns, how far windows reach beyond the first and beyond the last."""
    ends = [
        (made - 1) * stride + dilation * (kernel - 1) + 1 - pad - size
        for made, stride, dilation, kernel, pad, size in zip(
            op.shape[1:], op.stride, op.dilation, op.kernel, op.pad, source[1:], strict=True
        )
    ]
    return list(op.pad), ends


def _padded(made: _Nodes, x: str, before: list[int], after: list[int], value: float) -> str:
    """Channels, rows and columns around a plane; cut off where negative."""
    if not any(before + after):
        return x
    return made.add("Pad", x, made.ints([0, *before, 0, *after]), made.constant(value))


def _windowed(
    made: _Nodes, op: Op, source: geometry.Shape, x: str, value: float
) -> tuple[str, dict]:
    """What a conv or pool reads, and its attributes. Padding that ONNX lacks is a node."""
    before, after = _sides(op, source)
    # what is left over at the end, less than a stride, is not read anyway
    after = [0 if -step < n < 0 else n for n, step in zip(after, op.stride, strict=True)]
    if any(
        not 0 <= n < k for side in (before, after) for n, k in zip(side, op.kernel, strict=True)
    ):
        x = _padded(made, x, [0, *before], [0, *after], value)
        before = after = [0, 0]
    return x, dict(kernel_shape=op.kernel, strides=op.stride, pads=[*before, *after])


def _conv(made: _Nodes, op: Op, source: geometry.Shape, x: str, other: str = "") -> str:
    x, more = _windowed(made, op, source, x, 0.0)
    tensors = [made.constant(t) for t in (op.weight, op.bias) if t is not None]
    y = made.add("Conv", x, *tensors, **more, dilations=op.dilation, group=op.groups)
    return made.add("Add", y, other) if other else y


def _linear(made: _Nodes, op: Op, source: geometry.Shape, x: str) -> str:
    tensors = [made.constant(t) for t in (op.weight, op.bias) if t is not None]
    x = made.shaped(x, [prod(source)])
    return made.shaped(made.add("Gemm", x, *tensors, transB=1), chw(op.shape))


def _maxpool(made: _Nodes, op: Op, source: geometry.Shape, x: str) -> str:
    x, more = _windowed(made, op, source, x, -np.inf)
    return made.add("MaxPool", x, **more, dilations=op.dilation)


def _avgpool(made: _Nodes, op: Op, source: geometry.Shape, x: str) -> str:
    """Over all of each window, and scaled where torch counts fewer pixels."""
    x, more = _windowed(made, op, source, x, 0.0)
    y = made.add("AveragePool", x, **more, count_include_pad=1)
    rows, columns = (count for *_, count in geometry.both_windows(op, source))
    scale = prod(op.kernel) / np.outer(rows, columns)
    return y if (scale == 1).all() else made.add("Mul", y, made.constant(scale[None, None]))


def _adaptive(made: _Nodes, op: Op, source: geometry.Shape, x: str) -> str:
    """By ONNX's pools where all windows are alike; else rows, then columns, by their windows."""
    sizes, plane = source[1:], op.shape[1:]
    average = op.kind == "adaptive_avg"
    if plane == (1, 1):
        return made.add("GlobalAveragePool" if average else "GlobalMaxPool", x)
    if all(size % n == 0 for size, n in zip(sizes, plane, strict=True)):
        kernel = [size // n for size, n in zip(sizes, plane, strict=True)]
        kind = "AveragePool" if average else "MaxPool"
        return made.add(kind, x, kernel_shape=kernel, strides=kernel)
    for axis, (begin, end, count) in enumerate(geometry.both_windows(op, source)):
        if average:
            at = np.arange(sizes[axis])
            inside = (at >= begin[:, None]) & (at < end[:, None])
            x = _product(made, inside / count[:, None], x, axis)
            continue
        parts = []
        for first, last in zip(begin, end, strict=True):
            ends = [made.ints([n]) for n in (first, last, axis + 2)]
            part = made.add("Slice", x, *ends)
            parts.append(made.add("ReduceMax", part, made.ints([axis + 2]), keepdims=1))
        x = made.add("Concat", *parts, axis=axis + 2)
    return x


def _product(made: _Nodes, matrix: np.ndarray, x: str, axis: int) -> str:
    """A matrix (made, size) times the rows (axis 0) or the columns of a plane."""
    if axis == 0:
        return made.add("MatMul", made.constant(matrix), x)
    return made.add("MatMul", x, made.constant(matrix.T))


def _affine(made: _Nodes, op: Op, source: geometry.Shape, x: str) -> str:
    scale, shift = (made.constant(t.reshape(1, -1, 1, 1)) for t in (op.weight, op.bias))  # type: ignore[union-attr]
    return made.add("Add", made.add("Mul", x, scale), shift)


def _both(kind: str) -> Callable:
    return lambda made, op, source, x, y=None: made.add(kind, x, x if y is None else y)


def _scalar(made: _Nodes, op: Op, source: geometry.Shape, x: str) -> str:
    return made.add("Add", made.add("Mul", x, made.constant(op.alpha)), made.constant(op.beta))


def _layernorm(made: _Nodes, op: Op, source: geometry.Shape, x: str) -> str:
    x = made.add("Transpose", x, perm=[0, 2, 3, 1])
    tensors = made.constant(op.weight), made.constant(op.bias)
    x = made.add("LayerNormalization", x, *tensors, epsilon=op.alpha)
    return made.add("Transpose", x, perm=[0, 3, 1, 2])


def _groupnorm(made: _Nodes, op: Op, source: geometry.Shape, x: str) -> str:
    """Groups as the channels of an instance norm."""
    assert op.weight is not None and op.bias is not None
    scale, shift = made.constant(torch.ones(op.groups)), made.constant(torch.zeros(op.groups))
    x = made.shaped(x, [op.groups, prod(source) // op.groups])
    x = made.add("InstanceNormalization", x, scale, shift, epsilon=op.alpha)
    return _affine(made, op, source, made.shaped(x, source))


def _nearest(made: _Nodes, op: Op, source: geometry.Shape, x: str) -> str:
    factors = [n // size for n, size in zip(op.shape[1:], source[1:], strict=True)]
    if (
        op.alpha in (0, factors[0])
        and op.beta in (0, factors[1])
        and all(n == size * k for n, size, k in zip(op.shape[1:], source[1:], factors, strict=True))
    ):
        scales = made.constant([1, 1, *factors])
        more = dict(coordinate_transformation_mode="asymmetric", nearest_mode="floor")
        return made.add("Resize", x, "", scales, mode="nearest", **more)
    return _chosen(made, op, source, x)


def _chosen(made: _Nodes, op: Op, source: geometry.Shape, x: str) -> str:
    """Rows and columns of a plane by their numbers."""
    for axis, index in enumerate(geometry.selected(op, source)[1:]):
        x = made.add("Gather", x, made.ints(index), axis=axis + 2)
    return x


def _bilinear(made: _Nodes, op: Op, source: geometry.Shape, x: str) -> str:
    """Each row, then each column, as its share of two of the input's: a product with a matrix."""
    index, share = geometry.between(op, source)
    both = (np.split(values, [op.shape[1]]) for values in (index.astype(int), share))
    for axis, (at, part) in enumerate(zip(*both, strict=True)):
        matrix = np.zeros((len(at), source[axis + 1]))
        matrix[np.arange(len(at)), at] = 1 - part
        matrix[np.arange(len(at)), np.minimum(at + 1, source[axis + 1] - 1)] += part
        x = _product(made, matrix, x, axis)
    return x


def _gather(made: _Nodes, op: Op, source: geometry.Shape, x: str) -> str:
    return made.add("Gather", x, made.ints(op.index), axis=1)


def _slice(made: _Nodes, op: Op, source: geometry.Shape, x: str) -> str:
    """Of slice and pad."""
    before, after = _sides(replace(op, kernel=(1, 1), dilation=(1, 1)), source)
    channels = op.shape[0] - op.before - source[0]
    x = _padded(made, x, [op.before, *before], [channels, *after], op.alpha)
    if op.stride == (1, 1):
        return x
    ends = [made.ints(values) for values in ([0, 0], [2**31 - 1] * 2, [2, 3], op.stride)]
    return made.add("Slice", x, *ends)


def _stretch(made: _Nodes, op: Op, source: geometry.Shape, x: str) -> str:
    channels, height, width = source
    down, along = op.stride
    x = made.shaped(x, [channels, height, 1, width, 1])
    pads = made.ints([*[0] * 6, 0, 0, 0, down - 1, 0, along - 1])
    x = made.shaped(made.add("Pad", x, pads), [channels, height * down, width * along])
    ends = [made.ints(values) for values in ([0, 0], op.shape[1:], [2, 3])]
    return made.add("Slice", x, *ends)


def _flatten(made: _Nodes, op: Op, source: geometry.Shape, x: str) -> str:
    return made.shaped(x, chw(op.shape))


_KINDS: dict[str, Callable[..., str]] = {
    "conv": _conv,
    "linear": _linear,
    "maxpool": _maxpool,
    "avgpool": _avgpool,
    "adaptive_avg": _adaptive,
    "adaptive_max": _adaptive,
    "affine": _affine,
    "add": _both("Add"),
    "sub": _both("Sub"),
    "mul": _both("Mul"),
    "div": _both("Div"),
    "maximum": _both("Max"),
    "scalar": _scalar,
    "act": lambda made, op, source, x: x,
    "layernorm": _layernorm,
    "groupnorm": _groupnorm,
    "upsample_nearest": _nearest,
    "upsample_bilinear": _bilinear,
    "gather": _gather,
    "slice": _slice,
    "pad": _slice,
    "pad_reflect": _chosen,
    "pad_replicate": _chosen,
    "pad_circular": _chosen,
    "stretch": _stretch,
    "cat": lambda made, op, source, *parts: made.add("Concat", *parts, axis=1),
    "flatten": _flatten,
}

_PLAIN = {"relu": "Relu", "hardswish": "HardSwish", "sigmoid": "Sigmoid", "tanh": "Tanh"}


def _act(made: _Nodes, op: Op, x: str) -> str:
    if op.act in _PLAIN:
        return made.add(_PLAIN[op.act], x)
    if op.act in ("clamp", "relu6"):
        low, high = (0.0, 6.0) if op.act == "relu6" else (op.alpha, op.beta)
        return made.add("Clip", x, made.constant(low), made.constant(high))
    if op.act == "silu":
        return made.add("Mul", x, made.add("Sigmoid", x))
    if op.act == "hardsigmoid":
        return made.add("HardSigmoid", x, alpha=1 / 6, beta=0.5)
    if op.act == "leaky":
        return made.add("LeakyRelu", x, alpha=op.alpha)
    if op.act == "elu":
        return made.add("Elu", x, alpha=op.alpha)
    if op.act == "prelu":
        assert op.slope is not None
        return made.add("PRelu", x, made.constant(op.slope.reshape(-1, 1, 1)))
    if op.act == "mish":
        return made.add("Mish", x)
    return _gelu(made, x, tanh=op.act == "gelu_tanh")


def _gelu(made: _Nodes, x: str, tanh: bool) -> str:
    """x / 2 * (1 + erf(x / √2)), or the approximation by tanh."""
    if tanh:
        cube = made.add("Mul", made.add("Mul", x, x), made.add("Mul", x, made.constant(0.044715)))
        inner = made.add("Mul", made.add("Add", x, cube), made.constant(sqrt(2 / np.pi)))
        share = made.add("Tanh", inner)
    else:
        share = made.add("Erf", made.add("Div", x, made.constant(sqrt(2))))
    share = made.add("Add", share, made.constant(1.0))
    return made.add("Mul", made.add("Mul", x, share), made.constant(0.5))


def _viewed(made: _Nodes, view: View) -> str:
    """A result: its value, or that in another order, as `View.of` makes it."""
    own = made.names[view.base]
    if view.sizes == view.shape and view.dims == whole("", view.shape).dims:
        return own
    atoms = [atom for dim in view.dims for atom in dim]
    order = sorted({atom for atom in atoms if atom[1]}, key=lambda atom: -atom[1])
    own = made.shaped(own, [n for n, _ in order])
    own = made.add("Transpose", own, perm=[0, *(1 + order.index(a) for a in atoms if a[1])])
    if not all(step for _, step in atoms):
        own = made.shaped(own, [n if step else 1 for n, step in atoms])
        own = made.add("Expand", own, made.ints([1, *(n for n, _ in atoms)]))
    return made.shaped(own, view.sizes)
