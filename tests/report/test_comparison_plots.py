"""Criteria against each other: what stands in which panel and on which line."""

import pytest

from explib.report import comparison_plots
from explib.study import records
from tests.report.test_tables import record


def drawn(folder, figure, arch="resnet_56"):
    return getattr(comparison_plots, figure)(records.frame(records.read_all(folder)), arch)


def labels_of(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def marks_of(axes):
    """{height: place} of the criteria of a panel."""
    marks = [line for line in axes.lines if line.get_marker() == "o"]
    return {float(line.get_ydata()[0]): float(line.get_xdata()[0]) for line in marks}


def test_a_comparison_needs_two(tmp_path):
    record(tmp_path, 92.0)
    assert drawn(tmp_path, "criteria") is None
    record(tmp_path, 91.0, pruning_way="random")
    (axes,) = drawn(tmp_path, "criteria").axes
    assert labels_of(axes) == ["random kernels", "B, random survivors"]


def test_criteria_are_compared_after_as_many_epochs(tmp_path):
    record(tmp_path, 92.0)
    record(tmp_path, 91.0, pruning_way="random")
    record(tmp_path, 93.0, epochs=20)
    (axes,) = drawn(tmp_path, "criteria").axes
    assert marks_of(axes) == {0: 91, 1: 92}
    record(tmp_path, 92.5, epochs=20, pruning_way="random")  # as many criteria, more epochs
    (axes,) = drawn(tmp_path, "criteria").axes
    assert marks_of(axes) == {0: 92.5, 1: 93}


def test_a_criterion_has_its_line_in_the_panels_of_all_lengths(tmp_path):
    few, many = {"random": 88.0, "B": 90.0, "l1": 89.0, "bn": 87.0}, {"l1": 93.0, "random": 92.0}
    for way, top1 in few.items():
        record(tmp_path, top1, pruning_way=way, epochs=5)
    for way, top1 in {**many, "B": 92.5}.items():
        record(tmp_path, top1, pruning_way=way, epochs=50)
    record(tmp_path, 91.0, pruning_way="random", epochs=5, seed=1)
    left, right = drawn(tmp_path, "criteria").axes
    # by the longest fine-tuning, and below them what was not run so long
    assert labels_of(left) == [
        "lowest-γ filters", "random kernels", "B, random survivors", "L1 kernels"
    ]  # fmt: skip
    assert marks_of(left) == {0: 87, 1: 89.5, 2: 90, 3: 89}
    assert marks_of(right) == {1: 92, 2: 92.5, 3: 93}
    assert left.get_title(loc="left") == "53.5 % (truly 50.0): 5 epochs, one seed"
    assert right.get_title(loc="left") == "53.5 % (truly 50.0): 50 epochs, one seed"
    assert "89.50 (n=2)" in [text.get_text() for text in left.texts]


def test_what_longer_fine_tuning_brings_is_drawn_for_what_was_run_twice(tmp_path):
    record(tmp_path, 90.0)
    record(tmp_path, 91.0, pruning_way="random")
    assert drawn(tmp_path, "lengths") is None
    record(tmp_path, 92.0, epochs=40)
    figure = drawn(tmp_path, "lengths")
    (axes,) = figure.axes
    ours, *published = [line for line in axes.lines if line.get_marker() in "oD"]
    assert list(zip(*ours.get_data(), strict=True)) == [(10, 90), (40, 92)]
    # 55 convs of 30 epochs each, and the published top-1 of ways A and B
    ends = [(*line.get_xdata(), *line.get_ydata()) for line in published]
    assert ends == [(1650, 93.54), (1650, 93.82)]
    assert [text.get_text() for text in axes.texts] == ["dense 93.00"]
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["B, random survivors", "way A, published", "way B, published"]


def test_differences_have_an_interval_and_their_number_of_seeds(tmp_path):
    for seed, (ours, other) in enumerate(((91.0, 90.0), (93.0, 91.0), (92.0, 89.0))):
        record(tmp_path, ours, seed=seed)
        record(tmp_path, other, seed=seed, pruning_way="random")
    record(tmp_path, 91.5, pruning_way="l1")  # one pair has no interval
    (axes,) = drawn(tmp_path, "differences").axes
    assert labels_of(axes) == ["B, random survivors"]
    assert [text.get_text() for text in axes.texts] == ["n=3"]
    assert axes.get_title(loc="left") == "53.5 %, 10 epochs: minus random kernels"
    # 2 ± 4.3027 / sqrt(3), worked out in test_tables
    (bar,) = axes.containers
    assert bar.lines[0].get_xdata() == [2.0]
    ends = bar.lines[2][0].get_segments()[0][:, 0]
    assert [round(end, 2) for end in ends] == [-0.48, 4.48]
    assert drawn(tmp_path, "differences", "vgg_16_bn") is None


@pytest.mark.parametrize("figure", ["criteria", "differences", "lengths"])
def test_they_are_not_much_taller_than_wide(figure):
    for arch in ("resnet_56", "vgg_16_bn"):
        width, height = drawn("results", figure, arch).get_size_inches()
        assert height < 1.4 * width
