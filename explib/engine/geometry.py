"""Which pixels and channels of its input each op reads."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from explib.engine.graph import Op

MAX_HALO = 3
"""Convs of stride 1 that look further beyond a plane work on a copy with zeros around it."""

Shape = tuple[int, int, int]


def chw(shape: tuple[int, ...]) -> Shape:
    """A value's shape without batch as (C, H, W)."""
    return (shape[0], *shape[1:]) if len(shape) == 3 else (shape[0], 1, 1)


class Along(NamedTuple):
    """An op along rows or columns: its window, and the sizes of its input and output."""

    kernel: int
    stride: int
    pad: int
    dilation: int
    size: int
    made: int


def _axes(op: Op, source: Shape) -> list[Along]:
    own = (op.kernel, op.stride, op.pad, op.dilation, source[1:], chw(op.shape)[1:])
    return [Along(*axis) for axis in zip(*own, strict=True)]


def plain(op: Op, source: Shape) -> bool:
    """Whether a conv is square, of size 1 or 3, padded by half of it; as plan.h has it."""
    same = all(
        pad == kernel // 2 and dilation == 1 and made == (size - 1) // stride + 1
        for kernel, stride, pad, dilation, size, made in _axes(op, source)
    )
    square = op.kernel in ((1, 1), (3, 3)) and op.stride[0] == op.stride[1]
    return same and square and not depthwise(op, source)


def in_bytes(op: Op, source: Shape) -> bool:
    """Whether int8 computes a conv by dot products of bytes, as bytes.h has it, else as floats."""
    side, stride = op.kernel[0], op.stride[0]
    same = all(
        pad == kernel // 2 and dilation == 1 and made == (size - 1) // step + 1
        for kernel, step, pad, dilation, size, made in _axes(op, source)
    )
    square = op.kernel == (side, side) and op.stride == (stride, stride)
    fits = (side == 1 and not depthwise(op, source)) or (side in (3, 5, 7) and stride <= 2)
    return same and square and fits


def vectors(shape: tuple[int, ...], lanes: int) -> int:
    """About how many vectors a plane of a single image has."""
    _, height, width = chw(shape)
    return -(-height * (width + 1) // lanes)


def depthwise(op: Op, source: Shape) -> bool:
    """Whether a conv has filters of one channel each; as plan.h has it."""
    return 1 < op.groups == source[0]


def cropped(op: Op, source: Shape) -> Op:
    """A conv without the rows and columns of its kernels that only ever meet padding."""
    if op.kind != "conv" or op.weight is None:
        return op
    kept: list[slice] = []
    pads: list[int] = []
    for axis in _axes(op, source):
        taps, made = np.arange(axis.kernel)[:, None], np.arange(axis.made)
        at = taps * axis.dilation - axis.pad + made * axis.stride
        alive = np.flatnonzero(((at >= 0) & (at < axis.size)).any(1))
        first, last = (int(alive[0]), int(alive[-1])) if len(alive) else (0, 0)
        kept.append(slice(first, last + 1))
        pads.append(axis.pad - first * axis.dilation)
    weight = op.weight[:, :, kept[0], kept[1]]
    rows, columns = weight.shape[2:]
    down, along = op.dilation
    return replace(
        op,
        weight=weight,
        kernel=(rows, columns),
        pad=(pads[0], pads[1]),
        dilation=(down if rows > 1 else 1, along if columns > 1 else 1),
    )


def halo(op: Op, source: Shape) -> int:
    """How far, in outputs, a conv looks beyond its plane, where no copy of it is made.

    In pixels of its input if it is depthwise of stride 2 (`strided_kernel` of depthwise.h).
    """
    far, same = 0, True
    for kernel, stride, pad, dilation, size, made in _axes(op, source):
        reach = (kernel - 1) * dilation - pad
        far = max(far, -(-pad // stride), reach // stride)
        same &= stride == 1 and size == made and pad >= 0
    if depthwise(op, source) and op.stride == (2, 2):
        far, same = max(op.pad), op.kernel in ((3, 3), (5, 5)) and op.dilation == (1, 1)
    return far if plain(op, source) or (same and far <= MAX_HALO) else 0


Window = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of every row or column of a pool's output: the first of its input, the end, how many count."""


def both_windows(op: Op, source: Shape) -> list[Window]:
    return [_windows(op, *axis) for axis in _axes(op, source)]


def _windows(
    op: Op, kernel: int, stride: int, pad: int, dilation: int, size: int, made: int
) -> Window:
    at = np.arange(made)
    if op.kind.startswith("adaptive"):
        begin, end = at * size // made, -(-(at + 1) * size // made)
        return begin, end, end - begin
    start = at * stride - pad
    begin = np.where(start < 0, start + -(start // dilation) * dilation, start)
    end = np.minimum(start + (kernel - 1) * dilation + 1, size)
    # torch counts padding up to its own edge
    return begin, end, np.minimum(start + kernel, size + pad) - start if op.before else end - begin


def selected(op: Op, source: Shape) -> list[np.ndarray]:
    """Of every channel, row and column of the output that of the input, or -1."""
    channels, *plane = (np.arange(size) for size in chw(op.shape))
    if op.kind == "gather":
        return [np.array(op.index), *plane]
    if op.kind == "stretch":
        spread = zip(plane, op.stride, strict=True)
        return [channels, *(np.where(at % step, -1, at // step) for at, step in spread)]
    if op.kind == "upsample_nearest":
        return [
            channels,
            *(_nearest(*one) for one in zip(plane, source[1:], _factors(op), strict=True)),
        ]
    if op.kind.startswith("pad_"):
        ends = zip(plane, op.pad, source[1:], strict=True)
        return [channels, *(_around(op.kind, at - pad, size) for at, pad, size in ends)]
    at = [channels - op.before]
    at += [i * step - pad for i, step, pad in zip(plane, op.stride, op.pad, strict=True)]
    return [np.where((i >= 0) & (i < n), i, -1) for i, n in zip(at, source, strict=True)]


def _around(kind: str, at: np.ndarray, size: int) -> np.ndarray:
    """Which row or column stands for one that may be outside."""
    if kind == "pad_replicate":
        return at.clip(0, size - 1)
    return at % size if kind == "pad_circular" else size - 1 - abs(size - 1 - abs(at))


def _factors(op: Op) -> tuple[float, float]:
    return op.alpha, op.beta


def _ratio(size: int, made: int, factor: float) -> np.float32:
    """How far apart, in pixels of the input, those of the output are; as torch has it."""
    return np.float32(1 / factor if factor > 0 else size / made)


def _nearest(at: np.ndarray, size: int, factor: float) -> np.ndarray:
    if len(at) in (size, 2 * size):  # whatever the factor is
        return at // (len(at) // size)
    return np.minimum((at.astype(np.float32) * _ratio(size, len(at), factor)).astype(int), size - 1)


def between(op: Op, source: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Of every row, then column, that before it in the input, and how near it is to the next."""
    found = []
    for size, made, factor in zip(source[1:], op.shape[1:], _factors(op), strict=True):
        at = np.arange(made, dtype=np.float32)
        if op.before:  # the corners' centres lie on each other
            at = at * np.float32((size - 1) / max(made - 1, 1))
        else:
            at = np.maximum(
                (at + np.float32(0.5)) * _ratio(size, made, factor) - np.float32(0.5), 0
            )
        found.append(np.minimum(at, size - 1))
    at = np.concatenate(found)
    return np.floor(at), at - np.floor(at)
