"""Ops in, a native network out: which memory each value has."""

import ctypes
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from explib.engine import geometry, lists
from explib.engine.build import TYPES, largest, library
from explib.engine.geometry import Shape
from explib.engine.graph import Op

KINDS = (
    "load", "store", "conv", "linear", "maxpool", "avgpool", "add", "sub", "mul", "div", "maximum",
    "affine", "scalar", "act", "copy", "layernorm", "groupnorm", "select", "bilinear", "flatten",
)  # fmt: skip
"""What the C++ calls its ops."""
_SELECTING = (
    "gather", "slice", "pad", "pad_reflect", "pad_replicate", "pad_circular", "stretch",
    "upsample_nearest",
)  # fmt: skip
_KIND = dict.fromkeys(_SELECTING, "select") | {
    "adaptive_avg": "avgpool", "adaptive_max": "maxpool", "upsample_bilinear": "bilinear"
}  # fmt: skip
ACTS = (
    "", "relu", "clamp", "silu", "hardswish", "hardsigmoid", "sigmoid", "gelu", "gelu_tanh",
    "leaky", "prelu", "elu", "tanh", "mish",
)  # fmt: skip
_PAIRWISE = ("add", "sub", "mul", "div", "maximum")


def native(op: Op, sources: Sequence[tuple[int, ...]]) -> bool:
    """Whether the C++ has this op, of inputs of these shapes without batch."""
    if any(len(shape) not in (1, 3) for shape in (op.shape, *sources)):
        return False
    kind, made, first, *others = (
        _KIND.get(op.kind, op.kind),
        *map(geometry.chw, (op.shape, *sources)),
    )
    if kind == "cat":
        return True
    if kind in _PAIRWISE:
        channels, height, width = made
        beside = {made, (channels, 1, 1), (1, height, width), (1, 1, 1)}
        return first == made and {*others} <= beside
    if kind in ("maxpool", "avgpool"):
        return all((end > begin).all() for begin, end, _ in geometry.both_windows(op, first))
    if kind == "linear":
        return first[1:] == (1, 1)
    return kind in KINDS and {*others} <= {made}


class _Slot(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("channels", "height", "width")]


class _Tensor(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("slot", "first", "channels", "height", "width")]


class _Code(ctypes.Structure):
    _fields_ = [(name, ctypes.c_float) for name in ("scale", "zero")]


_CODES = ("in_code", "other_code", "out_code")
_AXIS = ("kernel", "stride", "pad", "dilation")


class _Op(ctypes.Structure):
    _axes = tuple(f"{name}_{axis}" for axis in "hw" for name in _AXIS)
    _lists = ("together", "chunk", "passes")
    _numbers = ("kind", "input", "other", "output", *_axes, "act", "groups", *_lists)
    _arrays = (
        "bias", "slope", "weight", "start", "index", "order", "winograd", "winograd_alone",
        "winograd_columns",
        "pair_weight", "pair_start", "pair_index",
        "plane_weight", "plane_start", "plane_index", "plane_order", "share",
        "byte_weight", "byte_start", "byte_index", "flat_weight", "flat_start", "flat_index",
        "byte_channel", "byte_scale", "byte_bias", "flat_bias",
    )  # fmt: skip
    _fields_ = [
        *[(name, ctypes.c_int32) for name in _numbers],
        *[(name, ctypes.c_float) for name in ("alpha", "beta")],
        *[(name, ctypes.c_void_p) for name in _arrays],
        *[(name, _Code) for name in _CODES],
    ]


@dataclass(frozen=True)
class Place:
    """Where a value lies: channels of a slot from `first` on."""

    slot: int
    first: int
    shape: tuple[int, int, int]


Part = tuple[str, int]
"""A value's place in another one: that one's name, and the value's first channel there."""


def places(
    ops: list[Op], inputs: dict[str, tuple[int, ...]], outputs: list[str]
) -> tuple[dict[str, Place], list[Shape], list[Op]]:
    """The place of every value, the shape (C, H, W) of every slot, and the ops that remain.

    A slot serves values of one shape, one after another: one of another shape would write where
    they keep their zeros. What is concatenated is made in its place at once, or copied there.
    """
    shapes = {name: geometry.chw(shape) for name, shape in inputs.items()}
    shapes |= {op.name: geometry.chw(op.shape) for op in ops}
    listed, parts = _without_parts(ops, shapes, {*inputs, *outputs})
    found = {name: _whole(name, parts) for name in shapes}
    root = {name: whole for name, (whole, _) in found.items()}
    slot, slots = _slots(listed, shapes, root, list(inputs), _ends(listed, root, outputs))
    placed = {
        name: Place(slot[whole], first, shapes[name]) for name, (whole, first) in found.items()
    }
    return placed, slots, listed


