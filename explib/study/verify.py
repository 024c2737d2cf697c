"""Have the shipped networks the accuracy they claim? `explib verify` asks.

Each is evaluated on its data set's test images, in torch in fp32 and in the engine in every type
that this processor computes in, beside the accuracy that its run recorded.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from explib import engine, registry
from explib.data import Data, eval_batches, example_of, load_data
from explib.engine import build
from explib.files import resolve
from explib.params import Params
from explib.pruning.checkpoints import load_network
from explib.study.bench.inference import ENGINE, RECHECK, RECHECK_CODES, calibration, margin
from explib.study.records import write_bench

TOLERANCE = 0.05
"""Per cent: weights are shipped in fp16, and another machine rounds otherwise."""
TOLERANCE_SHORT = 0.15
"""The same where all that is computed has 16 bits."""
TOLERANCE_CODES = 0.35
"""The same where it has 8."""


def verify(path: str | Path, data_dir: str = "") -> list[dict]:
    """A row for each backend and precision of a shipped network, on its test images.

    way (torch in fp32, then the engine's types, those of fewer bits also with `recheck`), top1
    as measured now and as recorded, in per cent; differ: images whose answer is not that of torch;
    rechecked_pct: images computed in float32, too.
    """
    model, _, meta = load_network(path)
    if lacking := [k for k in ("dataset", "normalization", "top1") if k not in meta]:
        raise ValueError(f"{path}: does not say its {lacking[0]}; give a network that a run left")
    if meta.get("evaluated_on", "test") != "test":
        raise ValueError(f"{path}: was evaluated on {meta['evaluated_on']}, not on the test images")
    registry.stored("dataset", meta["dataset"], str(path))
    params = Params(
        arch=meta["arch"],
        dataset=meta["dataset"],
        normalization=meta["normalization"],
        data_dir=data_dir,
        image_size=meta.get("image_size", 0) if meta["dataset"] == "imagenet" else 0,
    )
    data, example = load_data(params), example_of(params)
    ways = {}
    for name, dtype in _engine_types().items():
        given = calibration(data) if dtype == torch.int8 else None
        ways[name] = _scores(engine.compile(model, example, dtype=dtype, calibration=given), data)
        if dtype != torch.float32:
            twice = engine.compile(
                model, example, dtype=dtype, calibration=given, recheck=margin(name)
            )
            ways[f"{name}, rechecked"] = _scores(twice, data)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).to(memory_format=torch.channels_last)
    ways = {"torch fp32": _scores(model, data.to(device))} | ways
    answers = {name: scores.argmax(1) for name, scores in ways.items()}
    rows = []
    for name, answer in answers.items():
        best = ways[name.removesuffix(", rechecked")].topk(2, 1).values
        near = (best[:, 0] - best[:, 1] < margin(name)) & name.endswith(", rechecked")
        rows.append(
            {
                "way": name,
                "top1": 100 * float((answer == data.test.labels).double().mean()),
                "recorded": meta["top1"],
                "differ": int((answer != answers["torch fp32"]).sum()),
                "rechecked_pct": 100 * float(near.double().mean()),
            }
        )
    return rows


@torch.no_grad()
def _scores(forward: Callable, data: Data) -> torch.Tensor:
    return torch.cat([forward(images).cpu() for images, _ in eval_batches(data.test, data)])


def _engine_types() -> dict[str, torch.dtype]:
    """Those of the engine that this machine computes in."""
    try:
        library = build.library()
    except engine.NoCompiler:
        return {}
    return {name: dtype for name, dtype in ENGINE.items() if build.computes(library, dtype)}


def shipped(results_dir: str | Path = "results") -> list[Path]:
    """The networks of results_dir/checkpoints/cifar10. FileNotFoundError where there is none."""
    folder = resolve(results_dir) / "checkpoints/cifar10"
    if not (files := sorted(folder.glob("*.safetensors"))):
        raise FileNotFoundError(f"{folder}: no networks (*.safetensors); name some")
    return files


def verify_all(paths: Iterable[str | Path], data_dir: str = "") -> Iterator[dict]:
    """The rows of `verify` for several networks, each with its network's name."""
    for path in paths:
        for row in verify(path, data_dir):
            yield {"network": Path(path).stem, **row}


def allowed(way: str) -> float:
    """By how many points of top-1 what a backend computes may be off."""
    if "rechecked" in way:
        return TOLERANCE
    return TOLERANCE_CODES if "int8" in way else TOLERANCE_SHORT if "16" in way else TOLERANCE


def worst(rows: list[dict]) -> list[dict]:
    """The largest difference from what is claimed, for each backend and precision.

    way; networks: how many; off and allowed: points of top-1; passed: whether it is within these.
    """
    found = {}
    for way in dict.fromkeys(row["way"] for row in rows):
        own = [abs(row["top1"] - row["recorded"]) for row in rows if row["way"] == way]
        found[way] = {"networks": len(own), "off": max(own), "allowed": allowed(way)}
    return [
        {"way": way, **row, "passed": row["off"] <= row["allowed"] + 1e-9}
        for way, row in found.items()
    ]


def write(rows: list[dict], results_dir: str | Path = "results") -> Path:
    """Write the rows of all shipped networks to results_dir/bench/accuracy-MACHINE.json."""
    record = {"recheck": RECHECK, "recheck_int8": RECHECK_CODES, "rows": rows}
    return write_bench("accuracy-MACHINE", record, results_dir)
