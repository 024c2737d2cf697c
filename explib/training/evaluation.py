"""How a network runs on this machine, how well it does, and the statistics it needs for that."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from explib.data import Data, eval_batches
from explib.data.splits import Folders, Split
from explib.training import distributed, inference


def evaluate(
    model: nn.Module, data: Data, split: Split | Folders, forward: Callable | None = None
) -> float:
    """Top-1 accuracy in per cent, total correct over total images; fp32 unless `forward` is given.

    On a CPU many images go through the engine, which gives torch's results up to rounding. The
    model is left in evaluation mode.
    """
    return accuracy(model, data, split, forward)["top1"]


@torch.no_grad()
def accuracy(
    model: nn.Module, data: Data, split: Split | Folders, forward: Callable | None = None
) -> dict[str, float]:
    """{"top1"} in per cent, and {"top5"} where there are more than ten classes; see `evaluate`."""
    model.eval()
    # of ten classes, five at a time say little
    ks = (1, 5) if len(data.classes) > 10 else (1,)
    correct = torch.zeros(len(ks), dtype=torch.int64, device=split.labels.device)
    share = split.take(slice(distributed.rank(), None, distributed.world()))
    with nullcontext() if forward else strict_fp32():
        forward = forward or inference.in_fp32(model, share, data)
        for images, labels in eval_batches(share, data):
            logits = forward(images)
            best = logits.topk(5).indices if 5 in ks else logits.argmax(1, keepdim=True)
            hits = best == labels[:, None]
            correct += torch.stack([hits[:, :k].sum() for k in ks])
    found = distributed.sum_over_ranks(correct).tolist()
    return {f"top{k}": 100 * count / len(split) for k, count in zip(ks, found, strict=True)}


@contextmanager
def strict_fp32() -> Iterator[None]:
    """Compute in fp32 what says it is: a GPU's convolutions round it to TF32 by default."""
    switches: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, allowed in zip(switches, before, strict=True):
            switch.allow_tf32 = allowed


@torch.no_grad()
def reestimate_bn(model: nn.Module, data: Data, images: int, batch_size: int = 256) -> None:
    """Replace BatchNorm statistics by those of the first `images` training images, in fp32.

    Masks shift every activation's mean; until the statistics follow, accuracy is near chance.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    images = min(images, len(data.train))
    if not norms or not images:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over batches
    model.train()
    # batches of nearly equal size, since each counts alike in the average
    batch_size = math.ceil(images / math.ceil(images / batch_size))
    with strict_fp32():
        for part, _ in eval_batches(data.train.first(images), data, batch_size):
            model(part)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