def _without_parts(
    ops: list[Op], shapes: dict[str, Shape], kept: set[str]
) -> tuple[list[Op], dict[str, Part]]:
    """The ops but concatenations and what only names channels of another value.

    With the copies that concatenations need, and each value that is a part of another. kept: values
    that have a place of their own, and so are copied. Adds the copies' shapes.
    """
    listed: list[Op] = []
    parts: dict[str, Part] = {}
    for op in ops:
        first = _first_channel(op, shapes)
        if first is not None:
            parts[op.name] = (op.inputs[0], first)
            continue
        if op.kind != "cat":
            listed.append(op)
            continue
        first = 0
        for name in op.inputs:
            part = name
            if name in kept or name in parts:
                part = f"{op.name}:{first}"
                shapes[part] = shapes[name]
                listed.append(Op("copy", part, (name,), shapes[name]))
            parts[part] = (op.name, first)
            first += shapes[name][0]
    return listed, parts


def _first_channel(op: Op, shapes: dict[str, Shape]) -> int | None:
    """Of an op whose result is consecutive channels of its input, the first of them."""
    if op.kind == "flatten" and shapes[op.inputs[0]] == shapes[op.name]:
        return 0
    first, last = (op.index[0], op.index[-1] + 1) if op.index else (0, 0)
    alike = op.kind == "gather" and op.index and op.index == tuple(range(first, last))
    return first if alike else None


def _whole(name: str, parts: dict[str, Part]) -> Part:
    """The value that no other contains which `name` is a part of, and its first channel there."""
    first = 0
    while name in parts:
        name, more = parts[name]
        first += more
    return name, first


def _ends(listed: list[Op], root: dict[str, str], outputs: list[str]) -> dict[str, int]:
    """The number of the op after which each whole value is no longer read."""
    end = dict.fromkeys(root.values(), -1)
    for now, op in enumerate(listed):
        end |= {root[name]: now for name in (op.name, *op.inputs)}
    return end | {root[name]: len(listed) for name in outputs}


def _slots(
    listed: list[Op],
    shapes: dict[str, Shape],
    root: dict[str, str],
    inputs: list[str],
    end: dict[str, int],
) -> tuple[dict[str, int], list[Shape]]:
    """The slot of every whole value, and the shape of every slot; free ones serve again."""
    slots: list[Shape] = []
    slot: dict[str, int] = {}
    free: dict[Shape, list[int]] = {}

    def take(name: str) -> None:
        if name in slot:
            return
        if free.get(shapes[name]):
            slot[name] = free[shapes[name]].pop()
        else:
            slot[name] = len(slots)
            slots.append(shapes[name])

    for name in inputs:
        take(name)
    for now, op in enumerate(listed):
        done = {root[name] for name in (op.name, *op.inputs)}
        done = {name for name in done if end[name] == now}
        over = _overwritten(op, shapes, root)
        if over in done:
            slot[op.name] = slot[over]
            done.remove(over)
        take(root[op.name])
        for name in done:
            free.setdefault(shapes[name], []).append(slot[name])
    return slot, slots


def _overwritten(op: Op, shapes: dict[str, Shape], root: dict[str, str]) -> str:
    """The value whose place the op's result may take, if nothing reads it later; or "".

    Of a conv its residual, unless its tiles overlap; of what goes pixel by pixel its first input.
    What else it reads must be no part of that.
    """
    if op.kind == "conv" and len(op.inputs) > 1:
        _, height, width = shapes[op.name]
        (read, over), fits = op.inputs, height % 4 == width % 4 == 0
    elif op.kind in ("act", "affine", "scalar", *_PAIRWISE):
        over, read = op.inputs[0], op.inputs[-1]
        fits = read == over or root[read] != over
    else:
        return ""
    if op.kind == "conv":
        fits &= root[read] != over
    whole = root[over] == over and root[op.name] == op.name and shapes[over] == shapes[op.name]
    return over if fits and whole else ""


