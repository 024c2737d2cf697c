"""Masks on a model: put on, held through training, saved, and the pruned network made small.

A set of masks is a dict from the name of a conv to a bool (F, C) tensor, True where a kernel stays.
"""

from collections.abc import Callable

import torch
from torch import nn

Masks = dict[str, torch.Tensor]


def check(model: nn.Module, masks: Masks, source: str = "masks") -> None:
    """ValueError, naming the layer, unless each mask is a bool (F, C) of a conv of the model."""
    modules = dict(model.named_modules())
    for name, mask in masks.items():
        conv = modules.get(name)
        if not isinstance(conv, nn.Conv2d):
            raise ValueError(f"{source}: {name!r} is no conv of this network; use its own masks")
        shape = tuple(conv.weight.shape[:2])
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise ValueError(
                f"{source}: {name} has a {mask.dtype} mask {tuple(mask.shape)}; give bool {shape}"
            )
        if not mask.any():
            raise ValueError(f"{source}: {name} would lose every kernel; keep at least one")


@torch.no_grad()
def apply(model: nn.Module, masks: Masks, factor: float = 0.0) -> None:
    """Set the pruned kernels of the model to `factor` times their value, in place."""
    check(model, masks)
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        pruned = ~mask.to(weight.device)[:, :, None, None]
        # where, not a product: 0 * NaN would stay NaN
        scaled = weight * factor if factor else torch.zeros((), device=weight.device)
        weight.copy_(torch.where(pruned, scaled, weight))


def hold(
    model: nn.Module, masks: Masks, optimizer: torch.optim.Optimizer | None = None
) -> Callable[[], None]:
    """Zero the pruned kernels and keep them zero in any training loop; returns what undoes it.

    Gradients of pruned kernels become exact zeros: before each step of the optimizer where it is
    given, in one operation for all layers, else as soon as they are there. From weight 0, momentum
    0 and gradient 0, no optimizer (weight decay included) makes anything else. Put masks on before
    the optimizer has momentum, or clear it. ValueError, naming the layer, for a weight that is
    computed from other parameters (weight_norm): what is trained would not be what is held.
    """
    check(model, masks)
    trained = {name: model.get_submodule(name).weight for name in masks}
    if computed := [name for name, weight in trained.items() if not weight.is_leaf]:
        raise ValueError(
            f"masks: {computed[0]}'s weight is computed from other parameters, as by weight_norm; "
            "remove that first (torch.nn.utils.parametrize.remove_parametrizations)"
        )
    apply(model, masks)
    trained = {name: weight for name, weight in trained.items() if weight.requires_grad}
    weights = list(trained.values())  # frozen ones stay as they are
    wide = [  # of the weight's own shape and layout, as the fused multiplication on a GPU wants it
        torch.ones_like(weight, requires_grad=False)
        * masks[name].to(weight.device)[:, :, None, None]
        for name, weight in trained.items()
    ]

    def mask_all(*_):
        pairs = [(w.grad, m) for w, m in zip(weights, wide, strict=True) if w.grad is not None]
        if pairs:
            torch._foreach_mul_(*map(list, zip(*pairs, strict=True)))

    if optimizer is not None:
        return optimizer.register_step_pre_hook(mask_all).remove

    hooks = []
    for weight, mask in zip(weights, wide, strict=True):

        def mask_one(parameter, mask=mask):
            parameter.grad.mul_(mask)

        hooks.append(weight.register_post_accumulate_grad_hook(mask_one))

    def release():
        for hook in hooks:
            hook.remove()

    return release


def held(model: nn.Module, masks: Masks) -> bool:
    """Whether every pruned kernel of the model is exactly zero."""
    return not any(
        model.get_submodule(name)
        .weight.detach()[~mask.to(model.get_submodule(name).weight.device)]
        .any()
        for name, mask in masks.items()
    )


def sparsity(masks: Masks) -> float:
    """Share of kernels pruned, over all the masks."""
    total = sum(mask.numel() for mask in masks.values())
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / total if total else 0.0
