"""Every figure draws from plain data, with its axes named, and is written whole."""

import numpy as np
import pandas as pd
import pytest

from explib import plots, records
from tests.test_tables import record

LAYERS = [
    {"name": f"layer{i}", "kernels": 100, "nominal": 50, "pruned": 50 - i % 7,
     "macs_dense": 1_000_000, "macs": 500_000}
    for i in range(55)
]  # fmt: skip
SCORES = {f"layer{i}": np.random.default_rng(i).normal(size=(8, 9)) for i in range(55)}
FIGURES = {
    "linear_relation": (np.arange(5.0), np.arange(5.0) * 1.1, 0.99, "conv1"),
    "scores": (SCORES,),
    "levels": ({name: np.rint(values).astype(int) for name, values in SCORES.items()},),
    "redundancy": (
        pd.DataFrame({"layer": list("abc"), "kernels": 9, "redundant_pct": 80.0, "levels": 5}),
    ),
    "sparsity": (LAYERS,),
    "macs": (LAYERS,),
    "published_vs_true": (),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figure_names_its_axes(name):
    figure = getattr(plots, name)(*FIGURES[name])
    labels = [axes.get_xlabel() + axes.get_ylabel() for axes in figure.axes]
    assert all(labels) and figure.axes[0].get_title("left")


def test_bars_show_what_was_achieved_and_marks_what_was_asked():
    axes = plots.sparsity(LAYERS).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [50 - i % 7 for i in range(55)]
    marks = axes.collections[0].get_segments()
    assert [mark[0][1] for mark in marks] == [50] * 55


def test_curves_begin_before_fine_tuning_and_end_at_the_result(tmp_path):
    record(tmp_path, 92.0, epochs=1)
    figure = plots.curves(records.frame(records.read_all(tmp_path)))
    line = figure.axes[0].lines[0]
    assert line.get_xdata().tolist() == [0, 1] and line.get_ydata().tolist() == [40, 92]
    assert any("92.00" in text.get_text() for text in figure.axes[0].texts)


def test_accuracy_is_drawn_at_the_true_cut(tmp_path):
    record(tmp_path, 92.0)
    axes = plots.accuracy_vs_cut(records.frame(records.read_all(tmp_path)), "resnet_56").axes[0]
    stars = [line for line in axes.lines if line.get_marker() == "*"]
    assert [(s.get_xdata()[0], s.get_ydata()[0]) for s in stars] == [(50, 92)]
    assert "B, random survivors 92.00" in [text.get_text() for text in axes.texts]


def test_a_comparison_needs_two(tmp_path):
    record(tmp_path, 92.0)
    assert plots.criteria(records.frame(records.read_all(tmp_path)), "resnet_56") is None
    record(tmp_path, 91.0, pruning_way="random")
    figure = plots.criteria(records.frame(records.read_all(tmp_path)), "resnet_56")
    assert [t.get_text().split("\n")[0] for t in figure.axes[0].get_yticklabels()] == [
        "random kernels",
        "B, random survivors",
    ]


def test_equal_figures_are_equal_files(tmp_path):
    first = [path.read_bytes() for path in plots.save(plots.macs(LAYERS), tmp_path / "a")]
    second = [path.read_bytes() for path in plots.save(plots.macs(LAYERS), tmp_path / "b")]
    assert first == second
    assert first[0].startswith(b"<?xml") and first[1].startswith(b"\x89PNG")


def test_build_draws_what_the_records_allow(tmp_path):
    assert plots.build(tmp_path, "digits") == []
    record(tmp_path)
    names = {path.stem for path in plots.build(tmp_path, "cifar10")}
    assert names == {
        "published_vs_true",
        "curves-resnet_56",
        "sparsity-made-up",
        "accuracy_vs_cut-resnet_56",
        "accuracy_vs_cut-vgg_16_bn",
    }


def test_a_run_that_diverged_is_in_no_figure(tmp_path):
    record(tmp_path, 92.0)
    record(tmp_path, 91.0, pruning_way="random")
    built = {path.name: path.read_bytes() for path in plots.build(tmp_path, "cifar10")}
    for seed, way in enumerate(("A", "B", "random", "l1")):
        record(tmp_path, 99.0, "diverged", seed=seed, pruning_way=way, name=f"lost-{way}")
    record(tmp_path, 99.0, "diverged", kind="baseline")
    again = {path.name: path.read_bytes() for path in plots.build(tmp_path, "cifar10")}
    assert again == built


def test_every_figure_that_is_built_says_what_to_see(tmp_path):
    record(tmp_path, 92.0)
    record(tmp_path, 91.0, pruning_way="random")
    built = {path.stem for path in plots.build(tmp_path, "cifar10")}
    assert "criteria-resnet_56" in built
    assert all(plots.what_to_see(name).endswith(".") for name in built)
