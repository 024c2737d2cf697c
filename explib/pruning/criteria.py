"""Which kernels go: the two ways of EXP, and the criteria they are compared with.

A pruner takes one layer's tensors and returns a boolean mask (F, C), True where a kernel stays.
Ways A and B divide the layer into redundant sets, put the sets in order, keep a share of each and
prune the rest in that order (method: section 2). The criteria of comparison have no sets: they
prune the first n kernels of an order.
"""

from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch
from torch import nn

from explib.errors import ParamError
from explib.params import CHOICES, WAYS
from explib.pruning.layers import Conv, Inputs, find_convs, prunable
from explib.pruning.scores import delta_e, levels
from explib.rates import EPSILON, keep_floor, number_to_prune, spread_rates

_ALIKE = 16  # kernels next to each other by norm, among which `matched` draws anew


def prune_layer(
    weight: torch.Tensor,
    rate: float,
    way: str = "B",
    *,
    gamma: torch.Tensor | None = None,
    floor: float = 0.0,
    survivors: str = "random",
    groups: int = 13,
    bias: torch.Tensor | None = None,
    strict_rate: bool = False,
    generator: torch.Generator | None = None,
    layer: str = "layer",
) -> torch.Tensor:
    """The mask of one conv, bool (F, C), True where a kernel stays.

    weight: (F, C, K, K). rate: share of kernels to prune. way: `A` (BatchNorm priority, needs
    gamma, the (F,) scale of the conv's BatchNorm), `B` (full-layer), or of comparison `random`,
    `l1` (smallest L1 norm first), `bn` (filters of lowest |gamma| first, their kernels at random),
    `matched` (kernels at random, as many of every L1 norm as way B prunes: what of B is no score).
    floor: ceil(floor * m) of each redundant set of m kernels stay; A and B may therefore prune
    fewer than int(rate * F * C) unless strict_rate goes on into the survivors, in the same order.
    survivors: who stays in a set, `random` or the kernels of largest `l1` norm. generator: a CPU
    generator; equal seeds give equal masks.

    Raises ValueError, naming the layer, for weights that are not finite or a way A without gamma.
    """
    if way not in WAYS:
        raise ParamError(f"pruning_way: {way!r} is unknown; known: {', '.join(WAYS)}")
    if survivors not in CHOICES["survivors"]:
        raise ParamError(
            f"survivors: {survivors!r} is unknown; known: {', '.join(CHOICES['survivors'])}"
        )
    if not 0 <= floor <= 1:
        raise ParamError(f"floor: {floor} is out of range; give 0 to 1")
    if type(groups) is not int or groups < 1:
        raise ParamError(f"groups: {groups!r}; give a whole number from 1")
    if way in ("A", "bn") and gamma is None:
        raise ValueError(
            f"{layer}: no BatchNorm takes this conv's output, and way {way!r} needs its scale; "
            "use way B or leave the layer out"
        )
    delta = delta_e(weight, bias, layer)  # also checks the weights for every way
    filters, channels = delta.shape
    n = number_to_prune(rate, delta.numel())
    if way == "matched":
        keep = prune_layer(
            weight, rate, floor=floor, groups=groups, bias=bias, strict_rate=strict_rate,
            generator=generator, layer=layer,
        )  # fmt: skip
        return _among_alike(keep, _by_norm(weight), generator)
    if way == "l1" or survivors == "l1":
        order = _by_norm(weight)
    else:
        order = torch.randperm(delta.numel(), generator=generator).numpy()

    if way in ("A", "B"):
        level = levels(delta, groups).cpu().numpy()
        level -= level.min()
        frequency = np.bincount(level.ravel())
        rank = np.empty_like(frequency)
        rank[np.lexsort((np.arange(frequency.size), -frequency))] = np.arange(frequency.size)
        place = rank[level]
        if way == "A":
            place += _ranks(gamma.detach().abs(), layer)[:, None] * frequency.size
    elif way == "bn":
        order = torch.randperm(delta.numel(), generator=generator).numpy()
        place = np.repeat(_ranks(gamma.detach().abs(), layer), channels)
        floor = 0.0
    else:
        if way == "random":
            order = torch.randperm(delta.numel(), generator=generator).numpy()
        place = np.zeros(delta.numel(), np.int64)
        floor = 0.0
    keep = _first_in_sets(place.ravel(), order, n, floor, strict_rate)
    return torch.from_numpy(keep.reshape(filters, channels)).to(weight.device)


