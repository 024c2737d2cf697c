"""One step of training: its loss, its recording as a CUDA graph, masks that hold or fade."""

import functools
import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from explib.data import train_batch
from explib.engine import strided
from explib.params import Params
from explib.pruning import holding
from explib.pruning import masks as masking
from explib.pruning.layers import Inputs, call, conv_at
from explib.pruning.masks import Masks
from explib.training.evaluation import hits

TEMPERATURE = 4.0
"""Of the soft labels in distillation."""


def loss_of(logits, labels, params: Params, soft=None) -> torch.Tensor:
    """Cross-entropy, and where there are `soft` labels, the teacher's logits, their divergence."""
    loss = F.cross_entropy(logits, labels, label_smoothing=params.label_smoothing)
    if soft is not None:
        wanted = F.softmax(soft / TEMPERATURE, 1)
        own = F.log_softmax(logits / TEMPERATURE, 1)
        soft_loss = F.kl_div(own, wanted, reduction="batchmean") * TEMPERATURE**2
        loss = (1 - params.distill) * loss + params.distill * soft_loss
    return loss


def step_of(data, params, optimizer, forward, teacher, known=False) -> Callable:
    """One step of training: inputs of `train_batch` in, (sum of losses, hits) out.

    known: the soft labels come with them, and the teacher need not be asked.
    """
    without_sync = getattr(forward, "no_sync", nullcontext)  # gradients are averaged once a step

    def step(parts):
        total = torch.zeros(2, device=data.train.labels.device)
        for number, inputs in enumerate(parts):
            soft = inputs[-1] if known else None
            images, labels = train_batch(data, *(inputs[:-1] if known else inputs))
            if teacher and not known:
                with torch.no_grad():
                    soft = teacher(images)
            loss = functools.partial(loss_of, params=params, soft=soft)
            with nullcontext() if number + 1 == len(parts) else without_sync():
                total += add_gradients(forward, images, labels, loss, len(parts))
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def add_gradients(
    forward: Callable, images: Inputs, labels: torch.Tensor, loss: Callable, parts: int = 1
) -> torch.Tensor:
    """Add the gradients of a batch, one of so many parts of a step; (sum of losses, hits)."""
    with strided.Guard() if labels.is_cpu else nullcontext():
        logits = call(forward, images)
        hit, value = hits(logits, labels), loss(logits, labels)
        (value / parts).backward()
    return torch.stack([value.detach().float() * len(labels), hit])


def recorded(step: Callable, model: nn.Module, optimizer, parts: list[tuple]) -> Callable:
    """A step recorded as one CUDA graph: a thousand kernels started by one call.

    Recording takes a few real steps; weights, statistics and momentum are put back afterwards.
    Where it fails, a warning says why, and the step itself is what is returned.
    """
    # the stream that is in use, where it may record: there are only so many of them
    stream, replay = torch.cuda.current_stream(), step
    if stream == torch.cuda.default_stream():
        stream = torch.cuda.Stream()
    with _put_back(model, optimizer):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(parts)
        torch.cuda.current_stream().wait_stream(stream)
        try:
            replay = Recorded(step, parts, stream)
        except RuntimeError as error:
            why = str(error).strip().split("\n")[0]
            warnings.warn(
                f"the step cannot be recorded as a CUDA graph ({why}); kernels are started one by "
                "one, which is slower",
                stacklevel=2,
            )
            optimizer.zero_grad()  # what the broken capture has left there
    return replay


class Recorded:
    """A step as a CUDA graph: called like the step that it was made of, on inputs of its shapes."""

    def __init__(self, step: Callable, parts: list[tuple], stream):
        self.parts = [tuple(t.clone() for t in part) for part in parts]
        self.graph = torch.cuda.CUDAGraph()
        gc.collect()  # graphs that are garbage must not go while another one is recorded
        # other threads may ask for memory meanwhile, for runs of their own
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.result = step(self.parts)

    def __call__(self, chosen: list[tuple]) -> torch.Tensor:
        for own, new in zip(self.parts, chosen, strict=True):
            for mine, given in zip(own, new, strict=True):
                mine.copy_(given)
        self.graph.replay()
        return self.result


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what this thread gave it; on a CPU all is done already."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


@contextmanager
def _put_back(model: nn.Module, optimizer) -> Iterator[None]:
    """Steps inside leave no trace in weights, statistics and momentum."""
    parameters = optimizer.param_groups[0]["params"]
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    momenta = {p: momentum_of(optimizer, p) for p in parameters}
    momenta = {p: None if m is None else m.clone() for p, m in momenta.items()}
    yield
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(saved[name])
        for parameter, momentum in momenta.items():
            buffer = momentum_of(optimizer, parameter)
            if buffer is not None:  # from 0 the first step leaves the gradient, as a new one does
                buffer.zero_() if momentum is None else buffer.copy_(momentum)


class Fading:
    """Pruned weights that shrink to zero in a straight line, untrained, over some steps."""

    def __init__(self, model: nn.Module, masks: Masks, optimizer, steps: int):
        self.optimizer, self.steps = optimizer, steps
        masks = masking.check(model, masks)
        self.weights = [conv_at(model, name).weight for name in masks]
        # on the device once: a copy in every step would have the device wait for it
        self.kept = [
            mask.to(weight.device)[:, :, None, None]
            for mask, weight in zip(masks.values(), self.weights, strict=True)
        ]

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Shrink after this step, counted from 0, and clear what weight decay told momentum."""
        left = self.steps - step  # this one included
        if left <= 0:
            return
        factor = (left - 1) / left
        for weight, kept in zip(self.weights, self.kept, strict=True):
            # where, not a product: 0 * NaN would stay NaN
            scaled = weight * factor if factor else weight.new_zeros(())
            weight.copy_(torch.where(kept, weight, scaled))
            momentum = momentum_of(self.optimizer, weight)
            if momentum is not None:
                momentum.mul_(kept)


@contextmanager
def masks_held(
    model: nn.Module, masks: Masks, optimizer, faded: bool, plain: bool = False
) -> Iterator[None]:
    """Masks held; where they still fade, the pruned weights keep their values for now.

    plain: the optimizer is an SGD of ours, and nobody else touches the weights. Of a weight and a
    momentum of 0 that leaves 0 where the gradient is 0, and a GPU would take a tenth of its time
    for more.
    """
    light = plain and any(p.is_cuda for p in model.parameters())
    if light and faded:
        masking.apply(model, masks)
    hold = holding.hold if faded and not light else holding.mask_gradients
    release = hold(model, masks, optimizer)
    try:
        yield
        if light and faded and not masking.held(model, masks):
            raise RuntimeError("masks: a pruned kernel is not zero any more after training")
    finally:
        release()


def momentum_of(optimizer, parameter) -> torch.Tensor | None:
    """A parameter's momentum; None before its first step, and without momentum."""
    return optimizer.state.get(parameter, {}).get("momentum_buffer")
