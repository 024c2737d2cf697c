"""What was published: rows, accuracies, and the convention behind the published counts."""

import functools
from importlib import resources

import pandas as pd
import torch
import yaml
from torch import nn

from explib import models, registry
from explib.pruning.counting import counted, layer_table, macs, weights
from explib.pruning.layers import Conv, modes_kept
from explib.rates import number_to_prune, parse_rates


def published() -> dict[str, pd.DataFrame]:
    """Read the published figures, published.yaml of this package: `rows` and `others`, per cent."""
    text = resources.files("explib.study").joinpath("published.yaml").read_text("utf-8")
    content = yaml.safe_load(text)
    return {name: pd.DataFrame(rows) for name, rows in content.items()}


@functools.cache
def recounted() -> pd.DataFrame:
    """The published rows as `flops.published_rows` counts them, in the order of `published`."""
    return published_rows(published()["rows"].to_dict("records"))


@functools.cache
def named_rates(arch: str, compress_rate: str) -> str:
    """The published cut in per cent that belongs to a network's rates, else the rates."""
    rows = published()["rows"]
    for _, row in rows[rows["arch"] == arch].iterrows():
        if parse_rates(row["compress_rate"]) == parse_rates(compress_rate):
            return f"{row['cut_pct']:.1f}"
    return compress_rate


def published_convention(
    model: nn.Module, convs: list[Conv], rates: dict[str, float]
) -> dict[str, float]:
    """The counts behind the published figures: {"macs_m", "weights_m"}, both over 1024 squared.

    Whole filters stand for kernels: C * (F - int(rate * F)) * K * K * H * W summed over the convs,
    plus the linear layers with their biases. Published reductions set this against a dense count
    over 10**6, so that an unpruned network is credited with 4.63 %.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    heads = sum(parameter.numel() for module in linear for parameter in module.parameters())
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

    rows: those of `published`. Columns: arch, rates, published cut %, MACs dense M,
    convention M (the published count of what is left), convention cut % (mixed units, as
    published), MACs left M (all rates met, kernels), true cut %, weights left M.
    """
    table, networks = [], {}
    for row in rows:
        if row["arch"] not in networks:
            with torch.device("meta"):
                model = models.build(row["arch"])
            size = registry.network(row["arch"]).image_size
            networks[row["arch"]] = model, *counted(model, torch.zeros(1, 3, size, size))
        model, convs, dense = networks[row["arch"]]
        rates = models.rates_by_name(
            row["arch"], [conv.name for conv in convs], parse_rates(row["compress_rate"])
        )
        layers = layer_table(convs, rates=rates)
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


def by_ptflops(model: nn.Module, example: torch.Tensor) -> dict[str, int]:
    """The dense network counted by ptflops, in its MACs: {"total", "macs", "bias", "other"}.

    total = macs + bias + other. macs are the multiply-adds of convs and linear layers, the study's
    dense count; bias is one addition per output of such a layer with bias; other is BatchNorm,
    ReLU modules and pooling (functional calls are counted in part).
    """
    from ptflops import get_model_complexity_info  # brings torchvision: seconds

    def count(ignored):
        with modes_kept(model):
            total, _ = get_model_complexity_info(
                model.eval(),
                tuple(example.shape[1:]),
                as_strings=False,
                print_per_layer_stat=False,
                backend="pytorch",
                ignore_modules=ignored,
            )
        return int(total)

    total, other = count([]), count([nn.Conv2d, nn.Linear])
    dense = macs(model, example)["dense"]
    return {"total": total, "macs": dense, "bias": total - other - dense, "other": other}
