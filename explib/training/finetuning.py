"""Fine-tuning of any classifier on batches of one's own, under masks: a plain call."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from explib.engine.fused import keep_memory
from explib.errors import ParamError
from explib.pruning import masks as masking
from explib.pruning.layers import Inputs, batch_size, check_network, described, modes_kept
from explib.pruning.masks import Masks
from explib.training import backend
from explib.training.evaluation import (
    answer,
    check_batches,
    check_range,
    hits,
    pair_of,
    strict_fp32,
    top1_of,
)
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
    what the model is called with, a tensor, a tuple or a dict; labels: whole numbers (N,) from 0,
    or shares (N, classes); both are moved to the model's device. By default SGD with Nesterov
    momentum 0.9 and `weight_decay`, its learning rate up to the peak `lr` within a fifth of all
    steps, then down to 0 as a cosine. An `optimizer` of one's own keeps its learning rate, or that
    of its `scheduler` of torch.optim.lr_scheduler, which steps after every batch. loss: of (scores,
    labels), a mean. On a CPU images (N, C, H, W) are computed by the surviving kernels only, or in
    fused passes, where the engine takes the network; results are torch's up to rounding.

    An entry: epoch, lr (of its last step), train_loss, train_top1 (per cent), seconds,
    images_per_s, and with `validation`, batches like the others, top1 on them. The masks are held
    while this runs, see `hold`; modes are left as they were. ValueError, in one line, for masks
    that do not fit, batches that are empty or no such pairs, images or labels that do not go with
    the model or the loss, and numbers out of range: where the first batch shows it, before anything
    is trained. Diverged where loss or weights cease to be finite, at the latest at the end of the
    epoch.
    """
    check_network(model, "its batches")
    _check(epochs, lr, weight_decay, optimizer, scheduler)
    masks, length = masking.check(model, masks), _length(batches)
    peak = None if optimizer else lr
    optimizer = _optimizer(model, optimizer, lr, weight_decay, length)
    batches, first = _first(batches, "batches", epochs)
    scores = _tried(model, first, "batches")
    if validation is not None:
        validation, first = _first(validation, "validation", epochs)
        _tried(model, first, "validation")
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
                if labels.is_cpu:  # elsewhere it would be a wait in every step
                    check_range(scores, labels)
                if network is None:
                    network = _network(model, masks, images)
                if peak and length and steps:
                    done = (epoch * length + len(course)) / steps
                    set_lr(optimizer, peak * one_cycle(min(done, 1.0)))
                rates.append(float(optimizer.param_groups[0]["lr"]))
                with _explained(images, epoch, len(course)):
                    course.append(add_gradients(network, images, labels, _checked(loss)))
                first_step = not history and len(course) == 1
                if (labels.is_cpu or first_step) and not course[-1].isfinite().all():
                    break  # what follows would be no numbers either
                optimizer.step()
                optimizer.zero_grad()
                if scheduler is not None:
                    scheduler.step()
                count += len(labels)
                bar.update()
            seconds = time.perf_counter() - began
            entry = _entry(model, epoch, course, rates, count, seconds, length)
            if network is not None and validation is not None:
                with strict_fp32():
                    entry["top1"] = top1_of(model.eval(), network, validation, "validation")
            history.append(entry)
            bar.set_postfix_str(f"epoch {epoch + 1}: loss {entry['train_loss']:.3f}")
    return history


def _check(epochs: int, lr: float, weight_decay: float, optimizer: Any, scheduler: Any) -> None:
    """ParamError for numbers out of range, and for what does not go together."""
    if type(epochs) is not int or epochs < 1:
        raise ParamError(f"epochs: {epochs!r}; give a whole number of at least 1")
    if not isinstance(lr, Real) or not 0 < lr < float("inf"):
        raise ParamError(f"lr: {lr!r}; give a number above 0")
    if not isinstance(weight_decay, Real) or not 0 <= weight_decay < float("inf"):
        raise ParamError(f"weight_decay: {weight_decay!r}; give a number of at least 0")
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
    """How many batches there are; None where that is not known. ValueError for no batches."""
    check_batches(batches)
    try:
        return len(batches)  # type: ignore[arg-type]  # asked, not known
    except TypeError:
        return None


