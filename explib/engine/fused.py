"""Training at the speed of memory: BatchNorm, shortcut and ReLU in one pass.

A ResNet spends as much time between its convolutions as in them, on a CPU and on a GPU. `fuse`
rewrites a network, whose weights it shares, so that what lies between them reads and writes each
activation once per direction; the arithmetic is that of the plain network, up to rounding. On a GPU
also convolutions of few channels are computed otherwise (`gpu_convs`). On a CPU a small one (maps
of up to 4 x 4) becomes a matrix product, and a strided 1x1 one is trained as `strided` does.
"""

import ctypes
import functools
import operator
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.autograd.function import once_differentiable

from explib.engine import native, strided
from explib.engine.native import pointer
from explib.engine.tracing import is_addition, is_plain_conv, is_relu, outputs_match, trace
from explib.pruning.layers import modes_kept

_INT64 = ctypes.c_int64


@functools.cache
def library():
    """The compiled passes; None, with a warning, where they cannot be built."""
    try:
        return native.load(Path(__file__).parent / "csrc/fused.cpp", "-fopenmp")
    except native.NoCompiler as error:
        warnings.warn(f"training on this CPU is slower than it could be: {error}", stacklevel=2)
        return None


@functools.cache
def keep_memory() -> bool:
    """Have this process keep the memory it frees; whether its C library (glibc) can.

    A step of training frees its activations; returned to the system, each page of them would cost a
    fault at the next step (ResNet-56 with batch 128: 20,000 to 80,000 of them, a tenth of the time
    and more).
    """
    trim, mmap = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    large = mallopt(mmap, 1 << 30) or mallopt(mmap, 32 << 20)  # older ones take no more
    return bool(large and mallopt(trim, (1 << 31) - 1))


@functools.cache
def on_gpu():
    """What a GPU computes with, `gpu_norms` and `gpu_convs`, tried once.

    None, with a warning, where Triton is missing or cannot compile here.
    """
    try:
        from explib.engine import gpu_convs, gpu_norms

        gpu_norms.check()
        gpu_convs.check()
    except torch.OutOfMemoryError:  # says nothing about Triton
        raise
    except Exception as error:  # of a compiler, a driver, Triton's own: it has many
        why = str(error).strip().split("\n")[0] or type(error).__name__
        warnings.warn(f"training on this GPU is slower than it could be: {why}", stacklevel=2)
        return None
    return gpu_norms, gpu_convs


def _rows(x: torch.Tensor) -> tuple[int, int, bool, int]:
    """Pixels, channels, whether bfloat16, and threads, as the C++ wants them."""
    if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last) or not x.is_cpu:
        raise ValueError(
            f"x: {tuple(x.shape)}; give a channels-last (N, C, H, W) tensor on the CPU"
        )
    if x.dtype not in (torch.float32, torch.bfloat16) or not x.numel():
        raise ValueError(f"x: {x.numel()} values of {x.dtype}; give some in float32 or bfloat16")
    pixels, channels = x.numel() // x.shape[1], x.shape[1]
    return pixels, channels, x.dtype == torch.bfloat16, torch.get_num_threads()


