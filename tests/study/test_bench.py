"""The benchmarks on toy sizes: that they measure what they say; the time itself is no test."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from explib import models
from explib.data import normalize
from explib.errors import ParamError
from explib.params import Params
from explib.pruning import checkpoints
from explib.rates import number_to_prune
from explib.report import bench_plots, bench_tables
from explib.study import recipes
from explib.study.bench import processes, scoring, training
from tests.conftest import needs_compiler

# The plain loop has the usual number of workers, on however small a machine
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 8 worker")
TINY = {"batch_size": 16, "distill": 0.0, "lr": 0.01, "device": "cpu"}


@pytest.fixture
def images(make_data):
    return make_data(train=64, test=20, size=32)


def test_the_plain_loop_of_scores_prunes_what_it_should():
    assert scoring.plain_loop(torch.randn(12, 10, 3, 3), 0.4, 0.3) == number_to_prune(0.4, 120)


def test_plain_loaders_give_the_images_of_the_study(images):
    train, test = training.plain_loaders(images, 16)
    assert len(train) == 4 and sum(len(labels) for _, labels in train) == 64
    pictures, labels = next(iter(test))
    torch.testing.assert_close(pictures, normalize(images.test.images[:16], images))
    assert torch.equal(labels, images.test.labels[:16])


def test_training_has_a_row_for_each_loop_and_task(images, resnet_8):
    rows = training.training("resnet_56", images, Params(**TINY), rounds=1)
    assert {(r["task"], r["loop"]) for r in rows} == {
        (task, loop) for task in ("train", "evaluate") for loop in ("plain", "ours")
    }
    assert all(row["images_per_s"] > 0 for row in rows)
    losses = [row["loss"] for row in rows if row["task"] == "train"]
    assert losses[0] == pytest.approx(losses[1], rel=0.2)  # as many steps from the same weights


def test_the_machine_is_measured_by_torch_alone(resnet_8, monkeypatch):
    took = iter([9.0, 4.0, 2.0, 1.0, 9.0, 16.0, 8.0, 4.0])
    monkeypatch.setattr(training, "timed", lambda work: (next(took), work()))
    forward, step = training.eager("cpu", batch_size=8, repeats=3)
    assert (forward["task"], forward["images_per_s"]) == ("forward", 8 / 2)  # the first warms up
    assert (step["task"], step["images_per_s"]) == ("step", 8 / 8)
    assert forward["threads"] == torch.get_num_threads() and next(took, None) is None


def test_runs_together_add_up(make_data):
    params = Params(epochs=2, threads=1, **TINY)
    assert (
        training.throughput_of_several("resnet_56", make_data(train=16, test=4, size=32), params, 2)
        > 0
    )


def test_the_speeds_of_runs_together_are_summed(monkeypatch):
    def spawn(work, shared, nprocs, join):
        for number in range(nprocs):
            (Path(shared[-1]) / f"{number}.json").write_text(str(number + 1.5))

    monkeypatch.setattr(training.torch.multiprocessing, "spawn", spawn)
    assert training.throughput_of_several("resnet_56", None, None, 2) == 1.5 + 2.5


def test_processes_are_compared_with_a_linear_growth(tmp_path, resnet_8, monkeypatch):
    speeds = {1: 100.0, 2: 150.0, 4: 200.0}
    monkeypatch.setattr(processes, "images_per_s", lambda count, params: speeds[count])
    monkeypatch.setattr(processes, "RUN", Params(**{**TINY, "epochs": 1, "limit_train": 32}))
    rows = list(processes.measure(results_dir=tmp_path))
    assert [row["efficiency"] for row in rows] == [1.0, 0.75, 0.5]
    assert json.loads((tmp_path / "bench/processes.json").read_text())["rows"] == rows


def test_a_run_that_fails_in_several_processes_is_one_line(monkeypatch):
    monkeypatch.setattr(processes.sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="2 processes: the run failed"):
        processes.images_per_s(2, Params(**TINY))


def test_a_run_under_torchrun_is_timed(tmp_path):
    """As it is: the command line under torchrun, and its JSON."""
    params = processes.RUN.replace(
        batch_size=16, limit_train=16, limit_test=8, epochs=1, bn_images=16,
        results_dir=str(tmp_path), resume=str(tmp_path / "dense.safetensors"),
    )  # fmt: skip
    model = models.build("resnet_56", 10)
    meta = {"arch": "resnet_56", "num_classes": 10}
    checkpoints.save(tmp_path / "dense.safetensors", model, {}, meta)
    assert processes.images_per_s(1, params) > 0


def test_the_training_record_grows_by_row(tmp_path, monkeypatch):
    rows = [row("train", "plain", 200.0), row("train", "ours", 500.0)]
    sparse = {"network": "resnet_56", "pruned_pct": 50.0, "all_kernels": 1.0}
    monkeypatch.setattr(training, "measure", lambda params, rounds: iter(rows))
    monkeypatch.setattr(training, "by_sparsity", lambda arch, params: iter([sparse]))
    monkeypatch.setattr(training, "NETWORKS", ("resnet_56",))
    monkeypatch.setattr(training.sparse_training, "library", lambda: True)
    growing = training.record(Params(**TINY), tmp_path)
    assert next(growing) == rows[0]
    (path,) = tmp_path.glob("bench/training-*.json")
    first = json.loads(path.read_text())
    assert first["rows"] == rows[:1] and first["ratios"] == {}
    assert list(growing) == [rows[1], sparse]
    whole = json.loads(path.read_text())
    assert whole["rows"] == rows and whole["by_sparsity"] == [sparse]
    assert whole["ratios"] == {"resnet_56, train: ours / plain": 2.5}
    assert whole["provenance"]["hardware"]["device"] == "cpu"


def test_what_fails_is_a_row_that_says_why(images, resnet_8, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(training, "throughput", broken)
    rows = list(training.variant("batch 9", images, Params(**TINY)))
    assert [row["error"] for row in rows] == ["out of memory"] * 2


def row(task, loop, speed):
    return {"network": "resnet_56", "task": task, "loop": loop, "images_per_s": speed}


def test_ratios_by_hand():
    rows = [row("train", "plain", 200.0), row("train", "ours", 500.0), row("evaluate", "plain", 9)]
    assert training.ratios(rows) == {"resnet_56, train: ours / plain": 2.5}


def test_the_table_has_a_line_for_each_pair(tmp_path):
    rows = [row("train", "plain", 200.0), row("train", "ours", 500.0), row("train", "other", 1.0)]
    rows = [{**r, "precision": "bf16", "batch_size": 128} for r in rows]
    record = {"rows": rows, "provenance": {"hardware": {"name": "abacus"}}}
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/training-cpu.json").write_text(json.dumps(record))
    (line,) = bench_tables.training(tmp_path).to_dict("records")
    assert (line["network"], line["ratio"], line["hardware"]) == ("ResNet-56", "2.50", "abacus")
    assert bench_tables.training(tmp_path / "none").empty
    assert bench_tables.sparse_training(tmp_path).empty  # measured on other machines only


@needs_compiler
def test_training_by_sparsity_is_measured_shown_and_drawn(tmp_path, resnet_8, monkeypatch):
    monkeypatch.setattr(training, "timed", lambda work: (work() or 0.5, None))
    rows = list(training.by_sparsity("resnet_56", Params(**TINY), [0.5, 0.75], repeats=1))
    assert [row["pruned_pct"] for row in rows] == [50, 75]
    assert rows[0]["all_kernels"] == rows[0]["surviving_kernels"] == 16 / 0.5
    rows[1]["surviving_kernels"] = 96.0
    record = {"rows": [], "by_sparsity": rows, "provenance": {"hardware": {"name": "abacus"}}}
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/training-abacus.json").write_text(json.dumps(record))
    lines = bench_tables.sparse_training(tmp_path).to_dict("records")
    assert [line["ratio"] for line in lines] == ["1.00", "3.00"]
    assert lines[1]["kernels pruned %"] == "75" and lines[1]["hardware"] == "abacus"
    axes = bench_plots.sparse_training(record).axes[0]
    assert [text.get_text() for text in axes.texts] == ["1.0×", "3.0×"]
    assert bench_plots.sparse_training({"rows": []}) is None


def control(cut, way, survivors, top1, kept=50.0, changed=""):
    return {
        "arch": "resnet_56", "cut_pct": cut, "pruning_way": way, "survivors": survivors,
        "changed": changed, "top1": top1, "top1_as_was": [10.0], "norm_kept_pct": kept,
    }  # fmt: skip


def test_controls_have_a_column_for_each_cut(tmp_path):
    rows = [
        control(53.5, "B", "l1", [80.0, 82.0, 84.0]),
        control(60.5, "B", "l1", [70.0]),
        control(71.9, "B", "l1", [50.0, 50.0, 50.0], 62.44),
        control(53.5, "random", "", [20.0]),
        control(71.9, "B", "l1", [55.0], changed="groups 1"),
    ]
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/controls-resnet_56.json").write_text(json.dumps({"rows": rows}))
    chance, ours = bench_tables.controls(tmp_path).fillna("").to_dict("records")
    assert (chance["criterion"], chance["lowest cut"]) == ("random kernels", "20.00")
    assert (ours["lowest cut"], ours["highest cut"]) == ("82.00 ± 2.00", "50.00 ± 0.00")
    assert ours["there, statistics as they were"] == "10.00"
    assert (ours["squared weights left %"], chance["highest cut"]) == ("62.4", "")
    usual, one = bench_tables.settings(tmp_path).to_dict("records")
    assert usual["B, L1 survivors"] == "50.00 ± 0.00"
    assert (one["setting"], one["B, L1 survivors"]) == ("groups 1", "55.00")


class TestFigures:
    def test_speed_says_both_figures_and_their_ratio(self):
        record = {
            "rows": [row("train", "plain", 200.0), row("train", "ours", 500.0)],
            "provenance": {"hardware": {"name": "a machine"}},
        }
        (axes,) = bench_plots.training_speed(record).axes
        texts = [text.get_text().strip() for text in axes.texts]
        assert texts == ["plain loop 200", "ours 500, 2.5 times"]

    def test_controls_join_the_cuts_of_a_criterion(self):
        rows = [
            control(71.9, "B", "l1", [50.0], 60.0),
            control(53.5, "B", "l1", [80.0, 82.0], 80.0),
        ]
        (axes,) = bench_plots.controls({"rows": rows}).axes
        (line,) = axes.lines
        assert line.get_xydata().tolist() == [[60.0, 50.0], [80.0, 81.0]]

    def test_recipes_are_sorted(self):
        rows = [{"recipe": name, "last": top1} for name, top1 in (("a", 80.0), ("ours", 85.0))]
        record = {"rows": rows[::-1], "pruned": {"validation": 10_000, "epochs": 2}}
        (axes,) = bench_plots.recipes(record).axes
        assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "ours"]


def test_recipes_are_compared_on_a_validation_split(tmp_path, monkeypatch, resnet_8):
    common = {"dataset": "digits", "validation": 100, "limit_train": 64, "limit_test": 40}
    common |= {"epochs": 1, "batch_size": 32, "bn_images": 32}
    setup = {
        "dense": {"name": "dense", **common},
        "pruned": common,
        "recipes": {"ours": {}, "lr": {"lr": 0.01}},
    }
    (tmp_path / "recipes.yaml").write_text(yaml.safe_dump(setup, sort_keys=False))
    compare = partial(recipes.compare, tmp_path / "recipes.yaml", tmp_path)
    rows = list(compare())
    assert [row["changes"] for row in rows] == [{}, {"lr": 0.01}]
    written = json.loads((tmp_path / "bench/recipes.json").read_text())
    assert written["rows"] == rows and written["pruned"]["validation"] == 100
    records = [
        json.loads(p.read_text()) for p in tmp_path.glob("runs/recipes/records/digits/*.json")
    ]
    assert {r["provenance"]["data"]["evaluated_on"] for r in records} == {
        "validation (100 training images)"
    }
    assert list(compare()) == rows  # from the records: nothing is computed again


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "recipes.yaml: cannot be read"),
        ("dense: [", "recipes.yaml: not YAML"),
        ("dense: {}\npruned: {}", "recipes.yaml: has no mapping 'recipes'"),
    ],
)
def test_a_file_that_holds_no_recipes_is_one_line(tmp_path, content, message):
    if content:
        (tmp_path / "recipes.yaml").write_text(content)
    with pytest.raises(ParamError, match=message):
        next(recipes.compare(tmp_path / "recipes.yaml", tmp_path))
