"""How fast this machine trains and evaluates: `explib bench training`.

Ours beside the loop that one would write first, by turns in one run: torchvision's transforms in a
DataLoader of 8 workers, fp32, eager, SGD, weights masked anew after every step. On a CPU also what
leaving out pruned kernels brings. Needs CIFAR-10, about seven minutes on two cores and under ten on
a GPU. Of packages beyond PyTorch it uses those of explib only.
"""

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from explib.data import Data, Split, load_data
from explib.engine import training as sparse_training
from explib.files import write_json
from explib.models import build
from explib.params import Params
from explib.pruning import masks as masking
from explib.pruning.criteria import prune
from explib.pruning.layers import conv_at, find_convs
from explib.study.records import provenance, write_bench
from explib.training import backend, evaluation
from explib.training import loop as tuning

NETWORKS = ("resnet_56", "vgg_16_bn")
PRUNED = (0.3, 0.5, 0.7, 0.9)
EXAMPLE = torch.zeros(1, 3, 32, 32)
LONG = 10_000_000
"""Images of the run that is measured for: it trains by what a long one is trained by."""


class Pictures(Dataset):
    """A split as torchvision's data sets give it: one PIL image at a time, then transforms."""

    def __init__(self, split: Split, transform):
        self.images, self.labels = split.images.cpu().permute(0, 2, 3, 1).numpy(), split.labels
        self.transform = transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def plain_loaders(data: Data, batch_size: int) -> tuple[DataLoader, DataLoader]:
    """DataLoaders over the training and the test images with the usual transforms."""
    ends = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std)]
    mirror = [v2.RandomHorizontalFlip()] if data.flip else []
    images, others = cast(Split, data.train), cast(Split, data.test)  # in memory
    crop = v2.Compose([v2.RandomCrop(images.images.shape[-1], padding=4), *mirror, *ends])
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "num_workers": 8,
        "persistent_workers": True,
    }
    options["pin_memory"] = torch.cuda.is_available()
    train, test = Pictures(images, crop), Pictures(others, v2.Compose(ends))
    return (
        DataLoader(train, shuffle=True, drop_last=True, **options),
        DataLoader(test, **options),
    )


def plain_epoch(model, loader, optimizer, masks, device) -> float:
    """One epoch of the plain training loop; returns the mean loss."""
    model.train()
    total, weights = 0.0, [conv_at(model, name).weight for name in masks]
    wide = [mask.to(device)[:, :, None, None] for mask in masks.values()]
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for weight, mask in zip(weights, wide, strict=True):
                weight.mul_(mask)
        total += loss.item()
    return total / len(loader)


@torch.no_grad()
def plain_evaluate(model, loader, device) -> float:
    """Top-1 in per cent by the plain loop."""
    model.eval()
    hits = sum(
        (model(images.to(device)).argmax(1).cpu() == labels).sum().item()
        for images, labels in loader
    )
    return 100 * hits / len(loader.dataset)


