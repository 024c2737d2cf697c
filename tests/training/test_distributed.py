"""One run in several processes, as torchrun starts them: the same run as in one process."""

import json
import os
import subprocess
import sys

import pytest
import torch

from explib.data import load_data
from explib.errors import ParamError
from explib.files import load_tensors
from explib.models import resnet
from explib.params import Params
from explib.pruning import checkpoints
from explib.study import networks
from explib.training import distributed, loop
from tests.conftest import ROOT

FIXED = Params(
    arch="resnet_56",
    epochs=2,
    batch_size=64,
    limit_train=512,
    bn_images=512,
    lr=1e-4,  # more is too much for fixed statistics
    freeze_bn=True,  # statistics of a share are not those of the batch
    device="cpu",
    precision="fp32",
    compile="off",
    threads=1,
)
# The command line, in which `resnet_56` stands for a ResNet of 8 layers; where there is a second
# argument, rank 1 is lost once, as soon as there is something to go on from.
DRIVER = """
import os, pathlib, signal, sys, threading, time
from explib import registry
from explib.__main__ import cli
from explib.models import resnet
from explib.study import folder

folder.STATE_EVERY_S = 0.0
small = lambda num_classes: resnet.build(num_classes, 8)
registry.NETWORKS["resnet_56"] = registry.Network(small, "ResNet-56")
state, mark = map(pathlib.Path, sys.argv[1:3])

def kill():
    while not state.exists():
        time.sleep(0.01)
    mark.touch()
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ.get("RANK") == "1" and not mark.exists():
    threading.Thread(target=kill, daemon=True).start()
cli(sys.argv[3:])
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A trained network: with fixed statistics, fresh weights diverge."""
    params = FIXED.replace(freeze_bn=False, lr=0.1, limit_train=0, batch_size=64, epochs=3)
    torch.manual_seed(0)
    model = resnet.build(10, 8).to(memory_format=torch.channels_last)
    for _ in loop.train(model, load_data(params), params):
        pass
    path = tmp_path_factory.mktemp("dense") / "dense.safetensors"
    meta = {"arch": "resnet_56", "num_classes": 10}
    return checkpoints.save(path, model, {}, meta, torch.float32)


def options(params):
    known = Params()
    chosen = {k: v for k, v in params.asdict().items() if v != getattr(known, k)}
    return [*(f"--{name}={value}" for name, value in chosen.items()), "--json"]


def launch(params, processes, lost="never", restarts=0):
    """The record of a run by the command line, under torchrun if in several processes."""
    folder = networks.resolve(params.results_dir)
    driver = folder / "driver.py"
    driver.write_text(DRIVER)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    torchrun = [*torchrun, f"--max-restarts={restarts}"] if processes > 1 else []
    state = (
        networks.resolve(params.job_dir) / "state.safetensors" if lost != "never" else folder / "-"
    )
    done = subprocess.run(
        [sys.executable, *torchrun, driver, state, folder / lost, "finetune", *options(params)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout)  # one process speaks


def weights(params):
    return load_tensors(networks.resolve(params.job_dir) / "model.safetensors")[0]


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    params = FIXED.replace(resume=str(start), results_dir=str(tmp_path_factory.mktemp("alone")))
    return params, launch(params, 1)


@pytest.fixture(scope="module")
def two(start, tmp_path_factory):
    params = FIXED.replace(resume=str(start), results_dir=str(tmp_path_factory.mktemp("two")))
    return params, launch(params, 2)


def same_run(found, wanted):
    """Losses within 1e-5 of each other, all that is counted equal."""
    for one, other in zip(found["history"], wanted["history"], strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
        assert one["train_top1"] == other["train_top1"]
    for key in ("accuracy", "layers", "macs", "sparsity"):
        assert found[key] == wanted[key]


def test_two_processes_are_one(alone, two):
    (params, wanted), (other, found) = alone, two
    assert found["hardware"]["processes"] == 2 and wanted["hardware"]["processes"] == 1
    same_run(found, wanted)
    for name, tensor in weights(params).items():  # fp16 in the file
        torch.testing.assert_close(
            weights(other)[name].float(), tensor.float(), atol=1e-3, rtol=1e-2
        )


def test_four_processes_that_add_up_gradients_are_one(alone, start, tmp_path):
    params = alone[0].replace(results_dir=str(tmp_path), micro_batch=8)
    same_run(launch(params, 4), alone[1])


def test_a_lost_worker_goes_on_from_the_last_checkpoint(two, tmp_path):
    params, wanted = two
    other = params.replace(results_dir=str(tmp_path))
    found = launch(other, 2, lost="killed", restarts=2)
    assert (tmp_path / "killed").exists()
    same_run(found, wanted)
    for name, tensor in weights(params).items():
        assert torch.equal(weights(other)[name], tensor)


def test_a_batch_that_cannot_be_divided_is_refused(data, monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 2)
    assert loop.pieces(data, Params(batch_size=16)) == (1, 8)
    assert loop.pieces(data, Params(batch_size=16, micro_batch=2)) == (4, 2)
    message = "batch_size: 15 images cannot be divided among 2 processes in pieces of 7; .* of 14"
    with pytest.raises(ParamError, match=message):
        loop.pieces(data, Params(batch_size=15))
    with pytest.raises(ParamError, match="at least 1; give a multiple of 2"):
        loop.pieces(data, Params(batch_size=1))
