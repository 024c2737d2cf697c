"""Training on a GPU: BatchNorm, shortcut and ReLU in three kernels a direction, in Triton.

On a GPU a small network waits for its kernels' beginnings and for memory more than for arithmetic;
torch takes ten of them for what lies between two convolutions. x is (N, C, H, W), channels last: a
matrix of N*H*W rows and C columns. A pass over it leaves partial sums of each channel for each
group of rows, in an order that depends on the shape alone; a small kernel adds them up; a second
pass uses what comes out. Sums are in float32, of deviations from a mean, so that none cancel.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import nn
from torch.autograd.function import once_differentiable

TILE = 8192
"""Values that a program takes at a time."""

PROGRAMS = 264
"""Groups of rows, about: two for each multiprocessor of a large GPU."""

FEW = 4096
"""Values that a program adds up which follows them."""


@triton.jit
def _tile(start, first, rows, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of a tile of x, and which of them are inside."""
    row = start + tl.arange(0, ROWS)[:, None]
    column = first + tl.arange(0, COLUMNS)[None, :]
    return row.to(tl.int64) * channels + column, (row < rows) & (column < channels)


@triton.jit
def joined(values, inside, count, mean, squares, before):
    """Mean and squared deviations of so many rows before, and of these (count, 0 outside)."""
    own = tl.sum(values, 0) / tl.maximum(count, 1.0)
    away = tl.where(inside, values - own[None, :], 0.0)
    apart, share = own - mean, count / tl.maximum(before + count, 1.0)
    squares += tl.sum(away * away, 0) + apart * apart * before * share
    return mean + apart * share, squares


