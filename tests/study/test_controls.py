"""The controls before fine-tuning, on a small network and few images."""

import json

import pytest
import torch

from explib import registry
from explib.errors import ParamError
from explib.params import Params
from explib.study import controls, runs


def peak(layer):
    return layer.weight.abs().amax((2, 3))


def test_every_criterion_at_every_cut(tmp_path, monkeypatch, resnet_8):
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
    small = {"arch": "resnet_56", "limit_train": 64, "limit_test": 40, "results_dir": str(tmp_path)}
    runs.baseline(Params(**small, epochs=1, batch_size=32))
    rates = controls.published()["rows"].assign(compress_rate="[0.5]")
    monkeypatch.setattr(controls, "published", lambda: {"rows": rates})
    own = f"{__name__}:peak"
    rows = list(controls.measure(small, tmp_path, seeds=2, more=[own]))
    settings = [row for row in rows if row["changed"]]
    binary = [row for row in settings if row["changed"] == "binary_floor True"]
    assert binary == []  # half of the kernels of each conv: 0.4 is 0.4 in binary, too
    assert len(settings) == 2 * len(controls.SETTINGS)
    assert {row["cut_pct"] for row in settings} == {71.9}
    rows = [row for row in rows if not row["changed"]]
    assert len(rows) == 3 * (len(registry.variants()) + 1)
    chance = [len(row["top1"]) for row in rows[:12]]  # the last one: what nobody knows may draw
    assert chance == [2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 2] and rows[11]["pruning_way"] == own
    assert all(0 <= value <= 100 for row in rows for value in row["top1"])
    assert {row["cut_pct"] for row in rows if "top1_as_was" in row} == {71.9}
    kernels = [row for row in rows if row["pruning_way"] in ("B", "random", "l1", "matched")]
    assert len({row["macs_left"] for row in kernels}) == 1  # equal kernels pruned per layer
    kept = {(row["pruning_way"], row["survivors"]): row["norm_kept_pct"] for row in rows}
    assert kept["random", ""] < kept["B", "random"] < kept["B", "l1"] < kept["l1", ""]
    assert abs(kept["matched", ""] - kept["B", "random"]) < 2
    written = json.loads((tmp_path / "bench/controls-resnet_56.json").read_text())["rows"]
    assert written == rows + settings
    monkeypatch.setattr(controls, "_before", None)  # what is there is not measured again
    assert list(controls.measure(small, tmp_path, more=[own])) == written
    runs.baseline(Params(**small, epochs=1, batch_size=32, seed=1))  # another dense network
    with pytest.raises(TypeError, match="not callable"):
        next(controls.measure(small, tmp_path))


def test_a_network_without_controls_is_named():
    assert controls.start_of("vgg_16_bn")["dataset"] == "cifar10"
    with pytest.raises(ParamError, match="arch: 'lenet' has no controls; known: resnet_56, vgg"):
        controls.start_of("lenet")


def test_the_norm_kept_is_a_mean_over_convs(net):
    with torch.no_grad():
        net[3].weight.fill_(1.0)
        net[6].weight.zero_()[:, 0] = 2.0
    masks = {"3": torch.zeros(6, 8, dtype=torch.bool), "6": torch.ones(8, 6, dtype=torch.bool)}
    masks["3"][:, :2] = True  # a quarter of it, and all of the other
    assert controls.norm_kept(net, masks) == pytest.approx((25 + 100) / 2)


def test_the_published_rounding_is_measured_where_it_makes_a_difference():
    plan = controls._plan("resnet_56")
    found = [(cut["cut_pct"], way) for cut, way, _, changed in plan if changed == controls.BINARY]
    assert found == [(53.5, "A"), (53.5, "B"), (60.5, "A"), (60.5, "B")]
    plan = controls._plan("vgg_16_bn")
    assert [cut["cut_pct"] for cut, *_, changed in plan if changed == controls.BINARY] == [53.1] * 2
