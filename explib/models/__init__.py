"""The study's networks, and how any network's convs are found.

A family is one file with a `build` function; ARCHS says in one line what a name means.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from explib.models import googlenet, resnet, vgg
from explib.params import ParamError, spread_rates


@dataclass(frozen=True)
class Arch:
    """How a network is built, the side of its inputs, and which convs each rate is for."""

    build: Callable[..., nn.Module]
    image_size: int = 32
    num_classes: int = 10
    # names of the convs in forward order -> groups of names, one group per rate
    rate_groups: Callable[[list[str]], list[list[str]]] = lambda names: [[name] for name in names]


ARCHS = {
    "vgg_16_bn": Arch(vgg.build),
    "resnet_56": Arch(partial(resnet.build, depth=56)),
    "resnet_110": Arch(partial(resnet.build, depth=110)),
    "googlenet": Arch(googlenet.build, rate_groups=googlenet.rate_groups),
    "resnet_50": Arch(resnet.build_50, 224, 1000, rate_groups=resnet.rate_groups_50),
}


def build(arch: str, num_classes: int | None = None) -> nn.Module:
    """The network `arch` with fresh weights from torch's current random state."""
    if arch not in ARCHS:
        raise ParamError(f"arch: {arch!r} is unknown; known: {', '.join(ARCHS)}")
    spec = ARCHS[arch]
    return spec.build(num_classes=num_classes or spec.num_classes)


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


def rates_by_name(arch: str, convs: list[Conv], rates: list[float]) -> dict[str, float]:
    """The rate of each conv of `arch` that is pruned, by name, in the order of the rates.

    A single rate serves all; else there must be one per conv (GoogLeNet: one for the first conv
    and one per inception block). ParamError states how many are needed.
    """
    groups = ARCHS[arch].rate_groups([conv.name for conv in convs])
    what = f"rates of {arch}" if any(len(group) > 1 for group in groups) else f"convs of {arch}"
    spread = spread_rates(rates, len(groups), what)
    return {name: rate for group, rate in zip(groups, spread, strict=True) for name in group}


def load_weights(model: nn.Module, state: dict, source: str) -> nn.Module:
    """Load a state dict as found in the wild: nested, with `module.`, `fc` or `linear` heads.

    Raises ValueError, listing what does not match, before anything is changed; so too for
    weights that are not finite.
    """
    for key in ("state_dict", "model", "net"):
        if isinstance(state.get(key), dict):
            state = state[key]
    own = model.state_dict()
    found = {}
    for name, value in state.items():
        name = name.removeprefix("module.")
        for old, new in (("fc.", "linear."), ("linear.", "fc.")):
            if name not in own and name.startswith(old) and new + name.removeprefix(old) in own:
                name = new + name.removeprefix(old)
        found[name] = value
    optional = {name for name in own if name.endswith("num_batches_tracked")}
    problems = [f"lacks {name}" for name in own if name not in found and name not in optional]
    problems += [f"has unknown {name}" for name in found if name not in own]
    for name, value in found.items():
        if name not in own:
            continue
        if not isinstance(value, torch.Tensor):
            problems.append(f"{name} is a {type(value).__name__}, not a tensor")
        elif value.shape != own[name].shape:
            problems.append(f"{name} is {tuple(value.shape)}, not {tuple(own[name].shape)}")
        elif value.is_floating_point() and not torch.isfinite(value).all():
            problems.append(f"{name} has NaN or infinite values")
    if problems:
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ValueError(f"{source}: does not fit the network: {'; '.join(problems[:6])}{more}")
    model.load_state_dict({**{name: own[name] for name in optional}, **found})
    return model
