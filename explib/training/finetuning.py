"""Fine-tuning of any classifier on batches of one's own, under masks: a plain call."""

import time
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from explib.engine.fused import keep_memory
from explib.errors import ParamError
from explib.pruning import masks as masking
from explib.pruning.layers import Inputs, modes_kept
from explib.pruning.masks import Masks
from explib.training import backend
from explib.training.evaluation import pair_of, strict_fp32, top1_of
from explib.training.loop import one_cycle, progress_bar, raise_diverged, set_lr
from explib.training.step import add_gradients, masks_held


def finetune(
    model: nn.Module,
    masks: Masks,
    batches: Iterable,
    *,
    epochs: int,
    lr: float = 0.01,
    weight_decay: float = 5e-4,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = F.cross_entropy,
    validation: Iterable | None = None,
) -> list[dict]:
    """Train a classifier in place, its masks held at every step; returns one entry an epoch.

    batches: of (images, labels), gone through once an epoch, as a DataLoader or a list. images:
    what the model is called with, a tensor, a tuple or a dict; labels: int64 (N,), or shares
    (N, classes); both are moved to the model's device. By default SGD with Nesterov momentum 0.9
    and `weight_decay`, its learning rate up to the peak `lr` within a fifth of all steps, then down
    to 0 as a cosine. An `optimizer` of one's own keeps its learning rate, or that of its
    `scheduler` of torch.optim.lr_scheduler, which steps after every batch. loss: of (scores,
    labels), a mean. On a CPU images (N, C, H, W) are computed by the surviving kernels only, or in
    fused passes, where the engine takes the network; results are torch's up to rounding.

    An entry: epoch, lr (of its last step), train_loss, train_top1 (per cent), seconds,
    images_per_s, and with `validation`, batches like the others, top1 on them. The masks are held
    while this runs, see `hold`; modes are left as they were. ValueError, in one line, for masks
    that do not fit, batches that are empty or no such pairs, and numbers out of range; Diverged at
    the end of an epoch in which loss or weights ceased to be finite.
    """
    _check(epochs, lr, optimizer, scheduler)
    masks, length = masking.check(model, masks), _length(batches)
    peak = None if optimizer else lr
    optimizer = optimizer or _sgd(model, lr, weight_decay, length)
    optimizer.zero_grad()
    history: list[dict] = []
    network: Callable | None = None
    steps = epochs * length if length else None
    with (
        modes_kept(model),
        masks_held(model, masks, optimizer, faded=True),
        progress_bar(steps, "fine-tuning") as bar,
    ):
        for epoch in range(epochs):
            model.train()
            began, course, rates, count = time.perf_counter(), [], [], 0
            for batch in batches:
                images, labels = pair_of(model, batch)
                network = network or _network(model, masks, images)
                if peak and length and steps:
                    done = (epoch * length + len(course)) / steps
                    set_lr(optimizer, peak * one_cycle(min(done, 1.0)))
                rates.append(float(optimizer.param_groups[0]["lr"]))
                course.append(add_gradients(network, images, labels, loss))
                optimizer.step()
                optimizer.zero_grad()
                if scheduler is not None:
                    scheduler.step()
                count += len(labels)
                bar.update()
            seconds = time.perf_counter() - began
            entry = _entry(model, epoch, course, rates, count, seconds)
            if network and validation is not None:
                with strict_fp32():
                    entry["top1"] = top1_of(model.eval(), network, validation, "validation")
            history.append(entry)
            bar.set_postfix_str(f"epoch {epoch + 1}: loss {entry['train_loss']:.3f}")
    return history


def _check(epochs: int, lr: float, optimizer: Any, scheduler: Any) -> None:
    """ParamError for numbers out of range, and for what does not go together."""
    if type(epochs) is not int or epochs < 1:
        raise ParamError(f"epochs: {epochs!r}; give a whole number of at least 1")
    if not isinstance(lr, Real) or not 0 < lr < float("inf"):
        raise ParamError(f"lr: {lr!r}; give a number above 0")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise ParamError(
            f"optimizer: a {type(optimizer).__name__}; give one of torch.optim, made of the "
            "model's parameters"
        )
    if scheduler is not None and (
        optimizer is None or getattr(scheduler, "optimizer", None) is not optimizer
    ):
        raise ParamError("scheduler: is for another optimizer; give that one as optimizer, too")


def _length(batches: Iterable) -> int | None:
    """How many batches there are; None where that is not known."""
    try:
        return len(batches)  # type: ignore[arg-type]  # asked, not known
    except TypeError:
        return None


def _sgd(
    model: nn.Module, lr: float, weight_decay: float, length: int | None
) -> torch.optim.Optimizer:
    """The optimizer by default; ValueError where nothing can be trained, or for no known length."""
    if length is None:
        raise ValueError(
            "batches: have no len(), which the learning rate's schedule needs; give a list or a "
            "DataLoader, or an optimizer of your own"
        )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("model: no parameter requires a gradient; nothing can be trained")
    return torch.optim.SGD(trained, lr, momentum=0.9, weight_decay=weight_decay, nesterov=True)


def _network(model: nn.Module, masks: Masks, images: Inputs) -> Callable:
    """What computes the model fastest here, by the rule for runs that are not measured."""
    device = next(model.parameters()).device.type
    if device != "cpu":
        return model
    keep_memory()
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.dtype != torch.float32:
        return model
    return next(iter(backend.networks(model, images[:1], masks, device).values()))


def _entry(
    model: nn.Module,
    epoch: int,
    course: list[torch.Tensor],
    rates: list[float],
    count: int,
    seconds: float,
) -> dict:
    """An epoch's line of history, from each step's sum of losses and hits and learning rate."""
    if not course:
        raise ValueError(
            f"batches: empty in epoch {epoch + 1}; give (images, labels) that can be gone through "
            "once an epoch, as a list or a DataLoader"
        )
    sums = torch.stack(course).cpu().double()
    raise_diverged("fine-tuning", sums, rates, model, epoch)
    loss, correct = sums.sum(0).tolist()
    return {
        "epoch": epoch + 1,
        "lr": rates[-1],
        "train_loss": loss / count,
        "train_top1": 100 * correct / count,
        "seconds": seconds,
        "images_per_s": count / seconds,
    }
