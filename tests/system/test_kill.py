"""A fine-tuning that is killed at random moments ends as one that was left alone.

Each life of a run is a process of its own, forked from one that has loaded everything, so that
being born costs nothing and most deaths fall into the work.
"""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from explib.files import load_tensors, resolve
from explib.params import Params
from explib.study import folder, runs
from explib.study.folder import Folder
from explib.training import loop
from tests.conftest import ROOT, TINY
from tests.study.test_runs import untimed

KILLS = 10  # of each schedule, at least
PARAMS = TINY.replace(limit_train=128)
LIVES = """
import functools, json, os, random, signal, sys, time
import torch
from explib import data, registry
from explib.models import resnet
from explib.params import Params
from explib.study import folder, runs

folder.STATE_EVERY_S = 0.0
torch.set_num_threads(1)  # no threads before a fork
small = lambda num_classes: resnet.build(num_classes, 8)
registry.NETWORKS["resnet_56"] = registry.Network(small, "ResNet-56")
runs._save_network = functools.partial(runs._save_network, dtype=torch.float32)  # every bit
chance, changes, wanted = random.Random(0), json.loads(sys.argv[1]), int(sys.argv[2])

def life(params, seconds):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        runs.finetune(params)
        os._exit(0)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True

whole = Params(**changes)
data.load_data(whole)  # and with it what that imports, which takes longer than the run
began = time.monotonic()
assert not life(whole, 300)
took = time.monotonic() - began
kills = 0
for number in range(100):
    params = whole.replace(job_dir=f"{whole.results_dir}/broken-{number}")
    began = time.monotonic()
    if not life(params, took * chance.uniform(0.02, 0.9)):
        took = min(took, time.monotonic() - began)  # the machine was busy before
        continue
    kills += 1
    while life(params, took * chance.uniform(0.02, 0.9)):
        kills += 1
        assert kills < 200, "it never gets anywhere"
    print(json.dumps({"job_dir": params.job_dir, "kills": kills}), flush=True)
    if kills >= wanted:
        break
"""


@pytest.mark.parametrize(
    "schedule",
    [
        {"epochs": 6, "compress_rate": "[0.5]"},
        {"epochs": 1, "compress_rate": "[0.0]+[0.5]*6", "schedule": "layerwise"},
    ],
    ids=["oneshot", "layerwise"],
)
def test_killed_at_random_moments_it_ends_as_if_left_alone(tmp_path, resnet_8, schedule):
    runs.baseline(PARAMS.replace(results_dir=str(tmp_path), epochs=1))
    params = PARAMS.replace(results_dir=str(tmp_path), **schedule)
    changes = {k: v for k, v in params.asdict().items() if v != getattr(Params(), k)}
    done = subprocess.run(
        [sys.executable, "-c", LIVES, json.dumps(changes), str(KILLS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    broken = [json.loads(line) for line in done.stdout.splitlines()]
    assert broken[-1]["kills"] >= KILLS
    whole = resolve(params.job_dir)
    wanted = json.loads((whole / "record.json").read_text())
    for run in broken:
        folder = resolve(run["job_dir"])
        assert untimed(json.loads((folder / "record.json").read_text())) == untimed(wanted)
        for name in ("masks.safetensors", "model.safetensors"):
            assert (folder / name).read_bytes() == (whole / name).read_bytes()
        left = {path.name for path in folder.iterdir() if path.name != ".lock"}
        assert left == {"params.json", "record.json", "masks.safetensors", "model.safetensors"}
    weights = load_tensors(whole / "model.safetensors")[0]
    assert weights["conv1.weight"].dtype == torch.float32


class TestWhatHappensToTheDisk:
    @pytest.fixture
    def trained(self, tmp_path, resnet_8):
        params = PARAMS.replace(results_dir=str(tmp_path), epochs=3)
        runs.baseline(params.replace(epochs=1))
        return params

    @pytest.fixture
    def after_an_epoch(self, monkeypatch):
        """Calls what it is given once the first epoch is saved."""

        def after(call):
            original, saved = Folder.save, []

            def save_then_call(*args):
                original(*args)
                saved.append(1)
                if len(saved) == 1:
                    call()

            monkeypatch.setattr(folder, "STATE_EVERY_S", 0.0)
            monkeypatch.setattr(Folder, "save", save_then_call)

        return after

    def test_a_full_disk_is_one_line_and_what_was_saved_goes_on(
        self, trained, tmp_path, monkeypatch, after_an_epoch
    ):
        whole = runs.finetune(trained)
        broken = trained.replace(job_dir=str(tmp_path / "broken"))

        def full(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            after_an_epoch(lambda: patch.setattr(os, "fsync", full))
            with pytest.raises(OSError, match=r"cannot write .*state\.safetensors .No space left"):
                runs.finetune(broken)
        state = load_tensors(tmp_path / "broken/state.safetensors")[1]
        assert state["epoch"] == 1
        left = {path.name for path in (tmp_path / "broken").iterdir()}
        assert left == {".lock", "params.json", "state.safetensors"}
        assert untimed(runs.finetune(broken)) == untimed(whole)

    def test_results_that_are_removed_meanwhile_are_made_anew(
        self, trained, tmp_path, after_an_epoch
    ):
        after_an_epoch(lambda: shutil.rmtree(tmp_path / "runs"))
        found = runs.finetune(trained)
        assert len(found["history"]) == 3
        assert (resolve(trained.job_dir) / "model.safetensors").is_file()

    @pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("chattr"), reason="root, no chattr")
    def test_a_folder_that_cannot_be_written_is_one_line_before_any_work(
        self, trained, tmp_path, monkeypatch
    ):
        locked = tmp_path / "locked"
        locked.mkdir()
        if os.geteuid() == 0:  # root may write where modes say no
            if subprocess.run(["chattr", "+i", locked], capture_output=True).returncode:
                pytest.skip("this file system has no immutable folders")
        else:
            locked.chmod(0o500)
        monkeypatch.setattr(loop, "train", None)
        try:
            with pytest.raises(OSError, match=r"cannot write .*locked"):
                runs.finetune(trained.replace(job_dir=str(locked / "job")))
        finally:
            if os.geteuid() == 0:
                subprocess.run(["chattr", "-i", locked], check=True)
