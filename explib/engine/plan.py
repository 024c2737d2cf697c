"""Ops in, a native network out: which memory each value has, and the kernels that survive."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from explib.engine.build import TYPES, chunk, library
from explib.engine.graph import Op

KINDS = (
    "load", "store", "conv", "linear", "maxpool", "avgpool", "subsample", "add", "relu", "copy",
    "flatten",
)  # fmt: skip


class _Slot(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("channels", "height", "width")]


class _Tensor(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("slot", "first", "channels", "height", "width")]


class _Op(ctypes.Structure):
    _numbers = ("kind", "input", "other", "output", "kernel", "stride", "pad", "relu", "before")
    _arrays = ("bias", "weight", "start", "index", "pair_weight", "pair_start", "pair_index",
               "weight_by_channel", "start_by_channel", "index_by_channel", "share")  # fmt: skip
    _fields_ = [(n, ctypes.c_int32) for n in _numbers] + [(n, ctypes.c_void_p) for n in _arrays]


@dataclass(frozen=True)
class Place:
    """Where a value lies: channels of a slot from `first` on."""

    slot: int
    first: int
    shape: tuple[int, int, int]


def _chw(shape: tuple[int, ...]) -> tuple[int, int, int]:
    return shape if len(shape) == 3 else (shape[0], 1, 1)


Shape = tuple[int, int, int]
Part = tuple[str, int]
"""A value's place in another one: that one's name, and the value's first channel there."""


def places(
    ops: list[Op], inputs: dict[str, tuple[int, ...]], outputs: list[str]
) -> tuple[dict[str, Place], list[Shape], list[Op]]:
    """The place of every value, the shape (C, H, W) of every slot, and the ops that remain.

    A slot serves values of one shape, one after another: one of another shape would write where
    they keep their zeros. What is concatenated is made in its place at once, or copied there.
    """
    shapes = {name: _chw(shape) for name, shape in inputs.items()}
    shapes |= {op.name: _chw(op.shape) for op in ops}
    listed, parts = _without_cat(ops, shapes, {*inputs, *outputs})
    found = {name: _whole(name, parts) for name in shapes}
    root = {name: whole for name, (whole, _) in found.items()}
    slot, slots = _slots(listed, shapes, root, list(inputs), _ends(listed, root, outputs))
    placed = {
        name: Place(slot[whole], first, shapes[name]) for name, (whole, first) in found.items()
    }
    return placed, slots, listed


def _without_cat(
    ops: list[Op], shapes: dict[str, Shape], kept: set[str]
) -> tuple[list[Op], dict[str, Part]]:
    """The ops but concatenations, with the copies that those need, and each value that is a part.

    kept: values that have a place of their own, and so are copied. Adds the copies' shapes.
    """
    listed: list[Op] = []
    parts: dict[str, Part] = {}
    for op in ops:
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
        # what it reads may be a part of what is added to it, as of a concatenation
        apart = op.kind == "conv" and root[op.inputs[0]] not in op.inputs[1:]
        if apart and _in_place(op, shapes) and op.inputs[1] in done:
            slot[op.name] = slot[op.inputs[1]]
            done.remove(op.inputs[1])
        take(root[op.name])
        for name in done:
            free.setdefault(shapes[name], []).append(slot[name])
    return slot, slots


def _in_place(op: Op, shapes: dict[str, tuple[int, int, int]]) -> bool:
    """Whether a conv may write where its residual is read: its tiles must not overlap."""
    if len(op.inputs) < 2:
        return False
    _, height, width = shapes[op.name]
    return height % 4 == width % 4 == 0


