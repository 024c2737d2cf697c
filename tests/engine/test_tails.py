"""What follows the last map: of images that go one by one it goes in blocks (network.h)."""

import pytest
import torch
from torch import nn

from explib import engine
from explib.engine import build


class Heads(nn.Module):
    """Linear layers behind one another and beside one another, and features that are results."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 21, 3, 2, 1)
        self.norm = nn.LayerNorm(42)
        self.hidden, self.scores = nn.Linear(42, 37), nn.Linear(37, 10)
        self.aside = nn.Linear(21, 5)

    def forward(self, x):
        maps = self.stem(x).relu()
        means, peaks = maps.mean((2, 3)), maps.amax((2, 3))
        both = torch.cat([means, peaks], 1)
        hidden = nn.functional.silu(self.hidden(self.norm(both)))
        return self.scores(hidden), self.aside(means * 2 + peaks), means, hidden


class Wide(nn.Module):
    """Many features, as of VGG-16: each pixel of the last maps is one."""

    def __init__(self):
        super().__init__()
        self.stem, self.scores = nn.Conv2d(3, 9, 5, 2), nn.Linear(9 * 14 * 11, 11)

    def forward(self, x):
        return (self.scores(self.stem(x).tanh().flatten(1)),)


class Mapped(Heads):
    """A map is a result, too."""

    def forward(self, x):
        return *super().forward(x), self.stem(x)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("model", [Heads, Wide, Mapped])
def test_any_number_of_images_has_the_results_of_torch(model, threads):
    torch.manual_seed(0)
    model = model().eval()
    images = torch.randn(40, 3, 31, 25)
    fast = engine.compile(model, images[:1], threads=threads)
    assert fast.report["engine"] == "native"
    for count in (1, 2, 3, 4, 7, 9, 17, 22, 40):
        for ours, theirs in zip(fast(images[:count]), model(images[:count]), strict=True):
            assert ours.shape == theirs.shape
            assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [*build.TYPES[1:3], torch.int8])
def test_other_types_have_the_scores_that_one_image_has(dtype):
    if not build.computes(build.library(), dtype):
        pytest.skip(f"this processor does not compute in {dtype}")
    torch.manual_seed(0)
    model = Heads().eval()
    images = torch.randn(7, 3, 31, 25)
    calibration = [images] if dtype == torch.int8 else None
    fast = engine.compile(model, images, dtype=dtype, calibration=calibration, threads=2)
    alone = [torch.cat(each) for each in zip(*(fast(image[None]) for image in images), strict=True)]
    for ours, expected in zip(fast(images), alone, strict=True):
        spread = expected.std()
        assert (ours - expected).abs().max() < (0.03 if dtype.is_floating_point else 1e-4) * spread
