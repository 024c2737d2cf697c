"""Masks of a network: checked against it, put on, found in it.

A set of masks is a dict from the name of a conv to a bool (F, C) tensor, True where a kernel stays;
functions take numpy arrays as well. `explib.pruning.holding` keeps them through training.
"""

import copy
import warnings
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from explib.pruning.layers import check_network, conv_at, described

Masks = dict[str, torch.Tensor]


def check_mapping(masks: Any, source: str = "masks") -> None:
    """ValueError for masks that have no names."""
    if not isinstance(masks, Mapping):
        raise ValueError(
            f"{source}: a {described(masks)}; give {{name: bool (F, C)}}, {{}} for none"
        )


def check(model: nn.Module, masks: Masks, source: str = "masks") -> Masks:
    """Return masks as tensors; ValueError, naming the layer, unless they fit the model.

    Each must be a bool (F, C) of a Conv2d whose weight is a parameter and is what is convolved, and
    leave at least one kernel. Convs that share a weight need one mask, under either name, which is
    returned once.
    """
    check_network(model, "its masks")
    check_mapping(masks, source)
    modules = dict(model.named_modules(remove_duplicate=False))
    fitting: Masks = {}
    first: dict[int, str] = {}  # id of a weight -> name of the mask
    for name, given in masks.items():
        mask = as_tensor(given)
        conv = modules.get(name)
        if not isinstance(conv, nn.Conv2d):
            hint = _renamed(name, modules)
            raise ValueError(f"{source}: {name!r} is no conv of this network; {hint}")
        shape = tuple(conv.weight.shape[:2])
        if not isinstance(mask, torch.Tensor):
            raise ValueError(f"{source}: {name} has a {type(mask).__name__}; give bool {shape}")
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise ValueError(
                f"{source}: {name} has a {mask.dtype} mask {tuple(mask.shape)}; give bool {shape}"
            )
        if not mask.any():
            raise ValueError(f"{source}: {name} would lose every kernel; keep at least one")
        if problem := _computed(conv, mask):
            raise ValueError(f"{source}: {name}{problem}")
        other = first.setdefault(id(conv._parameters.get("weight", conv)), name)
        if other == name:
            fitting[name] = mask
        elif not torch.equal(mask, fitting[other].to(mask.device)):
            raise ValueError(f"{source}: {name} has the weight of {other}; give one mask for both")
    return fitting


def as_tensor(mask) -> torch.Tensor:
    """A numpy mask as a tensor; anything else as it is."""
    return torch.from_numpy(mask.copy()) if isinstance(mask, np.ndarray) else mask


def _renamed(name: str, modules: dict[str, nn.Module]) -> str:
    """What to do about a name that is no conv's."""
    convs = [known for known, module in modules.items() if isinstance(module, nn.Conv2d)]
    alike = [c for c in convs if f".{c}".endswith(f".{name}") or f".{name}".endswith(f".{c}")]
    return f"here it is {alike[0]!r}" if alike else "use its own masks"


def _computed(conv: nn.Conv2d, mask: torch.Tensor) -> str:
    """Why zeros in a conv's weight are no zeros in what it convolves; "" where they are."""
    if conv._parameters.get("weight") is None:
        if _pruned_by_torch(conv):
            return ""
        return (
            "'s weight is computed from other parameters, as by weight_norm or spectral_norm; "
            "remove that first (torch.nn.utils.parametrize.remove_parametrizations, "
            "remove_weight_norm or remove_spectral_norm)"
        )
    kind = type(conv)
    own = "forward" in vars(conv) or "_conv_forward" in vars(conv)
    if not own and (kind.forward, kind._conv_forward) == _PLAIN:
        return ""
    try:
        if _stays_zero(conv, mask):
            return ""
        why = "convolves something else than its weight, in which pruned kernels are not zero"
    except Exception as error:
        why = f"cannot be run by itself to see what it convolves ({' '.join(str(error).split())})"
    return f", a {kind.__name__}, {why}; leave it out, or make it a plain Conv2d"


_PLAIN = (nn.Conv2d.forward, nn.Conv2d._conv_forward)


