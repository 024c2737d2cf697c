"""The criteria of the study: the two ways of EXP, and what they are compared with.

Ways A and B divide the layer into redundant sets, put the sets in order, keep a share of each and
prune the rest in that order (method: section 2). `floor`: ceil(floor * m) of each set of m kernels
stay, so that fewer than int(rate * F * C) may be pruned, unless `strict_rate` goes on into the
survivors, in the same order. `survivors`: who stays in a set, chosen by chance (`random`) or the
kernels of largest L1 norm (`l1`). `groups`: the number of levels. `bias_in_score`: the conv's bias
is added to the score, as the reference does for VGG-16 in way A. `binary_floor`: floor * m is
rounded up as it stands in binary, as the reference does it: of 10 kernels at 0.30000000000000004
four stay, not three.
"""

import warnings

import numpy as np
import torch
from torch import nn

from explib import registry
from explib.errors import ParamError
from explib.pruning.criteria import Layer
from explib.pruning.layers import Conv, Inputs, conv_at
from explib.pruning.masks import Masks
from explib.pruning.scores import delta_e, levels
from explib.rates import EPSILON, number_to_prune

_ALIKE = 16  # kernels next to each other by norm, among which `matched` draws anew


def way_a(
    layer: Layer,
    *,
    floor: float = 0.0,
    survivors: str = "random",
    groups: int = 13,
    bias_in_score: bool = False,
    binary_floor: bool = False,
    strict_rate: bool = False,
) -> torch.Tensor:
    """Mask by way A, BatchNorm priority: a redundant set is one level of one filter.

    Filters in ascending |gamma|, equal ones by index; within a filter the level that most kernels
    of the layer hold first.
    """
    place, count = _by_frequency(layer, groups, bias_in_score)
    place += _ranks(layer.scale)[:, None] * count
    return _first_in_sets(layer, place, floor, binary_floor, survivors, strict_rate)


def scaling_factors(layer: Layer, *, bias_in_score: bool = False) -> torch.Tensor:
    """Scores of ways A and B: the expectation scaling factors, float64 (F, C)."""
    return delta_e(layer.weight, layer.bias if bias_in_score else None, layer.name)


def way_b(
    layer: Layer,
    *,
    floor: float = 0.0,
    survivors: str = "random",
    groups: int = 13,
    bias_in_score: bool = False,
    binary_floor: bool = False,
    strict_rate: bool = False,
) -> torch.Tensor:
    """Mask by way B, full-layer redundant: a redundant set is one level.

    The level that most kernels hold comes first.
    """
    place, _ = _by_frequency(layer, groups, bias_in_score)
    return _first_in_sets(layer, place, floor, binary_floor, survivors, strict_rate)


def random(layer: Layer) -> torch.Tensor:
    """Mask of kernels chosen by chance."""
    layer.shuffled()  # the masks of published records come from the second draw
    mask = np.ones(layer.weight.shape[:2], bool)
    mask.ravel()[layer.shuffled()[: layer.to_prune]] = False
    return torch.from_numpy(mask)


def l1(layer: Layer) -> torch.Tensor:
    """Scores of plain magnitude: each kernel's L1 norm, float64."""
    return layer.weight.abs().sum((2, 3), dtype=torch.float64)


def bn(layer: Layer) -> torch.Tensor:
    """Scores by filters: those of lowest |gamma| first, their kernels in random order."""
    layer.shuffled()  # as in `random`
    chance = _inverse(layer.shuffled()).reshape(layer.weight.shape[:2])
    return torch.from_numpy(_ranks(layer.scale)[:, None] * chance.size + chance)


