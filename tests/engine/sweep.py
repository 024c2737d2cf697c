"""Odd sizes through the engine, run as a program: under a sanitizer or for another processor."""

import sys
import warnings
from itertools import product

import torch
from torch import nn

from explib import engine
from explib.engine import training_layers
from tests.engine.cases import PLANES, sweep_ops

SIZES = ((32, 32), (13, 9), (7, 30), (5, 5), (2, 3), (1, 1))
BATCHES = (1, 2, 7, 8, 15, 17, 33)
BOUNDS = {torch.float32: 1e-5, torch.float16: 0.03, torch.bfloat16: 0.03, torch.int8: 0.15}


class Odd(nn.Module):
    """Every op of the engine, on planes that fit no tile."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3, padding=1)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.down = nn.Conv2d(5, 7, 3, stride=2, padding=1)
        self.wide = nn.Conv2d(7, 7, 5, padding=2)
        self.one = nn.Conv2d(7, 4, 1)
        self.seven = nn.Conv2d(7, 3, 7, padding=3, bias=False)
        self.mean = nn.AvgPool2d(3, stride=1, padding=1)
        self.skip = nn.Conv2d(7, 9, 1, stride=2)
        self.linear = nn.Linear(18, 3)

    def forward(self, x):
        x = self.pool(torch.relu(self.first(x)))
        y = torch.relu(self.down(x))
        y = torch.relu(self.wide(y) + y)
        y = self.mean(torch.cat([self.one(y), self.seven(y)], 1))
        short = nn.functional.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 0, 2))
        z = torch.cat([short, torch.relu(short + self.skip(y))], 1)
        return self.linear(z.mean((2, 3)))


@torch.no_grad()
def sweep(batches=BATCHES) -> int:
    """Compare with torch at every size; returns the number of comparisons, all within bounds."""
    compared = 0
    for height, width in SIZES:
        torch.manual_seed(height)
        model, example = Odd().eval(), torch.zeros(1, 3, height, width)
        for dtype, bound in BOUNDS.items():
            for threads in (1, 3):
                noise = torch.randn(16, 3, height, width)
                given = noise if dtype == torch.int8 else None
                fast = engine.compile(
                    model, example, dtype=dtype, calibration=given, threads=threads
                )
                assert fast.report["fallbacks"] == [], fast.report
                for count in batches:
                    images = torch.randn(count, 3, height, width)
                    wanted = model(images)
                    error = float((fast(images) - wanted).abs().max() / wanted.abs().max())
                    assert error < bound, (height, width, dtype, threads, count, error)
                    compared += 1
    return compared


def training_sweep() -> int:
    """The same for training: conv, BatchNorm, ReLU and their gradients, in blocks of images."""
    lib, compared = training_layers.library(), 0
    types = (torch.float32, torch.bfloat16)[: 1 + lib.training_halves()]
    for size, dtype, stride, threads in product(SIZES, types, (1, 2), (1, 3)):
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        conv, norm = nn.Conv2d(5, 7, 3, stride, padding=1), nn.BatchNorm2d(7)
        mask = torch.rand(7, 5) < 0.5
        conv.weight.data *= mask[:, :, None, None]
        images = torch.randn(2 * lib.training_lanes(), 5, *size, requires_grad=True)
        wanted = torch.relu(norm(conv(images)))
        out_size = tuple(wanted.shape[2:])
        wanted.square().sum().backward()
        gradient, images.grad = images.grad, None
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            x = training_layers.ToPlanes()(images)
        own = training_layers.Conv(conv, mask, size, out_size)(x)
        found = training_layers.FromPlanes(out_size)(
            training_layers.Norm(norm, True, out_size)(own)
        ).float()
        found.square().sum().backward()
        for one, other in ((found, wanted), (images.grad, gradient)):
            error = float((one - other).abs().max() / other.abs().max().clamp(min=1e-3))
            bound = 1e-3 if dtype == torch.float32 else 0.2  # a ReLU may fall the other way
            assert error < bound, (size, dtype, stride, threads, error)
            compared += 1
    return compared


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # several wait for each other actively, minutes where cores are few
    print(sweep_ops((1, 33), PLANES[2:]), "ops compared")
    print(sweep(tuple(map(int, sys.argv[1:])) or BATCHES), "compared")
    print(training_sweep(), "compared in training")
