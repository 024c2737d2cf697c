"""Training on a GPU: convolutions 3x3 of few channels, in Triton.

Of 16 to 64 channels in bfloat16 cuDNN's kernels take several times what memory would need: their
tiles are made for more. x is (N, C, H, W), channels last: a row of C values for each pixel. A
program takes a block of pixels and, for each of the nine taps, the product of the pixels beside
them with that tap's weights (C, F).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import nn
from torch.autograd.function import once_differentiable

CHANNELS = (16, 32, 64)
"""Numbers of channels, in and out, that are computed here."""

PROGRAMS = 88
"""Groups of pixels, about, whose parts of the weights' gradient are added up afterwards."""


@triton.jit
def _beside(x, row, rows, height, width, channels: tl.constexpr, DOWN, RIGHT):
    """The pixels (rows, channels) so far down and right of these; 0 outside of their image."""
    line, column = (row // width) % height + DOWN, row % width + RIGHT
    inside = (row < rows) & (line >= 0) & (line < height) & (column >= 0) & (column < width)
    beside = (row + DOWN * width + RIGHT).to(tl.int64)
    at = beside[:, None] * channels + tl.arange(0, channels)[None, :]
    return tl.load(x + at, inside[:, None], 0.0)


@triton.jit
def _convolve(
    x, weight, y, rows, height, width, TAP: tl.constexpr, STRIDE: tl.constexpr,
    INTO: tl.constexpr, OUT: tl.constexpr, OUT_STRIDE: tl.constexpr, IN_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """y = x * weight; of tap t the weights stand at (TAP + STRIDE * t) * INTO * OUT."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    into, out = tl.arange(0, INTO), tl.arange(0, OUT)
    total = tl.zeros((BLOCK, OUT), tl.float32)
    for tap in tl.static_range(9):
        pixels = _beside(x, row, rows, height, width, INTO, tap // 3 - 1, tap % 3 - 1)
        place = weight + (TAP + STRIDE * tap) * INTO * OUT
        own = tl.load(place + into[:, None] * IN_STRIDE + out[None, :] * OUT_STRIDE)
        total = tl.dot(pixels, own, total)
    at = row.to(tl.int64)[:, None] * OUT + out[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), (row < rows)[:, None])


@triton.jit
def _weights(
    x, dy, partial, rows, height, width, TURNS: tl.constexpr,
    INTO: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """This program's part of the weights' gradient, of one row of taps: (3, INTO, OUT)."""
    program, down = tl.program_id(0), tl.program_id(1) - 1
    into, out = tl.arange(0, INTO), tl.arange(0, OUT)
    left = tl.zeros((INTO, OUT), tl.float32)
    middle = tl.zeros((INTO, OUT), tl.float32)
    right = tl.zeros((INTO, OUT), tl.float32)
    for turn in range(TURNS):
        row = (program * TURNS + turn) * BLOCK + tl.arange(0, BLOCK)
        at = row.to(tl.int64)[:, None] * OUT + out[None, :]
        own = tl.load(dy + at, (row < rows)[:, None], 0.0)
        pixels = _beside(x, row, rows, height, width, INTO, down, -1)
        left = tl.dot(tl.trans(pixels), own, left)
        pixels = _beside(x, row, rows, height, width, INTO, down, 0)
        middle = tl.dot(tl.trans(pixels), own, middle)
        pixels = _beside(x, row, rows, height, width, INTO, down, 1)
        right = tl.dot(tl.trans(pixels), own, right)
    to = partial + (program * 9 + (down + 1) * 3) * INTO * OUT
    to += into[:, None] * OUT + out[None, :]
    tl.store(to, left)
    tl.store(to + INTO * OUT, middle)
    tl.store(to + 2 * INTO * OUT, right)


def _block(rows: int, channels: int) -> int:
    """Pixels of a program: few enough that there are some for each multiprocessor."""
    return 128 if rows >= 128 * 256 and channels <= 32 else 64


class _Conv(torch.autograd.Function):
    """A convolution 3x3, padded by 1, of x (N, C, H, W), channels last, and float32 weights."""

    @staticmethod
    def forward(ctx, x, weight):
        count, into, height, width = x.shape
        out, rows = weight.shape[0], count * height * width
        packed = x.new_empty((3, 3, into, out)).copy_(weight.permute(2, 3, 1, 0))
        y = x.new_empty((count, height, width, out)).permute(0, 3, 1, 2)
        block = _block(rows, max(into, out))
        _convolve[triton.cdiv(rows, block),](
            x, packed, y, rows, height, width, 0, 1, into, out, 1, out, block
        )
        ctx.save_for_backward(x, packed, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, packed, weight = ctx.saved_tensors
        count, into, height, width = x.shape
        out, rows = weight.shape[0], count * height * width
        dy = dy.contiguous(memory_format=torch.channels_last)
        block = _block(rows, max(into, out))
        dx = torch.empty_like(x)
        # what a pixel gave to its neighbour comes back from there: the taps the other way round
        _convolve[triton.cdiv(rows, block),](
            dy, packed, dx, rows, height, width, 8, -1, out, into, out, 1, block
        )
        turns = triton.cdiv(rows, PROGRAMS * block)
        programs = triton.cdiv(rows, turns * block)
        partial = x.new_empty((programs, 3, 3, into, out), dtype=torch.float32)
        _weights[programs, 3](x, dy, partial, rows, height, width, turns, into, out, block)
        dweight = torch.empty_like(weight).copy_(partial.sum(0).permute(3, 2, 0, 1))
        return dx, dweight


class Conv(nn.Module):
    """A conv 3x3 of the network, of stride 1 and padded by 1, while it trains in bfloat16."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        conv = self.conv
        if not (
            torch.is_grad_enabled()
            and torch.is_autocast_enabled("cuda")
            and x.dtype == torch.bfloat16
            and x.shape[1] == conv.in_channels
            and conv.weight.dtype == torch.float32
            and x.is_contiguous(memory_format=torch.channels_last)
        ):
            return conv(x)
        y = _Conv.apply(x, conv.weight)
        return y if conv.bias is None else y + conv.bias.to(y.dtype)[:, None, None]


def takes(conv: nn.Conv2d) -> bool:
    """Whether a plain conv 3x3 is computed here."""
    return (
        conv.stride == (1, 1)
        and conv.padding == (1, 1)
        and conv.in_channels in CHANNELS
        and conv.out_channels in CHANNELS
    )


def check() -> None:
    """RuntimeError where this GPU computes something else than torch does."""
    draw = torch.Generator("cuda").manual_seed(0)
    for into, out in ((16, 32), (64, 64)):
        x, dy = (
            torch.randn(2, channels, 8, 8, device="cuda", generator=draw)
            .bfloat16()
            .contiguous(memory_format=torch.channels_last)
            for channels in (into, out)
        )
        weight = torch.randn(out, into, 3, 3, device="cuda", generator=draw)
        own = _results(lambda x, w: _Conv.apply(x, w), x, weight, dy)
        plain = _results(lambda x, w: F.conv2d(x, w.bfloat16(), padding=1), x, weight, dy)
        for found, wanted in zip(own, plain, strict=True):
            if not (found - wanted).norm() <= 0.02 * wanted.norm():
                raise RuntimeError(f"convolutions of {into} and {out} channels in Triton are wrong")


def _results(convolve: Callable, x, weight, dy) -> list[torch.Tensor]:
    """A convolution's result and gradients, float32."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = convolve(x, weight)
    return [t.float() for t in (y.detach(), *torch.autograd.grad(y, [x, weight], dy))]