def timed(work) -> tuple[float, object]:
    """Seconds that a call took, the device's work included, and what it returned."""
    started = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def training(arch: str, data: Data, params: Params, rounds: int = 3) -> list[dict]:
    """Training and evaluation of a half-pruned `arch`, plain loop and ours by turns.

    Rows: network, device, precision, batch_size, task, loop, images_per_s (median of the rounds),
    loss (of the last round; as many steps for both loops, from the same weights).
    """
    device = backend.device_of(params)
    torch.manual_seed(0)
    models = {loop: build(arch, 10) for loop in ("plain", "ours")}
    models["ours"].load_state_dict(models["plain"].state_dict())
    masks = prune(models["plain"], EXAMPLE, 0.5, "B")
    for model in models.values():
        model.to(device)
        masking.apply(model, masks)
    train_loader, test_loader = plain_loaders(data, params.batch_size)
    optimizer = torch.optim.SGD(
        models["plain"].parameters(), params.lr, params.momentum, weight_decay=params.weight_decay
    )
    on_device = data.to(device)
    models["ours"].to(memory_format=torch.channels_last)
    params = params.replace(arch=arch, epochs=rounds + 1, nesterov=False, lr_schedule="step")
    forward = backend.choose(models["ours"], params, device, LONG, masks)
    epochs = tuning.train(models["ours"], on_device, params, masks, forward=forward)
    seconds, losses = defaultdict(list), {}
    for _ in range(rounds + 1):  # the first of each only warms up
        taken, losses["plain"] = timed(
            lambda: plain_epoch(models["plain"], train_loader, optimizer, masks, device)
        )
        seconds["train", "plain"].append(taken)
        entry, _ = next(epochs)
        seconds["train", "ours"].append(entry["seconds"])
        losses["ours"] = entry["train_loss"]
        taken, _ = timed(lambda: plain_evaluate(models["plain"], test_loader, device))
        seconds["evaluate", "plain"].append(taken)
        taken, _ = timed(
            lambda: evaluation.top1(models["ours"], on_device, on_device.test, forward)
        )
        seconds["evaluate", "ours"].append(taken)
    epochs.close()
    per_round = {
        "train": len(data.train) // params.batch_size * params.batch_size,
        "evaluate": len(data.test),
    }
    setting = {
        "network": arch,
        "device": device,
        "precision": forward.precision,
        "compile": params.compile,
        "trained_by": forward.how,
        "batch_size": params.batch_size,
    }
    return [
        {
            **setting,
            "task": task,
            "loop": loop,
            "images_per_s": per_round[task] / statistics.median(times[1:]),
            **({"loss": losses[loop]} if task == "train" else {}),
        }
        for (task, loop), times in seconds.items()
    ]


def throughput(arch: str, data: Data, params: Params, masked: bool = True) -> float:
    """Images/s of our training loop by itself, the first epoch left out; half pruned or dense."""
    device = backend.device_of(params)
    torch.manual_seed(0)
    model = build(arch, 10).to(device).to(memory_format=torch.channels_last)
    masks = prune(model, EXAMPLE, 0.5, "B") if masked else {}
    params = params.replace(arch=arch)
    forward = backend.choose(model, params, device, LONG, masks)
    entries = [e for e, _ in tuning.train(model, data.to(device), params, masks, forward=forward)]
    return statistics.median(entry["images_per_s"] for entry in entries[1:])


def by_sparsity(
    arch: str, params: Params, shares: Sequence[float] = PRUNED, repeats: int = 7
) -> Iterator[dict]:
    """One batch forward and backward on a CPU, over all kernels and over the surviving ones.

    By turns; a row for each share of the kernels that way B pruned in every conv but the first:
    network, pruned_pct, precision, batch_size, all_kernels and surviving_kernels (images/s, median
    of the repeats).
    """
    for share in shares:
        torch.manual_seed(0)
        model = build(arch, 10).to(memory_format=torch.channels_last).train()
        rates = {conv.name: share for conv in find_convs(model, EXAMPLE)[1:]}
        masks = prune(model, EXAMPLE, rates, "B")
        masking.apply(model, masks)
        ways = {
            "all_kernels": backend.choose(model, params, "cpu"),
            "surviving_kernels": backend.choose(
                model, params.replace(compile="sparse"), "cpu", 0, masks
            ),
        }
        images = torch.randn(params.batch_size, 3, 32, 32)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.randint(0, 10, (params.batch_size,))
        seconds = defaultdict(list)
        for _ in range(repeats + 1):
            for way, forward in ways.items():
                taken, _ = timed(partial(_step, forward, images, labels))
                seconds[way].append(taken)
        yield {
            "network": arch,
            "pruned_pct": 100 * share,
            "precision": ways["all_kernels"].precision,
            "batch_size": params.batch_size,
            **{w: params.batch_size / statistics.median(s[1:]) for w, s in seconds.items()},
        }


def _step(forward: Callable, images: torch.Tensor, labels: torch.Tensor) -> None:
    F.cross_entropy(forward(images), labels).backward()


def _one_of_many(rank: int, arch: str, data: Data, params: Params, folder: str) -> None:
    if params.threads:
        torch.set_num_threads(params.threads)
    write_json(f"{folder}/{rank}.json", throughput(arch, data, params))


