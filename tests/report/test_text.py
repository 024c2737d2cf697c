"""What the command line says of results, on made-up ones."""

import re

from explib.report import text
from tests.conftest import ROOT


def test_what_the_command_line_prints_with_is_there():
    source = (ROOT / "explib/__main__.py").read_text()
    names = re.findall(r"@answer\(\"(\w+)\"", source)
    names += re.findall(r"each\([^\n]*, \"(\w+)\"\)", source)
    assert "gpu" in names and len(names) > 8
    assert [name for name in names if not callable(getattr(text, name, None))] == []


def test_rows_stand_in_columns():
    lines = text.columns([{"layer": "a", "cut": 0.123456}, {"layer": "bb", "cut": 1}]).splitlines()
    assert [line.split() for line in lines] == [
        ["layer", "cut"], ["a", "0.1235"], ["bb", "1"],
    ]  # fmt: skip
    assert len({len(line) for line in lines}) == 1


def test_what_pruning_leaves_is_in_per_cent_of_equal_units():
    layer = {"name": "a", "kernels": 8, "nominal": 4, "pruned": 3}
    layer |= {"macs_dense": 8_000_000, "macs": 5_000_000}
    counts = {
        "layers": [layer],
        "macs": {"dense": 8_000_000, "left": 5_000_000, "published_m": 3.8},
        "weights": {"dense": 2_000_000, "left": 1_500_000},
        "sparsity": 3 / 8,
        "nominal_sparsity": 0.5,
    }
    lines = [" ".join(line.split()) for line in text.left(counts).splitlines()]
    assert lines[-5:] == [
        "kernels pruned 37.50 % (asked for: 50.00 %)",
        "multiply-adds left 5.00 of 8.00 M",
        "true cut 37.50 %",
        "published cut 52.50 % (its convention mixes units)",  # 1 - 3.8 / 8
        "weights left 1.500 of 2.000 M",
    ]
    assert text.left(counts | {"masks": "here"}).endswith("masks in here")


def test_a_record_says_its_accuracies_and_where_its_files_are():
    accuracy = {"dense": 93.0, "before": None, "last": 92.5, "best": 92.75, "best_epoch": 3}
    params = {"name": "net-B", "job_dir": "results/runs/net-B"}
    record = {"kind": "finetune", "status": "done", "params": params, "accuracy": accuracy}
    assert [line.split() for line in text.run(record).splitlines()] == [
        ["finetune", "net-B:", "done"],
        ["dense", "93.00", "%"],
        ["last", "92.50", "%"],
        ["best", "92.75", "%"],
        ["files", "in", "results/runs/net-B"],
    ]


def test_the_columns_of_accuracies_stand_below_their_titles():
    row = {"network": "a", "way": "torch fp32", "top1": 90.0, "recorded": 90.0, "differ": 12}
    assert len(text.accuracy(row)) == len(text.ACCURACY)
    assert text.accuracy(row).split()[-3:] == ["90.00", "90.00", "12"]


def test_an_evaluated_network_has_a_line_for_each_type():
    row = {"way": "engine bf16", "top1": 90.0, "recorded": 90.5, "differ": 12, "rechecked_pct": 0}
    head, line = text.evaluated([row]).splitlines()
    assert head.split()[:3] == ["computed", "in", "top-1"]
    assert line.split() == ["engine", "bf16", "90.00", "90.50", "12", "0.0"]


def test_a_benchmark_that_failed_says_so():
    row = {"network": "vgg_16_bn", "task": "train", "loop": "ours, batch 9"}
    assert text.training(row | {"images_per_s": None}).endswith("failed")
    assert text.training(row | {"images_per_s": 1234.5}).split()[-2:] == ["1234", "images/s"]


def test_a_gpu_is_right_and_fast():
    checked = {"network": "resnet_56", "part": "resumed", "largest_difference": 0.0}
    line = text.gpu(checked | {"of_two_equal_runs": 0.25})
    assert line.endswith("that was not: off by 0, two equal runs by 0.25")
    speed = {"network": "vgg_16_bn", "part": 4, "at_once": 4, "images_per_s": 84_341.2}
    line = text.gpu(speed | {"precision": "bf16", "trained_by": "fused passes"})
    assert line == "vgg_16_bn, 4 at once: 84,341 images/s (fused passes, bf16)"
