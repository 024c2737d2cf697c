"""Do the shipped networks have the accuracy that they claim? `python -m explib.verify [FILE ...]`.

Evaluates each on its data set's test images, in fp32 in torch and in the engine in every type this
processor computes in, beside the accuracy that its run recorded.
"""

import sys
from pathlib import Path

import torch

from explib import runtime
from explib.data import load_data
from explib.evaluation import evaluate
from explib.files import ROOT
from explib.params import Params
from explib.runtime import build
from explib.study import load_network

TOLERANCE = 0.05
"""Per cent: weights are shipped in fp16, and another machine rounds otherwise."""
SHORT = ("bfloat16", "float16")
TOLERANCE_SHORT = 0.15
"""The same where activations have 16 bits, too."""


def verify(path: str | Path, data_dir: str = "") -> dict[str, float]:
    """Top-1 in per cent of a shipped network: `recorded`, and as measured now.

    In `torch` (fp32), and in the engine in `float32`, `bfloat16` or `float16` as far as this
    machine has them.
    """
    model, _, meta = load_network(path)
    if lacking := [k for k in ("dataset", "normalization", "top1") if k not in meta]:
        raise ValueError(f"{path}: does not say its {lacking[0]}; give a network that a run left")
    params = Params(
        arch=meta["arch"],
        dataset=meta["dataset"],
        normalization=meta["normalization"],
        data_dir=data_dir,
    )
    data, found = load_data(params), {"recorded": meta["top1"]}
    for dtype in _engine_types():
        fast = runtime.compile(model, torch.zeros(1, 3, params.side, params.side), dtype=dtype)
        found[str(dtype).removeprefix("torch.")] = evaluate(model, data, data.test, fast)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = data.to(device)
    model.to(device, memory_format=torch.channels_last)
    return found | {"torch": evaluate(model, data, data.test)}


def _engine_types() -> list[torch.dtype]:
    try:
        library = build.library()
    except runtime.NoCompiler:
        return []
    return [dtype for dtype in build.TYPES if build.computes(library, dtype)]


def main(paths: list[str]) -> int:
    """Print a line a network; returns 1 if any is off by more than TOLERANCE, else 0."""
    files = paths or sorted((ROOT / "results/checkpoints").glob("cifar10/*.safetensors"))
    engine = [str(dtype).removeprefix("torch.") for dtype in _engine_types()]
    columns, worst = ["torch", *engine], {32: 0.0, 16: 0.0}
    print(f"{'network':32s}", *(f"{name:>9s}" for name in ["recorded", *columns]))
    for path in files:
        found = verify(path)
        for name in columns:
            bits = 16 if name in SHORT else 32
            worst[bits] = max(worst[bits], abs(found[name] - found["recorded"]))
        cells = (f"{found[name]:9.2f}" for name in ["recorded", *columns])
        print(f"{Path(path).stem:32s}", *cells, flush=True)
    print(
        f"{len(files)} networks, the worst off by {worst[32]:.2f} points in 32 bits "
        f"(allowed: {TOLERANCE}), {worst[16]:.2f} in 16 (allowed: {TOLERANCE_SHORT})"
    )
    return int(worst[32] > TOLERANCE + 1e-9 or worst[16] > TOLERANCE_SHORT + 1e-9)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
