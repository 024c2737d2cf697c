"""Whether a GPU trains right, and how many runs at once it trains fastest: `explib bench gpu`.

Right: steps recorded as a CUDA graph against the same ones begun one by one, both in strict fp32
and with deterministic convolutions, and a run that was interrupted against one that was not; beside
each difference the one between two equal runs, which is what the order of additions leaves to
chance. Fast: several runs in threads of this process, with all that runs do, counted while all of
them train.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from explib.data import Data, load_data
from explib.files import resolve
from explib.models import build
from explib.params import Params
from explib.pruning.criteria import prune
from explib.study.records import machine, provenance, write_bench
from explib.training import backend, loop, turns
from explib.training.evaluation import strict_fp32

NETWORKS = ("resnet_56", "vgg_16_bn")
AT_ONCE = (1, 2, 4, 8)
SECONDS = 4.0
"""How long runs at once are counted."""
EXAMPLE = torch.zeros(1, 3, 32, 32)


def usual(**changes) -> Params:
    """What is measured: a quarter of CIFAR-10, for training and for evaluation."""
    few = {"dataset": "cifar10", "limit_train": 12_800, "limit_test": 2_500, "epochs": 1000}
    return Params(**{**few, "distill": 0.0, **changes})


def measure(params: Params, results_dir: str | Path = "results") -> Iterator[dict]:
    """Measure what results_dir/bench/gpu-MACHINE.json lacks yet; yields each row.

    A row: check, network and largest_difference of the weights with that of two equal runs, in
    parts of the largest weight; or network, at_once, images_per_s in all, precision and trained_by.
    """
    device = backend.device_of(params)
    origin = provenance(device)
    name = f"gpu-{machine(origin['hardware']['name'])}"
    path = resolve(results_dir) / f"bench/{name}.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    data = load_data(params).to(device)
    parts: dict[tuple, Callable[[], dict]] = {}
    for network in NETWORKS:
        own = params.replace(arch=network, device=device)
        parts[network, "recorded"] = partial(recorded_as_eager, data, own)
        parts[network, "resumed"] = partial(resumed_as_whole, data, own)
        for count in AT_ONCE:
            parts[network, count] = partial(at_once, data, own, count)
    for (network, what), part in parts.items():
        key = {"network": network, "part": what}
        if any(row.items() >= key.items() for row in rows):
            continue
        row = {**key, **part()}
        rows.append(row)
        write_bench(name, {"rows": rows, "provenance": origin}, results_dir)
        yield row


def recorded_as_eager(data: Data, params: Params, steps: int = 20) -> dict:
    """`steps` steps as a CUDA graph and one by one, in strict fp32, from equal weights.

    With deterministic convolutions both differences are 0 on an H100. Without, both are 0.2 after
    20 steps: additions come in another order each time.
    """
    params = params.replace(precision="fp32", epochs=steps / (len(data.train) // params.batch_size))
    with strict_fp32(), _deterministic():
        graph = _trained(data, params)
        with _one_by_one():
            eager, again = _trained(data, params), _trained(data, params)
    return _difference(graph, eager, again)


def resumed_as_whole(data: Data, params: Params) -> dict:
    """Two epochs with an interruption after the first, and without, as runs are computed."""
    params = params.replace(epochs=2)
    whole, again = _trained(data, params), _trained(data, params)
    return _difference(_trained(data, params, interrupted=True), whole, again)


def at_once(data: Data, params: Params, count: int) -> dict:
    """Images/s of `count` runs together, counted for SECONDS once each has ended an epoch.

    They go on until each has ended one after that, too.
    """
    ends: list[list[tuple[float, int]]] = [[] for _ in range(count)]
    forwards: list[backend.Backend] = []
    errors: list[BaseException] = []
    stop = threading.Event()

    def run(number: int) -> None:
        stream = torch.cuda.stream(torch.cuda.Stream()) if _gpu(data) else nullcontext()
        try:
            with turns.held(), stream:
                forward, epochs = _epochs(data, params)
                forwards.append(forward)
                for entry, _ in epochs:
                    images = round(entry["images_per_s"] * entry["seconds"])
                    ends[number].append((time.perf_counter(), images))
                    if stop.is_set():
                        return
                    with turns.passed():
                        time.sleep(0)  # another one's turn, also where steps are not recorded
        except BaseException as error:
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    _wait(lambda: errors or all(ends))
    first = time.perf_counter()
    stop.wait(SECONDS)
    last = time.perf_counter()
    _wait(lambda: errors or all(own[-1][0] >= last for own in ends))
    stop.set()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    speed = sum(images_between(first, last, own) for own in ends) / (last - first)
    how = {"precision": forwards[0].precision, "trained_by": forwards[0].how}
    return {"at_once": count, "images_per_s": speed, **how, "batch_size": params.batch_size}


def images_between(first: float, last: float, ends: list[tuple[float, int]]) -> float:
    """Images that a run trained on between two moments, as if at one speed within an epoch.

    ends: when each epoch ended, and its images. ValueError unless one ended before and one after.
    """
    moments, images = zip(*ends, strict=True)
    if not moments[0] <= first <= last <= moments[-1]:
        raise ValueError(f"epochs ended from {moments[0]} to {moments[-1]}, not {first} to {last}")
    before, after = np.interp([first, last], moments, np.cumsum(images))
    return float(after - before)


def _wait(until: Callable) -> None:
    while not until():
        time.sleep(0.01)


def _epochs(data: Data, params: Params, model: torch.nn.Module | None = None, **options):
    """What computes a half-pruned network, by default a fresh one, and its epochs of training."""
    fresh = _network(data, params)
    masks, model = prune(fresh, EXAMPLE, 0.5, "B"), model or fresh
    forward = backend.choose(model, params, backend.device_of(params), 0, masks)
    return forward, loop.train(model, data, params, masks, forward=forward, **options)


def _network(data: Data, params: Params) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build(params.arch, len(data.classes)).to(data.train.labels.device)
    return model.to(memory_format=torch.channels_last)


def _trained(data: Data, params: Params, interrupted: bool = False) -> torch.Tensor:
    """All weights of a network after its training, one after another, float64."""
    model, resume = _network(data, params), None
    if interrupted:
        _, epochs = _epochs(data, params, model)
        _, resume = next(epochs)
        epochs.close()
    _, epochs = _epochs(data, params, model, resume=resume)
    for _ in epochs:
        pass
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def _difference(found: torch.Tensor, wanted: torch.Tensor, again: torch.Tensor) -> dict:
    largest = wanted.abs().max()
    return {
        "largest_difference": float((found - wanted).abs().max() / largest),
        "of_two_equal_runs": float((again - wanted).abs().max() / largest),
    }


@contextmanager
def _one_by_one() -> Iterator[None]:
    """Steps are begun one by one inside, whatever the device."""
    before, loop.recorded = loop.recorded, lambda step, *_: step
    try:
        yield
    finally:
        loop.recorded = before


@contextmanager
def _deterministic() -> Iterator[None]:
    """Convolutions add in the same order each time inside, on a GPU."""
    cudnn: Any = torch.backends.cudnn
    before, cudnn.deterministic = cudnn.deterministic, True
    try:
        yield
    finally:
        cudnn.deterministic = before


def _gpu(data: Data) -> bool:
    return data.train.labels.is_cuda