def _optimizer(
    model: nn.Module, given: Any, lr: float, weight_decay: float, length: int | None
) -> torch.optim.Optimizer:
    """The one given, or that by default; ValueError where it trains nothing of the model."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("model: no parameter requires a gradient; nothing can be trained")
    if given is not None:
        own = {id(parameter) for parameter in trained}
        if not any(id(p) in own for group in given.param_groups for p in group["params"]):
            raise ValueError(
                "optimizer: has no parameter of this model that requires a gradient; make it of "
                "model.parameters()"
            )
        return given
    if length is None:
        raise ValueError(
            "batches: have no len(), which the learning rate's schedule needs; give a list or a "
            "DataLoader, or an optimizer of your own"
        )
    return torch.optim.SGD(trained, lr, momentum=0.9, weight_decay=weight_decay, nesterov=True)


def _first(batches: Iterable, what: str, epochs: int) -> tuple[Iterable, Any]:
    """The batches and the first of them, drawn without a change of torch's random state."""
    check_batches(batches, what)
    with torch.random.fork_rng(devices=[]):
        iterator = iter(batches)
        first = next(iterator, None)
    if first is None:
        raise ValueError(f"{what}: empty; give batches of (images, labels), as a DataLoader does")
    if iterator is not batches:
        return batches, first
    if epochs > 1:
        raise ValueError(
            f"{what}: a {type(batches).__name__}, which ends with the first epoch of {epochs}; "
            "give a list or a DataLoader"
        )
    return itertools.chain([first], iterator), first


@torch.no_grad()
def _tried(model: nn.Module, batch: Any, what: str) -> torch.Tensor:
    """The scores of a batch in evaluation mode; ValueError where batch and model do not fit."""
    images, labels = pair_of(model, batch, what)
    with modes_kept(model):
        scores = answer(model.eval(), images, what)
    hits(scores, labels)
    check_range(scores, labels, what)
    return scores


def _checked(loss: Callable) -> Callable:
    """The loss, whose errors say in one line that it is the loss's, and what it was given."""

    def checked(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        given = f"scores {described(scores)} and labels {described(labels)}"
        try:
            value = loss(scores, labels)
        except Exception as error:
            raise ParamError(f"loss: does not take {given} ({_why(error)})") from error
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            raise ParamError(f"loss: returns {described(value)} for {given}; give their mean")
        return value

    return checked


def _why(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


@contextmanager
def _explained(images: Inputs, epoch: int, step: int) -> Iterator[None]:
    """ValueError, in one line, for what training a batch raises, as BatchNorm of a single image."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, ParamError):
        raise
    except Exception as error:
        alone = "; leave out what is left over, as by drop_last=True" * (batch_size(images) == 1)
        raise ValueError(
            f"batches: batch {step + 1} of epoch {epoch + 1}, images {described(images)}, cannot "
            f"be trained on ({_why(error)}){alone}"
        ) from error


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
    length: int | None,
) -> dict:
    """An epoch's line of history, from each step's sum of losses and hits and learning rate."""
    if not course:
        raise ValueError(
            f"batches: empty in epoch {epoch + 1}; give (images, labels) that can be gone through "
            "once an epoch, as a list or a DataLoader"
        )
    sums = torch.stack(course).cpu().double()
    raise_diverged("fine-tuning", sums, rates, model, epoch, length)
    loss, correct = sums.sum(0).tolist()
    return {
        "epoch": epoch + 1,
        "lr": rates[-1],
        "train_loss": loss / count,
        "train_top1": 100 * correct / count,
        "seconds": seconds,
        "images_per_s": count / seconds,
    }
