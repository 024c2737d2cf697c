"""Multiply-adds (MACs) and weights: dense, left after masks, and by the published convention.

MACs here are those of convs and linear layers, without biases: the work that pruning can remove.
ptflops counts the same network with biases, BatchNorm, activations and pooling on top; see
`by_ptflops`.
"""

import pandas as pd
import torch
from ptflops import get_model_complexity_info
from torch import nn

from explib import models
from explib.masks import Masks
from explib.models import Conv, blank, find_convs, modes_kept
from explib.params import parse_rates
from explib.pruners import number_to_prune


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


def published_convention(
    model: nn.Module, convs: list[Conv], rates: dict[str, float]
) -> dict[str, float]:
    """The counts behind the published figures: {"macs_m", "weights_m"}, both over 1024 squared.

    Whole filters stand for kernels: C * (F - int(rate * F)) * K * K * H * W summed over the convs,
    plus the linear layers with their biases. Published reductions set this against a dense count
    over 10**6, so that an unpruned network is credited with 4.63 %.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    heads = sum(module.weight.numel() + module.bias.numel() for module in linear)
    count, size = heads, heads
    for conv in convs:
        filters = conv.filters - number_to_prune(rates.get(conv.name, 0.0), conv.filters)
        area = conv.kernel[0] * conv.kernel[1]
        count += filters * conv.channels * conv.kernel_macs
        size += filters * conv.channels * area
        if model.get_submodule(conv.name).bias is not None:
            size += filters
    return {"macs_m": count / 1024**2, "weights_m": size / 1024**2}


def published_rows(rows: list[dict]) -> pd.DataFrame:
    """The published configurations counted both ways, next to what was published.

    rows: those of params/published.yaml. Columns: arch, rates, published cut %, MACs dense M,
    convention M (the published count of what is left), convention cut % (mixed units, as
    published), MACs left M (all rates met, kernels), true cut %, weights left M.
    """
    table, networks = [], {}
    for row in rows:
        if row["arch"] not in networks:
            with torch.device("meta"):
                model = models.build(row["arch"])
            size = models.ARCHS[row["arch"]].image_size
            networks[row["arch"]] = model, models.find_convs(model, size), linear_macs(model, size)
        model, convs, linear = networks[row["arch"]]
        rates = models.rates_by_name(row["arch"], convs, parse_rates(row["compress_rate"]))
        layers = layer_table(convs, rates=rates)
        dense = sum(layer["macs_dense"] for layer in layers) + linear
        pruned = sum(
            layer["nominal"] * conv.kernel_macs for layer, conv in zip(layers, convs, strict=True)
        )
        elements = sum(
            layer["nominal"] * conv.kernel[0] * conv.kernel[1]
            for layer, conv in zip(layers, convs, strict=True)
        )
        convention = published_convention(model, convs, rates)["macs_m"]
        table.append(
            {
                "arch": row["arch"],
                "rates": row["compress_rate"],
                "published cut %": row["cut_pct"],
                "MACs dense M": dense / 1e6,
                "convention M": convention,
                "convention cut %": 100 * (1 - convention / (dense / 1e6)),
                "MACs left M": (dense - pruned) / 1e6,
                "true cut %": 100 * pruned / dense,
                "weights left M": (weights(model)["dense"] - elements) / 1e6,
            }
        )
    return pd.DataFrame(table)


def by_ptflops(model: nn.Module, image_size: int = 32) -> dict[str, int]:
    """The dense network counted by ptflops, in its MACs: {"total", "macs", "bias", "other"}.

    total = macs + bias + other. macs are the multiply-adds of convs and linear layers, the study's
    dense count; bias is one addition per output of such a layer with bias; other is BatchNorm,
    ReLU modules and pooling (functional calls are counted in part).
    """

    def count(ignored):
        with modes_kept(model):
            total, _ = get_model_complexity_info(
                model.eval(),
                tuple(blank(model, image_size).shape[1:]),
                as_strings=False,
                print_per_layer_stat=False,
                backend="pytorch",
                ignore_modules=ignored,
            )
        return int(total)

    total, other = count([]), count([nn.Conv2d, nn.Linear])
    dense = macs(model, find_convs(model, image_size), image_size=image_size)["dense"]
    return {"total": total, "macs": dense, "bias": total - other - dense, "other": other}
