"""Have the shipped networks the accuracy they claim? `python -m explib.study.verify [FILE ...]`.

Evaluates each on its data set's test images, in torch in fp32 and in the engine in every type this
processor computes in, beside the accuracy that its run recorded. Without a FILE it takes all that
are shipped, and writes results/bench/accuracy-MACHINE.json.
"""

import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from explib import engine, registry
from explib.data import Data, eval_batches, example_of, load_data
from explib.engine import build
from explib.files import ROOT, write_json
from explib.params import Params
from explib.pruning.checkpoints import load_network
from explib.study.bench.inference import ENGINE, RECHECK
from explib.study.records import machine, provenance

TOLERANCE = 0.05
"""Per cent: weights are shipped in fp16, and another machine rounds otherwise."""
TOLERANCE_SHORT = 0.15
"""The same where all that is computed has 16 bits."""


def verify(path: str | Path, data_dir: str = "") -> list[dict]:
    """A row for each way to run a shipped network on its test images.

    way (torch in fp32, then the engine's types, those of 16 bits also with `recheck`), top1 as
    measured now and as recorded, in per cent; differ: images whose answer is not that of torch;
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
        ways[name] = _scores(engine.compile(model, example, dtype=dtype), data)
        if dtype != torch.float32:
            twice = engine.compile(model, example, dtype=dtype, recheck=RECHECK)
            ways[f"{name}, rechecked"] = _scores(twice, data)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device, memory_format=torch.channels_last)
    ways = {"torch fp32": _scores(model, data.to(device))} | ways
    answers = {name: scores.argmax(1) for name, scores in ways.items()}
    rows = []
    for name, answer in answers.items():
        best = ways[name.removesuffix(", rechecked")].topk(2, 1).values
        near = (best[:, 0] - best[:, 1] < RECHECK) & name.endswith(", rechecked")
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


def main(paths: list[str]) -> int:
    """Print a row for each way to run each network; 1 if any is off by too much, else 0.

    Allowed are TOLERANCE, and TOLERANCE_SHORT for what no float32 checks.
    """
    files = paths or sorted((ROOT / "results/checkpoints").glob("cifar10/*.safetensors"))
    rows, allowed, worst = [], {}, defaultdict(float)
    print(f"{'network':28s} {'way':24s} {'top-1':>6s} {'recorded':>9s} {'other answers':>14s}")
    for path in files:
        for row in verify(path):
            way = row["way"]
            plain = "16" in way and "rechecked" not in way
            allowed[way] = TOLERANCE_SHORT if plain else TOLERANCE
            worst[way] = max(worst[way], abs(row["top1"] - row["recorded"]))
            rows.append({"network": Path(path).stem, **row})
            found = f"{row['top1']:6.2f} {row['recorded']:9.2f} {row['differ']:14d}"
            print(f"{Path(path).stem:28s} {way:24s} {found}", flush=True)
    for way, most in worst.items():
        print(f"{way}: the worst of {len(files)} off by {most:.2f}, allowed {allowed[way]}")
    if not paths:
        record = {"recheck": RECHECK, "rows": rows, "provenance": provenance()}
        name = machine(record["provenance"]["hardware"]["name"])
        print(write_json(ROOT / f"results/bench/accuracy-{name}.json", record))
    return int(any(most > allowed[way] + 1e-9 for way, most in worst.items()))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
