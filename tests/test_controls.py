"""The controls before fine-tuning, on a small network and few images."""

import json

import pytest

from explib import controls, runs
from explib.params import Params


def test_every_criterion_at_every_cut(tmp_path, monkeypatch, resnet_8):
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
    small = {"arch": "resnet_56", "limit_train": 64, "limit_test": 40, "results_dir": str(tmp_path)}
    runs.baseline(Params(**small, epochs=1, batch_size=32))
    rates = controls.published()["rows"].assign(compress_rate="[0.5]")
    monkeypatch.setattr(controls, "published", lambda: {"rows": rates})
    monkeypatch.setattr(controls, "RESULT", tmp_path / "controls.json")
    rows = controls.measure(small, seeds=2)
    assert len(rows) == 3 * len(controls.CRITERIA)
    assert [len(row["top1"]) for row in rows[:8]] == [2, 2, 2, 2, 2, 2, 1, 1]
    assert all(0 <= value <= 100 for row in rows for value in row["top1"])
    kernels = {row["macs_left"] for row in rows if row["pruning_way"] in ("B", "random", "l1")}
    assert len(kernels) == 1  # equal kernels pruned per layer
    assert json.loads((tmp_path / "controls.json").read_text())["rows"] == rows
