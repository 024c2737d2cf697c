"""How fast networks run: dense torch, the engine, and a physically smaller network.

`explib bench runtime` measures images per second, the median of repeated calls by turns, all in
one process on the same threads. Networks pruned at published rates have random weights: speed
depends on which kernels survive, not on their values.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._inductor import config as inductor
from torch.fx.experimental import optimization

from explib import engine, models
from explib.data import Data, data_root, eval_batches, load_data
from explib.engine import build, native
from explib.engine.fused import keep_memory
from explib.files import resolve
from explib.params import Params
from explib.pruning import counting, criteria, filters
from explib.pruning import masks as masking
from explib.pruning.checkpoints import load_network
from explib.pruning.layers import find_convs
from explib.pruning.masks import Masks
from explib.rates import parse_rates
from explib.study import published as published_figures
from explib.study.records import provenance

NETWORKS = {"resnet_56": "resnet_56-71", "vgg_16_bn": "vgg_16_bn-70"}  # labels of published rates
DENSITIES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
DENSE = ("eager fp32", "compiled fp32", "compiled bf16")
ENGINE = {
    "engine fp32": torch.float32,
    "engine bf16": torch.bfloat16,
    "engine fp16": torch.float16,
    "engine int8": torch.int8,
}
BATCHES = (128, 1)
EXAMPLE = torch.zeros(1, 3, 32, 32)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
TURN = 0.1
"""Seconds of one way's turn, at least a call."""
CALIBRATION = 256
"""Training images that int8's ranges are taken from."""
RECHECK = 0.5
"""Scores nearer than this are computed in float32, too: ten times what bf16 changes a score by."""


RECHECK_CODES = 1.5
"""The same of int8, which changes scores more."""


def margin(way: str) -> float:
    """How near two scores have to be to be computed in float32, too, by the name of the way."""
    return RECHECK_CODES if "int8" in way else RECHECK


Ways = list[tuple[Any, Callable]]
"""Names of ways to run a network, and what runs it; of several of one name the fastest counts."""


def by_turns(ways: Ways, images: torch.Tensor, seconds: float = 1.0) -> list[list[float]]:
    """Seconds of each call of each way: at least five calls, after two.

    The ways run by turns, `seconds` each in all, so that what else the machine does slows them
    alike. The process keeps the memory it frees: else torch's networks, which the engine is
    compared with, would pay for some 70,000 page faults a call, or for none, by what ran before.
    """
    keep_memory()
    times: list[list[float]] = [[] for _ in ways]
    with torch.no_grad():
        for _, forward in ways:
            forward(images), forward(images)
        until = time.perf_counter() + seconds * len(ways)
        while any(len(own) < 5 for own in times) or time.perf_counter() < until:
            for (_, forward), own in zip(ways, times, strict=True):
                began = ended = time.perf_counter()
                while ended - began < TURN:
                    started = ended
                    forward(images)
                    ended = time.perf_counter()
                    own.append(ended - started)
    return times


def images_per_s(ways: Ways, images: torch.Tensor, seconds: float = 1.0) -> dict[Any, float]:
    """Images per second of each way by name, from the median of its calls; see `by_turns`."""
    fastest: dict[Any, float] = {}
    for (name, _), own in zip(ways, by_turns(ways, images, seconds), strict=True):
        fastest[name] = max(fastest.get(name, 0.0), len(images) / statistics.median(own))
    return fastest


def compiled(
    model: nn.Module,
    images: torch.Tensor,
    dtype: torch.dtype,
    layouts: Sequence[torch.memory_format] = LAYOUTS,
) -> list[Callable]:
    """A dense network as fast as torch makes it, in each memory format.

    BatchNorm folded, weights frozen.
    """
    forwards = []
    for layout in layouts:
        folded = optimization.fuse(model).to(dtype).to(memory_format=layout)
        with inductor.patch(freezing=True), torch.no_grad():
            fast = torch.compile(folded)
            fast(images.to(dtype=dtype, memory_format=layout))  # compiled here, under the setting

        def forward(x, fast=fast, layout=layout, dtype=dtype):
            return fast(x.to(dtype=dtype, memory_format=layout))

        forwards.append(forward)
    return forwards


