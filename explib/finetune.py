"""Training and evaluation: the dense baseline and fine-tuning under masks are the same loop."""

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from explib import masks as masking
from explib.data import Data, Split, batches_per_epoch, eval_batches, normalize, train_batches
from explib.masks import Masks
from explib.params import Params, parse_steps

TEMPERATURE = 4.0
"""Of the soft labels in distillation."""


class Diverged(RuntimeError):
    """The loss is NaN or infinite: the message says in which epoch and at what learning rate."""


def device_of(params: Params) -> str:
    """`cpu` or `cuda`. ValueError where CUDA is asked for and is not there."""
    if params.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: 'cuda' but torch sees no CUDA device; use 'cpu' or 'auto'")
    if params.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return params.device


def precision_of(params: Params, device: str) -> str:
    """`bf16` or `fp32`: what was asked for, by default bf16 where the hardware computes in it."""
    if params.precision != "auto":
        return params.precision
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def forward_of(model: nn.Module, params: Params, device: str, images: int) -> Callable:
    """The model in the run's precision, compiled where that pays: images in, fp32 logits out.

    images: how many the run will train on. Compiling a ResNet-56 takes about a minute and then
    saves a quarter of the time.
    """
    wanted = params.compile == "on" or (
        params.compile == "auto" and images >= 300_000 and shutil.which("g++") is not None
    )
    network = torch.compile(model, dynamic=False) if wanted else model
    enabled = precision_of(params, device) == "bf16"

    def forward(x):
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            return network(x).float()

    return forward


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, split: Split, forward: Callable | None = None) -> float:
    """Top-1 accuracy in per cent, total correct over total images; fp32 unless `forward` is given.

    The model is left in evaluation mode.
    """
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=split.labels.device)
    for images, labels in eval_batches(split, data):
        correct += ((forward or model)(images).argmax(1) == labels).sum()
    return 100 * int(correct) / len(split)


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
    for part in data.train.images[:images].chunk(math.ceil(images / batch_size)):
        model(normalize(part, data))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def lr_at(params: Params, epoch: float) -> float:
    """The learning rate after `epoch` epochs, a fraction counting the steps within one.

    step: lr, divided by 10 at each of lr_decay_step. cosine: from lr down to 0. onecycle: up in a
    straight line over the first fifth, then down to 0 as a cosine.
    """
    if params.lr_schedule == "step":
        return params.lr * 0.1 ** sum(epoch >= step for step in parse_steps(params.lr_decay_step))
    done = epoch / max(params.epochs, 1)
    rise = 0.2 if params.lr_schedule == "onecycle" else 0.0
    if done < rise:
        return params.lr * (0.02 + 0.98 * done / rise)
    return params.lr * 0.5 * (1 + math.cos(math.pi * (done - rise) / (1 - rise)))


