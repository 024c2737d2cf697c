"""What a study of ten thousand runs, or a network of 200 million weights, needs in memory.

Each in a process of its own, whose largest resident size the system notes. Times are not tested:
`python -m tests.system.test_load` prints them.
"""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT

MEASURE = """
import json, sys, time

def peak_mb():
    status = open("/proc/self/status").read()  # of this program alone; rusage knows its parent's
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
"""
NETWORK = """
import torch
from torch import nn
import explib
from explib.pruning import masks

before = peak_mb()
filters, layers = 1024, 22  # 9.4 million weights each, and 1.05 million kernels
model = nn.Sequential(nn.Conv2d(3, filters, 3, padding=1))
for _ in range(layers):
    model.append(nn.Conv2d(filters, filters, 3, padding=1, bias=False))
    model.append(nn.BatchNorm2d(filters))
size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
started = time.monotonic()
for way in "AB":
    convs = [conv for conv in explib.find_convs(model, torch.zeros(1, 3, 4, 4)) if conv.norm]
    chosen = explib.prune(model, None, {conv.name: 0.5 for conv in convs}, way, convs=convs)
    explib.apply(model, chosen)
    assert masks.held(model, chosen)
seconds = time.monotonic() - started
print(json.dumps({"size_mb": size, "peak_mb": peak_mb() - before, "seconds": seconds}))
"""
RECORDS = """
from pathlib import Path
from explib.report import tables
from explib.study import records

known = records.read_all(dataset="cifar10")
one = next(r for r in known if r["kind"] == "finetune")
folder = Path(sys.argv[1], "records/cifar10")
folder.mkdir(parents=True)
for number in range(10_000):
    params = one["params"] | {"seed": number % 5, "lr": 0.01 + 0.001 * (number // 5)}
    params["mask_seed"] = params["seed"]
    (folder / f"{number}.json").write_text(json.dumps(one | {"params": params}))
del known, one
started = time.monotonic()
made = tables.make(sys.argv[1])
seconds = time.monotonic() - started
rows = len(made["as_published"]) + len(made["ours"])
print(json.dumps({"rows": rows, "peak_mb": peak_mb(), "seconds": seconds}))
"""


def measure(code: str, *words: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE + code, *words],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_200_million_weights_are_scored_and_masked_within_twice_their_size():
    found = measure(NETWORK)
    assert found["size_mb"] > 4 * 200e6 / 2**20
    assert found["size_mb"] < found["peak_mb"] < 2 * found["size_mb"]


def test_ten_thousand_records_fit_in_a_gigabyte(tmp_path):
    if not list((ROOT / "results/records/cifar10").glob("finetune-*.json")):
        pytest.skip("no record of a fine-tuning is there to be multiplied")
    found = measure(RECORDS, str(tmp_path))
    assert found["rows"] == 24 and found["peak_mb"] < 1024


if __name__ == "__main__":
    import tempfile

    print("200 million weights, both ways:", measure(NETWORK))
    with tempfile.TemporaryDirectory() as folder:
        print("10,000 records:", measure(RECORDS, folder))
