"""Shared fixtures: one thread, the data folder if there is one, small networks and data."""

import os
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from torch import nn

from explib import registry
from explib.data import Data, Split, data_root
from explib.models import resnet
from explib.params import Params
from explib.study import networks

# Dozens of tests start Python: what it imports is compiled once, not by each of them
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Those processes have one thread, too: beside each other, more would mostly wait, and actively so
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("explib", deadline=None, max_examples=40)
settings.load_profile("explib")

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX") or "c++") is None, reason="no C++ compiler"
)
ROOT = Path(__file__).resolve().parent.parent
"""The checkout."""
LONGEST = (
    *("workflow", "engine", "distributed", "notebooks", "runs", "project", "kill", "load"),
    *("export", "strided", "bad_input", "bench", "inference_bench", "contributing", "training"),
    *("gpu", "install", "gpu_bench", "any_network", "security", "cli", "figures"),
)
"""The files of tests that take longest, from three minutes on two cores to 15 s."""
PUBLIC = ROOT / "results/checkpoints/cifar10/resnet_56-public.safetensors"


def pytest_collection_modifyitems(items):
    # Workers take whole files: the longest ones first, lest all wait for one in the end
    place = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cifar10_root() -> Path:
    for root in (data_root(), ROOT.parent / "shared/data"):
        if (root / "cifar-10-batches-py").is_dir():
            return root
    pytest.skip(f"no cifar-10-batches-py in {data_root()}; set EXPLIB_DATA")


@pytest.fixture(scope="session")
def public() -> networks.Dense:
    """The public ResNet-56, 93.39 % on CIFAR-10; not to be changed by a test."""
    params = Params(dataset="cifar10", normalization="imagenet", resume=str(PUBLIC))
    return networks.load_dense(params)


TINY = Params(
    epochs=2,
    batch_size=32,
    limit_train=64,
    limit_test=40,
    bn_images=32,
    device="cpu",
    precision="fp32",
    compile="off",
    threads=1,
)
"""A run of a second with `resnet_8`, bit for bit the same every time."""


def make_data(train: int = 48, test: int = 20, size: int = 8, flip: bool = True) -> Data:
    """Random images of ten classes."""
    generator = torch.Generator().manual_seed(7)

    def split(count):
        images = torch.randint(0, 256, (count, 3, size, size), generator=generator)
        return Split(images.to(torch.uint8), torch.randint(0, 10, (count,), generator=generator))

    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    return Data("toy", split(train), split(test), tuple("0123456789"), mean, std, flip, "")


def make_folders(root: Path, classes: dict[str, int]) -> Path:
    """Class folders of real JPEG files, of many sizes and tints, one grey and one a PNG.

    classes: training images of each, and half as many to evaluate on.
    """
    generator = np.random.default_rng(0)
    for part, share in (("train", 1), ("val", 2)):
        for label, (name, count) in enumerate(classes.items()):
            (root / part / name).mkdir(parents=True)
            for number in range(count // share):
                size = generator.integers(40, 90, 2)
                noise = generator.integers(0, 120, (*size, 3), np.uint8)
                noise[..., label % 3] += 120
                picture = Image.fromarray(noise)
                if (label, number) == (0, 0):
                    picture = picture.convert("L")
                ending = "png" if (label, number) == (1, 0) else "JPEG"
                picture.save(root / part / name / f"{number}.{ending}")
    return root


def image(side: int = 8, channels: int = 3) -> torch.Tensor:
    """One image of zeros (1, channels, side, side)."""
    return torch.zeros(1, channels, side, side)


RESNET_8 = registry.Network(partial(resnet.build, depth=8), "ResNet-56")


def make_net(seed: int = 0) -> nn.Module:
    """conv, norm, relu, conv without norm, conv by depth, conv, norm, linear; 3 x 8 x 8 in."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.Conv2d(6, 8, 1),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


@pytest.fixture
def data() -> Data:
    return make_data()


@pytest.fixture(name="make_data")
def data_maker():
    return make_data


@pytest.fixture
def net() -> nn.Module:
    return make_net()


@pytest.fixture(name="make_net")
def net_maker():
    return make_net


@pytest.fixture
def registered():
    """What a test registers is gone after it."""
    before = {field: dict(entries) for field, entries in registry.BY_FIELD.items()}
    yield
    for field, entries in before.items():
        registry.BY_FIELD[field].clear()
        registry.BY_FIELD[field].update(entries)


@pytest.fixture
def resnet_8(monkeypatch):
    """`resnet_56` means a ResNet of 8 layers, for runs of a second."""
    monkeypatch.setitem(registry.NETWORKS, "resnet_56", RESNET_8)
