"""How a network runs here: surviving kernels or all, in which precision, compiled by what."""

import functools
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from explib import engine
from explib.data import Data, eval_batches
from explib.data.splits import Folders, Split
from explib.engine import build, native, strided, training
from explib.engine.fused import fuse
from explib.params import Params
from explib.pruning.masks import Masks


def device_of(params: Params) -> str:
    """`cpu` or `cuda`. ValueError where CUDA is asked for and is not there."""
    if params.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: 'cuda' but torch sees no CUDA device; use 'cpu' or 'auto'")
    if params.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return params.device


def precision_of(params: Params, device: str) -> str:
    """`bf16` or `fp32`: what was asked for, by default bf16 where this machine is faster in it."""
    if params.precision != "auto":
        return params.precision
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if _bf16_wins() else "fp32"


@functools.cache
def _bf16_wins() -> bool:
    """Whether a convolution, forward and backward, is clearly faster in bf16 on this CPU.

    Measured once, since a CPU may well take bf16 and compute it in fp32 with conversions.
    """
    # a private name of torch: where it is gone, fp32 is right, too
    if not getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)():
        return False
    best = {}
    for kind in (torch.float32, torch.bfloat16) * 4:
        image, weight = torch.ones(32, 64, 16, 16, dtype=kind), torch.ones(64, 64, 3, 3, dtype=kind)
        image = image.contiguous(memory_format=torch.channels_last).requires_grad_()
        started = time.perf_counter()
        F.conv2d(image, weight.requires_grad_(), padding=1).sum().backward()
        seconds = time.perf_counter() - started
        best[kind] = min(seconds, best.get(kind, seconds))
    return best[torch.bfloat16] < 0.8 * best[torch.float32]


COMPILE_FROM = 3_000_000
"""Training images from which torch.compile repays its minute on a GPU. On a CPU it never does: the
fused passes are as fast on ResNet-56 and faster on VGG-16, at once."""


SPARSE_FROM = 0.3
"""Share of all kernels pruned from which training on a CPU leaves them out (measured by
explib.study.bench.training)."""


def forward_of(
    model: nn.Module, params: Params, device: str, images: int, masks: Masks | None = None
) -> Callable:
    """The model as it runs fastest, in the run's precision: images in, fp32 logits out.

    images: how many the run will train on, which decides whether compiling pays. masks: of kernels
    that stay zero, and so need not be computed. The function's `how` says what was chosen.
    ValueError where `compile: sparse` is not possible.
    """
    long = device == "cuda" and images >= COMPILE_FROM
    if params.compile == "on" or (params.compile == "auto" and long):
        network, how = torch.compile(model, dynamic=False), "torch.compile"
    elif sparse := _sparse(model, params, device, masks or {}):
        network, how = sparse, "surviving kernels"
    elif params.compile in ("auto", "sparse") and device == "cpu":
        network = fuse(model, torch.zeros(1, 3, params.side, params.side))
        how = "eager" if network is model else "fused passes"
    else:
        network, how = model, "eager"
    enabled = precision_of(params, device) == "bf16"
    guard = strided.Guard if device == "cpu" else nullcontext

    def forward(x):
        with guard(), torch.autocast(device, torch.bfloat16, enabled=enabled):
            return network(x).float()

    forward.how = how
    return forward


def _sparse(model: nn.Module, params: Params, device: str, masks: Masks) -> nn.Module | None:
    """The network of `runtime.training` where it is asked for, or likely faster and possible."""
    asked = params.compile == "sparse"
    if not masks or not (asked or (params.compile == "auto" and device == "cpu")):
        return None
    kernels = sum(m.weight[:, :, 0, 0].numel() for m in model.modules() if type(m) is nn.Conv2d)
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    if not asked and (pruned < SPARSE_FROM * kernels or _in_matrices(params, device)):
        return None
    example = torch.zeros(1, 3, params.side, params.side)
    network = training.sparse(model, masks, example) if device == "cpu" else None
    if asked and network is None:
        raise ValueError(
            "compile: 'sparse' needs a CPU, a C++ compiler, and a network that torch.fx traces and "
            "has masked convs 3x3, padded by 1, or 1x1; use 'auto'"
        )
    return network


def _in_matrices(params: Params, device: str) -> bool:
    """Whether torch multiplies matrices of bf16 in hardware (AMX), fast enough to spare no zero."""
    return precision_of(params, device) == "bf16" and native.multiplies_matrices()


def teacher_of(
    model: nn.Module, params: Params, device: str, images: int, exact: bool = True
) -> Callable:
    """The unpruned network for distillation: images in, fp32 logits out, in evaluation mode.

    On a CPU in the engine, in the run's precision, unless its processor multiplies matrices. Not
    exact: in fp16 rather than fp32 where the processor computes in it, which takes half the time.
    """
    if (
        device == "cpu"
        and params.compile in ("auto", "sparse")
        and not _in_matrices(params, device)
    ):
        example = torch.zeros(1, 3, params.side, params.side)
        types = [torch.float32]
        if precision_of(params, device) == "bf16":
            types = [torch.bfloat16]
        elif not exact:
            types = [torch.float16, torch.float32]
        for dtype in types:
            if engine := _engine(model, example, dtype):
                return engine
    return forward_of(model, params, device, images)


ENGINE_FROM = 2000
"""Images from which evaluating in the engine repays the second it takes to plan a network."""


def in_fp32(model: nn.Module, split: Split | Folders, data: Data) -> Callable:
    """The model in fp32 and evaluation mode, in the engine where that pays and is possible."""
    parameter = next(model.parameters(), None)
    if parameter is None or not parameter.is_cpu or len(split) < ENGINE_FROM:
        return model
    images, _ = next(eval_batches(split.first(1), data))
    return _engine(model, images, torch.float32) or model


def _engine(model: nn.Module, example: torch.Tensor, dtype: torch.dtype) -> Callable | None:
    """The model in the engine, all of it and in this type; None where that is not possible."""
    try:
        if build.computes(build.library(), dtype):
            return engine.compile(model, example, dtype=dtype, fallback=False)
    except (engine.NoCompiler, NotImplementedError):
        pass
    return None
