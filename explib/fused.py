"""Training on a CPU at the speed of its memory: BatchNorm, shortcut and ReLU in one pass.

On a CPU a ResNet spends more time between its convolutions than in them. `fuse` rewrites a network,
whose weights it shares, so that what lies between them reads and writes each activation once per
direction; the arithmetic is that of the plain network, up to rounding. Also, a small convolution
(maps of up to 4 x 4) becomes a matrix product.
"""

import functools
import operator
import shutil
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import fx, nn


@functools.cache
def library():
    """The compiled passes, built for this machine at first use; None, with a warning, if it fails.

    Takes half a minute once; PyTorch keeps what was built in its extensions folder.
    """
    if shutil.which("g++") is None:
        warnings.warn(
            "training on the CPU without g++: about half as fast; install g++", stacklevel=2
        )
        return None
    from torch.utils.cpp_extension import load

    try:
        return load(
            "explib_fused",
            [str(Path(__file__).with_name("fused.cpp"))],
            extra_cflags=["-O3", "-march=native", "-ffp-contract=fast", "-fopenmp"],
        )
    except (RuntimeError, OSError, ImportError) as error:
        why = str(error).strip().splitlines()[-1]
        warnings.warn(f"training on the CPU without fused passes, slower: {why}", stacklevel=2)
        return None


class _NormAct(torch.autograd.Function):
    """relu(batch_norm(x) + add) with batch statistics, which it returns beside the result."""

    @staticmethod
    def forward(ctx, x, weight, bias, add, eps, relu):
        mean, var = library().batch_moments(x)
        invstd = (var + eps).rsqrt()
        scale = (weight * invstd).float()
        y = library().affine(x, scale, (bias - mean * weight * invstd).float(), add, relu)
        ctx.save_for_backward(x, y if relu else None, weight, mean.float(), invstd.float())
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx, dy, *_):
        x, y, weight, mean, invstd = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        wants_add = ctx.needs_input_grad[3]
        dx, dadd, dweight, dbias = library().backward(dy, x, y, weight, mean, invstd, wants_add)
        return dx, dweight, dbias, dadd, None, None


class NormAct(nn.Module):
    """A BatchNorm2d of the network with what follows it: relu(norm(x) + add)."""

    def __init__(self, norm: nn.BatchNorm2d, relu: bool):
        super().__init__()
        self.norm, self.relu = norm, relu

    def forward(self, x, add=None):
        norm = self.norm
        if (
            not norm.affine
            or norm.running_mean is None
            or (norm.training and norm.momentum is None)
            or (not norm.training and torch.is_grad_enabled())
            or x.dtype not in (torch.float32, torch.bfloat16)
            or (add is not None and add.shape != x.shape)
        ):
            y = norm(x) if add is None else norm(x) + add
            return F.relu(y) if self.relu else y
        x = x.contiguous(memory_format=torch.channels_last)
        if add is not None:
            add = add.to(x.dtype).contiguous(memory_format=torch.channels_last)
        if norm.training:
            y, mean, var = _NormAct.apply(x, norm.weight, norm.bias, add, norm.eps, self.relu)
            with torch.no_grad():
                pixels = x.numel() // x.shape[1]
                norm.running_mean.lerp_(mean.float(), norm.momentum)
                unbiased = var * (pixels / max(pixels - 1, 1))
                norm.running_var.lerp_(unbiased.float(), norm.momentum)
                norm.num_batches_tracked += 1
            return y
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return library().affine(x, scale, norm.bias - norm.running_mean * scale, add, self.relu)


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


def fuse(model: nn.Module) -> nn.Module:
    """A network that computes what `model` does, faster on a CPU, with the same weights and modes.

    The model itself where it cannot be traced, where training mode changes more than its layers do,
    or where nothing could be compiled.
    """
    graph = _traced(model)
    if graph is None or library() is None:
        return model
    modules = dict(model.named_modules())
    fused = fx.GraphModule(model, graph)
    for node in list(graph.nodes):
        module = modules.get(node.target) if node.op == "call_module" else None
        if type(module) is nn.BatchNorm2d:
            _fuse_norm(fused, node, module, modules)
        elif type(module) is nn.Conv2d and _like_3x3(module):
            _replace(fused, node, [node], SmallConv(module), node.args)
    graph.eliminate_dead_code()
    fused.recompile()
    return fused


def _traced(model: nn.Module) -> fx.Graph | None:
    """The model's graph if it has one, the same for training and evaluation."""
    graphs, modes = [], {module: module.training for module in model.modules()}
    try:
        for mode in (True, False):
            model.train(mode)
            graphs.append(fx.Tracer().trace(model))
    except Exception:  # control flow that depends on the data: any error can come of it
        return None
    finally:
        for module, mode in modes.items():
            module.training = mode
    same = str(graphs[0]) == str(graphs[1])
    return graphs[0] if same else None


def _like_3x3(conv: nn.Conv2d) -> bool:
    same = {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 1}
    square = all(getattr(conv, field) == (value, value) for field, value in same.items())
    return square and conv.groups == 1 and conv.padding_mode == "zeros"


def _fuse_norm(fused, norm, module, modules) -> None:
    """Put a BatchNorm, an addition that only it feeds from this side, and a ReLU into one node."""
    chain, add, relu = [norm], None, False
    follower = _only_user(norm)
    if follower and _is_add(follower):
        others = [arg for arg in follower.args if arg is not norm]
        if (
            len(others) == 1
            and isinstance(others[0], fx.Node)
            and _is_relu(_only_user(follower), modules)
        ):
            add = others[0]
            chain.append(follower)
            follower = _only_user(follower)
    if follower and _is_relu(follower, modules):
        chain.append(follower)
        relu = True
    _replace(fused, norm, chain, NormAct(module, relu), (norm.args[0], add))


def _replace(fused, node, chain, module, args) -> None:
    name = f"fused_{node.name}"
    fused.add_submodule(name, module)
    with fused.graph.inserting_before(chain[-1]):
        new = fused.graph.call_module(name, args)
    chain[-1].replace_all_uses_with(new)
    for old in reversed(chain):
        fused.graph.erase_node(old)


def _only_user(node):
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None


def _is_add(node) -> bool:
    return node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add)


def _is_relu(node, modules) -> bool:
    if node is None:
        return False
    if node.op == "call_module":
        return type(modules.get(node.target)) is nn.ReLU
    return node.op == "call_function" and node.target in (F.relu, torch.relu)