@torch.no_grad()
def _stays_zero(conv: nn.Conv2d, mask: torch.Tensor) -> bool:
    """Whether no output reads an input through a pruned kernel, in a copy of a conv.

    One image for each input channel of a filter, in which only that channel is not zero, beside an
    image of zeros: where they differ in an output, the kernel between the two is at work.
    """
    twin = copy.deepcopy(conv).eval()
    twin.weight.masked_fill_(~mask.to(twin.weight.device)[:, :, None, None], 0)
    size = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    each = conv.in_channels // conv.groups
    images = twin.weight.new_zeros(each + 1, conv.in_channels, *size)
    for channel in range(each):
        images[channel, channel::each] = 1 + torch.rand(size).to(images)
    out = twin(images)
    works = (out[:-1] != out[-1:]).flatten(2).any(2).T  # (F, C)
    return not bool((works & ~mask.to(works.device)).any())


def _pruned_by_torch(conv: nn.Module) -> bool:
    """Whether a hook of torch.nn.utils.prune makes the conv's weight."""
    return any(
        isinstance(hook, torch_prune.BasePruningMethod) and hook._tensor_name == "weight"
        for hook in conv._forward_pre_hooks.values()
    )


def take_over(model: nn.Module, masks: Masks) -> dict[str, torch.Tensor]:
    """Make weights that torch.nn.utils.prune computes parameters again, with its zeros in them.

    Returns its masks, by element (F, C, K, K), by the name of the conv; a warning says so.
    """
    found = {name: conv_at(model, name) for name in masks}
    found = {name: conv for name, conv in found.items() if _pruned_by_torch(conv)}
    elements = {name: cast(torch.Tensor, conv.weight_mask).bool() for name, conv in found.items()}
    for conv in found.values():
        torch_prune.remove(conv, "weight")
    if found:
        names = ", ".join(list(found)[:3]) + (", ..." if len(found) > 3 else "")
        warnings.warn(
            f"masks: torch.nn.utils.prune's hooks on {names} are removed; its zeros stay in the "
            "weights",
            stacklevel=3,
        )
    return elements


@torch.no_grad()
def apply(model: nn.Module, masks: Masks, factor: float = 0.0) -> None:
    """Set the pruned kernels of the model to `factor` times their value, in place.

    Training may bring them back; see `hold`.
    """
    masks = check(model, masks)
    take_over(model, masks)
    for name, mask in masks.items():
        weight = conv_at(model, name).weight
        pruned = ~mask.to(weight.device)[:, :, None, None]
        # where, not a product: 0 * NaN would stay NaN
        scaled = weight * factor if factor else torch.zeros((), device=weight.device)
        weight.copy_(torch.where(pruned, scaled, weight))


def held(model: nn.Module, masks: Masks) -> bool:
    """Whether every pruned kernel of the model is exactly zero."""
    return not leaks(model, masks)


def leaks(model: nn.Module, masks: Masks) -> dict[str, int]:
    """How many pruned kernels of each conv are not zero, of those where some are not."""
    found = {}
    for name, mask in check(model, masks).items():
        weight = conv_at(model, name).weight.detach()
        found[name] = int(weight[~mask.to(weight.device)].flatten(1).any(1).sum())
    return {name: count for name, count in found.items() if count}


def sparsity(masks: Masks) -> float:
    """Share of kernels pruned, over all the masks."""
    check_mapping(masks)
    tensors = [as_tensor(mask) for mask in masks.values()]
    total = sum(mask.numel() for mask in tensors)
    return 1 - sum(int(mask.sum()) for mask in tensors) / total if total else 0.0


def masks_of(model: nn.Module) -> Masks:
    """The masks that a network has already: of its convs with kernels of zeros, where those are.

    Left out are convs without such kernels, those with no other kernels, and of convs that share a
    weight all but the first.
    """
    masks, seen = {}, set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) or module.weight.is_meta:
            continue
        alive = module.weight.detach().flatten(2).any(2)
        if id(module.weight) not in seen and alive.any() and not alive.all():
            masks[name] = alive
        seen.add(id(module.weight))
    return masks


def spread(model: nn.Module, masks: Masks) -> Masks:
    """Masks under the names of all the convs that have their weights."""
    modules = dict(model.named_modules(remove_duplicate=False))
    by_weight = {id(modules[name]._parameters.get("weight")): mask for name, mask in masks.items()}
    return masks | {
        name: by_weight[id(module._parameters["weight"])]
        for name, module in modules.items()
        if isinstance(module, nn.Conv2d) and id(module._parameters.get("weight")) in by_weight
    }
