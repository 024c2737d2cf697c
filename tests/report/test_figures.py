"""What the records allow is drawn, and nothing that is no result."""

import json

import numpy as np
import pytest
import torch

from explib import models
from explib.pruning import checkpoints
from explib.report import figures, finding, tables
from explib.study import records
from tests.report.test_tables import record


def test_accuracy_is_drawn_at_the_true_cut(tmp_path):
    record(tmp_path, 92.0)
    axes = figures.accuracy_vs_cut(records.frame(records.read_all(tmp_path)), "resnet_56").axes[0]
    stars = [line for line in axes.lines if line.get_marker() == "*"]
    assert [(s.get_xdata()[0], s.get_ydata()[0]) for s in stars] == [(50, 92)]
    assert "B 92.00 (10)" in [text.get_text() for text in axes.texts]


def test_the_finding_needs_several_criteria_at_two_lengths(tmp_path):
    for way, survivors, short, long in (
        ("random", "random", 87.0, 92.0), ("B", "random", 89.0, 92.5), ("l1", "random", 91.0, 93.0)
    ):  # fmt: skip
        record(tmp_path, short, pruning_way=way, survivors=survivors, epochs=5)
        assert finding.draw(records.frame(records.read_all(tmp_path)), "resnet_56") is None
        record(tmp_path, long, pruning_way=way, survivors=survivors, epochs=50)
    record(tmp_path, 89.4, pruning_way="B", epochs=5, seed=1)
    record(tmp_path, 93.5, pruning_way="B", epochs=100)  # one criterion alone
    found = records.frame(records.read_all(tmp_path))
    (axes,) = finding.draw(found, "resnet_56").axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [
        "chance\nrandom kernels",
        "EXP as published\nB, random survivors",
        "magnitude: the largest stay\nL1 kernels",
    ]
    marks = [line for line in axes.lines if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in marks] == [87, 92, 89.2, 92.5, 91, 93]
    assert [line.get_markersize() for line in marks] == [5, 9] * 3
    assert "89.20 (n=2)" in [text.get_text() for text in axes.texts]
    assert "5 epochs (small) and for 50 (large)" in axes.get_title(loc="left")
    assert finding.draw(found, "vgg_16_bn") is None


def test_build_draws_what_the_records_allow(tmp_path):
    assert figures.build(tmp_path, "digits") == []
    record(tmp_path)
    names = {path.stem for path in figures.build(tmp_path, "cifar10")}
    assert names == {
        "published_vs_true",
        "curves-resnet_56",
        "sparsity-made-up",
        "accuracy_vs_cut-resnet_56",
        "accuracy_vs_cut-vgg_16_bn",
    }


def test_scores_and_levels_are_those_of_the_network_that_runs_started_from(tmp_path):
    record(tmp_path)
    model = models.build("resnet_56", 10)
    meta = {"arch": "resnet_56", "num_classes": 10, "normalization": "cifar10"}
    path = tmp_path / "checkpoints/cifar10/resnet_56.safetensors"
    checkpoints.save(path, model, {}, meta, torch.float32)
    params = records.read_all(tmp_path)[0]["params"]
    found = figures._scores(params)
    assert set(found) == {"scores-resnet_56", "levels-resnet_56"}
    medians = found["scores-resnet_56"].axes[0].lines[0].get_ydata()
    second = model.layer1[0].conv1.weight.detach().sum((2, 3)).numpy()
    assert medians[1] == pytest.approx(np.median(second), abs=1e-6)
    assert {"scores-resnet_56", "levels-resnet_56"} <= {
        path.stem for path in figures.build(tmp_path, "cifar10")
    }


def test_where_that_network_is_no_more_or_another_the_other_figures_are_drawn(tmp_path):
    record(tmp_path)
    names = {path.stem for path in figures.build(tmp_path, "cifar10")}
    assert not {name for name in names if name.startswith(("scores", "levels"))}
    assert "accuracy_vs_cut-resnet_56" in names
    model, meta = models.build("resnet_56", 7), {"arch": "resnet_56", "num_classes": 7}
    path = tmp_path / "checkpoints/cifar10/resnet_56.safetensors"
    checkpoints.save(path, model, {}, meta)
    assert {path.stem for path in figures.build(tmp_path, "cifar10")} == names


def test_every_figure_that_is_built_says_what_to_see(tmp_path):
    record(tmp_path, 92.0)
    record(tmp_path, 91.0, pruning_way="random")
    built = {path.stem for path in figures.build(tmp_path, "cifar10")}
    assert "criteria-resnet_56" in built
    assert all(figures.what_to_see(name).endswith(".") for name in built)


def test_a_run_that_diverged_is_in_no_figure(tmp_path):
    record(tmp_path, status="diverged")
    names = {path.stem for path in figures.build(tmp_path, "cifar10")}
    assert not any(name.startswith(("curves", "sparsity", "criteria")) for name in names)
    axes = figures.accuracy_vs_cut(records.frame(records.read_all(tmp_path)), "resnet_56").axes[0]
    assert not [line for line in axes.lines if line.get_marker() == "*"]


def test_nor_is_its_sparsity_drawn_for_that_of_a_finished_run(tmp_path):
    record(tmp_path, seed=1)
    built = {path.name: path.read_bytes() for path in figures.build(tmp_path)}
    path = record(tmp_path, status="diverged", seed=0)
    lost = json.loads(path.read_text())
    lost["layers"][0]["pruned"] = 48
    path.write_text(json.dumps(lost))
    assert {path.name: path.read_bytes() for path in figures.build(tmp_path)} == built


def test_runs_that_prune_as_many_kernels_of_every_layer_share_a_figure(tmp_path):
    record(tmp_path, name="first")
    record(tmp_path, name="second", survivors="l1")
    path = record(tmp_path, name="third", pruning_way="A")
    short = json.loads(path.read_text())
    short["layers"][0]["pruned"] -= 1
    path.write_text(json.dumps(short))
    names = {path.stem for path in figures.build(tmp_path) if path.stem.startswith("sparsity")}
    assert names == {"sparsity-first", "sparsity-third"}


def test_published_cuts_are_drawn_beside_the_true_ones():
    axes = figures.published_vs_true().axes[0]
    lines = {line.get_label(): line.get_xdata() for line in axes.lines}
    table = tables.recount().iloc[::-1]  # that of the README
    assert [f"{cut:.2f}" for cut in lines["true"]] == table["true cut %"].tolist()
    assert [f"{cut:.2f}" for cut in lines["published"]] == table["published cut %"].tolist()


@pytest.mark.parametrize("arch", ["resnet_56", "vgg_16_bn"])
def test_names_of_other_methods_stand_apart(tmp_path, arch):
    record(tmp_path, 93.2, arch=arch)
    figure = figures.accuracy_vs_cut(records.frame(records.read_all(tmp_path)), arch)
    figure.draw_without_rendering()
    names = [text for text in figure.axes[0].texts if text.get_color() == "#555555"]
    boxes = [text.get_window_extent() for text in names]
    pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert len(pairs) > 2 and not any(a.overlaps(b) for a, b in pairs)
