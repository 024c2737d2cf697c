"""Training: the dense baseline and fine-tuning under masks are the same loop."""

import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from explib.data import Data, batches_per_epoch, epoch_plan, train_batch
from explib.data.splits import Split
from explib.engine import strided
from explib.engine.fused import keep_memory
from explib.errors import ParamError
from explib.params import Params, parse_steps
from explib.pruning import masks as masking
from explib.pruning.masks import Masks
from explib.training import distributed, soft_labels
from explib.training.evaluation import accuracy

TEMPERATURE = 4.0
"""Of the soft labels in distillation."""


class Diverged(RuntimeError):
    """Loss or weights are not finite: the message says in which step and at what learning rate."""


def lr_at(params: Params, epoch: float) -> float:
    """The learning rate after `epoch` epochs, a fraction counting the steps within one.

    step: lr, divided by 10 at each of lr_decay_step. cosine: from lr down to 0. onecycle: up in a
    straight line over the first fifth, then down to 0 as a cosine.
    """
    if params.lr_schedule == "step":
        return params.lr * 0.1 ** sum(epoch >= step for step in parse_steps(params.lr_decay_step))
    done = epoch / params.epochs
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
    keep: Path | None = None,
    resume: dict | None = None,
    before: int = 0,
    label: str = "",
) -> Iterator[tuple[dict, dict]]:
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
    fade = params.fade_epochs if masks else 0
    on_gpu = _on_gpu(data)
    if not on_gpu:
        keep_memory()
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(
        named.values(),
        # on a GPU the whole step is recorded once, so its learning rate has to be read from memory
        lr=torch.tensor(params.lr, device=data.train.labels.device) if on_gpu else params.lr,
        momentum=params.momentum,
        weight_decay=params.weight_decay,
        nesterov=params.nesterov and params.momentum > 0,
        fused=True,
    )
    first = 0
    if resume:
        first = resume["epoch"]
        for name, momentum in resume["momentum"].items():
            # laid out like its weight: the fused optimizer goes through both in step
            buffer = torch.empty_like(named[name], requires_grad=False).copy_(momentum)
            optimizer.state[named[name]]["momentum_buffer"] = buffer
    steps, in_all = batches_per_epoch(data, params.batch_size), steps_of(data, params)
    epochs = math.ceil(in_all / steps)
    forward = forward or model
    with (
        _holding(model, masks, optimizer, faded=first >= fade),
        tqdm(
            total=in_all,
            initial=min(first * steps, in_all),
            desc=label or "training",
            unit="batch",
            mininterval=2 if sys.stdout.isatty() else 30,  # a log wants lines, not a movie
            file=sys.stdout,
            dynamic_ncols=True,
            disable=distributed.rank() > 0,
        ) as bar,
    ):
        averaged = distributed.parallel(model, forward)
        soft = _ahead(teacher, data, params, keep)
        step = _step_of(data, params, optimizer, averaged, teacher, bool(soft))
        if on_gpu and first < epochs and distributed.world() == 1:
            _train_mode(model, params)
            inputs = next(_steps(data, params, before + first * steps, 1, soft))
            step = _recorded(step, model, optimizer, inputs)
        for epoch in range(first, epochs):
            started = time.perf_counter()
            own = min(steps, in_all - epoch * steps)
            inputs = _steps(data, params, before + epoch * steps, own, soft)
            course = _epoch(step, inputs, model, data, params, masks, optimizer, epoch, bar)
            count = own * min(params.batch_size, len(data.train))
            seconds = time.perf_counter() - started
            lr = float(optimizer.param_groups[0]["lr"])
            distributed.from_rank_0(model.buffers())
            if broken := _broken(course, model):
                number, what = broken
                rate = lr_at(params, epoch + number / steps)
                raise Diverged(
                    f"{label or 'training'}: {what} in epoch {epoch + 1}, step {number + 1} of "
                    f"{steps}, at learning rate {rate:.2g}; use a smaller lr"
                )
            loss, hits = course.sum(0).tolist()
            # the last epoch is the result: measured in fp32, whatever the training's precision;
            # pruned networks on a CPU always, since the engine is fast in it
            exact = epoch + 1 == epochs or (masks and not on_gpu)
            found = accuracy(model, data, data.test, None if exact else forward)
            speed = count / seconds
            entry = {
                "epoch": min(epoch + 1, params.epochs),
                "lr": lr,
                "train_loss": loss / count,
                "train_top1": 100 * hits / count,
                **found,
                "seconds": seconds,
                "images_per_s": speed,
            }
            bar.set_postfix_str(
                f"epoch {entry['epoch']:g}: top-1 {found['top1']:.2f} %, {speed:.0f} images/s"
            )
            buffers = {k: _momentum(optimizer, p) for k, p in named.items()}
            momentum = {k: buffer for k, buffer in buffers.items() if buffer is not None}
            yield entry, {"epoch": epoch + 1, "momentum": momentum}


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
    plans = [epoch_plan(data, params.batch_size, params.seed, epoch) for epoch in epochs]
    plans = torch.cat(plans)[own_steps]
    turns, each = pieces(data, params)
    own = plans.view(len(plans), 4, turns, -1, each)[:, :, :, distributed.rank()]
    own = own.permute(0, 2, 1, 3).reshape(-1, 4, each)
    inputs = iter(data.train.inputs(own, data.workers))
    if soft:
        logits = torch.cat([soft(epoch) for epoch in epochs])[own_steps].reshape(len(own), each, -1)
        inputs = ((*given, known) for given, known in zip(inputs, logits, strict=True))
    for _ in plans:
        yield [next(inputs) for _ in range(turns)]