def train(
    model: nn.Module,
    data: Data,
    params: Params,
    masks: Masks | None = None,
    *,
    forward: Callable | None = None,
    teacher: Callable | None = None,
    resume: dict | None = None,
    label: str = "",
) -> Iterator[tuple[dict, dict]]:
    """Train in place for params.epochs, masks held at every step; yields after every epoch.

    Yields (entry, state): entry is the epoch's line of history (epoch, lr, train_loss, train_top1,
    top1 on data.test in per cent, seconds, images_per_s); state is {"epoch": epochs done,
    "momentum": {parameter: tensor}}, which as `resume`, with the model's weights of that moment,
    continues bit for bit. teacher: logits of the dense network, for distillation. With fade_epochs
    pruned weights shrink to zero in a straight line, untrained, instead of vanishing at once.

    Raises Diverged at the end of an epoch whose loss is not finite; the model is then worthless.
    """
    masks = masks or {}
    forward = forward or model
    fade = params.fade_epochs if masks else 0
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(
        named.values(),
        lr=params.lr,
        momentum=params.momentum,
        weight_decay=params.weight_decay,
        nesterov=params.nesterov and params.momentum > 0,
    )
    first = 0
    if resume:
        first = resume["epoch"]
        for name, momentum in resume["momentum"].items():
            optimizer.state[named[name]]["momentum_buffer"] = momentum.to(named[name].device)
    steps = batches_per_epoch(data, params.batch_size)
    with (
        _holding(model, masks, faded=first >= fade),
        tqdm(
            total=params.epochs * steps,
            initial=first * steps,
            desc=label or "training",
            unit="batch",
            mininterval=2 if sys.stdout.isatty() else 30,  # a log wants lines, not a movie
            file=sys.stdout,
            dynamic_ncols=True,
        ) as bar,
    ):
        for epoch in range(first, params.epochs):
            started = time.perf_counter()
            loss, hits, count = _epoch(
                model, data, params, masks, optimizer, epoch, forward, teacher, bar
            )
            seconds = time.perf_counter() - started
            lr = optimizer.param_groups[0]["lr"]
            if not math.isfinite(loss):
                raise Diverged(
                    f"{label or 'training'}: loss is {loss} in epoch {epoch + 1} at learning rate "
                    f"{lr:.2g}; use a smaller lr"
                )
            # the last epoch is the result: measured in fp32, whatever the training's precision
            top1 = evaluate(model, data, data.test, None if epoch + 1 == params.epochs else forward)
            speed = count / seconds
            bar.set_postfix_str(f"epoch {epoch + 1}: top-1 {top1:.2f} %, {speed:.0f} images/s")
            entry = {
                "epoch": epoch + 1,
                "lr": lr,
                "train_loss": loss / count,
                "train_top1": 100 * hits / count,
                "top1": top1,
                "seconds": seconds,
                "images_per_s": speed,
            }
            buffers = {k: _momentum(optimizer, p) for k, p in named.items()}
            momentum = {k: buffer for k, buffer in buffers.items() if buffer is not None}
            yield entry, {"epoch": epoch + 1, "momentum": momentum}


def _epoch(model, data, params, masks, optimizer, epoch, forward, teacher, bar):
    """One epoch of steps; returns (sum of losses, hits, images), read from the device once."""
    model.train()
    steps = batches_per_epoch(data, params.batch_size)
    fade = params.fade_epochs if masks else 0
    total, count = torch.zeros(2, device=data.train.labels.device), 0
    batches = train_batches(data, params.batch_size, params.seed, epoch)
    for step, (images, labels) in enumerate(batches):
        now = epoch + step / steps
        optimizer.param_groups[0]["lr"] = lr_at(params, now)
        logits = forward(images)
        loss = _loss(logits, labels, params, teacher, images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        left = (fade - epoch) * steps - step  # steps of fading to go, this one included
        if left > 0:
            _shrink(model, masks, optimizer, (left - 1) / left)
        hits = (logits.detach().argmax(1) == labels).sum()
        total += torch.stack([loss.detach() * len(labels), hits])
        count += len(labels)
        bar.update()
    return (*total.tolist(), count)


def _loss(logits, labels, params, teacher, images):
    loss = F.cross_entropy(logits, labels, label_smoothing=params.label_smoothing)
    if teacher is not None:
        with torch.no_grad():
            soft = F.softmax(teacher(images) / TEMPERATURE, 1)
        own = F.log_softmax(logits / TEMPERATURE, 1)
        soft_loss = F.kl_div(own, soft, reduction="batchmean") * TEMPERATURE**2
        loss = (1 - params.distill) * loss + params.distill * soft_loss
    return loss


@contextmanager
def _holding(model: nn.Module, masks: Masks, faded: bool):
    """Masks held; where they still fade, the pruned weights keep their values for now."""
    values = {name: model.get_submodule(name).weight.detach().clone() for name in masks}
    release = masking.hold(model, masks)
    if not faded:
        with torch.no_grad():
            for name, value in values.items():
                model.get_submodule(name).weight.copy_(value)
    try:
        yield
    finally:
        release()


@torch.no_grad()
def _shrink(model: nn.Module, masks: Masks, optimizer, factor: float) -> None:
    """One step of fading: scale the pruned weights, and clear what weight decay told momentum."""
    masking.apply(model, masks, factor)
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        momentum = _momentum(optimizer, weight)
        if momentum is not None:
            momentum.mul_(mask.to(weight.device)[:, :, None, None])


def _momentum(optimizer, parameter) -> torch.Tensor | None:
    """A parameter's momentum; None before its first step, and without momentum."""
    return optimizer.state.get(parameter, {}).get("momentum_buffer")
