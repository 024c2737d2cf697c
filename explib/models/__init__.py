"""The study's networks, and how any network's convs are found.

A family is one file with a `build` function; ARCHS says in one line what a name means.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from explib.errors import ParamError
from explib.models import googlenet, resnet, vgg
from explib.rates import spread_rates


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


def rates_by_name(arch: str, names: list[str], rates: list[float]) -> dict[str, float]:
    """The rate of each conv of `arch` that is pruned, by name, in the order of the rates.

    names: of its convs in forward order. A single rate serves all; else there must be one per conv
    (GoogLeNet: one for the first conv and one per inception block). ParamError states how many are
    needed.
    """
    groups = ARCHS[arch].rate_groups(names)
    what = f"rates of {arch}" if any(len(group) > 1 for group in groups) else f"convs of {arch}"
    spread = spread_rates(rates, len(groups), what)
    return {name: rate for group, rate in zip(groups, spread, strict=True) for name in group}
