"""Training: the dense baseline and fine-tuning under masks are the same loop."""

import functools
import math
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from explib.checks import parse_steps
from explib.data import Data, batches_per_epoch, epoch_plan
from explib.data.splits import Split
from explib.engine.fused import keep_memory
from explib.errors import ParamError
from explib.params import Params
from explib.pruning.masks import Masks
from explib.training import distributed, soft_labels, turns
from explib.training.backend import train_mode
from explib.training.evaluation import accuracy
from explib.training.step import (
    Fading,
    Recorded,
    masks_held,
    momentum_of,
    recorded,
    step_of,
    synchronize,
)

AHEAD = 32
"""Steps that may wait for a GPU: who has to wait for all of it, as other runs' evaluation and
recording do, waits for these, too."""


class Diverged(RuntimeError):
    """Loss or weights are not finite: the message says in which step and at what learning rate."""


def lr_at(params: Params, epoch: float) -> float:
    """The learning rate after `epoch` epochs, a fraction counting the steps within one.

    step: lr, divided by 10 at each of lr_decay_step. cosine: from lr down to 0. onecycle: up in a
    straight line over the first fifth, then down to 0 as a cosine.
    """
    if params.lr_schedule == "step":
        return params.lr * 0.1 ** sum(epoch >= step for step in parse_steps(params.lr_decay_step))
    rise = 0.2 if params.lr_schedule == "onecycle" else 0.0
    return params.lr * one_cycle(epoch / params.epochs, rise)


def one_cycle(done: float, rise: float = 0.2) -> float:
    """The share of the peak learning rate where `done`, 0 to 1, of a training lies behind.

    From a fiftieth up in a straight line until `rise`, then down to 0 as a cosine.
    """
    if done < rise:
        return 0.02 + 0.98 * done / rise
    return 0.5 * (1 + math.cos(math.pi * (done - rise) / (1 - rise)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give all parameters this learning rate."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def train(
    model: nn.Module,
    data: Data,
    params: Params,
    masks: Masks | None = None,
    *,
    forward: Callable | None = None,
    teacher: Callable | None = None,
    keep: Path | None = None,
    resume: dict | None = None,
    before: int = 0,
    label: str = "",
) -> Generator[tuple[dict, dict]]:
    """Train in place for params.epochs, masks held at every step; yields after every epoch.

    Yields (entry, state): entry is the epoch's line of history (epoch, lr, train_loss, train_top1,
    top1 on data.test in per cent, with more than ten classes top5, seconds, images_per_s); state is
    {"epoch": epochs done, "momentum": {parameter: tensor}}, which as `resume`, with the model's
    weights of that moment, continues bit for bit. Where params.epochs is no whole number the last
    epoch is the part that is left. before: steps that were trained before these, after which the
    images go on in their order. teacher: logits of the dense network, for distillation; keep: the
    folder where those of an epoch are kept for other runs. With fade_epochs pruned weights shrink
    to zero in a straight line, untrained, instead of vanishing at once. Under torchrun every rank
    calls this with the same arguments, and computes its share of each batch.

    Raises Diverged at the end of an epoch in which loss or weights ceased to be finite; the model
    is then worthless.
    """
    masks = masks or {}
    if not _on_gpu(data):
        keep_memory()
    optimizer = _optimizer(model, data, params)
    trainer = _Trainer(
        model, data, params, masks, optimizer, forward or model, teacher, keep, before, label
    )
    first = resume["epoch"] if resume else 0
    if resume:
        trainer.load_momentum(resume["momentum"])
    faded = not masks or first >= params.fade_epochs
    with masks_held(model, masks, optimizer, faded, plain=True), trainer.progress(first) as bar:
        step = trainer.start(first)
        for epoch in range(first, trainer.epochs):
            yield trainer.epoch(epoch, step, bar)


def _optimizer(model: nn.Module, data: Data, params: Params) -> torch.optim.SGD:
    on_gpu = _on_gpu(data)
    return torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        # on a GPU the whole step is recorded once, so its learning rate has to be read from memory
        lr=torch.tensor(params.lr, device=data.train.labels.device) if on_gpu else params.lr,
        momentum=params.momentum,
        weight_decay=params.weight_decay,
        nesterov=params.nesterov and params.momentum > 0,
        fused=True,
    )


