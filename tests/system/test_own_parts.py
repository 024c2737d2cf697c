"""A criterion, a network and a data set of one's own, from outside the package, all the way."""

import json
import sys

import pytest
import torch
from click.testing import CliRunner

import explib
from explib import engine
from explib.__main__ import cli
from explib.params import from_yaml
from explib.pruning import checkpoints
from explib.report import figures, tables, widgets
from explib.study import networks, records, runs, verify
from tests.conftest import ROOT

MINE = """
import torch
from torch import nn
from explib.data import Data, Split

def peak(layer):
    return layer.weight.abs().amax((2, 3))

def small(num_classes):
    first = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)
    last = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)
    return nn.Sequential(*first, nn.Conv2d(8, 8, 3, groups=8), *last)

def stripes(params):
    chance = torch.Generator().manual_seed(0)
    images = torch.randint(0, 99, (96, 1, 12, 16), dtype=torch.uint8, generator=chance)
    images[::2, :, ::2] += 99
    labels = torch.arange(96) % 2
    train, test = (Split(images[part], labels[part]) for part in (slice(64), slice(64, 96)))
    return Data("stripes", train, test, ("striped", "plain"))
"""
YAML = """
arch: my_parts:small
dataset: my_parts:stripes
pruning_way: my_parts:peak
epochs: 2
batch_size: 16
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The YAML file beside a module that Python finds; neither is of the package."""
    (tmp_path / "my_parts.py").write_text(MINE)
    (tmp_path / "mine.yaml").write_text(YAML)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "mine.yaml"
    sys.modules.pop("my_parts", None)