def _train_mode(model: nn.Module, params: Params) -> None:
    model.train()
    if params.freeze_bn:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def _step_of(data, params, optimizer, forward, teacher, known=False) -> Callable:
    """One step of training: inputs of `train_batch` in, (sum of losses, hits) out.

    known: the soft labels come with them, and the teacher need not be asked.
    """
    alone = getattr(forward, "no_sync", nullcontext)  # gradients are averaged once a step
    guard = nullcontext if _on_gpu(data) else strided.Guard

    def step(parts):
        total = torch.zeros(2, device=data.train.labels.device)
        for number, inputs in enumerate(parts):
            soft = inputs[-1] if known else None
            images, labels = train_batch(data, *(inputs[:-1] if known else inputs))
            if teacher and not known:
                with torch.no_grad():
                    soft = teacher(images)
            with guard(), nullcontext() if number + 1 == len(parts) else alone():
                logits = forward(images)
                loss = _loss(logits, labels, params, soft)
                (loss / len(parts)).backward()
            hits = (logits.detach().argmax(1) == labels).sum()
            total += torch.stack([loss.detach() * len(labels), hits])
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def _recorded(step: Callable, model: nn.Module, optimizer, parts: list[tuple]) -> Callable:
    """A step recorded as one CUDA graph: a thousand kernels started by one call.

    Recording takes a few real steps; weights, statistics and momentum are put back afterwards.
    """
    parameters = optimizer.param_groups[0]["params"]
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    momenta = {p: _momentum(optimizer, p) for p in parameters}
    momenta = {p: None if m is None else m.clone() for p, m in momenta.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(parts)
    torch.cuda.current_stream().wait_stream(stream)
    graph, parts = torch.cuda.CUDAGraph(), [[t.clone() for t in part] for part in parts]
    with torch.cuda.graph(graph):
        result = step(parts)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(saved[name])
        for parameter, momentum in momenta.items():
            buffer = _momentum(optimizer, parameter)
            if buffer is not None:  # from 0 the first step leaves the gradient, as a new one does
                buffer.zero_() if momentum is None else buffer.copy_(momentum)

    def replay(chosen):
        for own, new in zip(parts, chosen, strict=True):
            for mine, given in zip(own, new, strict=True):
                mine.copy_(given)
        graph.replay()
        return result

    return replay


def _epoch(step, inputs, model, data, params, masks, optimizer, epoch, bar):
    """One epoch of these inputs; returns its course, float64 (steps, 2).

    That is each step's sum of losses and hits, read from the device once.
    """
    _train_mode(model, params)
    group = optimizer.param_groups[0]
    steps = batches_per_epoch(data, params.batch_size)
    fade = params.fade_epochs if masks else 0
    course = []
    for number, parts in enumerate(inputs):
        lr = lr_at(params, epoch + number / steps)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
        course.append(step(parts).clone())  # a recorded step writes into the same memory
        left = (fade - epoch) * steps - number  # steps of fading to go, this one included
        if left > 0:
            _shrink(model, masks, optimizer, (left - 1) / left)
        bar.update()
    return distributed.sum_over_ranks(torch.stack(course)).cpu().double()


def _broken(course: torch.Tensor, model: nn.Module) -> tuple[int, str] | None:
    """The first step after which nothing is worth anything, and why; None if all is finite."""
    steps = (~course[:, 0].isfinite()).nonzero()
    if len(steps):
        return int(steps[0]), f"loss is {float(course[steps[0], 0])}"
    finite = torch.stack([tensor.isfinite().all() for tensor in model.state_dict().values()])
    return None if finite.all() else (len(course) - 1, "weights are not finite")


def _loss(logits, labels, params: Params, soft=None) -> torch.Tensor:
    """Cross-entropy, and where there are `soft` labels, the teacher's logits, their divergence."""
    loss = F.cross_entropy(logits, labels, label_smoothing=params.label_smoothing)
    if soft is not None:
        wanted = F.softmax(soft / TEMPERATURE, 1)
        own = F.log_softmax(logits / TEMPERATURE, 1)
        soft_loss = F.kl_div(own, wanted, reduction="batchmean") * TEMPERATURE**2
        loss = (1 - params.distill) * loss + params.distill * soft_loss
    return loss


@contextmanager
def _holding(model: nn.Module, masks: Masks, optimizer, faded: bool):
    """Masks held; where they still fade, the pruned weights keep their values for now."""
    values = {name: model.get_submodule(name).weight.detach().clone() for name in masks}
    release = masking.hold(model, masks, optimizer)
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
