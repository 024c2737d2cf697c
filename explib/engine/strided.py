"""Strided 1x1 convolutions, trained so that no CPU writes beyond its memory.

On x86 torch computes convolutions with oneDNN, whose weight gradient of a 1x1 convolution of stride
above 1 on channels-last inputs writes outside its workspace where the inputs have fewer channels
than a vector (16 with AVX-512, 8 with AVX2): a crash, or gradients that are silently wrong
(docs/torch-cpu-memory.md has the lines that show it, the versions and the report to oneDNN). Such a
convolution reads every stride-th pixel only; here it is one of stride 1 over those pixels, which
takes another path. Inference, and anything on a GPU, is left as it is.
"""

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class Guard(TorchFunctionMode):
    """A context in which every call of torch.conv2d is one of `conv2d`, whoever calls it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (conv2d if func is torch.conv2d else func)(*args, **(kwargs or {}))


class Strided(nn.Module):
    """A layer of the network for which `affected` is true, in Guard."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        with Guard():
            return self.conv(x)


def affected(layer: nn.Module) -> bool:
    """Whether a layer is a strided 1x1 convolution without padding."""
    return isinstance(layer, nn.Conv2d) and _affected(layer.weight, layer.stride, layer.padding)


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """torch.conv2d; of stride 1 where it is strided and 1x1, on a CPU and for training."""
    if input.is_cpu and torch.is_grad_enabled() and _affected(weight, stride, padding):
        down, right = _pair(stride)
        input, stride = input[..., ::down, ::right], 1
    return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _affected(weight: torch.Tensor, stride, padding) -> bool:
    plain = padding == "valid" or _pair(padding) == (0, 0)
    return tuple(weight.shape[2:]) == (1, 1) and _pair(stride) != (1, 1) and plain


def _pair(value) -> tuple:
    both = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return both * 2 if len(both) == 1 else both
