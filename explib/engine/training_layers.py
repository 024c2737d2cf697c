"""The layers of networks that train with the surviving kernels only (training.py), on planes.

Between convs activations lie as in the engine, 16 images side by side on AVX-512: *planes*, a
float32 or bfloat16 tensor (blocks, C, plane, lanes), in which a plane is H * W pixels of a map and
a few that mean nothing.
"""

import ctypes
import functools
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from explib.engine import native
from explib.engine.fused import norm_act, scale_and_shift
from explib.engine.native import pointer

Size = tuple[int, int]
_INT64 = ctypes.c_int64


class _Planes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("blocks", "channels", "height", "width")]


@functools.cache
def library() -> ctypes.CDLL | Any:  # Any: who computes has asked before whether it is there
    """The compiled kernels; None, with a warning, where they cannot be built."""
    try:
        lib = native.load(Path(__file__).parent / "csrc/training.cpp", "-fopenmp")
    except native.NoCompiler as error:
        warnings.warn(f"training multiplies pruned kernels, too: {error}", stacklevel=2)
        return None
    lib.training_plane.restype = _INT64
    return lib


def _ends(x: torch.Tensor) -> tuple[bool, int]:
    """What every C++ function ends with: whether bfloat16, and threads."""
    return x.dtype == torch.bfloat16, torch.get_num_threads()


def _shape(x: torch.Tensor, size: Size) -> ctypes.Array:
    """The shape of planes, for C++. ValueError unless they are planes of maps of that size."""
    lib = library()
    wanted = (lib.training_plane(*size), lib.training_lanes())
    types = (torch.float32, torch.bfloat16)[: 1 + lib.training_halves()]
    if x.ndim != 4 or x.shape[2:] != wanted or x.dtype not in types or not x.is_cpu:
        raise ValueError(f"planes {tuple(x.shape)}, {x.dtype}, on {x.device} for maps {size}")
    if not x.is_contiguous() or x.data_ptr() % 64:
        raise ValueError("planes: not contiguous from a multiple of 64 bytes on")
    return (_Planes * 1)(_Planes(*x.shape[:2], *size))


