"""`explib bench gpu`, rehearsed on a CPU, where recorded steps are the steps themselves."""

import json
import time

import pytest
import torch

from explib.study.bench import gpu
from explib.training import backend, loop


@pytest.fixture
def small(monkeypatch):
    """Two networks' checks and runs at once on digits, in a second or two each."""
    monkeypatch.setattr(gpu, "NETWORKS", ("resnet_56",))
    monkeypatch.setattr(gpu, "AT_ONCE", (2,))
    monkeypatch.setattr(gpu, "SECONDS", 1.0)
    return gpu.usual(dataset="digits", limit_train=64, limit_test=32, batch_size=32)


def test_checks_and_speeds_are_written_and_not_measured_again(small, tmp_path):
    rows = list(gpu.measure(small, tmp_path))
    assert [row["part"] for row in rows] == ["recorded", "resumed", 2]
    for row in rows[:2]:
        assert row["largest_difference"] == row["of_two_equal_runs"] == 0  # on a CPU, to the bit
    assert rows[2]["at_once"] == 2 and rows[2]["images_per_s"] > 0
    assert rows[2]["trained_by"] in ("surviving kernels", "fused passes", "eager")
    assert rows[2]["precision"] in ("fp32", "bf16") and rows[2]["batch_size"] == 32
    (path,) = (tmp_path / "bench").glob("gpu-*.json")
    assert json.loads(path.read_text())["rows"] == rows
    assert list(gpu.measure(small, tmp_path)) == []


def test_a_recorded_step_that_does_something_else_is_told(small, monkeypatch):
    def wrong(step, model, optimizer, parts):
        def replay(chosen):
            optimizer.param_groups[0]["lr"] *= 2
            return step(chosen)

        return replay

    monkeypatch.setattr(loop, "recorded", wrong)
    monkeypatch.setattr(loop, "_on_gpu", lambda data: True)
    monkeypatch.setattr(loop, "_optimizer", _on_the_cpu(loop._optimizer))
    data = gpu.load_data(small)
    found = gpu.recorded_as_eager(data, small.replace(device="cpu", arch="resnet_56"), steps=4)
    assert found["largest_difference"] > 1e-3 > found["of_two_equal_runs"]


def _on_the_cpu(make):
    """An optimizer whose learning rate is a number, as the fused one of a CPU needs it."""

    def made(*args):
        optimizer = make(*args)
        for group in optimizer.param_groups:
            group["lr"] = float(group["lr"])
        return optimizer

    return made


def test_steps_are_compared_with_deterministic_convolutions(small, monkeypatch):
    seen = []
    monkeypatch.setattr(gpu, "_difference", lambda *_: seen.append(deterministic()))
    monkeypatch.setattr(gpu, "_trained", lambda *_: seen.append(deterministic()))
    for before in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", before)
        gpu.recorded_as_eager(gpu.load_data(small), small)
        assert seen == [True, True, True, before]
        seen.clear()


def deterministic():
    return torch.backends.cudnn.deterministic


@pytest.mark.parametrize(
    ("ends", "first", "last", "wanted"),
    [
        ([(10.0, 100), (20.0, 1000)], 12.0, 15.0, 300.0),  # both within one epoch of 100 images/s
        ([(10.0, 100), (12.0, 100), (20.0, 200)], 11.0, 16.0, 150.0),  # 1 s of 50, 4 s of 25
        ([(10.0, 7), (12.0, 100), (14.0, 300), (15.0, 80)], 11.5, 14.25, 345.0),  # 25 + 300 + 20
        ([(10.0, 7), (12.0, 100), (14.0, 300)], 10.0, 14.0, 400.0),  # what the first had is before
    ],
)
def test_images_are_counted_by_the_share_of_an_epoch(ends, first, last, wanted):
    assert gpu.images_between(first, last, ends) == pytest.approx(wanted)


@pytest.mark.parametrize(("first", "last"), [(9.0, 11.0), (11.0, 13.0)])
def test_images_outside_the_epochs_known_are_not_guessed(first, last):
    with pytest.raises(ValueError, match=r"epochs ended from 10\.0 to 12\.0, not"):
        gpu.images_between(first, last, [(10.0, 7), (12.0, 100)])


def test_runs_go_on_until_each_has_ended_an_epoch_after_the_count(small, monkeypatch):
    """Two runs, of 100 images in 0.5 s and in 0.1 s, counted for 0.3 s from the first 0.5 s on."""
    lengths, ended = [0.5, 0.1], {0.5: [], 0.1: []}

    def epochs(*_):
        seconds = lengths.pop()

        def entries():
            while True:
                with gpu.turns.passed():
                    time.sleep(seconds)
                ended[seconds].append(time.perf_counter())
                yield {"images_per_s": 100 / seconds, "seconds": seconds}, {}

        return backend.Backend(None, "eager", "bf16"), entries()

    monkeypatch.setattr(gpu, "_epochs", epochs)
    monkeypatch.setattr(gpu, "SECONDS", 0.3)
    found = gpu.at_once(gpu.load_data(small), small.replace(device="cpu"), 2)
    assert (found["trained_by"], found["precision"]) == ("eager", "bf16")
    assert 600 < found["images_per_s"] < 1250  # 200 and 1000 where nothing else runs
    assert ended[0.1][-1] > ended[0.5][1]  # or the long epoch would have had the machine alone


def test_an_error_in_a_run_is_not_swallowed(small, monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu, "_epochs", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        gpu.at_once(gpu.load_data(small), small.replace(device="cpu"), 2)
