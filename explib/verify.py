"""Do the shipped networks have the accuracy that they claim? `python -m explib.verify [FILE ...]`.

Evaluates each in fp32 on its data set's test images, beside the accuracy that its run recorded.
"""

import sys
from pathlib import Path

import torch

from explib.data import load_data
from explib.evaluation import evaluate
from explib.files import ROOT
from explib.params import Params
from explib.study import load_network

TOLERANCE = 0.05
"""Per cent: weights are shipped in fp16, and another machine rounds otherwise."""


def verify(path: str | Path, data_dir: str = "") -> tuple[float, float]:
    """Top-1 in per cent of a shipped network, recorded and measured now."""
    model, _, meta = load_network(path)
    if lacking := [k for k in ("dataset", "normalization", "top1") if k not in meta]:
        raise ValueError(f"{path}: does not say its {lacking[0]}; give a network that a run left")
    params = Params(
        arch=meta["arch"],
        dataset=meta["dataset"],
        normalization=meta["normalization"],
        data_dir=data_dir,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = load_data(params).to(device)
    model.to(device, memory_format=torch.channels_last)
    return meta["top1"], evaluate(model, data, data.test)


def main(paths: list[str]) -> int:
    """Print a line a network; returns 1 if any is off by more than TOLERANCE, else 0."""
    found = paths or sorted((ROOT / "results/checkpoints").glob("cifar10/*.safetensors"))
    worst = 0.0
    print(f"{'network':40s} {'recorded':>9s} {'now':>9s} {'difference':>11s}")
    for path in found:
        recorded, now = verify(path)
        worst = max(worst, abs(now - recorded))
        print(
            f"{Path(path).stem:40s} {recorded:9.2f} {now:9.2f} {now - recorded:+11.2f}", flush=True
        )
    print(f"{len(found)} networks, the worst off by {worst:.2f} points (allowed: {TOLERANCE})")
    return int(worst > TOLERANCE + 1e-9)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
