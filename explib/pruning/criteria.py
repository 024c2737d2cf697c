"""Choose masks for a network by a criterion: one of the study's (`ways`), or one of your own.

A criterion is a function of one `Layer`. It returns scores (F, C), of which the int(rate * F * C)
lowest are pruned, of equal ones those of lower index first; or a boolean mask (F, C), True where a
kernel stays:

    def peak(layer):
        return layer.weight.abs().amax((2, 3))

    masks = explib.prune(model, images, rate=0.5, criterion=peak)

Whatever arguments it has beside the layer are options, which `prune` hands on by name. A criterion
of the whole network (`register_criterion(…, whole_network=True)`) is a function of (model,
example_inputs, convs, rates by name) that returns the masks by name.
"""

import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from explib import registry
from explib.errors import ParamError
from explib.pruning.layers import Conv, Inputs, conv_at, find_convs, prunable
from explib.pruning.masks import Masks, check
from explib.rates import keep_floor, number_to_prune


@dataclass(frozen=True)
class Layer:
    """What a criterion sees of one conv. Its tensors are the network's own: do not change them."""

    name: str
    weight: torch.Tensor  # (F, C, K, K), detached
    bias: torch.Tensor | None = None  # (F,)
    gamma: torch.Tensor | None = None  # (F,), the scale of the BatchNorm that takes its output
    rate: float = 0.5  # the share of its kernels to prune
    generator: torch.Generator | None = None  # of this conv alone, on the CPU
    norm: str | None = None  # the name of that BatchNorm

    @property
    def to_prune(self) -> int:
        """How many kernels the rate asks for, int(rate * F * C)."""
        return number_to_prune(self.rate, self.weight[:, :, 0, 0].numel())

    @property
    def scale(self) -> torch.Tensor:
        """|gamma| (F,). ValueError, naming the layer, where there is none or it is not finite."""
        if self.gamma is None:
            lacking = "no BatchNorm takes this conv's output, and the criterion needs its scale"
            if self.norm is not None:
                lacking = f"its BatchNorm {self.norm} has no scale (affine=False), which the "
                lacking += "criterion needs"
            raise ValueError(f"{self.name}: {lacking}; use way B or leave the layer out")
        if not torch.isfinite(self.gamma).all():
            raise ValueError(f"{self.name}: BatchNorm scales hold NaN or infinite values")
        return self.gamma.abs()

    def shuffled(self) -> np.ndarray:
        """All kernels (flat indices) in random order, drawn from the layer's generator."""
        count = self.weight[:, :, 0, 0].numel()
        return torch.randperm(count, generator=self.generator).numpy()


def prune(
    model: nn.Module,
    example_inputs: Inputs | None,
    rate: float | Sequence[float] | dict[str, float] = 0.5,
    criterion: str | Callable[..., Any] = "B",
    *,
    seed: int = 0,
    floor: float | None = None,
    convs: list[Conv] | None = None,
    **options: Any,
) -> Masks:
    """Choose a network's masks, by the name of the conv: bool (F, C), True where a kernel stays.

    example_inputs: what the network is called with, a tensor, a tuple or a dict; not needed where
    `convs` holds what `find_convs` found. rate: one share for all prunable convs, a list with one
    per conv in forward order, or a dict by name. criterion: a function as this module describes, a
    registered name, or package.module:function. floor: the share of every redundant set that
    stays, by default 1 - max(rates) - 0.1. options: the criterion's own. The model is not changed;
    `holding.hold` does that. A conv's mask depends on the seed and its place only, so that leaving
    another conv out does not change it; at rate 0 it stays whole. Kernels that are zero already
    count as pruned, and first; a warning says how many.

    Raises ParamError for options that the criterion does not take, and ValueError, naming the
    layer, for weights that are not finite, and for scores and masks that cannot be.
    """
    convs = convs or _convs(model, example_inputs)
    rates = _by_name(rate, [conv.name for conv in prunable(convs)])
    entry, function = _resolved(criterion)
    known = options_of(function)
    if floor is not None or "floor" in known:
        usual = keep_floor(list(rates.values()), bool(options.get("binary_floor")))
        options["floor"] = usual if floor is None else floor
    _check_options(options, function, entry)
    if entry.whole_network:
        masks = function(model, example_inputs, convs, rates, **options)
        _tell_known(model, rates)
        known_zero = {name: _known(conv_at(model, name).weight.detach()).cpu() for name in masks}
        return check(
            model, {n: m & ~known_zero[n] for n, m in masks.items()}, f"criterion {entry.label!r}"
        )
    _tell_known(model, rates)
    masks = {}
    for index, conv in enumerate(convs):
        if conv.name in rates:
            layer = _layer(model, conv, rates[conv.name], _generator(seed, index))
            masks[conv.name] = _beyond_known(layer, function, **options)
    return masks