def _like(x: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor | None:
    """`other` in the type and layout of x."""
    if other is not None and other.shape != x.shape:
        raise ValueError(f"a tensor {tuple(other.shape)} beside one of {tuple(x.shape)}")
    return (
        None if other is None else other.to(x.dtype).contiguous(memory_format=torch.channels_last)
    )


def _per_channel(x: torch.Tensor, *values: torch.Tensor) -> list[torch.Tensor]:
    if any(value.numel() != x.shape[1] for value in values):
        raise ValueError(f"values per channel: give {x.shape[1]} of each")
    return [value.detach().float().contiguous() for value in values]


def batch_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each channel of x (N, C, H, W), channels last; float64 (C,)."""
    pixels, channels, half, threads = _rows(x)
    mean, var = torch.empty(2, channels, dtype=torch.float64)
    library().fused_moments(
        *(pointer(x), _INT64(pixels), _INT64(channels), half, threads),
        *map(pointer, (mean, var)),
    )
    return mean, var


def affine(x, scale, shift, add=None, relu: bool = False) -> torch.Tensor:
    """x * scale + shift (+ add), then ReLU where it is wanted; scale and shift (C,)."""
    pixels, channels, half, threads = _rows(x)
    scale, shift = _per_channel(x, scale, shift)
    add, y = _like(x, add), torch.empty_like(x)
    library().fused_affine(
        *map(pointer, (x, add, y)),
        *(_INT64(pixels), _INT64(channels), half, threads),
        *(pointer(scale), pointer(shift), relu),
    )
    return y


def backward(dy, x, y, weight, mean, invstd, wants_add: bool):
    """Gradients of x, of add (None unless wanted), weight and bias, from that of the result.

    y: the result where a ReLU made it, else None.
    """
    pixels, channels, half, threads = _rows(x)
    dy, y = _like(x, dy), _like(x, y)
    weight, mean, invstd = _per_channel(x, weight, mean, invstd)
    dx, dadd = torch.empty_like(x), torch.empty_like(x) if wants_add else None
    dweight, dbias = torch.empty(2, channels, dtype=torch.float32)
    library().fused_backward(
        *map(pointer, (dy, x, y, dx, dadd)),
        *(_INT64(pixels), _INT64(channels), half, threads),
        *map(pointer, (weight, mean, invstd, dweight, dbias)),
    )
    return dx, dadd, dweight, dbias


@torch.no_grad()
def track(norm: nn.BatchNorm2d, mean: torch.Tensor, var: torch.Tensor, pixels: int) -> None:
    """Update running statistics with a batch's mean and biased variance, each (C,)."""
    count, running_mean, running_var = norm.num_batches_tracked, norm.running_mean, norm.running_var
    if not norm.track_running_stats or count is None or running_mean is None or running_var is None:
        return
    count += 1
    # without momentum it is the plain average over batches
    share = 1 / float(count) if norm.momentum is None else norm.momentum
    running_mean.lerp_(mean.to(running_mean), share)
    running_var.lerp_((var * (pixels / max(pixels - 1, 1))).to(running_var), share)


def normalize(x, weight, bias, add, eps: float, relu: bool) -> tuple[torch.Tensor, ...]:
    """relu(batch_norm(x) + add) with batch statistics; its mean, biased variance, 1 / deviation."""
    mean, var = batch_moments(x)
    invstd = (var + eps).rsqrt()
    scale = weight * invstd
    return affine(x, scale, bias - mean * scale, add, relu), mean, var, invstd


class _NormAct(torch.autograd.Function):
    """What `normalize` returns, and its gradients by `gradients`; of one layout of activations."""

    @staticmethod
    def forward(ctx, x, weight, bias, add, eps, relu, normalize, gradients):
        y, mean, var, invstd = normalize(x, weight, bias, add, eps, relu)
        ctx.save_for_backward(x, y if relu else None, weight, mean, invstd)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        x, y, weight, mean, invstd = ctx.saved_tensors
        wants_add = ctx.needs_input_grad[3]
        dx, dadd, dweight, dbias = ctx.gradients(dy, x, y, weight, mean, invstd, wants_add)
        return dx, dweight, dbias, dadd, *[None] * 4


def norm_act(
    norm: nn.BatchNorm2d, x, add, relu: bool, values: int, passes: tuple[Callable, Callable]
) -> torch.Tensor:
    """relu(norm(x) + add) in training mode; updates running statistics.

    values: of each channel of x. passes: `normalize` and `backward` of the layout of x.
    """
    y, mean, var = _NormAct.apply(x, norm.weight, norm.bias, add, norm.eps, relu, *passes)
    track(norm, mean, var, values)
    return y


def sound(norm: nn.BatchNorm2d) -> bool:
    """Whether a BatchNorm has all that the passes read: weight, bias and running statistics."""
    return all(t is not None for t in (norm.weight, norm.bias, norm.running_mean))


def scale_and_shift(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What a BatchNorm that is `sound` multiplies and adds in evaluation mode, each (C,)."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


def _usual(norm: nn.BatchNorm2d) -> bool:
    """Whether a norm is as a GPU's passes take it.

    In float32, its running statistics following each batch by a fixed share.
    """
    numbers = norm.momentum, norm.num_batches_tracked
    followed = norm.track_running_stats and None not in numbers
    return followed and norm.weight.dtype == torch.float32


class NormAct(nn.Module):
    """A BatchNorm2d of the network with what follows it: relu(norm(x) + add)."""

    def __init__(self, norm: nn.BatchNorm2d, relu: bool):
        super().__init__()
        self.norm, self.relu = norm, relu

    def takes(self, shape: torch.Size, like: torch.Tensor, add: torch.Tensor | None) -> bool:
        """Whether the passes compute it of an x of this shape, of the type and device of `like`."""
        norm = self.norm
        return (
            sound(norm)
            and shape.numel() > shape[1]  # torch says what is wrong with one value a channel
            and (norm.training or not torch.is_grad_enabled())
            and like.dtype in (torch.float32, torch.bfloat16)
            and (add is None or add.shape == shape)
            and (not like.is_cuda or (norm.training and _usual(norm)))
        )

    def forward(self, x, add=None, bias=None):
        """bias: of the conv that made x without it, on a GPU."""
        norm = self.norm
        if not self.takes(x.shape, x, add):
            y = norm(x if bias is None else x + bias.to(x.dtype)[:, None, None])
            y = y if add is None else y + add
            return F.relu(y) if self.relu else y
        x = x.contiguous(memory_format=torch.channels_last)
        add = _like(x, add)
        if x.is_cuda:
            return on_gpu()[0].norm_act(norm, x, add, self.relu, bias)
        if norm.training:
            count = x.numel() // x.shape[1]
            return norm_act(norm, x, add, self.relu, count, (normalize, backward))
        return affine(x, *scale_and_shift(norm), add, self.relu)


class SmallConv(nn.Module):
    """A conv 3x3 of the network; in bfloat16 on maps of up to 4 x 4, as one matrix product.

    There oneDNN spends its time laying weights out anew (512 filters on 2 x 2: a fifth of the
    speed of the product, forward and backward).
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        conv = self.conv
        n, channels, height, width = x.shape
        if height * width > 16 or not torch.is_autocast_enabled("cpu"):
            return conv(x)
        x = F.pad(x.bfloat16().permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        taps = [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        columns = torch.cat(taps, 3).view(n * height * width, 9 * channels)
        weight = conv.weight.bfloat16().permute(2, 3, 1, 0).reshape(9 * channels, -1)
        y = columns @ weight if conv.bias is None else torch.addmm(conv.bias, columns, weight)
        return y.view(n, height, width, -1).permute(0, 3, 1, 2)


def fuse(model: nn.Module, like: torch.Tensor) -> nn.Module:
    """A network that computes what `model` does, faster, with the same weights and modes.

    like: images as it takes them, of whatever content, on its device. The model itself, with a
    warning that says why, where it cannot be traced, where training mode changes more than its
    layers do, or where nothing could be compiled.
    """
    try:
        return fused(model, like)
    except NotImplementedError as error:
        place = "GPU" if like.is_cuda else "CPU"
        warnings.warn(f"training on this {place} is slower than it could be: {error}", stacklevel=2)
        return model
    except native.NoCompiler:  # which `library` or `on_gpu` has said
        return model


def fused(model: nn.Module, like: torch.Tensor) -> fx.GraphModule:
    """The network of `fuse`. NotImplementedError or NoCompiler, saying why, where there is none."""
    graph = _traced(model, like)
    if (on_gpu if like.is_cuda else library)() is None:
        what = "Triton" if like.is_cuda else "C++"
        raise native.NoCompiler(f"its {what} could not be compiled")
    modules = dict(model.named_modules())
    made = fx.GraphModule(model, graph)
    for node in list(graph.nodes):
        module: Any = modules.get(str(node.target)) if node.op == "call_module" else None
        if type(module) is nn.BatchNorm2d and node.args:
            _fuse_norm(made, node, module, modules)
        elif like.is_cuda:
            continue  # its convs go into their norms, below
        elif is_plain_conv(module, (3,)) and module.stride == (1, 1):
            _replace(made, node, [node], SmallConv(module), node.args)
        elif strided.affected(module):
            _replace(made, node, [node], strided.Strided(module), node.args)
        elif node.op == "call_function" and node.target is torch.conv2d:
            node.target = strided.conv2d
    if like.is_cuda:
        _fuse_convs(made, modules)
    graph.eliminate_dead_code()
    made.recompile()
    if not outputs_match(made, model, like):
        raise NotImplementedError("its fused passes make something else of it")
    return made


def _traced(model: nn.Module, like: torch.Tensor) -> fx.Graph:
    """The model's graph, the same for training and evaluation; NotImplementedError without one."""
    graphs = []
    with modes_kept(model):
        for mode in (True, False):
            graphs.append(trace(model.train(mode), like).graph)
    if str(graphs[0]) != str(graphs[1]):
        raise NotImplementedError("training mode changes more than its layers do")
    return graphs[0]


def _fuse_norm(fused, norm, module, modules) -> None:
    """Put a BatchNorm, an addition that only it feeds from this side, and a ReLU into one node."""
    chain, add, relu = [norm], None, False
    follower = _only_user(norm)
    if follower and is_addition(follower):
        others = [arg for arg in follower.args if arg is not norm]
        if (
            len(others) == 1
            and isinstance(others[0], fx.Node)
            and is_relu(_only_user(follower), modules)
        ):
            add = others[0]
            chain.append(follower)
            follower = _only_user(follower)
    if follower and is_relu(follower, modules):
        chain.append(follower)
        relu = True
    _replace(fused, norm, chain, NormAct(module, relu), (norm.args[0], add))


def _fuse_convs(fused, modules) -> None:
    """Put a conv that only a norm's node takes into that node, on a GPU."""
    convs, small = on_gpu()[1], []
    for node in [n for n in fused.graph.nodes if n.op == "call_module"]:
        after = fused.get_submodule(str(node.target))
        conv = node.args[0] if isinstance(after, NormAct) else None
        if not isinstance(conv, fx.Node) or conv.op != "call_module" or len(conv.args) != 1:
            continue
        layer: Any = modules.get(str(conv.target))
        if type(layer) is not nn.Conv2d or not _only_user(conv):
            continue
        args = conv.args[0], node.args[1]
        new = _replace(fused, node, [node], convs.ConvNorm(layer, after), args)
        if is_plain_conv(layer, (3,)) and convs.takes(layer):
            small.append((new, layer))
    if not small:
        return
    fused.add_submodule("fused_weights", convs.Weights([layer for _, layer in small]))
    with fused.graph.inserting_before(next(iter(fused.graph.nodes))):
        weights = fused.graph.call_module("fused_weights")
    for number, (node, _) in enumerate(small):
        with fused.graph.inserting_before(node):
            own = fused.graph.call_function(operator.getitem, (weights, number))
        node.args = (*node.args, own)


def _replace(fused, node, chain, module, args) -> fx.Node:
    name = f"fused_{node.name}"
    fused.add_submodule(name, module)
    with fused.graph.inserting_before(chain[-1]):
        new = fused.graph.call_module(name, args)
    chain[-1].replace_all_uses_with(new)
    for old in reversed(chain):
        fused.graph.erase_node(old)
    return new


def _only_user(node):
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None