def forget(monkeypatch, folder):
    """From here on the module cannot be imported."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(folder)])
    sys.modules.pop("my_parts", None)


def test_a_whole_run_its_record_tables_and_figures(mine, tmp_path, monkeypatch):
    results, name = str(tmp_path / "results"), "my_parts:stripes"
    params = from_yaml(mine, results_dir=results)
    assert "my_parts" not in sys.modules  # reading is not importing
    dense = runs.baseline(params)
    assert dense["macs"]["dense"] == 8 * 9 * 10 * 14 + 64 * 9 * 8 * 12 + 8 * 9 * 6 * 10 + 8 * 2
    found = runs.finetune(params)
    runs.finetune(params.replace(pruning_way="random"))
    assert runs.finetune(params)["wall_s"] == found["wall_s"]  # not computed again
    assert [row["pruned"] for row in found["layers"]] == [4, 32, 0]
    job = found["params"]["job_dir"]
    state, masks, meta = checkpoints.load(f"{job}/model.safetensors")
    model = checkpoints.load_weights(sys.modules["my_parts"].small(2), state, "mine")
    assert meta["arch"] == "my_parts:small" and int(masks["3"].sum()) == 32
    score = dense_weight(params).abs().amax((2, 3))
    assert score[masks["3"]].min() >= score[~masks["3"]].max()
    assert not model[3].weight[~masks["3"]].any()

    forget(monkeypatch, tmp_path)
    written = records.read_all(results, name)
    assert sorted(r["params"]["pruning_way"] for r in written if r["kind"] == "finetune") == [
        "my_parts:peak",
        "random",
    ]
    made = tables.make(results, name)
    assert set(made["criteria"]["criterion"]) == {"my_parts:peak", "random kernels"}
    assert set(made["baselines"]["network"]) == {"my_parts:small"}
    assert tables.build(results, name)[0].parent.name == "my_parts.stripes"
    drawn = {path.name for path in figures.build(results, name)}
    assert {"criteria-my_parts.small.svg", "curves-my_parts.small.svg"} <= drawn
    assert "my_parts" not in sys.modules


def dense_weight(params):
    return networks.load_dense(params).model[3].weight.detach()


def test_the_command_line_and_the_widgets(mine, tmp_path, monkeypatch):
    words = ["-f", str(mine), f"--results_dir={tmp_path}/results"]
    done = CliRunner().invoke(cli, ["flops", *words])
    assert done.exit_code == 0 and "multiply-adds left" in done.stdout, done.output
    (tmp_path / "wrong.yaml").write_text(YAML.replace("peak", "paek"))
    done = CliRunner().invoke(cli, ["flops", "-f", str(tmp_path / "wrong.yaml"), words[2]])
    assert done.exit_code == 2
    assert "pruning_way: 'my_parts:paek': module my_parts has no paek; did you mean" in done.output
    params = from_yaml(mine, results_dir=str(tmp_path / "results"))
    runs.baseline(params)
    shown, made = [], widgets.widgets.Dropdown
    monkeypatch.setattr(widgets, "display", lambda bundle, raw: shown.append(bundle))
    options = {}
    monkeypatch.setattr(
        widgets.widgets,
        "Dropdown",
        lambda **given: options.update({given["description"]: given["options"]}) or made(**given),
    )
    widgets.masks(params)
    assert shown[0]["image/png"]
    assert options["network"][0] == "my_parts:small" and "my_parts:peak" in options["way"]


def test_registered_they_have_names_labels_and_load(mine, tmp_path, registered):
    import my_parts

    explib.register_criterion("peak", my_parts.peak, label="largest weight", colour="#123456")
    explib.register_network("small", my_parts.small, label="Small", num_classes=2)
    explib.register_dataset("stripes", my_parts.stripes, size=(2, (1, 12, 16)))
    chosen = {"arch": "small", "dataset": "stripes", "pruning_way": "peak", "batch_size": 16}
    params = explib.Params(**chosen, epochs=1, results_dir=str(tmp_path / "results"))
    runs.baseline(params)
    found = runs.finetune(params)
    runs.finetune(params.replace(pruning_way="l1"))
    made = tables.make(params.results_dir, "stripes")
    assert set(made["criteria"]["criterion"]) == {"largest weight", "L1 kernels"}
    assert set(made["criteria"]["network"]) == {"Small"}
    path = f"{found['params']['job_dir']}/model.safetensors"
    model, masks, meta = explib.load_network(path)
    assert meta["dataset"] == "stripes" and not model[3].weight[~masks["3"]].any()


class TestWhatAFileNamesIsNotImported:
    @pytest.fixture
    def trap(self, tmp_path, monkeypatch):
        (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
        monkeypatch.syspath_prepend(tmp_path)
        yield "trap:f"
        assert "trap" not in sys.modules

    @pytest.mark.parametrize("load", [explib.load_network, engine.load])
    def test_by_a_network(self, trap, tmp_path, load):
        path = tmp_path / "a.safetensors"
        meta = {"arch": trap, "num_classes": 10}
        checkpoints.save(path, torch.nn.Conv2d(1, 1, 1), {}, meta)
        with pytest.raises(ValueError, match=r"its arch is 'trap:f'; .* is not imported"):
            load(path)

    def test_by_the_data_set_of_a_network(self, trap, tmp_path):
        meta = {"arch": "resnet_56", "num_classes": 10, "dataset": trap, "normalization": ""}
        path = tmp_path / "a.safetensors"
        checkpoints.save(path, explib.build("resnet_56"), {}, {**meta, "top1": 9.0})
        with pytest.raises(ValueError, match=r"its dataset is 'trap:f'; .* is not imported"):
            verify.verify(path)

    @pytest.mark.parametrize("field", ["arch", "dataset", "pruning_way"])
    def test_by_a_record(self, trap, tmp_path, field):
        record = json.loads(next((ROOT / "results/records/cifar10").glob("finetune-*")).read_text())
        record["params"][field] = trap
        path = records.write(record, tmp_path)
        assert records.read(path)["params"][field] == trap
        tables.build(tmp_path, record["params"]["dataset"])
        assert figures.build(tmp_path, record["params"]["dataset"])
