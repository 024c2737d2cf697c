"""What a run starts from: the dense network of a configuration, its masks, and what they leave."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from explib import models, registry
from explib.data import eval_batches, example_of, load_data, size_of
from explib.errors import ParamError
from explib.files import resolve
from explib.params import Params
from explib.pruning import checkpoints, counting, criteria
from explib.pruning import layers as layer_finding
from explib.pruning import masks as masking
from explib.pruning import scores as scoring
from explib.pruning.layers import Conv, conv_at
from explib.pruning.masks import Masks
from explib.rates import keep_floor
from explib.registry import file_name
from explib.study import published as published_figures


@dataclass(frozen=True)
class Dense:
    """A dense network with what a run needs to know of it."""

    model: nn.Module
    convs: list[Conv]  # in forward order
    rates: dict[str, float]  # nominal, by conv, in the order of compress_rate
    checkpoint: str = ""  # the file it came from, as named in the record
    sha256: str = ""


def seed_all(params: Params) -> None:
    """Seed initialisation, and set the number of CPU threads."""
    torch.manual_seed(params.seed)
    if params.threads:
        torch.set_num_threads(params.threads)


def fresh(params: Params) -> Dense:
    """The network of a configuration with seeded fresh weights, its rates checked against it."""
    seed_all(params)
    model = models.build(params.arch, size_of(params)[0])
    try:
        convs = layer_finding.find_convs(model, example_of(params))
    except ValueError as error:
        known = registry.NETWORKS.get(params.arch)
        raise ParamError(
            f"{'image_size' if params.dataset == 'imagenet' else 'arch'}: {params.arch} does not "
            f"run on images {size_of(params)[1]} of {registry.dataset(params.dataset).label} "
            f"({' '.join(str(error.__cause__ or error).split())})"
            + (f"; its usual ones have {known.image_size} pixels a side" if known else "")
        ) from None
    usable = [conv.name for conv in layer_finding.prunable(convs)]
    rates = models.rates_by_name(params.arch, usable, params.rates)
    if params.start_cov >= len(convs):
        raise ParamError(f"start_cov: {params.start_cov} of {len(convs)} convs; give a lower index")
    names = [conv.name for conv in convs][params.start_cov :]
    return Dense(model, convs, {n: r for n, r in rates.items() if n in names})


def dense_path(params: Params) -> Path:
    """The checkpoint of the dense network: `resume`, else the one that 00_baseline writes."""
    if params.resume:
        return resolve(params.resume)
    name = f"{file_name(params.arch)}.safetensors"
    return resolve(params.results_dir) / f"checkpoints/{file_name(params.dataset)}/{name}"


def load_dense(params: Params) -> Dense:
    """The dense network to prune, from `dense_path`: a file of ours or a foreign torch checkpoint.

    One line of FileNotFoundError or ValueError where it is missing, damaged, of another network or
    trained with another normalization of its inputs.
    """
    network, path = fresh(params), dense_path(params)
    if not params.resume_mask:
        _criterion(params)  # if it cannot be imported, that is to be known before any long work
    if not path.is_file():
        raise FileNotFoundError(
            f"resume: {path} is not there; run notebooks/00_baseline.ipynb or `explib "
            f"baseline` with dataset {params.dataset!r} and arch {params.arch!r}, or set resume to "
            "a checkpoint"
        )
    try:
        state, meta = checkpoints.load_state(path)
    except ValueError as error:
        raise ValueError(f"resume: {error}") from None
    if meta.get("arch", params.arch) != params.arch:
        raise ValueError(f"resume: {path} is a {meta['arch']}, not a {params.arch}")
    if meta.get("normalization", params.normalization) != params.normalization:
        raise ParamError(
            f"normalization: {params.normalization!r}, but {path.name} was trained with "
            f"{meta['normalization']!r}; set that"
        )
    checkpoints.load_weights(network.model, state, f"resume: {path.name}")
    return Dense(network.model, network.convs, network.rates, path.name, checkpoints.origin(path))


def _criterion(params: Params) -> Callable:
    """The function that chooses the masks of a configuration."""
    return registry.load(registry.criterion(params.pruning_way).function, "pruning_way")


def choose_masks(params: Params, dense: Dense, names: list[str] | None = None) -> Masks:
    """The masks of a configuration (or of some of its convs) from the model's present weights.

    With `resume_mask` they come from that file instead.
    """
    wanted = {n: dense.rates[n] for n in (dense.rates if names is None else names)}
    if params.resume_mask:
        found, _ = checkpoints.load_masks(resolve(params.resume_mask))
        masking.check(dense.model, found, f"resume_mask: {params.resume_mask}")
        missing = [name for name in wanted if name not in found]
        if missing:
            raise ValueError(f"resume_mask: {params.resume_mask} lacks a mask of {missing[0]}")
        return {name: found[name] for name in wanted}
    usual = keep_floor(params.rates, params.binary_floor)
    floor = usual if params.keep_floor is None else params.keep_floor
    options: dict[str, Any] = {
        "floor": floor,
        "bias_in_score": params.bias_in_score,
        "survivors": params.survivors,
        "groups": params.groups,
        "strict_rate": params.strict_rate,
        "binary_floor": params.binary_floor,
    }
    known = criteria.options_of(_criterion(params))
    if "batches" in known:
        options["batches"] = _calibration(params)
    return criteria.prune(
        dense.model,
        example_of(params),
        wanted,
        params.pruning_way,
        seed=params.mask_seed or 0,
        convs=dense.convs,
        **{name: value for name, value in options.items() if name in known},
    )


def _calibration(params: Params, images: int = 1024) -> Iterator:
    """The first training images, for criteria that look at the loss: 128 at a time."""
    data = load_data(params)
    return eval_batches(data.train.first(images), data, 128)


def scores(params: Params, dense: Dense) -> dict[str, torch.Tensor]:
    """The expectation scaling factors (F, C) of the convs that the configuration prunes."""
    modules = {name: conv_at(dense.model, name) for name in dense.rates}
    return {
        name: scoring.delta_e(module.weight, module.bias if params.bias_in_score else None, name)
        for name, module in modules.items()
    }


def score_table(params: Params, dense: Dense) -> list[dict]:
    """A row for each conv: those of `explib.pruning.scores.redundancy`, with the ranges.

    delta_e_min, delta_e_max, level_min, level_max: of its expectation scaling factors and levels.
    """
    found = scores(params, dense)
    rows = scoring.redundancy(found, params.groups)
    for row, delta in zip(rows, found.values(), strict=True):
        levels = scoring.levels(delta, params.groups)
        row |= {
            "delta_e_min": float(delta.min()),
            "delta_e_max": float(delta.max()),
            "level_min": int(levels.min()),
            "level_max": int(levels.max()),
        }
    return rows


def save_masks(params: Params, masks: Masks) -> Path:
    """Write masks where `finetune` leaves those of the same configuration.

    Those of a finished run stay: conv by conv they come from weights that are no more.
    """
    path = resolve(params.job_dir) / "masks.safetensors"
    if path.is_file() and path.with_name("record.json").is_file():
        return path
    return checkpoints.save_masks(path, masks, {"arch": params.arch, "name": params.name})


def counts(params: Params, dense: Dense, masks: Masks) -> dict:
    """What masks leave of a network, as a record says it: layers, MACs, weights, sparsity."""
    layers = counting.layer_table(dense.convs, masks, dense.rates)
    published = published_figures.published_convention(dense.model, dense.convs, dense.rates)
    kernels = sum(row["kernels"] for row in layers)
    return {
        "layers": layers,
        "macs": counting.macs(dense.model, example_of(params), masks)
        | {"published_m": published["macs_m"]},
        "weights": counting.weights(dense.model, masks),
        "sparsity": sum(row["pruned"] for row in layers) / kernels,
        "nominal_sparsity": sum(row["nominal"] for row in layers) / kernels,
    }