def score(
    model: nn.Module,
    example_inputs: Inputs | None,
    criterion: str | Callable[..., Any] = "B",
    *,
    seed: int = 0,
    convs: list[Conv] | None = None,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Scores (F, C) of every prunable conv, by its name, as a criterion orders its kernels.

    Of ways A and B that is the expectation scaling factor, from which they make levels. Arguments
    as of `prune`; the model is not changed. ParamError for a criterion that chooses masks without
    scores and for options that it does not take; ValueError, naming the layer, for weights that are
    not finite and for scores that cannot be.
    """
    convs = convs or _convs(model, example_inputs)
    entry, function = _resolved(criterion)
    if entry.score is not None:
        function = registry.load(entry.score, "criterion")
    if entry.whole_network:
        raise ParamError(f"criterion: {entry.label!r} chooses masks at once; give one with scores")
    _check_options(options, function, entry)
    scores, usable = {}, {conv.name for conv in prunable(convs)}
    for index, conv in enumerate(convs):
        if conv.name in usable:
            layer = _layer(model, conv, 0.5, _generator(seed, index))
            scores[conv.name] = _answer(layer, function, **options)
            if scores[conv.name].dtype == torch.bool:
                raise ParamError(f"criterion: {entry.label!r} chooses masks; give one with scores")
    return scores


def options_of(function: Callable[..., Any]) -> set[str]:
    """The options of a criterion: its arguments but those that every one is called with."""
    found = inspect.signature(function).parameters.values()
    return {p.name for p in found if p.kind is p.KEYWORD_ONLY or p.default is not p.empty}


def _check_options(options: Iterable[str], function: Callable, entry: registry.Criterion) -> None:
    """ParamError for an option that a criterion does not take."""
    known = options_of(function)
    for option in options:
        if option not in known:
            takes = f"it takes {', '.join(sorted(known))}" if known else "it takes none"
            raise ParamError(f"{option}: is not for criterion {entry.label!r}; {takes}")


def _convs(model: nn.Module, example_inputs: Inputs | None) -> list[Conv]:
    if example_inputs is None:
        raise ParamError("example_inputs: None; give what the network takes, or its convs")
    return find_convs(model, example_inputs)


def _generator(seed: int, index: int) -> torch.Generator:
    """Chance for the conv at this place alone."""
    return torch.Generator().manual_seed(seed * 100_003 + index)


def _resolved(criterion: str | Callable) -> tuple[registry.Criterion, Callable]:
    """What is known of a criterion, and its function."""
    if isinstance(criterion, str):
        entry = registry.criterion(criterion, "criterion")
        return entry, registry.load(entry.function, "criterion")
    if not callable(criterion):
        raise ParamError(f"criterion: {criterion!r}; give a function or a name")
    label = getattr(criterion, "__name__", type(criterion).__name__)
    return registry.Criterion(criterion, label, ""), criterion


def _by_name(rate: Any, names: list[str]) -> dict[str, float]:
    """The rate of each conv; ParamError for other convs and for what is no rate."""
    if isinstance(rate, dict):
        if unknown := sorted(set(rate) - set(names), key=str):
            near = registry.nearest(unknown[0], names)
            hint = f"did you mean {near!r}?" if near else f"prunable are {', '.join(names[:3])} ..."
            raise ParamError(
                f"rate: {unknown[0]!r} is not a prunable conv of the network (grouped and "
                f"depthwise ones stay dense); {hint}"
            )
        rates = rate
    else:
        rate = rate.tolist() if isinstance(rate, np.ndarray | np.generic | torch.Tensor) else rate
        given = list(rate) if isinstance(rate, list | tuple) else [rate]
        if len(given) not in (1, len(names)):
            raise ParamError(
                f"rate: {len(given)} for {len(names)} prunable convs; give one, or {len(names)}"
            )
        rates = dict(zip(names, given * (len(names) if len(given) == 1 else 1), strict=True))
    for name, value in rates.items():
        if not isinstance(value, Real) or not 0 <= float(value) < 1:
            raise ParamError(f"rate: {value!r} for {name}; give a number from 0 to below 1")
    return {name: float(value) for name, value in rates.items()}


def _layer(model: nn.Module, conv: Conv, rate: float, generator: torch.Generator) -> Layer:
    module = conv_at(model, conv.name)
    norm = cast(nn.BatchNorm2d, model.get_submodule(conv.norm)) if conv.norm else None
    bias, gamma = module.bias, norm.weight if norm else None
    # on the CPU, so that a network has the same masks wherever it is; copies, since a criterion may
    # compute in place
    return Layer(
        conv.name,
        module.weight.detach().cpu().clone(),
        None if bias is None else bias.detach().cpu().clone(),
        None if gamma is None else gamma.detach().cpu().clone(),
        rate,
        generator,
        conv.norm,
    )


def _known(weight: torch.Tensor) -> torch.Tensor:
    """Which kernels (F, C) of a layer are zero already; none where all are, as in a fresh one."""
    zero = ~weight.flatten(2).any(2)
    return zero & ~zero.all()


def _tell_known(model: nn.Module, rates: dict[str, float]) -> None:
    counts = [int(_known(conv_at(model, name).weight.detach()).sum()) for name in rates]
    if any(counts):
        layers = sum(count > 0 for count in counts)
        warnings.warn(
            f"prune: {sum(counts)} kernels of {layers} convs are zero already; they count as "
            "pruned, and first",
            stacklevel=3,
        )


@torch.no_grad()
def _beyond_known(layer: Layer, function: Callable[..., Any], **options: Any) -> torch.Tensor:
    """The mask (F, C) of a layer whose kernels of zeros, if any, are pruned first.

    The criterion chooses how many more the rate asks for.
    """
    zero = _known(layer.weight)
    if not zero.any():
        return mask_of(layer, function, **options)
    state: Any = None if layer.generator is None else layer.generator.get_state()
    # the largest number to ask for with which no more than the rate are zero or chosen
    mask = mask_of(replace(layer, rate=0.0), function, **options) & ~zero  # looks at the weights
    low, high = 0, layer.to_prune if int(zero.sum()) < layer.to_prune else 0
    while low < high:
        middle = (low + high + 1) // 2
        if layer.generator is not None:
            layer.generator.set_state(state)
        found = mask_of(replace(layer, rate=(middle + 0.5) / zero.numel()), function, **options)
        if int((~found | zero).sum()) <= layer.to_prune:
            mask, low = found & ~zero, middle
        else:
            high = middle - 1
    return mask


@torch.no_grad()
def mask_of(layer: Layer, function: Callable[..., Any], **options: Any) -> torch.Tensor:
    """The mask (F, C) of a layer, from the scores or the mask that a criterion returns for it."""
    mask = torch.ones(layer.weight.shape[:2], dtype=torch.bool, device=layer.weight.device)
    if not layer.rate:
        _check_finite(layer)
        return mask
    found = _answer(layer, function, **options)
    if found.dtype == torch.bool:
        if not found.any():
            raise ValueError(f"{layer.name}: the criterion prunes every kernel; keep at least one")
        return found
    order = found.flatten().cpu().argsort(stable=True)
    mask.view(-1)[order[: layer.to_prune].to(mask.device)] = False
    return mask


@torch.no_grad()
def _answer(layer: Layer, function: Callable[..., Any], **options: Any) -> torch.Tensor:
    """What a criterion returns for a layer: scores or a boolean mask (F, C), on its device."""
    _check_finite(layer)
    shape = tuple(layer.weight.shape[:2])
    found = function(layer, **options)
    found = torch.as_tensor(found) if isinstance(found, np.ndarray) else found
    if not isinstance(found, torch.Tensor) or tuple(found.shape) != shape or found.is_complex():
        what = f"a {type(found).__name__}"
        if isinstance(found, torch.Tensor):
            what = f"{found.dtype} {tuple(found.shape)}"
        raise ValueError(
            f"{layer.name}: the criterion returned {what}; give scores or a boolean mask, {shape}"
        )
    if found.isnan().any():
        raise ValueError(f"{layer.name}: the criterion's scores hold NaN; give numbers")
    return found.to(layer.weight.device)


def _check_finite(layer: Layer) -> None:
    if not torch.isfinite(layer.weight).all():
        raise ValueError(
            f"{layer.name}: weights hold NaN or infinite values; give a sound checkpoint"
        )
