"""How one run grows with processes, each on one thread: `explib bench processes`.

The same fine-tuning (ResNet-56, half of its kernels, batch 256 in all, with the dense network's
soft labels) in 1, 2 and 4 processes, as torchrun starts them; on GPUs, one process each.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from explib.params import Params
from explib.study import runs
from explib.study.records import write_bench

RUN = Params(arch="resnet_56", batch_size=256, limit_train=1024, limit_test=64, epochs=3, threads=1)


def images_per_s(processes: int, params: Params) -> float:
    """Training images per second, of the last epoch. RuntimeError where the run fails."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    given = {k: v for k, v in params.asdict().items() if v != getattr(Params(), k)}
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "explib", "finetune", "--json"]
        + [f"--{name}={value}" for name, value in given.items()],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{processes} processes: the run failed; what it said stands above")
    return json.loads(done.stdout)["history"][-1]["images_per_s"]


def measure(
    counts: Sequence[int] = (1, 2, 4), results_dir: str | Path = "results"
) -> Iterator[dict]:
    """Yield a row for each number of processes: images/s, and the share of a linear growth.

    The rows so far are in results_dir/bench/processes.json.
    """
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        runs.baseline(RUN.replace(results_dir=f"{folder}/dense", epochs=1))
        dense = f"{folder}/dense/checkpoints/digits/resnet_56.safetensors"
        for count in counts:
            params = RUN.replace(results_dir=f"{folder}/{count}", resume=dense)
            speed = images_per_s(count, params)
            first = rows[0] if rows else {"processes": count, "images_per_s": speed}
            linear = first["images_per_s"] * count / first["processes"]
            rows.append({"processes": count, "images_per_s": speed, "efficiency": speed / linear})
            devices = torch.cuda.device_count() or os.cpu_count()
            write_bench("processes", {"rows": rows, "devices": devices}, results_dir)
            yield rows[-1]
