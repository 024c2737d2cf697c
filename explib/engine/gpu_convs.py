"""Training on a GPU: convolutions 3x3 of few channels with the norms behind them, in Triton.

Of up to 64 channels in bfloat16 cuDNN's kernels take several times what memory would need: their
tiles are made for more. x is (N, C, H, W), channels last: a row of C values for each pixel. A
program takes a block of pixels and, for each tap, the product of the pixels beside them with that
tap's weights; where C is small those of a pixel and its two neighbours, which lie side by side, are
taken at once. It leaves the moments of what it has made, too: BatchNorm need not read it for them.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from explib.engine import gpu_norms

CHANNELS = (16, 32, 64)
"""Numbers of filters, and of channels, that are computed here; 3 channels, an image's, too."""

MOST = 1 << 22
"""Values of x: with more of them cuDNN's tiles are full, and faster."""


@triton.jit
def _beside(
    x, row, rows, height, width,
    DOWN: tl.constexpr, RIGHT: tl.constexpr, TAPS: tl.constexpr,
    CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What lies so far beside these pixels, TAPS of them from there on (rows, WIDE); else 0."""
    line, column = (row // width) % height + DOWN, row % width + RIGHT
    tap = tl.arange(0, WIDE) // CHANNELS
    beside = column[:, None] + tap[None, :]
    inside = (row < rows) & (line >= 0) & (line < height)
    inside = inside[:, None] & (tap < TAPS)[None, :] & (beside >= 0) & (beside < width)
    first = (row + (DOWN * width + RIGHT)).to(tl.int64) * CHANNELS
    return tl.load(x + first[:, None] + tl.arange(0, WIDE)[None, :], inside, 0.0)


@triton.jit
def _convolve(
    x, weight, y, partial, rows, height, width,
    FIRST: tl.constexpr, STEP: tl.constexpr,
    TAP_STRIDE: tl.constexpr, CHANNEL_STRIDE: tl.constexpr, FILTER_STRIDE: tl.constexpr,
    CHANNELS: tl.constexpr, FILTERS: tl.constexpr, TAPS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, MOMENTS: tl.constexpr,
):  # fmt: skip
    """y = x * weight, whose tap t is weight's tap FIRST + STEP * t; each program's moments of y."""
    start, filters = tl.program_id(0) * BLOCK, tl.arange(0, FILTERS)
    row = start + tl.arange(0, BLOCK)
    tap, channel = tl.arange(0, WIDE) // CHANNELS, tl.arange(0, WIDE) % CHANNELS
    total = tl.zeros((BLOCK, FILTERS), tl.float32)
    for first in tl.static_range(0, 9, TAPS):
        pixels = _beside(
            x, row, rows, height, width, first // 3 - 1, first % 3 - 1, TAPS, CHANNELS, WIDE
        )
        place = (FIRST + STEP * (first + tap)) * TAP_STRIDE + channel * CHANNEL_STRIDE
        place = weight + place[:, None] + filters[None, :] * FILTER_STRIDE
        total = tl.dot(pixels, tl.load(place, (tap < TAPS)[:, None], 0.0), total)
    values, inside = total.to(y.dtype.element_ty), (row < rows)[:, None]
    tl.store(y + row.to(tl.int64)[:, None] * FILTERS + filters[None, :], values, inside)
    if MOMENTS:
        none = tl.zeros((FILTERS,), tl.float32)
        count = tl.minimum(rows - start, BLOCK).to(tl.float32)
        made = values.to(tl.float32)  # 0 outside
        mean, squares = gpu_norms.joined(made, inside, count, none, none, 0.0)
        to = partial + tl.program_id(0) * FILTERS + filters
        tl.store(to, mean)
        tl.store(to + tl.num_programs(0) * FILTERS, squares)


@triton.jit
def _weights(
    x, dy, partial, rows, height, width, TURNS: tl.constexpr,
    CHANNELS: tl.constexpr, FILTERS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """This program's part of the weights' gradient, of one row of taps: (FILTERS, 3 * CHANNELS)."""
    program, down = tl.program_id(0), tl.program_id(1)
    filters, wide = tl.arange(0, FILTERS), tl.arange(0, WIDE)
    total = tl.zeros((FILTERS, WIDE), tl.float32)
    for turn in range(TURNS):
        row = (program * TURNS + turn) * BLOCK + tl.arange(0, BLOCK)
        at = row.to(tl.int64)[:, None] * FILTERS + filters[None, :]
        own = tl.load(dy + at, (row < rows)[:, None], 0.0)
        pixels = _beside(x, row, rows, height, width, down - 1, -1, 3, CHANNELS, WIDE)
        total = tl.dot(tl.trans(own), pixels, total)
    to = ((program * FILTERS + filters)[:, None] * 3 + down) * 3 * CHANNELS + wide[None, :]
    tl.store(partial + to, total, (wide < 3 * CHANNELS)[None, :])


@triton.jit
def _add_up(
    partial, total, programs, size, PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The sum of all programs' parts."""
    program = tl.arange(0, PROGRAMS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (program < programs) & (column < size)[None, :]
    values = tl.load(partial + program * size + column[None, :], inside, 0.0)
    tl.store(total + column, tl.sum(values, 0), column < size)


def _cut_weights(channels: int, filters: int) -> tuple[int, int, int]:
    """Of the weights' gradient: pixels of a block, about how many programs, and warps.

    The fastest of a few, alone and eight side by side, on an H100.
    """
    if channels == 3 and filters == 64:
        return 128, 64, 4
    return {16: (64, 176, 2), 32: (64, 44, 4), 64: (32, 16, 8)}[max(channels, filters)]


def _wide(channels: int) -> int:
    return max(16, triton.next_power_of_2(3 * channels))


def convolve(x, weight, filters: int, strides: tuple[int, ...], back: bool, moments: bool):
    """A convolution 3x3, padded by 1, of x (N, C, H, W), channels last; its partial moments.

    strides: of a tap, a channel and a filter in weight. back: with the taps the other way round.
    Returns y, (2, programs, F) in float32, and how many pixels of y each program has.
    """
    count, channels, height, width = x.shape
    rows = count * height * width
    block = 128 if rows >= 128 * 256 and max(channels, filters) <= 32 else 64
    programs = triton.cdiv(rows, block)
    taps, wide = (1, channels) if channels in CHANNELS else (3, _wide(channels))
    y = x.new_empty((count, height, width, filters)).permute(0, 3, 1, 2)
    partial = x.new_empty((2, programs, filters) if moments else (0,), dtype=torch.float32)
    first, step = (8, -1) if back else (0, 1)
    _convolve[programs,](
        x, weight, y, partial, rows, height, width, first, step, *strides,
        channels, filters, taps, wide, block, moments,
    )  # fmt: skip
    return y, partial, block


def weights_gradient(x, dy) -> torch.Tensor:
    """Gradient of the weights (F, C, 3, 3), float32, from x and that of the result."""
    count, channels, height, width = x.shape
    filters, rows = dy.shape[1], count * height * width
    block, programs, warps = _cut_weights(channels, filters)
    turns = triton.cdiv(rows, programs * block)
    programs = triton.cdiv(rows, turns * block)
    partial = x.new_empty((programs, filters, 3, 3, channels), dtype=torch.float32)
    _weights[programs, 3](
        x, dy, partial, rows, height, width, turns,
        channels, filters, _wide(channels), block, num_warps=warps,
    )  # fmt: skip
    total = torch.empty_like(partial[0])
    most = triton.next_power_of_2(programs)
    columns = max(16, 4096 // most)
    _add_up[triton.cdiv(total.numel(), columns),](
        partial, total, programs, total.numel(), most, columns
    )
    return total.permute(0, 3, 1, 2)


class _ConvNorm(torch.autograd.Function):
    """relu(batch_norm(conv(x)) + add): of x (N, C, H, W), channels last, in bfloat16.

    weight: the conv's in the type of x, channels last.
    """

    @staticmethod
    def forward(ctx, x, add, whole, weight, bias, relu, norm, *parameters):
        filters, channels = weight.shape[:2]
        strides = channels, 1, 9 * channels
        between, partial, each = convolve(x, weight, filters, strides, False, True)
        y, found = gpu_norms.normalize(between, add, norm, relu, bias, partial, each)
        ctx.save_for_backward(x, weight, between, y if relu else None, norm.weight, found)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, between, y, scale, found = ctx.saved_tensors
        wants_x, wants_add = ctx.needs_input_grad[:2]
        dbetween, dadd, dscale, dshift = gpu_norms.gradients(
            dy, between, y, scale, found, wants_add
        )
        dx, channels = None, x.shape[1]
        if wants_x and channels not in CHANNELS:
            dx = conv2d_input(x.shape, weight, dbetween, padding=1)
        elif wants_x:
            strides = channels, 9 * channels, 1
            dx = convolve(dbetween, weight, channels, strides, True, False)[0]
        dweight = weights_gradient(x, dbetween)
        # what a bias adds the norm takes away again
        dbias = x.new_zeros(dy.shape[1], dtype=torch.float32) if ctx.needs_input_grad[4] else None
        return dx, dadd, dweight, None, dbias, None, None, dscale, dshift


def conv_norm(
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    x: torch.Tensor,
    add: torch.Tensor | None,
    relu: bool,
    weight: torch.Tensor,
) -> torch.Tensor:
    """relu(norm(conv(x)) + add) in training mode, x (N, C, H, W), in the type of `weight`.

    weight: the conv's, channels last. The norm has all that `fused.NormAct` asks for.
    """
    x = x.to(weight.dtype, memory_format=torch.channels_last)
    if add is not None:
        add = add.to(weight.dtype, memory_format=torch.channels_last)
    own = norm.weight, norm.bias
    return _ConvNorm.apply(x, add, conv.weight, weight, conv.bias, relu, norm, *own)


class ConvNorm(nn.Module):
    """A conv of the network with its norm and what follows it: relu(norm(conv(x)) + add)."""

    def __init__(self, conv: nn.Conv2d, norm_act: Any):
        super().__init__()
        self.conv, self.norm_act = conv, norm_act

    def forward(self, x, add=None, weight=None):
        """weight: the conv's as `Weights` gives it, or None."""
        conv, after = self.conv, self.norm_act
        if not (x.is_cuda and after.norm.training):
            return after(conv(x), add)
        if weight is not None and x.shape[1] == conv.in_channels and x.numel() <= MOST:
            shape = torch.Size((len(x), conv.out_channels, *x.shape[2:]))
            if after.takes(shape, x, add):
                return conv_norm(conv, after.norm, x, add, after.relu, weight)
        return after(conv._conv_forward(x, conv.weight, None), add, conv.bias)


class Weights(nn.Module):
    """The weights of convs in bfloat16, channels last, made at once: a GPU waits for each copy."""

    def __init__(self, convs: list[nn.Conv2d]):
        super().__init__()
        self.convs = nn.ModuleList(convs)

    @torch.no_grad()
    def forward(self) -> list:
        """Each one's (F, C, 3, 3); None of all where nothing is computed in bfloat16."""
        weights: list[Any] = [conv.weight for conv in self.convs]
        own = weights[0]
        if not (own.is_cuda and torch.is_autocast_enabled("cuda")) or (
            torch.get_autocast_dtype("cuda") != torch.bfloat16
        ):
            return [None] * len(weights)
        made = [
            torch.empty_like(w, dtype=torch.bfloat16, memory_format=torch.channels_last)
            for w in weights
        ]
        torch._foreach_copy_(made, weights)
        return made


def takes(conv: nn.Conv2d) -> bool:
    """Whether a plain conv 3x3 is computed here."""
    return (
        conv.stride == (1, 1)
        and conv.padding == (1, 1)
        and conv.in_channels in (3, *CHANNELS)
        and conv.out_channels in CHANNELS
        and conv.weight.dtype == torch.float32
    )


def check() -> None:
    """RuntimeError where this GPU computes something else than torch does."""
    draw = torch.Generator("cuda").manual_seed(0)
    for channels, filters in ((3, 16), (16, 32), (64, 64)):
        conv = nn.Conv2d(channels, filters, 3, padding=1).cuda()
        x, dy, add = (
            torch.randn(2, many, 8, 8, device="cuda", generator=draw)
            .bfloat16()
            .contiguous(memory_format=torch.channels_last)
            for many in (channels, filters, filters)
        )
        weight = conv.weight.detach().bfloat16()
        weight = weight.contiguous(memory_format=torch.channels_last)
        own = _results(conv, filters, x, add, dy, weight)
        plain = _results(conv, filters, x, add, dy, None)
        for found, wanted in zip(own, plain, strict=True):
            if not (found - wanted).norm() <= 0.01 * wanted.norm():
                raise RuntimeError(
                    f"convolutions of {channels} channels and {filters} filters in Triton are wrong"
                )


def _results(conv, filters: int, x, add, dy, weight) -> list[torch.Tensor]:
    """What conv, norm and addition make and leave, by torch's layers where weight is None."""
    norm = nn.BatchNorm2d(filters).cuda()
    x, add = x.clone().requires_grad_(), add.clone().requires_grad_()
    if weight is not None:
        y = conv_norm(conv, norm, x, add, False, weight)
    else:
        y = F.conv2d(x, conv.weight.bfloat16(), conv.bias.bfloat16(), padding=1)
        y = norm(y) + add
    gradients = torch.autograd.grad(y, [x, add, conv.weight, norm.weight, norm.bias], dy)
    left: Any = (norm.running_mean, norm.running_var)
    return [t.float() for t in (y.detach(), *gradients, *left)]
