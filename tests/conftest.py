import os
from pathlib import Path

import pytest
import torch

from explib.files import ROOT
from explib.params import Params

torch.set_num_threads(1)
PUBLIC = ROOT / "results/checkpoints/cifar10/resnet_56-public.safetensors"


@pytest.fixture(scope="session")
def cifar10_root():
    """A folder with genuine CIFAR-10, or a skip that says why."""
    for folder in (os.environ.get("EXPLIB_DATA"), ROOT.parent / "shared/data", ROOT / "data"):
        if folder and (Path(ROOT, folder) / "cifar-10-batches-py").is_dir():
            return str(Path(ROOT, folder).resolve())
    pytest.skip("no CIFAR-10 in $EXPLIB_DATA or data/")


@pytest.fixture
def tiny(tmp_path):
    """Parameters of a run that takes a second: digits, fp32, one thread."""
    return Params(
        name="tiny",
        results_dir=str(tmp_path),
        precision="fp32",
        epochs=2,
        batch_size=32,
        limit_train=96,
        limit_test=50,
        bn_images=32,
        threads=1,
    )


def bits(tensors):
    """A dict of tensors as bytes, to compare exactly."""
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