def matched(
    layer: Layer,
    *,
    floor: float = 0.0,
    groups: int = 13,
    bias_in_score: bool = False,
    binary_floor: bool = False,
    strict_rate: bool = False,
) -> torch.Tensor:
    """Mask by chance that prunes as many kernels of every L1 norm as way B.

    Among every _ALIKE kernels next to each other by norm as many stay as in B's mask, at random
    places: it has the magnitudes that B leaves, and nothing of its score.
    """
    keep = way_b(
        layer, floor=floor, groups=groups, bias_in_score=bias_in_score,
        binary_floor=binary_floor, strict_rate=strict_rate,
    )  # fmt: skip
    order, chance = _by_norm(layer), layer.shuffled()
    drawn = np.lexsort((chance, np.arange(order.size) // _ALIKE))
    mask = np.empty(order.size, bool)
    mask[order] = keep.numpy().ravel()[order[drawn]]
    return torch.from_numpy(mask).view(keep.shape)


def global_l1(
    model: nn.Module, example_inputs: Inputs, convs: list[Conv], rates: dict[str, float]
) -> Masks:
    """Masks of the whole network: the kernels of least mean |w| go, whatever conv they are of.

    As many that they save the multiply-adds that pruning every conv at its rate would. Convs whose
    rate is 0 stay whole, and of every other one its largest kernel. ValueError, naming the layer,
    for weights that are not finite.
    """
    pruned = [conv for conv in convs if rates.get(conv.name)]
    sizes = []
    for conv in pruned:
        weight = conv_at(model, conv.name).weight.detach().cpu()
        if not torch.isfinite(weight).all():
            raise ValueError(f"{conv.name}: weights hold NaN or infinite values")
        sizes.append(weight.abs().mean((2, 3)).flatten())
    largest = torch.cat([torch.arange(len(own)) == own.argmax() for own in sizes])
    order = torch.cat(sizes).masked_fill(largest, torch.inf).argsort(stable=True)
    counts = torch.tensor([conv.kernels for conv in pruned])
    macs = torch.tensor([conv.kernel_macs for conv in pruned]).repeat_interleave(counts)
    saved = macs[order].cumsum(0)
    wanted = sum(number_to_prune(rates[c.name], c.kernels) * c.kernel_macs for c in pruned)
    keep = torch.ones(len(order), dtype=torch.bool)
    keep[order[: int((saved <= wanted).sum())]] = False
    keep |= largest
    masks = dict(zip((c.name for c in pruned), keep.split(counts.tolist()), strict=True))
    alone = [name for name, mask in masks.items() if mask.sum() == 1 < len(mask)]
    if alone:
        warnings.warn(
            f"global_l1: of {len(alone)} convs one kernel each is left, {alone[0]} first; their "
            "weights are the smallest",
            stacklevel=4,
        )
    return {
        conv.name: masks.get(conv.name, torch.ones(conv.kernels, dtype=torch.bool)).view(
            conv.filters, conv.channels
        )
        for conv in convs
        if conv.name in rates
    }


def _by_frequency(layer: Layer, groups: int, bias_in_score: bool) -> tuple[np.ndarray, int]:
    """The place (F, C) of each kernel's level among the levels, and how many places there are.

    The level that most kernels hold comes first, of equal ones the lower.
    """
    if type(groups) is not int or groups < 1:
        raise ParamError(f"groups: {groups!r}; give a whole number from 1")
    level = levels(scaling_factors(layer, bias_in_score=bias_in_score), groups).cpu().numpy()
    level -= level.min()
    frequency = np.bincount(level.ravel())
    order = np.lexsort((np.arange(frequency.size), -frequency))
    return _inverse(order)[level], frequency.size


def _first_in_sets(
    layer: Layer, place: np.ndarray, floor: float, binary: bool, survivors: str, strict: bool
) -> torch.Tensor:
    """Mask (F, C) after pruning kernels set by set, until the rate is met or no candidate is left.

    place: of each kernel's set among the sets, (F, C). Of a set of m the last ceil(floor * m), in
    the order in which they go, are survivors.
    """
    if not 0 <= floor <= 1:
        raise ParamError(f"floor: {floor} is out of range; give 0 to 1")
    if survivors not in registry.SURVIVORS:
        raise registry.unknown("survivors", survivors, registry.SURVIVORS)
    order = _by_norm(layer) if survivors == "l1" else layer.shuffled()
    sizes = np.bincount(place.ravel())
    stay = np.ceil(sizes * floor - (0 if binary else EPSILON)).astype(np.int64)
    # a sort by set, stable so that each set keeps `order`; 16 bits make it a radix sort
    kind = np.uint16 if sizes.size < 2**16 else np.int64
    order = order[np.argsort(place.ravel().astype(kind)[order], kind="stable")]
    runs = np.stack([sizes - stay, stay], axis=1).ravel()
    candidate = np.repeat(np.arange(runs.size) % 2 == 0, runs)
    gone = order[candidate][: layer.to_prune]
    keep = np.ones(place.shape, bool)
    keep.ravel()[gone] = False
    if strict and gone.size < layer.to_prune:
        keep.ravel()[order[~candidate][: layer.to_prune - gone.size]] = False
    return torch.from_numpy(keep)


def _by_norm(layer: Layer) -> np.ndarray:
    """All kernels of a conv (flat indices), smallest L1 norm first."""
    return l1(layer).flatten().cpu().argsort(stable=True).numpy()


def _ranks(values: torch.Tensor) -> np.ndarray:
    """The rank of each value in ascending order, equal values in order of their index."""
    return _inverse(values.detach().cpu().argsort(stable=True).numpy())


def _inverse(order: np.ndarray) -> np.ndarray:
    """Where each index stands in an order of all indices."""
    places = np.empty(order.size, np.int64)
    places[order] = np.arange(order.size)
    return places
