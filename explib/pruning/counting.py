"""Multiply-adds (MACs) and weights: dense, left after masks, and by the published convention.

MACs here are those of convs and linear layers, without biases: the work that pruning can remove.
ptflops counts the same network with biases, BatchNorm, activations and pooling on top; see
`by_ptflops`.
"""

import torch
from torch import nn

from explib.pruning.layers import Conv, blank, modes_kept
from explib.pruning.masks import Masks
from explib.rates import number_to_prune


def layer_table(
    convs: list[Conv], masks: Masks | None = None, rates: dict[str, float] | None = None
) -> list[dict]:
    """One row per conv: sizes, rate, kernels, nominal and pruned kernels, MACs dense and left."""
    rows = []
    for conv in convs:
        mask = (masks or {}).get(conv.name)
        rate = (rates or {}).get(conv.name, 0.0)
        left = conv.kernels if mask is None else int(mask.sum())
        rows.append(
            {
                "name": conv.name,
                "filters": conv.filters,
                "channels": conv.channels,
                "kernel": list(conv.kernel),
                "out_h": conv.out_h,
                "out_w": conv.out_w,
                "kernels": conv.kernels,
                "rate": rate,
                "nominal": number_to_prune(rate, conv.kernels),
                "pruned": conv.kernels - left,
                "macs_dense": conv.kernels * conv.kernel_macs,
                "macs": left * conv.kernel_macs,
            }
        )
    return rows


def linear_macs(model: nn.Module, image_size: int = 32) -> int:
    """MACs of all linear layers for one image."""
    total, hooks = [], []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            hook = module.register_forward_hook(
                lambda m, _, output: total.append(m.in_features * output.numel())
            )
            hooks.append(hook)
    try:
        with modes_kept(model), torch.no_grad():
            model.eval()(blank(model, image_size))
    finally:
        for hook in hooks:
            hook.remove()
    return sum(total)


def macs(
    model: nn.Module, convs: list[Conv], masks: Masks | None = None, image_size: int = 32
) -> dict[str, int]:
    """MACs of one image: {"dense": int, "left": int}, convs and linear layers, from the masks."""
    table, linear = layer_table(convs, masks), linear_macs(model, image_size)
    return {
        "dense": sum(row["macs_dense"] for row in table) + linear,
        "left": sum(row["macs"] for row in table) + linear,
    }


def weights(model: nn.Module, masks: Masks | None = None) -> dict[str, int]:
    """Trainable numbers: {"dense": all of them, "left": without the pruned kernels' elements}."""
    dense = sum(parameter.numel() for parameter in model.parameters())
    pruned = sum(
        int((~mask).sum()) * model.get_submodule(name).weight[0, 0].numel()
        for name, mask in (masks or {}).items()
    )
    return {"dense": dense, "left": dense - pruned}