def dense_ways(
    model: nn.Module,
    images: torch.Tensor,
    names: Sequence[str] = DENSE,
    layouts: Sequence[torch.memory_format] = LAYOUTS,
) -> Ways:
    """A network in torch; names: of DENSE.

    Without a C++ compiler those that torch would compile are left out.
    """
    torch._dynamo.reset()  # what it compiled of other networks
    ways: Ways = [("eager fp32", model)]
    try:
        build.library()
        for name, dtype in (("compiled fp32", torch.float32), ("compiled bf16", torch.bfloat16)):
            if name in names:
                ways += [(name, forward) for forward in compiled(model, images, dtype, layouts)]
    except engine.NoCompiler:
        pass
    return [way for way in ways if way[0] in names]


def engine_ways(
    model: nn.Module,
    images: torch.Tensor,
    names: Sequence[str] = tuple(ENGINE),
    calibration: Sequence[torch.Tensor] = (),
) -> Ways:
    """A masked network in the engine, in the types this machine has; names: of ENGINE.

    calibration: of int8, batches of training images; without any, of these images themselves.
    """
    ways: Ways = []
    for name in names:
        dtype = ENGINE[name]
        given = list(calibration) or [images[:32]] if dtype == torch.int8 else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the report says it too
            fast = engine.compile(model, images[:1], dtype=dtype, calibration=given)
        wanted = str(dtype).removeprefix("torch.")
        small = dtype == torch.bfloat16 and len(images) < 10  # computed in float32
        if (fast.report["engine"], fast.report["dtype"]) == ("native", wanted) and not small:
            ways.append((name, fast))
    return ways


