"""The convs of any network: where they are, their BatchNorms, their sizes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Conv:
    """A conv of a network: where it is, its BatchNorm, and its size."""

    name: str
    norm: str | None  # name of the BatchNorm2d that takes the conv's output, if there is one
    filters: int
    channels: int  # input channels of one filter
    kernel: tuple[int, int]
    groups: int
    out_h: int
    out_w: int
    positions: int  # of a kernel on one image: out_h * out_w, of every call where there are several

    @property
    def kernels(self) -> int:
        """Number of K x K kernels, filters * channels."""
        return self.filters * self.channels

    @property
    def kernel_macs(self) -> int:
        """Multiply-adds of one kernel for one image."""
        return self.kernel[0] * self.kernel[1] * self.positions


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Whatever happens to modes inside, each module trains or evaluates afterwards as before."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def blank(model: nn.Module, image_size: int = 32) -> torch.Tensor:
    """One blank image (1, C, image_size, image_size) of the model's device, type and channels."""
    convs = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    channels = next((conv.in_channels for conv in convs), 3)
    like = next(model.parameters(), torch.empty(0)).detach()
    return like.new_zeros(1, channels, image_size, image_size)


def find_convs(model: nn.Module, image_size: int = 32) -> list[Conv]:
    """The Conv2d layers of any network in forward order, found by running one blank image.

    A conv's BatchNorm is the BatchNorm2d (or SyncBatchNorm) that takes its very output. A conv that
    the forward pass visits twice is listed once, and its work counted twice. The model's modes and
    statistics are left as they were.
    """
    order, owner, norms, kept, hooks = [], {}, {}, [], []
    shapes, positions = {}, {}

    def after_conv(name):
        def hook(module, inputs, output):
            if name not in shapes:
                order.append(name)
            shapes[name] = output.shape[-2:]
            positions[name] = positions.get(name, 0) + shapes[name].numel()
            owner[id(output)] = name
            kept.append(output)  # so that no other tensor gets its id

        return hook

    def before_norm(name):
        def hook(module, inputs):
            if id(inputs[0]) in owner:
                norms[owner[id(inputs[0])]] = name

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(after_conv(name)))
        elif isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
            hooks.append(module.register_forward_pre_hook(before_norm(name)))
    try:
        with modes_kept(model), torch.no_grad():
            model.eval()(blank(model, image_size))
    finally:
        for hook in hooks:
            hook.remove()
    convs = []
    for name in order:
        conv = model.get_submodule(name)
        filters, channels = conv.weight.shape[:2]
        convs.append(
            Conv(
                name,
                norms.get(name),
                filters,
                channels,
                tuple(conv.kernel_size),
                conv.groups,
                *shapes[name],
                positions[name],
            )
        )
    return convs


def prunable(convs: list[Conv]) -> list[Conv]:
    """The convs the method is defined for: grouped and depthwise ones stay dense.

    A grouped conv's kernels do not share their inputs, so that none can stand for another.
    """
    return [conv for conv in convs if conv.groups == 1]