def _by_norm(weight: torch.Tensor) -> np.ndarray:
    """All kernels of a conv (flat), smallest L1 norm first."""
    norm = weight.detach().abs().sum((2, 3), dtype=torch.float64).flatten().cpu()
    return norm.argsort(stable=True).numpy()


def _among_alike(keep: torch.Tensor, order: np.ndarray, generator) -> torch.Tensor:
    """A mask with as many of every _ALIKE neighbours in `order` as `keep` has, at random places."""
    chance = torch.randperm(keep.numel(), generator=generator).numpy()
    drawn = np.lexsort((chance, np.arange(order.size) // _ALIKE))
    mask = np.empty(order.size, bool)
    mask[order] = keep.cpu().numpy().ravel()[order[drawn]]
    return torch.from_numpy(mask).view(keep.shape).to(keep.device)


def _ranks(values: torch.Tensor, layer: str) -> np.ndarray:
    """The rank of each value in ascending order, equal values in order of their index."""
    if not torch.isfinite(values).all():
        raise ValueError(f"{layer}: BatchNorm scales hold NaN or infinite values")
    ranks = np.empty(values.numel(), np.int64)
    ranks[values.argsort(stable=True).cpu().numpy()] = np.arange(values.numel())
    return ranks


def _first_in_sets(
    place: np.ndarray, order: np.ndarray, n: int, floor: float, strict: bool
) -> np.ndarray:
    """Keep-mask after pruning up to n items, set by set.

    place: the set of each item, as its rank among the sets; order: all items, the first to go
    first. Of a set of m items the last ceil(floor * m) in that order are survivors.
    """
    sizes = np.bincount(place)
    stay = np.ceil(sizes * floor - EPSILON).astype(np.int64)
    # a sort by set, stable so that each set keeps `order`; 16 bits make it a radix sort
    kind = np.uint16 if sizes.size < 2**16 else np.int64
    order = order[np.argsort(place.astype(kind)[order], kind="stable")]
    runs = np.stack([sizes - stay, stay], axis=1).ravel()
    candidate = np.repeat(np.arange(runs.size) % 2 == 0, runs)
    gone = order[candidate][:n]
    keep = np.ones(place.size, bool)
    keep[gone] = False
    if strict and gone.size < n:
        keep[order[~candidate][: n - gone.size]] = False
    return keep


def prune(
    model: nn.Module,
    example_inputs: Inputs | None,
    rate: float | Sequence[float] | dict[str, float] = 0.5,
    way: str = "B",
    *,
    seed: int = 0,
    floor: float | None = None,
    convs: list[Conv] | None = None,
    bias_in_score: bool = False,
    **options,
) -> dict[str, torch.Tensor]:
    """Masks for any network, by the name of the conv: bool (F, C), True where a kernel stays.

    example_inputs: what the network is called with, a tensor, a tuple or a dict; not needed where
    `convs` holds what `find_convs` found. rate: one share for all prunable convs, a list with one
    per conv in forward order, or a dict by name. floor: the share of every redundant set that
    stays, by default 1 - max(rates) - 0.1. options go to `prune_layer`: survivors, groups,
    strict_rate. The model is not changed; `masks.hold` does that. A conv's mask depends on the seed
    and its place only, so that leaving another conv out does not change it.
    """
    convs = convs or find_convs(model, example_inputs)
    usable = prunable(convs)
    if isinstance(rate, dict):
        unknown = set(rate) - {conv.name for conv in usable}
        if unknown:
            raise ParamError(f"rate: {sorted(unknown)[0]!r} is not a prunable conv of the network")
        rates = rate
    else:
        given = list(rate) if isinstance(rate, list | tuple) else [rate]
        spread = spread_rates(given, len(usable))
        rates = {conv.name: value for conv, value in zip(usable, spread, strict=True)}
    for name, value in rates.items():
        if not isinstance(value, Real) or not 0 <= value < 1:
            raise ParamError(f"rate: {value!r} for {name}; give a number from 0 to below 1")
    floor = keep_floor(list(rates.values())) if floor is None else floor
    masks = {}
    for index, conv in enumerate(convs):
        if conv.name not in rates:
            continue
        module = model.get_submodule(conv.name)
        norm = model.get_submodule(conv.norm) if conv.norm else None
        generator = torch.Generator().manual_seed(seed * 100_003 + index)
        masks[conv.name] = prune_layer(
            module.weight,
            rates[conv.name],
            way,
            gamma=None if norm is None else norm.weight,
            floor=floor,
            bias=module.bias if bias_in_score else None,
            generator=generator,
            layer=conv.name,
            **options,
        )
    return masks