def calibration(data: Data) -> list[torch.Tensor]:
    """Training images for int8, as they are evaluated, in batches."""
    batches = islice(eval_batches(data.train, data, 32), CALIBRATION // 32)
    return [images.contiguous() for images, _ in batches]


def fresh(arch: str) -> nn.Module:
    """The network with fresh weights, in evaluation mode.

    With BatchNorm statistics of random images: without them values outgrow float16.
    """
    torch.manual_seed(0)
    return with_statistics(models.build(arch), torch.randn(16, 3, 32, 32))


def with_statistics(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """The model itself in evaluation mode, its BatchNorm statistics those of the images."""
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    return model.eval()


def published(arch: str, label: str = "") -> tuple[nn.Module, Masks]:
    """A fresh network masked by way B at published rates, those of NETWORKS by default."""
    rows = published_figures.published()["rows"].set_index("label")
    model = fresh(arch)
    convs = find_convs(model, EXAMPLE)
    rates = parse_rates(rows.loc[label or NETWORKS[arch], "compress_rate"])
    masks = criteria.prune(
        model, None, models.rates_by_name(arch, [c.name for c in convs], rates), "B", convs=convs
    )
    masking.apply(model, masks)
    return model, masks


def by_network(
    arch: str,
    batches: Sequence[int] = BATCHES,
    seconds: float = 1.0,
    dense: Sequence[str] = DENSE,
) -> list[dict]:
    """One row per batch size: a network at its published rates, dense and in the engine."""
    model, masks = published(arch)
    left = counting.macs(model, EXAMPLE, masks)
    rows = []
    for batch in batches:
        images = torch.randn(batch, 3, 32, 32)
        ways = dense_ways(model, images, dense) + engine_ways(model, images)
        speeds = images_per_s(ways, images, seconds)
        cut = 100 * (1 - left["left"] / left["dense"])
        rows.append({"arch": arch, "cut_pct": cut, "batch": batch, "images_per_s": speeds})
    return rows


def by_density(
    arch: str = "resnet_56",
    batch: int = 128,
    seconds: float = 1.0,
    densities: Sequence[float] = DENSITIES,
) -> list[dict]:
    """One row per density: the engine with that share of every conv's kernels but the first's."""
    images = torch.randn(batch, 3, 32, 32)
    ways = []
    for density in densities:
        model = fresh(arch)
        rates = {conv.name: 1 - density for conv in find_convs(model, EXAMPLE)[1:]}
        masking.apply(model, criteria.prune(model, EXAMPLE, rates, "random"))
        ways += [((density, name), forward) for name, forward in engine_ways(model, images)]
    speeds = images_per_s(ways, images, seconds)
    return [
        {
            "density": density,
            "images_per_s": {name: speed for (at, name), speed in speeds.items() if at == density},
        }
        for density in densities
    ]


def shipped(
    batch: int = 128,
    seconds: float = 1.0,
    dense: Sequence[str] = DENSE,
    results_dir: str | Path = "results",
    names: Sequence[str] = (),
) -> list[dict]:
    """One row per network of results_dir/checkpoints/cifar10: its top-1 in per cent, its speed.

    names: only these; without any, all. ValueError for one that is not there.

    kind: `dense`; `kernels`, run by the engine; or `filters`, pruned by whole filters, run by torch
    and by the engine as the smaller dense network that it is. Where CIFAR-10 is on disk the images
    are from its test set, channels last, so that the share of undecided ones, which `recheck`
    computes again, is a real one.
    """
    rows = []
    real = (data_root() / "cifar-10-batches-py").is_dir()
    folder = resolve(results_dir) / "checkpoints/cifar10"
    paths = {path.stem: path for path in sorted(folder.glob("*.safetensors"))}
    if unknown := set(names) - set(paths):
        raise ValueError(f"names: no network {min(unknown)!r}; known: {', '.join(paths)}")
    for path in [paths[name] for name in names or paths]:
        model, masks, meta = load_network(path)
        images, given = torch.randn(batch, 3, 32, 32), []
        if real:
            params = Params(dataset="cifar10", normalization=meta.get("normalization", ""))
            data = load_data(params)
            images, _ = next(iter(eval_batches(data.test, data, batch)))
            given = calibration(data)
        counts = counting.macs(model, EXAMPLE, masks)
        row = {"name": path.stem, "arch": meta["arch"], "top1": meta["top1"]}
        row["cut_pct"] = 100 * (1 - counts["left"] / counts["dense"])
        whole = filters.whole_filters(masks)
        row["kind"] = "filters" if whole else "kernels" if masks else "dense"
        network = filters.narrowed(model, masks, EXAMPLE) if whole else model
        ways = engine_ways(network, images, calibration=given)
        for name in [name for name, _ in ways if real and name != "engine fp32"]:
            codes = given if ENGINE[name] == torch.int8 else None
            fast = engine.compile(
                network, images[:1], dtype=ENGINE[name], calibration=codes, recheck=margin(name)
            )
            ways.append((f"{name}, rechecked", fast))
        if row["kind"] != "kernels":
            ways += dense_ways(network, images, dense)
        rows.append(row | {"images_per_s": images_per_s(ways, images, seconds)})
    return rows


def crossover(rows: list[dict], engine: str, dense: float) -> float | None:
    """The density at which the engine is as fast as `dense` images per second, or None.

    rows: of `by_density`; interpolated in seconds per image, which are about linear in density.
    """
    points = [(row["density"], 1 / row["images_per_s"][engine]) for row in rows]
    for (d0, t0), (d1, t1) in pairwise(points):
        if t0 <= 1 / dense <= t1:
            return d0 + (d1 - d0) * (1 / dense - t0) / (t1 - t0)
    return None


def measure(
    archs: Sequence[str] = tuple(NETWORKS), threads: int = 0, results_dir: str | Path = "results"
) -> dict:
    """The whole record, on so many threads (0: as many as torch takes).

    results_dir: where the shipped networks are.
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    networks = [row for arch in archs for row in by_network(arch)]
    amx = native.multiplies_matrices()
    return {
        "networks": networks,
        "density": by_density(),
        "shipped": shipped(results_dir=results_dir),
        "engine": engine.compile(fresh("resnet_56"), EXAMPLE).report,
        "dense_bf16": "AMX" if amx else torch.backends.cpu.get_cpu_capability(),
        "provenance": provenance(),
    }