@triton.jit
def _moments(
    x, partial, rows, channels,
    TURNS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each channel in this program's rows."""
    program, first = tl.program_id(0), tl.program_id(1) * COLUMNS
    mean = tl.zeros((COLUMNS,), tl.float32)
    squares = tl.zeros((COLUMNS,), tl.float32)
    before = 0.0
    for turn in range(TURNS):
        start = (program * TURNS + turn) * ROWS
        at, inside = _tile(start, first, rows, channels, ROWS, COLUMNS)
        values = tl.load(x + at, inside, 0.0).to(tl.float32)
        count = tl.minimum(tl.maximum(rows - start, 0), ROWS).to(tl.float32)
        mean, squares = joined(values, inside, count, mean, squares, before)
        before += count
    column = first + tl.arange(0, COLUMNS)
    to = partial + program * channels + column
    tl.store(to, mean, column < channels)
    tl.store(to + tl.num_programs(0) * channels, squares, column < channels)


@triton.jit
def _norm(
    partial, weight, bias, added, running_mean, running_var, batches, found,
    programs, each, rows, channels, eps, momentum,
    ADDED: tl.constexpr, PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """From partial moments: mean, 1 / deviation, scale and shift (4, C); running statistics.

    added: what belongs to the mean and was left out, since it falls out of all else.
    """
    program = tl.arange(0, PROGRAMS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (program < programs) & (column[None, :] < channels)
    at = partial + program * channels + column[None, :]
    means = tl.load(at, inside, 0.0)
    squares = tl.load(at + programs * channels, inside, 0.0)
    count = tl.minimum(tl.maximum(rows - program * each, 0), each).to(tl.float32)
    mean = tl.sum(means * count, 0) / rows
    apart = tl.where(inside, means - mean[None, :], 0.0)
    var = (tl.sum(squares, 0) + tl.sum(apart * apart * count, 0)) / rows
    inverse = 1.0 / tl.sqrt(var + eps)
    there = column < channels
    scale = tl.load(weight + column, there, 0.0) * inverse
    shift = tl.load(bias + column, there, 0.0) - mean * scale
    tl.store(found + column, mean, there)
    tl.store(found + channels + column, inverse, there)
    tl.store(found + 2 * channels + column, scale, there)
    tl.store(found + 3 * channels + column, shift, there)
    known = tl.load(running_mean + column, there, 0.0)
    if ADDED:
        mean += tl.load(added + column, there, 0.0)
    tl.store(running_mean + column, known + momentum * (mean - known), there)
    unbiased = var * (rows / tl.maximum(rows - 1.0, 1.0))
    known = tl.load(running_var + column, there, 0.0)
    tl.store(running_var + column, known + momentum * (unbiased - known), there)
    if tl.program_id(0) == 0:
        tl.store(batches, tl.load(batches) + 1)


@triton.jit
def _apply(
    x, add, y, found, rows, channels,
    ADD: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y = relu(x * scale + shift + add)."""
    first = tl.program_id(1) * COLUMNS
    at, inside = _tile(tl.program_id(0) * ROWS, first, rows, channels, ROWS, COLUMNS)
    column = first + tl.arange(0, COLUMNS)
    scale = tl.load(found + 2 * channels + column, column < channels, 0.0)
    shift = tl.load(found + 3 * channels + column, column < channels, 0.0)
    values = tl.load(x + at, inside, 0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if ADD:
        values += tl.load(add + at, inside, 0.0).to(tl.float32)
    if RELU:
        values = tl.where(values < 0.0, 0.0, values)  # NaN stays
    tl.store(y + at, values.to(y.dtype.element_ty), inside)


@triton.jit
def _gradient(dy, y, at, inside, RELU: tl.constexpr):
    """The gradient of what ReLU took."""
    values = tl.load(dy + at, inside, 0.0).to(tl.float32)
    if RELU:
        values = tl.where(tl.load(y + at, inside, 0.0).to(tl.float32) > 0.0, values, 0.0)
    return values


@triton.jit
def _sums(
    dy, x, y, found, partial, rows, channels,
    RELU: tl.constexpr, TURNS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums of the gradient, and of it times x - mean, of each channel in this program's rows."""
    program, first = tl.program_id(0), tl.program_id(1) * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    mean = tl.load(found + column, column < channels, 0.0)
    plain = tl.zeros((COLUMNS,), tl.float32)
    weighed = tl.zeros((COLUMNS,), tl.float32)
    for turn in range(TURNS):
        start = (program * TURNS + turn) * ROWS
        at, inside = _tile(start, first, rows, channels, ROWS, COLUMNS)
        gradient = _gradient(dy, y, at, inside, RELU)
        away = tl.load(x + at, inside, 0.0).to(tl.float32) - mean[None, :]
        plain += tl.sum(gradient, 0)
        weighed += tl.sum(gradient * away, 0)
    to = partial + program * channels + column
    tl.store(to, plain, column < channels)
    tl.store(to + tl.num_programs(0) * channels, weighed, column < channels)


@triton.jit
def _factors(
    partial, weight, found, dweight, dbias, factors, programs, rows, channels,
    PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """From partial sums: gradients of weight and bias, and what `_back` needs of them (3, C)."""
    program = tl.arange(0, PROGRAMS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (program < programs) & (column[None, :] < channels)
    at = partial + program * channels + column[None, :]
    plain = tl.sum(tl.load(at, inside, 0.0), 0)
    weighed = tl.sum(tl.load(at + programs * channels, inside, 0.0), 0)
    there = column < channels
    inverse = tl.load(found + channels + column, there, 0.0)
    tl.store(dweight + column, weighed * inverse, there)
    tl.store(dbias + column, plain, there)
    tl.store(factors + column, tl.load(weight + column, there, 0.0) * inverse, there)
    tl.store(factors + channels + column, plain / rows, there)
    tl.store(factors + 2 * channels + column, inverse * inverse * weighed / rows, there)


@triton.jit
def _back(
    dy, x, y, dx, dadd, found, factors, rows, channels,
    ADD: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of x and of what was added to its norm."""
    first = tl.program_id(1) * COLUMNS
    at, inside = _tile(tl.program_id(0) * ROWS, first, rows, channels, ROWS, COLUMNS)
    column = first + tl.arange(0, COLUMNS)
    there = column < channels
    mean = tl.load(found + column, there, 0.0)
    scale = tl.load(factors + column, there, 0.0)
    plain = tl.load(factors + channels + column, there, 0.0)
    weighed = tl.load(factors + 2 * channels + column, there, 0.0)
    gradient = _gradient(dy, y, at, inside, RELU)
    if ADD:
        tl.store(dadd + at, gradient.to(dadd.dtype.element_ty), inside)
    away = tl.load(x + at, inside, 0.0).to(tl.float32) - mean[None, :]
    own = scale[None, :] * (gradient - plain[None, :] - away * weighed[None, :])
    tl.store(dx + at, own.to(dx.dtype.element_ty), inside)


class _Shape:
    """How x is divided: of each program's rows and columns, and how many there are."""

    def __init__(self, x: torch.Tensor):
        self.channels, self.rows = x.shape[1], x.numel() // x.shape[1]
        columns = min(triton.next_power_of_2(self.channels), 128)
        tile = min(TILE // columns, triton.next_power_of_2(self.rows))
        across, down = triton.cdiv(self.channels, columns), triton.cdiv(self.rows, tile)
        self.turns = triton.cdiv(down, max(PROGRAMS // across, 1))
        self.programs = triton.cdiv(down, self.turns)
        self.each = self.turns * tile
        self.cut: Any = {"ROWS": tile, "COLUMNS": columns}
        self.whole, self.grouped = (down, across), (self.programs, across)

    def few(self, programs: int) -> tuple[tuple[int], Any]:
        """How what so many programs have left is added up: the grid, and each one's cut."""
        most = triton.next_power_of_2(programs)
        columns = max(1, min(16, FEW // most))
        return (triton.cdiv(self.channels, columns),), {"PROGRAMS": most, "COLUMNS": columns}


def normalize(
    x: torch.Tensor,
    add: torch.Tensor | None,
    norm: nn.BatchNorm2d,
    relu: bool,
    bias: torch.Tensor | None = None,
    partial: torch.Tensor | None = None,
    each: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """relu(norm(x + bias) + add) with batch statistics, and what `gradients` needs of them (4, C).

    Updates the running statistics. bias (C,): changes nothing but these. partial: each program's
    moments of x, (2, programs, C), where they are known already, of `each` rows.
    """
    shape, y = _Shape(x), torch.empty_like(x)
    size = shape.rows, shape.channels
    if partial is None:
        each = shape.each
        partial = x.new_empty((2, shape.programs, shape.channels), dtype=torch.float32)
        _moments[shape.grouped](x, partial, *size, TURNS=shape.turns, **shape.cut)
    found = x.new_empty((4, shape.channels), dtype=torch.float32)
    programs = partial.shape[1]
    grid, cut = shape.few(programs)
    _norm[grid](
        partial, norm.weight, norm.bias, norm.weight if bias is None else bias,
        norm.running_mean, norm.running_var, norm.num_batches_tracked, found,
        programs, each, *size, norm.eps, norm.momentum, bias is not None, **cut,
    )  # fmt: skip
    other = x if add is None else add  # what is not there is not read
    _apply[shape.whole](x, other, y, found, *size, add is not None, relu, **shape.cut)
    return y, found


def gradients(dy, x, y, weight, found, wants_add: bool) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x, of add (None unless wanted), weight and bias, from that of the result.

    y: the result where a ReLU made it, else None.
    """
    relu = y is not None
    dy = dy.contiguous(memory_format=torch.channels_last)
    y = y if relu else x
    shape, dx = _Shape(x), torch.empty_like(x)
    dadd = torch.empty_like(x) if wants_add and relu else dx
    partial = x.new_empty((2, shape.programs, shape.channels), dtype=torch.float32)
    dweight, dbias = (x.new_empty(shape.channels, dtype=torch.float32) for _ in range(2))
    factors = x.new_empty((3, shape.channels), dtype=torch.float32)
    size = shape.rows, shape.channels
    _sums[shape.grouped](dy, x, y, found, partial, *size, relu, shape.turns, **shape.cut)
    grid, cut = shape.few(shape.programs)
    _factors[grid](partial, weight, found, dweight, dbias, factors, shape.programs, *size, **cut)
    _back[shape.whole](
        dy, x, y, dx, dadd, found, factors, *size, wants_add and relu, relu, **shape.cut
    )
    return dx, (dadd if relu else dy) if wants_add else None, dweight, dbias


class _NormAct(torch.autograd.Function):
    """`normalize` and `gradients`; x and add channels last."""

    @staticmethod
    def forward(ctx, x, add, bias, relu, norm, *parameters):
        y, found = normalize(x, add, norm, relu, bias)
        ctx.save_for_backward(x, y if relu else None, norm.weight, found)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, y, weight, found = ctx.saved_tensors
        dx, dadd, dweight, dbias = gradients(dy, x, y, weight, found, ctx.needs_input_grad[1])
        # what a conv's bias adds the norm takes away again
        none = torch.zeros_like(weight) if ctx.needs_input_grad[2] else None
        return dx, dadd, none, None, None, dweight, dbias


def norm_act(
    norm: nn.BatchNorm2d,
    x: torch.Tensor,
    add: torch.Tensor | None,
    relu: bool,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """relu(norm(x + bias) + add) in training mode, x (N, C, H, W) channels last.

    The norm has all that `fused.NormAct` asks for, a number as momentum, and float32 weights.
    bias: of the conv that made x without it.
    """
    return _NormAct.apply(x, add, bias, relu, norm, norm.weight, norm.bias)


def check() -> None:
    """RuntimeError where this GPU computes something else than torch does."""
    draw = torch.Generator("cuda").manual_seed(0)
    x, add, dy = (
        torch.randn(4, 24, 8, 8, device="cuda", generator=draw)
        .add(1)
        .contiguous(memory_format=torch.channels_last)
        for _ in range(3)
    )
    results = []
    for own in (True, False):
        norm = nn.BatchNorm2d(24).cuda()
        given = [x.clone().requires_grad_(), add.clone().requires_grad_()]
        y = (
            norm_act(norm, given[0], given[1], True)
            if own
            else torch.relu(norm(given[0]) + given[1])
        )
        gradients = torch.autograd.grad(y, [*given, norm.weight, norm.bias], dy)
        results.append([y.detach(), *gradients, norm.running_mean, norm.running_var])
    for found, wanted in zip(*results, strict=True):
        if not (found - wanted).norm() <= 1e-3 * wanted.norm():
            raise RuntimeError("BatchNorm in Triton is wrong")
