"""Choose how a network is computed here: which kernels, in which precision, by what.

On a CPU the ways that are possible are timed for a few seconds once a machine (`timing`); nothing
is inferred from the names of instruction sets.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from explib.data import example_of
from explib.engine import strided, training
from explib.engine.fused import fuse
from explib.params import Params
from explib.pruning.layers import modes_kept
from explib.pruning.masks import Masks
from explib.training import distributed, timing
from explib.training.timing import Speeds

NAMES = [
    f"{how}, {precision}"
    for how in ("surviving kernels", "fused passes", "eager", "torch.compile")
    for precision in ("fp32", "bf16")
]
"""All ways to train: what computes, and in which precision."""

SPARSE_FROM = 0.3
"""Share of all kernels pruned from which runs that are too short to measure leave them out."""

SHARE = 25
"""A run is worth measuring for if it trains on so many times the images that measuring takes: at
most 4 % of it, and nothing of the next one that asks the same."""


@dataclass(frozen=True)
class Backend:
    """A network as it is computed here: images in, fp32 logits out.

    how: `surviving kernels`, `fused passes`, `eager`, `torch.compile` or `engine` (for inference).
    precision: `fp32`, `bf16` or `fp16` (engine only). measured: images/s of each way that was timed
    for the choice, by "how, precision"; empty where there was nothing to choose or no time.
    """

    network: Callable
    how: str
    precision: str
    device: str = "cpu"
    measured: Speeds = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What computes, and in which precision."""
        return f"{self.how}, {self.precision}"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        short = self.precision == "bf16" and self.how != "engine"
        guard = strided.Guard() if self.device == "cpu" else nullcontext()
        with guard, torch.autocast(self.device, torch.bfloat16, enabled=short):
            return self.network(images).float()


def device_of(params: Params) -> str:
    """`cpu` or `cuda`. ValueError where CUDA is asked for and is not there."""
    if params.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: 'cuda' but torch sees no CUDA device; use 'cpu' or 'auto'")
    if params.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return params.device


def choose(
    model: nn.Module,
    params: Params,
    device: str,
    images: int = 0,
    masks: Masks | None = None,
    kept: str = "",
) -> Backend:
    """The model as it trains fastest here, within what `compile` and `precision` ask for.

    images: how many the run will train on. A long one on a CPU is worth a measurement, which leaves
    the model as it was; else there is a rule: surviving kernels, then fused passes, in bf16 where a
    convolution is faster in it. masks: of kernels that stay zero, and so need not be computed.
    kept: `how` an interrupted run was trained, to go on so; a warning says where that is not
    possible. Ranks choose alike. ValueError where `compile: sparse` is not possible.
    """
    possible = networks(model, example_of(params), masks or {}, device, params.compile)
    if kept and kept in possible:
        possible = {kept: possible[kept]}
    kinds = precisions(params, device)
    ways = {
        f"{how}, {precision}": Backend(network, how, precision, device)
        for how, network in possible.items()
        for precision in kinds
    }
    measured: Speeds = {}
    count = _count(params)
    compiles = "torch.compile" in possible  # a minute for each
    if len(ways) > 1 and not compiles and images >= SHARE * count * (1 + timing.ROUNDS) * len(ways):
        question = {
            **question_of("training", model, count, ways, training.library()),
            "shape": list(example_of(params).shape),
            "frozen": params.freeze_bn,
        }
        measured = timing.remembered(question, lambda: _train_speeds(model, params, ways, count))
        best = timing.ranking(measured)[0]
    else:
        short = bool(len(kinds) > 1 and bf16_wins())
        best = f"{next(iter(possible))}, {kinds[short]}"
    best = NAMES[distributed.as_rank_0(NAMES.index(best), device)]
    if best not in ways:  # where rank 0 is on another kind of machine
        best = next((name for name in ways if name.endswith(best[-4:])), next(iter(ways)))
    if kept and ways[best].how != kept:
        warnings.warn(
            f"this run began with {kept}, which is not possible here; it goes on with {best}",
            stacklevel=2,
        )
    chosen = ways[best]
    return Backend(chosen.network, chosen.how, chosen.precision, device, measured)


def networks(
    model: nn.Module, example: torch.Tensor, masks: Masks, device: str, compile: str = "auto"
) -> dict[str, Callable]:
    """What may train the model here, by its name, what is likely fastest first.

    example: images as it takes them. compile: as the field of Params.
    """
    if compile == "on":
        return {"torch.compile": torch.compile(model, dynamic=False)}
    if compile == "off" or (compile == "sparse" and device != "cpu"):
        if compile == "sparse" and masks:
            raise ValueError(_NOT_SPARSE)
        return {"eager": model}
    if device != "cpu":
        quick = fuse(model, example.to(device))
        return {"eager" if quick is model else "fused passes": quick}
    network = training.sparse(model, masks, example) if masks else None
    if compile == "sparse" and masks:
        if network is None:
            raise ValueError(_NOT_SPARSE)
        return {"surviving kernels": network}
    fused = network.dense if network else fuse(model, example)
    all_kernels: dict[str, Callable] = {"eager" if fused is model else "fused passes": fused}
    surviving: dict[str, Callable] = {"surviving kernels": network} if network else {}
    likely = _pruned(model, masks) >= SPARSE_FROM
    return surviving | all_kernels if likely else all_kernels | surviving


