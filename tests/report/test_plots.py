"""Every figure draws from plain data, with its axes named, and is written whole."""

import numpy as np
import pandas as pd
import pytest

from explib.report import plots
from explib.study import records
from tests.report.test_tables import record

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


def test_of_seeds_of_one_name_the_mean_is_drawn_and_where_they_lie(tmp_path):
    for seed, last in enumerate((92.0, 93.0)):
        record(tmp_path, last, epochs=1, seed=seed)
    record(tmp_path, 90.0, epochs=1, pruning_way="random", name="chance")
    axes = plots.curves(records.frame(records.read_all(tmp_path))).axes[0]
    colours = {line.get_ydata()[-1]: line.get_color() for line in axes.lines[:2]}
    assert colours[92.5] != colours[90]
    between = [band.get_paths()[0].vertices for band in axes.collections]
    assert {frozenset(y for x, y in own if x == 1) for own in between} == {
        frozenset((92, 93)), frozenset((90,)),
    }  # fmt: skip
    found = [t.get_text() for t in axes.texts if not t.get_text().startswith("dense")]
    assert sorted(found) == ["chance 90.00", "made-up 92.50"]


def test_the_last_epochs_of_a_long_run_stand_beside_it(tmp_path):
    record(tmp_path, 92.0, epochs=20)
    whole, late = plots.curves(records.frame(records.read_all(tmp_path))).axes
    assert late.get_xlim() == (16, 20) and whole.get_xlim()[0] <= 0
    low, high = late.get_ylim()
    assert whole.get_ylim()[0] < 40 < low < 92 < high
    labels = [t.get_text() for t in late.texts]
    assert labels == ["made-up 92.00"] and "made-up 92.00" not in {
        t.get_text() for t in whole.texts
    }


def test_epochs_of_every_conv_stand_one_after_another(tmp_path):
    record(tmp_path, 92.0, epochs=1, schedule="layerwise", trained=3)
    axes = plots.curves(records.frame(records.read_all(tmp_path))).axes[0]
    assert axes.lines[0].get_xdata().tolist() == [0, 1, 2, 3]


def test_equal_figures_are_equal_files(tmp_path):
    first = [path.read_bytes() for path in plots.save(plots.macs(LAYERS), tmp_path / "a")]
    second = [path.read_bytes() for path in plots.save(plots.macs(LAYERS), tmp_path / "b")]
    assert first == second
    assert first[0].startswith(b"<?xml") and first[1].startswith(b"\x89PNG")


def test_labels_are_kept_apart_as_near_to_their_values_as_that_allows():
    assert plots.apart([], 1, 9) == []
    assert plots.apart([1, 5], 1, 9) == [1, 5]
    assert plots.apart([2, 2, 8], 1, 9) == [1.5, 2.5, 8]  # both give way
    assert plots.apart([8.8, 9], 1, 9) == [8, 9]  # not above the top