class Network:
    """Consecutive ops as one native call: float NCHW or (N, C) tensors in and out.

    inputs: value -> shape without batch; outputs: values in the order of the results.
    """

    def __init__(self, ops, inputs, outputs, *, dtype: torch.dtype, threads: int):
        self.inputs, self.outputs, self.dtype, self.threads = inputs, outputs, dtype, threads
        self.shapes = {op.name: op.shape for op in ops} | inputs
        self._pointers = ctypes.c_void_p * len(inputs), ctypes.c_void_p * len(outputs)
        self._library = library(dtype)
        self._keep: list[np.ndarray] = []
        ops = [geometry.cropped(op, geometry.chw(self.shapes[op.inputs[0]])) for op in ops]
        found, slots, listed = places(ops, inputs, outputs)
        blocks = max(map(math.prod, slots)) <= largest(library())
        self._target = lists.Target(self._library, dtype, threads, blocks)
        index = {name: i for i, name in enumerate(found)}
        codes = {
            name: _Code(scale or 1, zero)
            for op in ops
            for name, scale, zero in zip((*op.inputs, op.name), op.scales, op.zeros, strict=False)
        }
        self._codes = defaultdict(lambda: _Code(1, 0), codes)
        made = [
            self._op("load", -1, i, index[name], out_code=self._codes[name])
            for i, name in enumerate(inputs)
        ]
        # a linear layer at the end writes its result itself, unrounded
        used = {name for op in listed for name in op.inputs}
        last = {op.name for op in listed if op.kind == "linear" and op.name not in used}
        last &= set(outputs)
        made += [
            self._native(op, index, outputs.index(op.name) if op.name in last else -1)
            for op in listed
        ]
        made += [
            self._op("store", index[name], i, -1, in_code=self._codes[name])
            for i, name in enumerate(outputs)
            if name not in last
        ]
        halo = max(
            (geometry.halo(op, self._source(op)) for op in ops if op.kind == "conv"), default=0
        )
        tensors = [_Tensor(p.slot, p.first, *p.shape) for p in found.values()]
        self._handle = self._library.explib_new(
            (_Op * len(made))(*made), len(made),
            (_Tensor * len(tensors))(*tensors), len(tensors),
            (_Slot * len(slots))(*(_Slot(*shape) for shape in slots)), len(slots),
            halo, threads, TYPES.index(dtype),
        )  # fmt: skip
        if not self._handle:
            raise MemoryError("no memory for the network's plan")

    def __del__(self):
        if getattr(self, "_handle", None):
            self._library.explib_free(self._handle)

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Results for inputs of the planned shapes, on the CPU; ValueError for any others."""
        given = [tensor.detach().float().contiguous() for tensor in tensors]
        count = given[0].shape[0]
        for tensor, (name, shape) in zip(given, self.inputs.items(), strict=True):
            if tensor.shape != (count, *shape):
                raise ValueError(f"{name}: {tuple(tensor.shape)}; give ({count}, {shape})")
        results = [
            torch.empty(count, *self.shapes[name], dtype=torch.float32) for name in self.outputs
        ]
        read, made = self._pointers
        status = self._library.explib_run(
            self._handle,
            read(*[tensor.data_ptr() for tensor in given]),
            made(*[tensor.data_ptr() for tensor in results]),
            count,
        )
        if status:
            raise MemoryError(f"no memory or no threads for a batch of {count}")
        return results

    def _held(self, array: np.ndarray) -> int:
        array = np.ascontiguousarray(array)
        self._keep.append(array)
        return array.ctypes.data

    def _op(self, kind: str, source: int, other: int, output: int, **more) -> _Op:
        codes = dict.fromkeys(_CODES, _Code(1, 0))  # what is stored as it is
        return _Op(KINDS.index(kind), source, other, output, **codes | more)

    def _source(self, op: Op) -> Shape:
        return geometry.chw(self.shapes[op.inputs[0]])

    def _native(self, op: Op, index: dict[str, int], result: int) -> _Op:
        """result: the argument that the value goes to, or -1."""
        binary = len(op.inputs) > 1 or op.kind in _PAIRWISE
        source, other = index[op.inputs[0]], index[op.inputs[-1]] if binary else result
        alpha, beta = (0.0, 6.0) if op.act == "relu6" else (op.alpha, op.beta)
        act = ACTS.index("clamp" if op.act == "relu6" else op.act)
        more = dict(act=act, groups=op.groups, alpha=alpha, beta=beta)
        names = op.inputs[0], op.inputs[-1], op.name
        if op.kind != "copy":
            more |= dict(zip(_CODES, (self._codes[name] for name in names), strict=True))
        for name in _AXIS:
            more |= dict(zip((f"{name}_h", f"{name}_w"), getattr(op, name), strict=True))
        given = self._arrays(op)
        more |= {name: given.pop(name) for name in _Op._lists if name in given}
        arrays = {name: self._held(array) for name, array in given.items()}
        return self._op(_KIND.get(op.kind, op.kind), source, other, index[op.name], **more | arrays)

    def _arrays(self, op: Op) -> dict[str, Any]:
        """What the C++ reads beside the numbers of an op."""
        arrays: dict[str, Any] = {}
        kind, source = _KIND.get(op.kind, op.kind), self._source(op)
        if op.slope is not None:
            arrays["slope"] = lists.floats(op.slope)
        if op.weight is not None:
            bias = torch.zeros(len(op.weight)) if op.bias is None else op.bias
            weight = lists.floats(op.weight)
            arrays |= {"bias": lists.floats(bias), "weight": weight}
            if kind == "conv":
                arrays |= lists.kernels(weight, op, source, self._target)
            elif kind == "linear":
                arrays["weight"] = lists.scalars(weight, self.dtype)
        if kind == "select":
            arrays["index"] = np.concatenate(geometry.selected(op, source))
        elif kind == "bilinear":
            arrays["index"], arrays["bias"] = geometry.between(op, source)
        elif kind in ("maxpool", "avgpool"):
            both = geometry.both_windows(op, source)
            pairs = [np.stack([begin, end], 1).ravel() for begin, end, _ in both]
            arrays["index"] = np.concatenate(pairs)
            arrays["bias"] = 1 / np.concatenate([count for *_, count in both])
        for name, type in (("index", np.int32), ("bias", np.float32)):
            if name in arrays and kind != "conv":
                arrays[name] = arrays[name].astype(type)
        return arrays
