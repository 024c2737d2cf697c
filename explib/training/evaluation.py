"""How well a network does, on data of the study or of one's own, and BatchNorm's statistics."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from explib.data import Data, eval_batches
from explib.data.splits import Folders, Split
from explib.pruning.layers import (
    Inputs,
    batch_size,
    call,
    check_network,
    described,
    modes_kept,
    on_device_of,
)
from explib.training import distributed, inference


def evaluate(model: nn.Module, batches: Iterable) -> float:
    """Top-1 accuracy in per cent on batches of (images, labels), as a DataLoader gives them.

    Total correct over total images, in evaluation mode; modes are left as they were. images: what
    the model is called with, a tensor, a tuple or a dict, moved to its device. labels: whole
    numbers (N,) from 0, or shares (N, classes). ValueError, in one line, where there are none, the
    model does not take the images, or its scores (N, classes) do not go with the labels.
    """
    check_network(model, "its batches")
    with modes_kept(model):
        model.eval()
        with strict_fp32():
            return top1_of(model, model, batches)


@torch.no_grad()
def top1_of(model: nn.Module, forward: Callable, batches: Iterable, what: str = "batches") -> float:
    """The top-1 in per cent of what `forward` makes of batches; see `evaluate`."""
    correct = count = 0
    check_batches(batches, what)
    for batch in batches:
        images, labels = pair_of(model, batch, what)
        scores = answer(forward, images, what)
        correct += int(hits(scores, labels))
        check_range(scores, labels, what)
        count += len(labels)
    if not count:
        raise ValueError(f"{what}: empty; give batches of (images, labels), as a DataLoader does")
    return 100 * correct / count


def pair_of(model: nn.Module, batch: Any, what: str = "batches") -> tuple[Inputs, torch.Tensor]:
    """Images and labels of a batch, on the model's device. ValueError for what is no such pair."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(f"{what}: a batch is {described(batch)}; give a pair (images, labels)")
    images, labels = on_device_of(model, tuple(batch))
    right = "give whole numbers (N,), int64, or shares (N, classes), float32"
    if not isinstance(labels, torch.Tensor):
        raise ValueError(f"{what}: labels are {described(labels)}; {right}, as a tensor")
    shares = labels.is_floating_point()
    if labels.ndim != 1 + shares or labels.is_complex() or labels.dtype == torch.bool:
        kind = str(labels.dtype).removeprefix("torch.")
        raise ValueError(f"{what}: labels are {kind} {described(labels)}; {right}")
    return images, labels if shares else labels.long()


def check_batches(batches: Any, what: str = "batches") -> None:
    """ValueError for what cannot be gone through, or gives one image at a time."""
    if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        raise ValueError(
            f"{what}: a {type(batches).__name__}, which gives one image at a time; wrap it in a "
            "torch.utils.data.DataLoader"
        )
    if not isinstance(batches, Iterable):
        raise ValueError(f"{what}: a {type(batches).__name__}; give a DataLoader or a list")


def answer(forward: Callable, images: Inputs, what: str = "batches") -> Any:
    """What the network returns for images; ValueError, in one line, where it does not take them."""
    try:
        return call(forward, images)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{what}: the model does not take images {described(images)} ({why}); give what its "
            "forward takes"
        ) from error


def check_range(scores: torch.Tensor, labels: torch.Tensor, what: str = "batches") -> None:
    """ValueError unless the labels are of classes that the scores (N, classes) are of."""
    classes = scores.shape[1]
    if labels.ndim == 2 and labels.shape[1] != classes:
        raise ValueError(
            f"{what}: labels are shares {described(labels)}, the model's scores "
            f"{described(scores)}; give a share for each class"
        )
    if labels.ndim == 1 and len(labels):
        least, most = (int(n) for n in labels.aminmax())
        if least < 0 or most >= classes:
            raise ValueError(
                f"{what}: a label is {least if least < 0 else most}; the model has {classes} "
                f"classes, 0 to {classes - 1}"
            )


def hits(scores: Any, labels: torch.Tensor) -> torch.Tensor:
    """How many images have their highest score at their label; ValueError for other outputs."""
    shape = tuple(getattr(scores, "shape", ()))
    if len(shape) != 2 or shape[0] != len(labels):
        raise ValueError(
            f"model: returns {described(scores)} for {len(labels)} labels; give a classifier that "
            "returns scores (N, classes), and as many labels as images"
        )
    classes = labels.argmax(1) if labels.ndim == 2 else labels
    return (scores.detach().argmax(1) == classes).sum()


def top1(
    model: nn.Module, data: Data, split: Split | Folders, forward: Callable | None = None
) -> float:
    """Top-1 accuracy of a split in per cent; see `accuracy`."""
    return accuracy(model, data, split, forward)["top1"]


@torch.no_grad()
def accuracy(
    model: nn.Module, data: Data, split: Split | Folders, forward: Callable | None = None
) -> dict[str, float]:
    """{"top1"} in per cent, and {"top5"} where there are more than ten classes, of a split.

    Total correct over total images; fp32 unless `forward` is given. On a CPU many images go through
    the engine, which gives torch's results up to rounding. The model is left in evaluation mode.
    """
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


def bn_batches(data: Data, images: int, size: int = 256) -> Iterator[torch.Tensor]:
    """The first `images` training images, normalized, in batches of nearly equal size."""
    images = min(images, len(data.train))
    size = math.ceil(images / math.ceil(images / size))
    return (part for part, _ in eval_batches(data.train.first(images), data, size))


@torch.no_grad()
def recalibrate_bn(model: nn.Module, batches: torch.Tensor | Iterable) -> None:
    """Replace BatchNorm statistics by their averages over batches, in fp32; modes stay.

    Masks shift every activation's mean; until the statistics follow, accuracy is near chance.
    batches: images (N, C, H, W), taken 256 at a time, or batches as a DataLoader gives them: what
    the model is called with, a tensor or a dict, or a pair of that and labels. Every image counts
    alike; some 2,000 do. ValueError, in one line, where there are none, the model does not take
    them, or their statistics are not finite; the old ones are put back then.
    """
    check_network(model, "its batches")
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    if isinstance(batches, torch.Tensor):
        batches = batches.chunk(math.ceil(len(batches) / 256)) if batches.numel() else ()
    momenta, count = [norm.momentum for norm in norms], 0
    check_batches(batches)
    buffers = [buffer for norm in norms for buffer in norm.buffers()]
    before = [buffer.clone() for buffer in buffers]
    with modes_kept(model), strict_fp32():
        model.train()
        try:
            for norm in norms:
                norm.reset_running_stats()
            for batch in batches:
                images = batch[0] if isinstance(batch, tuple | list) else batch
                count += batch_size(images)
                for norm in norms:  # the average over all images so far
                    norm.momentum = batch_size(images) / count
                answer(model, on_device_of(model, images))
            if not count:
                raise ValueError(
                    "batches: empty; give training images, a tensor or batches of them"
                )
            if not all(buffer.isfinite().all() for buffer in buffers):
                raise ValueError(
                    "batches: BatchNorm's statistics are not finite on them; look for NaN in the "
                    "images or the weights"
                )
        except BaseException:
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(old)
            raise
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
