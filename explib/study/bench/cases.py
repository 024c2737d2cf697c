"""The networks that the engine is compared on: dense, masked, without whole filters."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from explib.data import Data, data_root, eval_batches, load_data
from explib.errors import extra
from explib.files import resolve
from explib.params import Params
from explib.pruning import counting, criteria, filters
from explib.pruning import masks as masking
from explib.pruning.checkpoints import load_network
from explib.pruning.layers import find_convs
from explib.pruning.masks import Masks
from explib.study.bench import inference


@dataclass(frozen=True)
class Case:
    """A network to compare.

    batches: images per call; side: of an image, in pixels; dense, pruned, filters: names of shipped
    checkpoints. Without `dense`, torchvision's network with random weights and BatchNorm statistics
    of random images, and `RATE` of the kernels of every prunable conv pruned by way B.
    """

    label: str
    batches: tuple[int, ...]
    side: int
    dense: str = ""
    pruned: str = ""
    filters: str = ""


CASES = {
    "resnet_56": Case(
        *("ResNet-56", (128, 16, 1), 32),
        *("resnet_56-public", "resnet_56-B-71-l1-e100", "resnet_56-filters-71-e50"),
    ),
    "vgg_16_bn": Case("VGG-16", (128, 16, 1), 32, "vgg_16_bn", "vgg_16_bn-B-70-l1-e30"),
    "resnet18": Case("ResNet-18", (16, 1), 224),
    "resnet50": Case("ResNet-50", (16, 1), 224),
    "mobilenet_v2": Case("MobileNetV2", (16, 1), 224),
}
RATE = 0.7


@dataclass
class Network:
    """A network in its three shapes, the images it is timed on, and what is known of it.

    top1: in per cent, by what was measured. lacking: why a way is not timed, by its name.
    """

    dense: nn.Module
    pruned: nn.Module
    masks: Masks
    small: nn.Module | None
    images: torch.Tensor
    calibration: list[torch.Tensor]
    data: Data | None = None
    top1: dict[str, float] = field(default_factory=dict)
    lacking: dict[str, str] = field(default_factory=dict)


def load(arch: str, results_dir: str | Path = "results") -> Network:
    """A network of CASES. Where CIFAR-10 is on disk, its images; random ones elsewhere."""
    case = CASES[arch]
    made = _shipped(case, results_dir) if case.dense else _random(arch, case)
    if made.small is None:
        example = made.images[:1]
        left = counting.macs(made.dense, example, made.masks)["left"]
        try:
            convs = find_convs(made.dense, example)
            gone = filters.filter_masks(made.dense, example, left, convs)
            made.small = filters.narrowed(made.dense, gone, example)
        except ValueError as error:  # not every network can lose as much
            made.lacking["filters"] = str(error)
    return made


def _shipped(case: Case, results_dir: str | Path) -> Network:
    folder = resolve(results_dir) / "checkpoints/cifar10"
    dense, _, meta = load_network(folder / f"{case.dense}.safetensors")
    pruned, masks, found = load_network(folder / f"{case.pruned}.safetensors")
    top1 = {"dense": meta["top1"], "kernels pruned": found["top1"]}
    small = None
    if case.filters:
        model, gone, own = load_network(folder / f"{case.filters}.safetensors")
        small = filters.narrowed(model, gone, torch.zeros(1, 3, case.side, case.side))
        top1["filters pruned"] = own["top1"]
    if not (data_root() / "cifar-10-batches-py").is_dir():
        images = torch.randn(max(case.batches), 3, case.side, case.side)
        lacking = {"top-1 of int8": f"no cifar-10-batches-py in {data_root()}; set EXPLIB_DATA"}
        return Network(
            dense, pruned, masks, small, images, _batches(images), top1=top1, lacking=lacking
        )
    data = load_data(Params(dataset="cifar10", normalization=meta.get("normalization", "")))
    images = _first(eval_batches(data.test, data, max(case.batches)))
    given = inference.calibration(data)
    return Network(dense, pruned, masks, small, images, given, data, top1)


def _random(arch: str, case: Case) -> Network:
    with extra():
        from torchvision import models
    torch.manual_seed(0)
    images = torch.randn(16, 3, case.side, case.side)
    dense = inference.with_statistics(getattr(models, arch)(), images[:8])
    pruned, masks = at_density(dense, images[:1], 1 - RATE)
    return Network(dense, pruned, masks, None, images, _batches(images))


def _first(batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    return next(iter(batches))[0].contiguous()


def _batches(images: torch.Tensor) -> list[torch.Tensor]:
    return list(images[:16].split(4))


def at_density(dense: nn.Module, example: torch.Tensor, density: float) -> tuple[nn.Module, Masks]:
    """A copy of which way B leaves this share of every prunable conv's kernels, and its masks."""
    model, masks = copy.deepcopy(dense), {}
    if density < 1:
        masks = criteria.prune(model, example, 1 - density, "B", seed=0)
        masking.apply(model, masks)
    return model, masks