def throughput_of_several(arch: str, data: Data, params: Params, processes: int) -> float:
    """Images/s in all of several runs that share one device, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        shared = (arch, data, params, folder)
        torch.multiprocessing.spawn(_one_of_many, shared, nprocs=processes, join=True)
        return sum(json.loads(path.read_text()) for path in Path(folder).glob("*.json"))


def eager(device: str, batch_size: int = 128, repeats: int = 5) -> Iterator[dict]:
    """What this machine is worth, to scale other times by: torch's own ResNet-56, eager, in fp32.

    A row for forward in evaluation mode and one for forward and backward in training mode: images/s
    on random images, median of the repeats after one call.
    """
    torch.manual_seed(0)
    model = build("resnet_56", 10).to(device)
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    labels = torch.randint(0, 10, (batch_size,), device=device)

    def forward():
        with torch.no_grad():
            model.eval()(images)

    tasks = {"forward": forward, "step": lambda: _step(model.train(), images, labels)}
    for task, work in tasks.items():
        seconds = [timed(work)[0] for _ in range(repeats + 1)][1:]
        yield {
            "network": "resnet_56",
            "device": device,
            "precision": "fp32",
            "batch_size": batch_size,
            "threads": torch.get_num_threads(),
            "task": task,
            "loop": "eager fp32",
            "images_per_s": batch_size / statistics.median(seconds),
        }


def measure(params: Params, rounds: int = 3):
    """Yields rows: plain loop and ours on both networks, and on a GPU what else may be faster.

    Before them those of `eager`.
    """
    data, device = load_data(params), backend.device_of(params)
    yield from eager(device)
    for arch in NETWORKS:
        yield from training(arch, data, params, rounds)
    params = params.replace(epochs=4)
    yield from variant("without masks", data, params, masked=False)
    if device == "cuda":
        for batch_size in (256, 512, 1024):
            yield from variant(f"batch {batch_size}", data, params.replace(batch_size=batch_size))
        for processes in (2, 4):
            speed = throughput_of_several(NETWORKS[0], data, params, processes)
            yield {
                "network": NETWORKS[0],
                "loop": f"{processes} runs at once",
                "images_per_s": speed,
            }
        for batch_size in (128, 512):
            compiled = params.replace(compile="on", batch_size=batch_size)
            yield from variant(f"compiled, batch {batch_size}", data, compiled)


def variant(name: str, data: Data, params: Params, masked: bool = True):
    """A row for each network of our loop by itself, or of the error that it ended in."""
    for arch in NETWORKS:
        row = {"network": arch, "device": params.device, "task": "train", "loop": f"ours, {name}"}
        try:
            yield row | {"images_per_s": throughput(arch, data, params, masked)}
        except RuntimeError as error:
            yield row | {"images_per_s": None, "error": str(error).splitlines()[0]}


def usual(**changes) -> Params:
    """The setting that is measured: CIFAR-10, and on a CPU a part of it."""
    few = {} if torch.cuda.is_available() else {"limit_train": 2048, "limit_test": 2048}
    return Params(**{"dataset": "cifar10", "distill": 0.0, "lr": 0.01, **few, **changes})


def record(
    params: Params | None = None, results_dir: str | Path = "results", rounds: int = 3
) -> Iterator[dict]:
    """Measure everything; yields each row of `measure`, then of `by_sparsity`.

    params: by default those of `usual`. The rows so far are in
    results_dir/bench/training-MACHINE.json, with the `ratios` of them.
    """
    params = params or usual()
    device = backend.device_of(params)
    archs = NETWORKS if device == "cpu" and sparse_training.library() else ()
    parts = {
        "rows": measure(params, rounds),
        "by_sparsity": (row for arch in archs for row in by_sparsity(arch, params)),
    }
    found: dict[str, list[dict]] = {part: [] for part in parts}
    origin = {"provenance": provenance(device)}
    for part, rows in parts.items():
        for row in rows:
            found[part].append(row)
            whole = {**found, **origin, "ratios": ratios(found["rows"])}
            write_bench("training-MACHINE", whole, results_dir)
            yield row


def ratios(rows: list[dict]) -> dict[str, float]:
    """Ours to the plain loop for each network and task."""
    speed = {
        (r["network"], r.get("task"), r["loop"]): r["images_per_s"] for r in rows if "loop" in r
    }
    return {
        f"{arch}, {task}: ours / plain": speed[arch, task, "ours"] / value
        for (arch, task, loop), value in speed.items()
        if loop == "plain" and (arch, task, "ours") in speed
    }
