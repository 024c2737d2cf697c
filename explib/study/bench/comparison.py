"""Pruned networks in the engine beside what a user would run instead: `explib bench inference`.

For every network and batch all ways run by turns, in one process, on the same threads: the engine
over the surviving kernels; the dense network in torch.compile, OpenVINO and ONNX Runtime; and the
network that is left of it without whole filters, at as many multiply-adds, in OpenVINO.
"""

import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from explib import engine
from explib.data import Data, eval_batches
from explib.files import resolve
from explib.pruning import counting
from explib.pruning import masks as masking
from explib.study.bench import inference, peers
from explib.study.bench.cases import CASES, Network, at_density, load
from explib.study.records import machine, provenance, write_bench

DENSITIES = (0.2, 0.3, 0.5, 0.7, 1.0)
WAYS = (
    *inference.ENGINE,
    "compiled fp32",
    "compiled bf16",
    "openvino fp32",
    "openvino bf16",
    "openvino int8",
    "onnxruntime fp32",
    "filters openvino fp32",
    "filters openvino bf16",
    "filters openvino int8",
)
USUAL = tuple(way for way in WAYS if way != "compiled bf16")
"""Ways timed unless others are named: torch takes long to compile a network for every batch."""
DENSE_FP32 = ("compiled fp32", "openvino fp32", "onnxruntime fp32")


class Peers:
    """A network in OpenVINO and ONNX Runtime: its ONNX files, in a folder, and what runs them."""

    def __init__(self, network: Network, folder: str | Path, names: Sequence[str]):
        """Write the files that the ways called `names` need; without the packages, none."""
        self.files: dict[str, Path] = {}
        self.names = [name for name in names if "openvino" in name or "onnxruntime" in name]
        if missing := peers.lacking():
            why = f'not installed: {", ".join(missing)}; pip install "explib[peers]"'
            network.lacking |= {name: why for name in self.names}
            self.names = []
        if network.small is None:
            self.names = [name for name in self.names if not name.startswith("filters")]
        for name in [n for n in self.names if n.endswith("bf16")]:
            if not peers.openvino_computes("bf16"):
                network.lacking[name] = "OpenVINO does not compute in bf16 on this processor"
                self.names.remove(name)
        shapes = {"filters": network.small, "dense": network.dense}
        for shape, model in shapes.items():
            wanted = any((shape == "filters") == n.startswith("filters") for n in self.names)
            if wanted and model is not None:
                path = Path(folder) / f"{shape}.onnx"
                self.files[shape] = peers.exported(model, network.images, path)
        for name, shape in (("openvino int8", "dense"), ("filters openvino int8", "filters")):
            if name in self.names:
                given = network.calibration
                self.files[name] = peers.quantized(self.files[shape], given)

    def ways(self, images: torch.Tensor) -> list[tuple[str, Callable]]:
        """Each way by its name, ready for these images."""
        made: list[tuple[str, Callable]] = []
        for name in self.names:
            *_, program, precision = name.split()
            file = self.files["filters" if name.startswith("filters") else "dense"]
            file = self.files.get(name, file)  # int8 has a file of its own
            threads = torch.get_num_threads()
            if program == "openvino":
                shape = tuple(images.shape)
                made.append((name, peers.in_openvino(file, shape, precision, threads)))
            else:
                made.append((name, peers.in_onnxruntime(file, threads)))
        return made

    def top1(self, name: str, data: Data, batches: int | None = None) -> float:
        """Top-1 in per cent of a way in int8 on the test images, of so many batches of 250."""
        right = total = 0
        forward, shape = None, None
        for images, labels in islice(eval_batches(data.test, data, 250), batches):
            if images.shape != shape:
                shape = images.shape
                forward = peers.in_openvino(
                    self.files[name], tuple(shape), "int8", torch.get_num_threads()
                )
            assert forward is not None
            right += int((forward(images).argmax(1) == labels).sum())
            total += len(labels)
        return 100 * right / total


def _top1(network: Network, batches: int | None) -> float:
    """Top-1 in per cent of the pruned network in the engine in int8, of so many batches of 250."""
    fast = engine.compile(
        network.pruned, network.images[:1], dtype=torch.int8, calibration=network.calibration
    )
    assert network.data is not None
    found = [
        fast(images).argmax(1) == labels
        for images, labels in islice(eval_batches(network.data.test, network.data, 250), batches)
    ]
    return 100 * float(torch.cat(found).double().mean())


def off(forward: Callable, model: nn.Module, images: torch.Tensor) -> float:
    """The largest difference from the model's own answers to four images, over their largest."""
    with torch.no_grad():
        exact = model(images[:4])
        return float((forward(images)[:4] - exact).abs().max() / exact.abs().max())


def compare(
    network: Network,
    batch: int,
    seconds: float,
    names: Sequence[str],
    others: Peers,
    densities: Sequence[float] = (),
) -> tuple[dict, list[dict]]:
    """One batch: speeds by way, and rows of the engine in fp32 at other densities.

    RuntimeError, naming the way, where one in fp32 answers differently from torch.
    """
    images = network.images[:batch].contiguous()
    types = [name for name in names if name in inference.ENGINE]
    ways = inference.engine_ways(network.pruned, images, types, network.calibration)
    compiled: list[tuple[str, Any]] = list(ways)
    fallbacks = {name: len(fast.report["fallbacks"]) for name, fast in compiled}
    torch_ways = [n for n in names if n in inference.DENSE]
    ways += inference.dense_ways(network.dense, images, torch_ways, [torch.channels_last])
    ways += others.ways(images)
    differ = {}
    for name, forward in ways:
        own = network.pruned if name in inference.ENGINE else network.dense
        own = network.small if name.startswith("filters") and network.small else own
        differ[name] = off(forward, own, images)
        if name.endswith("fp32") and not differ[name] < 1e-3:
            raise RuntimeError(f"{name}: answers differ from torch's by {differ[name]:.2g}")
    row = {"batch": batch, **_figures(ways, images, seconds), "off": differ}
    row["fallbacks"] = fallbacks
    sweep: list[dict] = []
    dense = {n: s for n, s in row["images_per_s"].items() if n in DENSE_FP32}
    if densities and dense and "engine fp32" in row["images_per_s"]:
        best = max(dense, key=lambda name: dense[name])
        sweep = _sweep(network, images, seconds, densities, (best, dict(ways)[best]))
    return row, sweep


