"""The study's networks, and any other, by name. A family is one file with a `build` function."""

import inspect

from torch import nn

from explib import registry
from explib.errors import ParamError
from explib.rates import spread_rates


def build(arch: str, num_classes: int | None = None) -> nn.Module:
    """Build a network with fresh weights from torch's current random state.

    arch: a name of `explib.registry`, or package.module:function of a function that takes
    num_classes. ParamError, in one line, where that is no such function.
    """
    entry = registry.network(arch)
    make = registry.load(entry.function, "arch")
    takes = inspect.signature(make).parameters.values()
    if not any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in takes):
        raise ParamError(
            f"arch: {arch!r} takes no num_classes; give a function or class with an argument of "
            "that name"
        )
    model = make(num_classes=num_classes or entry.num_classes)
    if not isinstance(model, nn.Module):
        raise ParamError(f"arch: {arch!r} built a {type(model).__name__}; give a torch.nn.Module")
    return model


def rates_by_name(arch: str, names: list[str], rates: list[float]) -> dict[str, float]:
    """The rate of each conv of `arch` that is pruned, by name, in the order of the rates.

    names: of its convs in forward order. A single rate serves all; else there must be one per conv
    (GoogLeNet: one for the first conv and one per inception block). ParamError states how many are
    needed.
    """
    grouping = registry.network(arch).rate_groups
    groups = registry.load(grouping, "arch")(names) if grouping else [[name] for name in names]
    what = f"rates of {arch}" if any(len(group) > 1 for group in groups) else f"convs of {arch}"
    spread = spread_rates(rates, len(groups), what)
    return {name: rate for group, rate in zip(groups, spread, strict=True) for name in group}
