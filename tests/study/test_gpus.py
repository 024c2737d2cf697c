"""GPUs, by name only: no GPU is needed to hand each job its own."""

import os
import threading

import pytest

from explib.study import gpus


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Locks of this test's own, no GPU named by the environment, no nvidia-smi."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


def nvidia_smi(folder, script):
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_found_are_those_of_nvidia_smi(tmp_path):
    assert gpus.visible() == []
    nvidia_smi(tmp_path, "echo GPU-1a; echo GPU-2b")
    assert gpus.visible() == ["GPU-1a", "GPU-2b"]
    nvidia_smi(tmp_path, "echo 'Failed to initialize NVML'; exit 9")
    assert gpus.visible() == []


def test_found_keeps_to_what_the_environment_names(tmp_path, monkeypatch):
    nvidia_smi(tmp_path, "echo GPU-1a")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert gpus.visible() == ["2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus.visible() == []


def test_the_choice_of_a_scheduler_is_left_alone(tmp_path, monkeypatch):
    nvidia_smi(tmp_path, "echo GPU-1a")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with gpus.taken(gpus.visible()) as own:
        assert own is None and os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_each_takes_another_and_the_one_too_many_waits_for_the_first_that_comes_free(capsys):
    names, third = ["0", "1"], []

    def wait():
        with gpus.taken(names) as own:
            third.append(own)

    with gpus.taken(names) as first:
        with gpus.taken(names) as second:
            assert {first, second} == set(names)
            late = threading.Thread(target=wait)
            late.start()
            late.join(0.2)
            assert third == []
        late.join(20)
        assert third == [second]
    assert capsys.readouterr().err == "all GPUs (0, 1) are taken; waiting for one\n"


def test_without_gpus_there_is_none_to_take():
    with gpus.taken([]) as own:
        assert own is None