_NOT_SPARSE = (
    "compile: 'sparse' needs a CPU, a C++ compiler, and a network that torch.fx traces and "
    "has masked convs 3x3, padded by 1, or 1x1; use 'auto'"
)


def _pruned(model: nn.Module, masks: Masks) -> float:
    """The share of the kernels of all plain convs that the masks prune."""
    kernels = sum(m.weight[:, :, 0, 0].numel() for m in model.modules() if type(m) is nn.Conv2d)
    return sum(int((~mask).sum()) for mask in masks.values()) / max(kernels, 1)


def precisions(params: Params, device: str) -> list[str]:
    """The precisions in which training may be computed."""
    if params.precision != "auto":
        return [params.precision]
    if device == "cuda":
        return ["bf16" if torch.cuda.is_bf16_supported() else "fp32"]
    return ["fp32", "bf16"] if _takes_bf16() else ["fp32"]


def _takes_bf16() -> bool:
    """Whether torch computes convolutions in bf16 on this CPU, however fast."""
    # a private name of torch: where it is gone, fp32 is right, too
    return getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)()


def bf16_wins() -> bool:
    """Whether one convolution, forward and backward, is clearly faster in bf16 on this CPU.

    The rule for runs that are too short for more.
    """
    if not _takes_bf16():
        return False

    def way(kind: torch.dtype) -> Callable:
        image, weight = torch.ones(32, 64, 16, 16, dtype=kind), torch.ones(64, 64, 3, 3, dtype=kind)
        image = image.contiguous(memory_format=torch.channels_last).requires_grad_()
        weight.requires_grad_()
        return lambda: torch.autograd.grad(
            F.conv2d(image, weight, padding=1).sum(), [image, weight]
        )

    ways = {"fp32": way(torch.float32), "bf16": way(torch.bfloat16)}
    found = timing.remembered({"what": "a convolution"}, lambda: timing.speeds(ways, 32))
    return timing.ranking(found)[0] == "bf16"


def _count(params: Params) -> int:
    """Images to time training on: 64, and 16 for each thread, at most a piece of the run's batches.

    With fewer, what a step costs whatever its images weighs too much: of VGG-16 with 20 % of its
    kernels pruned 16 images are faster over all kernels, 64 and 128 over the surviving ones.
    Divisible by the lanes of the C++ exactly where those pieces are.
    """
    piece = params.micro_batch or max(1, params.batch_size // distributed.world())
    return min(piece, max(64, 16 * torch.get_num_threads()) + piece % 16)


def question_of(what: str, model: nn.Module, images: int, ways, library) -> dict:
    """What the speed of each of these ways depends on, for `timing.remembered`.

    That is the network's layers and how dense they are, and the C++ that was compiled: its file's
    name is a digest of sources, compiler, flags and processor.
    """
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    left = sum(int(weight.detach().flatten(2).any(2).sum()) for weight in weights)
    kernels = sum(weight.shape[0] * weight.shape[1] for weight in weights)
    return {
        "what": what,
        "network": hashlib.sha256(repr(model).encode()).hexdigest()[:16],
        "density": round(20 * left / max(kernels, 1)) / 20,
        "images": images,
        "ways": list(ways),
        "kernels": Path(library._name).stem if library else "",
    }


def _train_speeds(model: nn.Module, params: Params, ways: dict[str, Backend], count: int) -> Speeds:
    """Images/s of each way, forward and backward on one batch of noise."""
    weights = [p for p in model.parameters() if p.requires_grad]
    images = noise(example_of(params), count)
    labels = torch.arange(count)

    def step(way: Backend):
        logits = way(images)
        loss = F.cross_entropy(logits, labels % logits.shape[1])
        torch.autograd.grad(loss, weights, allow_unused=True)  # leaves no gradient behind

    with untouched(model):
        train_mode(model, params.freeze_bn)
        return timing.speeds({name: partial(step, way) for name, way in ways.items()}, count)


def noise(like: torch.Tensor, count: int) -> torch.Tensor:
    """`count` images of noise, of the shape, type and device of the one image `like`."""
    images = torch.randn(count, *like.shape[1:], generator=torch.Generator().manual_seed(0))
    return images.to(like).contiguous(memory_format=torch.channels_last)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Keep modes, buffers and torch's random state, whatever is computed inside."""
    saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with modes_kept(model), torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    buffer.copy_(saved[name])


def train_mode(model: nn.Module, freeze_bn: bool = False) -> None:
    """Training mode; with freeze_bn, BatchNorm keeps evaluating with its statistics."""
    model.train()
    if freeze_bn:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