@dataclass
class _Trainer:
    """What the epochs of one training have in common; see `train`."""

    model: nn.Module
    data: Data
    params: Params
    masks: Masks
    optimizer: torch.optim.SGD
    forward: Callable
    teacher: Callable | None
    keep: Path | None
    before: int
    label: str

    def __post_init__(self):
        self.steps = batches_per_epoch(self.data, self.params.batch_size)  # of a whole epoch
        self.in_all = steps_of(self.data, self.params)
        self.epochs = math.ceil(self.in_all / self.steps)
        self.soft = _ahead(self.teacher, self.data, self.params, self.keep)
        fading = self.params.fade_epochs * self.steps if self.masks else 0
        self.fading = Fading(self.model, self.masks if fading else {}, self.optimizer, fading)

    @property
    def named(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained."""
        return {k: p for k, p in self.model.named_parameters() if p.requires_grad}

    def load_momentum(self, momenta: dict[str, torch.Tensor]) -> None:
        """Go on with the momentum of an interrupted training."""
        named = self.named
        for name, momentum in momenta.items():
            # laid out like its weight: the fused optimizer goes through both in step
            buffer = torch.empty_like(named[name], requires_grad=False).copy_(momentum)
            self.optimizer.state[named[name]]["momentum_buffer"] = buffer

    def progress(self, first: int) -> tqdm:
        """A progress bar of all steps, those of the epochs before `first` done."""
        done = min(first * self.steps, self.in_all)
        return progress_bar(self.in_all, self.label or "training", done)

    def start(self, first: int) -> Callable:
        """One step of this training, on a GPU recorded with inputs of the epoch `first`."""
        forward = distributed.parallel(self.model, self.forward)
        step = step_of(
            self.data, self.params, self.optimizer, forward, self.teacher, bool(self.soft)
        )
        if _on_gpu(self.data) and first < self.epochs and distributed.world() == 1:
            train_mode(self.model, self.params.freeze_bn)
            step = recorded(step, self.model, self.optimizer, next(self.inputs(first, 1)))
        return step

    def inputs(self, epoch: int, count: int) -> Iterator[list[tuple]]:
        """What the first `count` steps of an epoch take."""
        first = self.before + epoch * self.steps
        return _steps(self.data, self.params, first, count, self.soft)

    def epoch(self, epoch: int, step: Callable, bar: tqdm) -> tuple[dict, dict]:
        """Train one epoch and evaluate; returns what `train` yields."""
        started = time.perf_counter()
        count = min(self.steps, self.in_all - epoch * self.steps)
        course = self.course(epoch, count, step, bar)
        seconds = time.perf_counter() - started
        distributed.from_rank_0(self.model.buffers())
        rates = [lr_at(self.params, epoch + number / self.steps) for number in range(count)]
        raise_diverged(self.label or "training", course, rates, self.model, epoch)
        entry = self.entry(course, epoch, seconds)
        bar.set_postfix_str(
            f"epoch {entry['epoch']:g}: top-1 {entry['top1']:.2f} %, "
            f"{entry['images_per_s']:.0f} images/s"
        )
        buffers = {k: momentum_of(self.optimizer, p) for k, p in self.named.items()}
        momentum = {k: buffer for k, buffer in buffers.items() if buffer is not None}
        return entry, {"epoch": epoch + 1, "momentum": momentum}

    def course(self, epoch: int, count: int, step: Callable, bar: tqdm) -> torch.Tensor:
        """Train `count` steps; returns each one's sum of losses and hits, float64 (count, 2).

        They are read from the device once.
        """
        train_mode(self.model, self.params.freeze_bn)
        course, inputs = [], self.inputs(epoch, count)
        with turns.passed() if isinstance(step, Recorded) else nullcontext():
            for number, parts in enumerate(inputs):
                set_lr(self.optimizer, lr_at(self.params, epoch + number / self.steps))
                course.append(step(parts).clone())  # a recorded step writes into the same memory
                self.fading.after(epoch * self.steps + number)
                bar.update()
                if number % AHEAD == AHEAD - 1 or number == count - 1:
                    synchronize(self.data.train.labels.device)
        return distributed.sum_over_ranks(torch.stack(course)).cpu().double()

    def entry(self, course: torch.Tensor, epoch: int, seconds: float) -> dict:
        """The epoch's line of history; evaluates the model."""
        lr = float(self.optimizer.param_groups[0]["lr"])
        count = len(course) * min(self.params.batch_size, len(self.data.train))
        loss, hits = course.sum(0).tolist()
        # the last epoch is the result: measured in fp32, whatever the training's precision;
        # pruned networks on a CPU always, since the engine is fast in it
        exact = epoch + 1 == self.epochs or (self.masks and not _on_gpu(self.data))
        found = accuracy(self.model, self.data, self.data.test, None if exact else self.forward)
        return {
            "epoch": min(epoch + 1, self.params.epochs),
            "lr": lr,
            "train_loss": loss / count,
            "train_top1": 100 * hits / count,
            **found,
            "seconds": seconds,
            "images_per_s": count / seconds,
        }


def progress_bar(total: int | None, label: str, done: int = 0) -> tqdm:
    """A progress bar of batches on stdout, of rank 0; lines now and then where that is a file."""
    return (tqdm if sys.stdout.isatty() else _Lines)(
        total=total,
        initial=done,
        desc=label,
        unit="batch",
        file=sys.stdout,
        dynamic_ncols=True,
        disable=distributed.rank() > 0,
    )


class _Lines(tqdm):
    """Progress for a log: a line after 5 s, which says how long it will take, then every 30 s."""

    def __init__(self, **options):
        text = "{desc}: step {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} to go{postfix}"
        super().__init__(**options, bar_format=text, mininterval=5, miniters=1, delay=5)

    def update(self, n=1):
        if shown := super().update(n):
            self.mininterval = 30
        return shown

    def close(self):
        self.delay = 0  # what was said before it was over needs its line's end, too
        super().close()


def _on_gpu(data: Data) -> bool:
    return data.train.labels.is_cuda


def steps_of(data: Data, params: Params) -> int:
    """How many steps params.epochs are; ParamError where they are less than one."""
    steps = batches_per_epoch(data, params.batch_size)
    if (found := round(params.epochs * steps)) < 1:
        raise ParamError(
            f"epochs: {params.epochs} of an epoch of {steps} steps is less than one step; give at "
            f"least {1 / steps:.2g}"
        )
    return found


def pieces(data: Data, params: Params) -> tuple[int, int]:
    """How a batch is divided: (how many pieces each rank takes in turn, images in each).

    ParamError where it cannot be divided evenly.
    """
    batch, ranks = min(params.batch_size, len(data.train)), distributed.world()
    each = params.micro_batch or batch // ranks
    if each == 0 or batch % (ranks * each):
        raise ParamError(
            f"batch_size: {batch} images cannot be divided among {ranks} processes in pieces of "
            f"{each or 'at least 1'}; give a multiple of {ranks * max(each, 1)}"
        )
    return batch // (ranks * each), each


def _ahead(teacher, data: Data, params: Params, keep: Path | None) -> Callable | None:
    """An epoch in, its soft labels out; None where the teacher is asked in each step instead.

    Images on disk would have to be read twice, and of several processes each has its own.
    """
    if teacher is None or not isinstance(data.train, Split) or distributed.world() > 1:
        return None
    return functools.lru_cache(1)(
        lambda epoch: soft_labels.of_epoch(teacher, data, params, epoch, keep)
    )


def _steps(data: Data, params: Params, first: int, count: int, soft=None) -> Iterator[list[tuple]]:
    """What `count` steps from the first of them take on this rank: each a list of inputs of
    `train_batch`, epochs one after another. With `soft`, an epoch in, its soft labels (steps,
    batch, classes) out, their own are each one's last.
    """
    steps = batches_per_epoch(data, params.batch_size)
    epochs = range(first // steps, math.ceil((first + count) / steps))
    own_steps = slice(first - epochs[0] * steps, first - epochs[0] * steps + count)
    whole = [epoch_plan(data, params.batch_size, params.seed, epoch) for epoch in epochs]
    plans = torch.cat(whole)[own_steps]
    parts, each = pieces(data, params)
    own = plans.view(len(plans), 4, parts, -1, each)[:, :, :, distributed.rank()]
    own = own.permute(0, 2, 1, 3).reshape(-1, 4, each)
    inputs = iter(data.train.inputs(own, data.workers))
    if soft:
        logits = torch.cat([soft(epoch) for epoch in epochs])[own_steps].reshape(len(own), each, -1)
        inputs = ((*given, known) for given, known in zip(inputs, logits, strict=True))
    # what is above is done now, and not when the first one is asked for
    return ([next(inputs) for _ in range(parts)] for _ in plans)


def raise_diverged(
    label: str,
    course: torch.Tensor,
    rates: list[float],
    model: nn.Module,
    epoch: int,
    steps: int | None = None,
) -> None:
    """Raise Diverged unless an epoch's losses, course[:, 0], and the weights after it are finite.

    rates: the learning rate of each of its steps. steps: of a whole epoch, where this one was cut
    short.
    """
    broken = (~course[:, 0].isfinite()).nonzero().flatten().tolist()
    number = broken[0] if broken else len(course) - 1
    what = f"loss is {float(course[number, 0])}"
    if not broken:
        running = [b for name, b in model.named_buffers() if ".running_" in f".{name}"]
        if torch.stack([t.isfinite().all() for t in (*model.parameters(), *running)]).all():
            return
        what = "weights are not finite"
    hint = f"at learning rate {rates[number]:.2g}; use a smaller lr"
    if broken and epoch == number == 0:
        hint = "before any training; look for NaN in the images, labels or weights"
    raise Diverged(
        f"{label}: {what} in epoch {epoch + 1}, step {number + 1} of {steps or len(course)}, {hint}"
    )
