"""Networks as the engine's tests want them, and how far its results are from torch's."""

import pytest
import torch
from torch import nn

from explib import models, registry
from explib.engine import build
from explib.pruning import criteria
from explib.pruning import masks as masking
from tests.conftest import image

SIDES = dict.fromkeys(registry.NETWORKS, 32) | {"resnet_50": 64}


def lively(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, its BatchNorms no identities."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            if module.affine:
                nn.init.uniform_(module.weight, 0.4, 0.9)
                nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def masked(arch: str, rate: float = 0.6) -> nn.Module:
    torch.manual_seed(0)
    model = lively(models.build(arch, 10))
    masking.apply(model, criteria.prune(model, image(SIDES[arch]), rate, "B"))
    return model


@torch.no_grad()
def error(model: nn.Module, fast: nn.Module, images: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    wanted = model(images)
    return float((fast(images) - wanted).abs().max() / wanted.abs().max())


def skip_its_own(flags: str) -> None:
    """Skip what AVX2 alone is compiled for anew where the processor has no wider vectors."""
    if "avx2" in flags and build.byte_point(build.library(torch.int8)) == 2:
        pytest.skip("this processor's own vectors are these: every other test runs them")