def _beside(x: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor | None:
    """Other planes in the type of x and contiguous. ValueError for another shape."""
    if other is None:
        return None
    if other.shape != x.shape:
        raise ValueError(f"planes {tuple(other.shape)} beside {tuple(x.shape)}")
    return other.to(x.dtype).contiguous()


def _empty(x: torch.Tensor, channels: int, size: Size) -> torch.Tensor:
    return x.new_empty(x.shape[0], channels, library().training_plane(*size), x.shape[3])


def maps(x: torch.Tensor, size: Size) -> torch.Tensor:
    """Planes as (blocks, C, H, W, lanes), a view."""
    return x[:, :, : size[0] * size[1]].unflatten(2, size)


def planes(x: torch.Tensor) -> torch.Tensor:
    """What `maps` gives, as planes again."""
    more = library().training_plane(*x.shape[2:4]) - x.shape[2] * x.shape[3]
    x = x.flatten(2, 3)
    return (F.pad(x, (0, 0, 0, more)) if more else x).contiguous()


class ToPlanes(nn.Module):
    """(N, C, H, W) to planes, N a multiple of the lanes; in bfloat16 where autocast says so."""

    def forward(self, x):
        half = torch.is_autocast_enabled("cpu") and library().training_halves()
        x = x.to(torch.bfloat16 if half else torch.float32)
        lanes = library().training_lanes()
        return planes(x.unflatten(0, (-1, lanes)).permute(0, 2, 3, 4, 1))


class FromPlanes(nn.Module):
    """Planes to (N, C, H, W)."""

    def __init__(self, size: Size):
        super().__init__()
        self.size = size

    def forward(self, x):
        return maps(x, self.size).permute(0, 4, 1, 2, 3).flatten(0, 1)


class Indexed(nn.Module):
    """x[index] of maps, slices of the first four dimensions."""

    def __init__(self, index: tuple[slice, ...], size: Size):
        super().__init__()
        self.index, self.size = index, size

    def forward(self, x):
        return planes(maps(x, self.size)[self.index])


class Pool(nn.Module):
    """A pooling layer of the network; a map of a block is an image of as many channels as lanes."""

    def __init__(self, pool: nn.Module, size: Size):
        super().__init__()
        self.pool, self.size = pool, size

    def forward(self, x):
        images = maps(x, self.size).flatten(0, 1).permute(0, 3, 1, 2)
        pooled = self.pool(images).permute(0, 2, 3, 1)
        return planes(pooled.unflatten(0, x.shape[:2]))


def _kernel_list(mask: torch.Tensor, half: bool) -> tuple[torch.Tensor, ...]:
    """The kernels of a mask (rows, columns) row by row: start (rows + 1,), column, row.

    half: they go in pairs, and start counts pairs; where their number in a row is odd, the last one
    has itself for a partner, of row -1.
    """
    row, column = mask.nonzero().unbind(1)
    counts = mask.sum(1)
    each = counts + counts % 2 if half else counts
    start = F.pad(each.cumsum(0), (1, 0))
    place = start[row] + torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
    columns = torch.zeros(int(start[-1]), dtype=torch.int32)
    rows = torch.full((int(start[-1]),), -1)
    columns[place], rows[place] = column.int(), row
    lonely = start[1:][each > counts] - 1
    columns[lonely] = columns[lonely - 1]
    return (start // 2 if half else start).int(), columns, rows


class Conv(nn.Module):
    """A conv of the network, 3x3 padded by 1 or 1x1, over the kernels of its mask."""

    def __init__(self, conv: nn.Conv2d, mask: torch.Tensor, size: Size, out_size: Size):
        """mask: bool (F, C); size and out_size: of the maps it takes and gives."""
        super().__init__()
        self.conv, self.size, self.out_size = conv, size, out_size
        self.kernel, self.stride = conv.kernel_size[0], conv.stride[0]
        self.lists = {
            (turned, half): _kernel_list(mask.T if turned else mask, half)
            for turned in (False, True)
            for half in (False, True)
        }
        self.f, self.c = (index.int().contiguous() for index in mask.nonzero().unbind(1))
        self.offsets: dict[tuple, torch.Tensor] = {}

    def forward(self, x):
        return _Conv.apply(x, self.conv.weight, self.conv.bias, self)

    def run(self, x, weight, bias, turned: bool = False) -> torch.Tensor:
        """The conv of x; turned: from the gradient of its outputs, spread, that of its inputs."""
        if weight.dtype != torch.float32 or not weight.is_cpu:
            raise TypeError(f"weight: {weight.dtype} on {weight.device}; give float32 on the CPU")
        half, threads = _ends(x)
        start, columns, rows = self.lists[turned, half]
        at = self.offsets.get((turned, half, weight.stride()))
        if at is None:
            outer, inner = weight.stride()[:2]
            at = rows * (inner if turned else outer) + columns * (outer if turned else inner)
            self.offsets[turned, half, weight.stride()] = at.masked_fill_(rows < 0, -1)
        kernels = len(at) // (1 + half)
        words = torch.empty(kernels * self.kernel**2, dtype=torch.int32)
        down, right = map(_INT64, weight.stride()[2:])
        library().training_pack(
            *(pointer(weight), pointer(at), _INT64(kernels), down, right),
            *(self.kernel, turned, half),
            *(pointer(words), threads),
        )
        filters = len(start) - 1
        size, stride = (self.size, 1) if turned else (self.out_size, self.stride)
        y = _empty(x, filters, size)
        bias = (
            torch.zeros(filters, dtype=torch.float32)
            if bias is None
            else bias.detach().float().contiguous()
        )
        library().training_conv(
            *(pointer(x), pointer(y), _shape(x, self.size), _shape(y, size)),
            *(self.kernel, stride),
            *map(pointer, (words, bias, start, columns)),
            *(half, threads),
        )
        return y

    def spread(self, dy: torch.Tensor) -> torch.Tensor:
        """The gradient of the outputs as that of a conv of stride 1."""
        if self.stride == 1:
            return dy
        wide = _empty(dy, dy.shape[1], self.size).zero_()
        maps(wide, self.size)[:, :, :: self.stride, :: self.stride] = maps(dy, self.out_size)
        return wide

    def gradient(self, dy, x, weight) -> torch.Tensor:
        """That of the weight, from that of the outputs, spread, and the inputs."""
        made = torch.zeros_like(weight, dtype=torch.float32)
        outer, inner, down, right = made.stride()
        at = self.f.long() * outer + self.c.long() * inner
        library().training_kernels(
            *(pointer(dy), pointer(x), _shape(dy, self.size), _shape(x, self.size)),
            *(pointer(self.f), pointer(self.c), pointer(at), _INT64(len(at))),
            *(self.kernel, _INT64(down), _INT64(right), pointer(made), *_ends(x)),
        )
        return made


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, conv):
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.conv = conv
        return conv.run(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x, weight), conv = ctx.saved_tensors, ctx.conv
        dy, dbias = dy.to(x.dtype).contiguous(), None
        if ctx.needs_input_grad[2]:
            dbias = torch.empty(dy.shape[1], dtype=torch.float32)
            shape = _shape(dy, conv.out_size)
            library().training_sums(pointer(dy), shape, pointer(dbias), *_ends(dy))
        dy = conv.spread(dy)
        dx = conv.run(dy, weight, None, turned=True) if ctx.needs_input_grad[0] else None
        return dx, conv.gradient(dy, x, weight), dbias, None


class Norm(nn.Module):
    """A BatchNorm2d of the network with what follows it: relu(norm(x) + add)."""

    def __init__(self, norm: nn.BatchNorm2d, relu: bool, size: Size):
        super().__init__()
        self.norm, self.relu, self.size = norm, relu, size

    def forward(self, x, add=None):
        norm, x, add = self.norm, x.contiguous(), _beside(x, add)
        if norm.training:
            count = x.shape[0] * x.shape[3] * self.size[0] * self.size[1]
            passes = (
                functools.partial(_normalize, size=self.size),
                functools.partial(_norm_back, size=self.size),
            )
            return norm_act(norm, x, add, self.relu, count, passes)
        scale, shift = scale_and_shift(norm)
        if torch.is_grad_enabled():  # frozen statistics
            y = maps(x, self.size) * scale[:, None, None, None] + shift[:, None, None, None]
            y = planes(y.to(x.dtype))
            y = y if add is None else y + add
            return F.relu(y) if self.relu else y
        y = torch.empty_like(x)
        scale, shift = scale.float().contiguous(), shift.float().contiguous()
        library().training_affine(
            *map(pointer, (x, add, y)), _shape(x, self.size),
            *(pointer(scale), pointer(shift), self.relu, *_ends(x)),
        )  # fmt: skip
        return y


def _normalize(x, weight, bias, add, eps: float, relu: bool, *, size: Size) -> tuple:
    """As `fused.normalize`, on planes."""
    y, shape = torch.empty_like(x), _shape(x, size)
    mean, var, invstd = torch.empty(3, x.shape[1], dtype=torch.float32).unbind()
    weight, bias = weight.float().contiguous(), bias.float().contiguous()
    library().training_norm(
        *map(pointer, (x, add, y)), shape, pointer(weight), pointer(bias),
        *(ctypes.c_double(eps), relu, *map(pointer, (mean, var, invstd)), *_ends(x)),
    )  # fmt: skip
    return y, mean, var, invstd


def _norm_back(dy, x, y, weight, mean, invstd, wants_add: bool, *, size: Size) -> tuple:
    """As `fused.backward`, on planes."""
    dy, dx = _beside(x, dy), torch.empty_like(x)
    dadd = torch.empty_like(x) if wants_add else None
    dweight, dbias = torch.empty(2, x.shape[1], dtype=torch.float32).unbind()
    weight = weight.float().contiguous()
    library().training_norm_back(
        *map(pointer, (dy, x, y, dx, dadd)), _shape(x, size),
        *map(pointer, (weight, mean, invstd, dweight, dbias)), *_ends(x),
    )  # fmt: skip
    return dx, dadd, dweight, dbias