def _figures(ways: inference.Ways, images: torch.Tensor, seconds: float) -> dict:
    """Images/s from the median call, the spread of calls (IQR in per cent of it), their number."""
    names = [name for name, _ in ways]
    times = dict(zip(names, inference.by_turns(ways, images, seconds), strict=True))
    figures: dict[str, dict] = {"images_per_s": {}, "spread_pct": {}, "calls": {}}
    for name, own in times.items():
        low, middle, high = statistics.quantiles(own, n=4, method="inclusive")
        figures["images_per_s"][name] = len(images) / middle
        figures["spread_pct"][name] = 100 * (high - low) / middle
        figures["calls"][name] = len(own)
    return figures


def _sweep(
    network: Network,
    images: torch.Tensor,
    seconds: float,
    densities: Sequence[float],
    best: tuple[str, Callable],
) -> list[dict]:
    """The engine in fp32 at each density, by turns with the best dense way in fp32."""
    ways: inference.Ways = [best]
    for density in densities:
        model, _ = at_density(network.dense, images[:1], density)
        found = dict(inference.engine_ways(model, images, ["engine fp32"]))
        ways.append((density, found["engine fp32"]))
    found = _figures(ways, images, seconds)["images_per_s"]
    dense = {"against": best[0], "against_images_per_s": found[best[0]]}
    return [
        {"batch": len(images), "density": d, "images_per_s": {"engine fp32": found[d]}, **dense}
        for d in densities
    ]


def measure(
    archs: Sequence[str] = tuple(CASES),
    *,
    threads: int = 0,
    seconds: float = 0.5,
    names: Sequence[str] = USUAL,
    densities: Sequence[float] = (),
    quick: bool = False,
    again: bool = False,
    results_dir: str | Path = "results",
) -> Iterator[dict]:
    """Yield a row for each network and batch; the record, results_dir/bench/inference-MACHINE.json,
    is written after each network.

    What the record has of a network from the same code, versions, threads and settings is not
    measured again, unless `again`. threads: 0, as many as torch takes. densities: measured, too, at
    the largest and the smallest batch. quick: the smallest batch only, and nothing is written.
    ValueError for a network or way that is not known.
    """
    for what, given, known in (("network", archs, CASES), ("way", names, WAYS)):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"{what}: {unknown[0]!r} is unknown; known: {', '.join(known)}")
    torch.set_num_threads(threads or torch.get_num_threads())
    origin = provenance()
    versions = {n: metadata.version(n) for n in peers.PACKAGES if n not in peers.lacking()}
    settings = {"seconds": seconds, "ways": list(names), "densities": list(densities)}
    settings |= {"threads": torch.get_num_threads(), "versions": origin["versions"] | versions}
    settings["git_commit"] = origin["git_commit"]
    for arch in archs:
        record = read(results_dir, origin["hardware"]["name"])
        kept = record["made"].get(arch, {})
        if not (quick or again) and all(kept.get(k) == settings[k] for k in settings):
            yield {"arch": arch, "kept": kept["created"]}
            continue
        rows, sweep, network = [], [], load(arch, results_dir)
        counts = counting.macs(network.dense, network.images[:1], network.masks)
        about = {"arch": arch, "label": CASES[arch].label, "side": CASES[arch].side}
        about["density"] = 1 - masking.sparsity(network.masks)
        about["cut_pct"] = 100 * (1 - counts["left"] / counts["dense"])
        with tempfile.TemporaryDirectory() as folder:
            others = Peers(network, folder, names)
            if network.data:
                few = 4 if quick else None
                trained = {"openvino int8": "dense", "filters openvino int8": "filters pruned"}
                for name in [n for n, of in trained.items() if of in network.top1]:
                    if name in others.files:
                        network.top1[name] = others.top1(name, network.data, few)
                if "engine int8" in names:
                    network.top1["engine int8"] = _top1(network, few)
            batches = CASES[arch].batches
            for batch in batches[-1:] if quick else batches:
                ends = batch in (batches[0], batches[-1])
                row, more = compare(
                    network, batch, seconds, names, others, densities if ends else ()
                )
                rows.append(about | row)
                sweep += [{"arch": arch, **found} for found in more]
                yield rows[-1] | {"lacking": network.lacking, "top1": network.top1, "sweep": more}
        if not quick:
            own = {"top1": network.top1, "lacking": network.lacking}
            record["made"][arch] = settings | own | {"created": provenance()["created"]}
            for part, new in (("networks", rows), ("density", sweep)):
                others_rows = [row for row in record[part] if row["arch"] != arch]
                record[part] = sorted(others_rows + new, key=lambda r: list(CASES).index(r["arch"]))
            write_bench("inference-MACHINE", record | {"provenance": origin}, results_dir)


def read(results_dir: str | Path, processor: str) -> dict:
    """What is measured so far on a processor; empty lists where nothing is."""
    path = resolve(results_dir) / f"bench/inference-{machine(processor)}.json"
    empty: dict = {"networks": [], "density": [], "made": {}}
    return empty | (json.loads(path.read_text()) if path.is_file() else {})