class Network:
    """Consecutive ops as one native call: float NCHW or (N, C) tensors in and out.

    inputs: value -> shape without batch; outputs: values in the order of the results.
    """

    def __init__(self, ops, inputs, outputs, *, dtype: torch.dtype, threads: int):
        self.inputs, self.outputs, self.dtype, self.threads = inputs, outputs, dtype, threads
        self.shapes = {op.name: op.shape for op in ops} | inputs
        self._library = library()
        self._keep: list[np.ndarray] = []
        found, slots, listed = places(ops, inputs, outputs)
        index = {name: i for i, name in enumerate(found)}
        made = [self._op("load", -1, i, index[name]) for i, name in enumerate(inputs)]
        # a linear layer at the end writes its result itself, unrounded
        used = {name for op in listed for name in op.inputs}
        last = {op.name for op in listed if op.kind == "linear" and op.name not in used}
        last &= set(outputs)
        made += [
            self._native(op, index, outputs.index(op.name) if op.name in last else -1)
            for op in listed
        ]
        made += [
            self._op("store", index[name], i, -1)
            for i, name in enumerate(outputs)
            if name not in last
        ]
        halo = max((_halo(op) for op in ops if op.kind == "conv"), default=0)
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
        count = len(given[0])
        for tensor, (name, shape) in zip(given, self.inputs.items(), strict=True):
            if tensor.shape != (count, *shape):
                raise ValueError(f"{name}: {tuple(tensor.shape)}; give ({count}, {shape})")
        results = [
            torch.empty(count, *self.shapes[name], dtype=torch.float32) for name in self.outputs
        ]
        pointers = ctypes.c_void_p * len(given), ctypes.c_void_p * len(results)
        status = self._library.explib_run(
            self._handle,
            pointers[0](*(tensor.data_ptr() for tensor in given)),
            pointers[1](*(tensor.data_ptr() for tensor in results)),
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
        return _Op(KINDS.index(kind), source, other, output, **more)

    def _native(self, op: Op, index: dict[str, int], result: int) -> _Op:
        """result: the argument that the value goes to, or -1."""
        source, other = index[op.inputs[0]], index[op.inputs[1]] if len(op.inputs) > 1 else result
        more = dict(kernel=op.kernel, stride=op.stride, pad=op.pad, relu=op.relu, before=op.before)
        if op.kind in ("conv", "linear"):
            layer, features = op.module, op.module.weight.shape[0]
            bias = (
                torch.zeros(features, dtype=torch.float32)
                if layer.bias is None
                else layer.bias.detach().float()
            )
            more["bias"] = self._held(bias.numpy())
            weight = layer.weight.detach().float().numpy()
            arrays = (
                self._kernels(weight) if op.kind == "conv" else {"weight": self._scalars(weight)}
            )
            more |= {name: self._held(array) for name, array in arrays.items()}
        return self._op(op.kind, source, other, index[op.name], **more)

    def _scalars(self, values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # what is infinite then shows in the results, too
            return values.astype(np.float16 if self.dtype == torch.float16 else np.float32)

    def _words(self, values: np.ndarray) -> np.ndarray:
        """Each value as a 32-bit word: a float, or the same half twice."""
        values = self._scalars(values)
        return np.repeat(values, 2, axis=-1) if values.dtype == np.float16 else values

    def _kernels(self, weight: np.ndarray) -> dict[str, np.ndarray]:
        """The kernels (F, C, K, K) that are not all zeros, by filter and by channel."""
        filters, channels = weight.shape[:2]
        keep = np.asarray(weight.any((2, 3)))
        f, c = keep.nonzero()
        # each thread's share of the filters holds about the same number of kernels
        total = np.concatenate([[0], keep.sum(1).cumsum()])
        wanted = total[-1] * np.arange(self.threads + 1) / self.threads
        share = np.searchsorted(total, wanted)
        share[0], share[-1] = 0, filters
        thread = np.searchsorted(share, f, side="right") - 1
        order = np.lexsort((f, c, thread))
        counts = np.bincount(thread * channels + c, minlength=self.threads * channels)
        starts = np.concatenate([[0], counts.cumsum()])
        flat = weight.reshape(filters, channels, -1)
        lists = {"share": share.astype(np.int32)}
        if self.dtype == torch.bfloat16:
            size = chunk(self._library, self.dtype, True) if flat.shape[2] == 1 else channels
            lists |= _by_chunk(_pairs, flat, keep, size)
        if flat.shape[2] == 1:
            lists |= _by_chunk(_singles, flat, keep, chunk(self._library, self.dtype))
            lists["weight"] = self._words(lists["weight"])
            small = {n: lists[n].astype(np.uint8) for n in ("index", "pair_index") if n in lists}
            return lists | small
        return lists | {
            "weight": self._words(flat[f, c]),
            "start": total.astype(np.int32),
            "index": c.astype(np.int32),
            "weight_by_channel": self._words(flat[f, c][order]),
            "start_by_channel": starts.astype(np.int32),
            "index_by_channel": f[order].astype(np.int32),
        }


def _by_chunk(
    lists: Callable[[np.ndarray, np.ndarray], dict], weight: np.ndarray, keep: np.ndarray, size: int
) -> dict[str, np.ndarray]:
    """The lists of `size` channels after those of the `size` channels before, as one."""
    parts = [
        lists(weight[:, first : first + size], keep[:, first : first + size])
        for first in range(0, weight.shape[1], size)
    ]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for name in joined:
        if name.endswith("start"):
            counts = [np.diff(part[name]) for part in parts]
            joined[name] = np.concatenate([[0], np.concatenate(counts).cumsum()]).astype(np.int32)
    return joined


def _singles(weight: np.ndarray, keep: np.ndarray) -> dict[str, np.ndarray]:
    """The kernels of `keep` by filter, of weight (F, C, taps)."""
    f, c = keep.nonzero()
    return {
        "weight": weight[f, c],
        "start": np.concatenate([[0], keep.sum(1).cumsum()]).astype(np.int32),
        "index": c.astype(np.int32),
    }


def _pairs(weight: np.ndarray, keep: np.ndarray) -> dict[str, np.ndarray]:
    """The kernels of `keep`, two of a filter at once: weight (F, C, taps) as pairs of bfloat16.

    Where their number is odd the last one has itself for a partner, with weights of zero.
    """
    starts, channels, words = [0], [], []
    for filter_weight, kept in zip(weight, keep, strict=True):
        own = kept.nonzero()[0]
        values = filter_weight[own]
        if len(own) % 2:
            own, values = np.append(own, own[-1]), np.append(values, 0 * values[-1:], 0)
        starts.append(starts[-1] + len(own) // 2)
        channels.append(own)
        words.append(values.reshape(-1, 2, weight.shape[2]).swapaxes(1, 2))
    pairs = torch.from_numpy(np.concatenate(words)).bfloat16().view(torch.int16)
    return {
        "pair_weight": pairs.numpy(),
        "pair_start": np.array(starts, np.int32),
        "pair_index": np.concatenate(channels).astype(np.int32),
    }


def _halo(op: Op) -> int:
    """How far, in outputs, a conv looks beyond its plane."""
    if op.stride == 1:
        return op.pad
    return max(-(-op.pad // op.stride), (op.kernel - 1 - op.pad) // op.stride)
