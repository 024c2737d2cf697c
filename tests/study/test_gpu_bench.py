"""`explib bench gpu`, rehearsed on a CPU, where recorded steps are the steps themselves."""

import json

import pytest

from explib.study.bench import gpu
from explib.training import loop


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


def test_an_error_in_a_run_is_not_swallowed(small, monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("out of memory")
        yield

    monkeypatch.setattr(gpu, "_epochs", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        gpu.at_once(gpu.load_data(small), small.replace(device="cpu"), 2)
