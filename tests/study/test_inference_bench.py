"""What the benchmark makes of its measurements: speeds themselves are not tested."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("torch_pruning")

from explib import engine
from explib.engine import build
from explib.pruning import checkpoints, counting, criteria, filters
from explib.pruning import masks as masking
from explib.pruning.layers import find_convs
from explib.report import figures, inference_plots, speed_tables
from explib.study.bench import inference
from explib.study.records import machine
from tests.conftest import ROOT, image, needs_compiler

SPEEDS = {"eager fp32": 100.0, "compiled fp32": 200.0, "compiled bf16": 400.0}
ENGINE = {"engine fp32": 800.0, "engine fp16": 1000.0}
NETWORK = {
    "arch": "resnet_56", "cut_pct": 71.48, "batch": 128, "images_per_s": SPEEDS | ENGINE,
}  # fmt: skip


def sweep(*speeds: float) -> list[dict]:
    """Made-up rows of bench.by_density at 0.1, 0.2 and so on."""
    return [
        {"density": (i + 1) / 10, "images_per_s": {"engine fp32": speed}}
        for i, speed in enumerate(speeds)
    ]


def test_the_crossover_lies_between_its_neighbours_in_seconds_per_image():
    # 1/100 s lies halfway between 1/200 and 3/200 s, so halfway between 0.2 and 0.3
    assert inference.crossover(sweep(400, 200, 200 / 3), "engine fp32", 100.0) == pytest.approx(
        0.25
    )
    assert inference.crossover(sweep(400, 200, 150), "engine fp32", 100.0) is None


def test_ways_take_turns_and_the_median_of_their_calls_counts(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(inference, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def way(name, *took):
        took = iter((0, 0, *took))  # two to warm up

        def forward(images):
            calls.append(name)
            now[0] += next(took)

        return name, forward

    ways = [way("a", 1, 2, 4, 8, 16), way("b", *[3] * 5), way("b", *[2] * 5)]
    speeds = inference.images_per_s(ways, [0] * 12, seconds=0)
    assert speeds == {"a": pytest.approx(12 / 4), "b": pytest.approx(12 / 2)}
    assert calls[6:] == ["a", "b", "b"] * 5
    assert inference.images_per_s([], [0]) == {}


def test_a_turn_holds_as_many_calls_as_fit(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(inference, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(inference, "TURN", 1.0)

    def forward(images):
        calls.append(now[0])
        now[0] += 0.25

    inference.images_per_s([("a", forward), ("b", forward)], [0], seconds=0)
    assert len(calls) == 4 + 2 * 8  # two turns of four calls for each, and the warm-up


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("arch", inference.NETWORKS)
def test_what_is_timed_stays_within_16_bits(arch, dtype):
    if not build.computes(build.library(), dtype):
        pytest.skip(f"this processor does not compute in {dtype}")
    fast = engine.compile(
        inference.fresh(arch), torch.zeros(1, 3, 32, 32), dtype=dtype, fallback=False
    )
    assert fast.report["dtype"] == str(dtype).removeprefix("torch.")


@needs_compiler
def test_what_torch_compiles_answers_as_the_network_does():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()).eval()
    images = torch.randn(4, 3, 8, 8)
    torch._dynamo.reset()
    found = inference.compiled(model, images, torch.float32)
    assert len(found) == 2  # both memory formats
    with torch.no_grad():
        for forward in found:
            torch.testing.assert_close(forward(images), model(images), rtol=1e-4, atol=1e-5)


@needs_compiler
def test_networks_of_each_kind_run_as_they_run_best(tmp_path):
    model = inference.fresh("resnet_56")
    convs = find_convs(model, image(32))
    chosen = {
        "dense": {},
        "kernels": criteria.prune(model, None, 0.5, "B", convs=convs),
        "filters": filters.filter_masks(
            model, image(32), counting.macs(model, image(32))["dense"] // 2, convs
        ),
    }
    for name, masks in chosen.items():
        meta = {"arch": "resnet_56", "num_classes": 10, "name": name, "top1": 90.0}
        path = tmp_path / f"checkpoints/cifar10/{name}.safetensors"
        pruned = copy.deepcopy(model)
        masking.apply(pruned, masks)
        checkpoints.save(path, pruned, masks, meta)
    rows = {row["name"]: row for row in inference.shipped(4, 0.0, ["eager fp32"], tmp_path)}
    assert all(row["kind"] == name for name, row in rows.items()) and len(rows) == 3
    assert "eager fp32" in rows["dense"]["images_per_s"]
    assert {"engine fp32", "eager fp32"} <= set(rows["filters"]["images_per_s"])
    assert "eager fp32" not in rows["kernels"]["images_per_s"]
    assert rows["filters"]["cut_pct"] == pytest.approx(50, abs=1)
    only = inference.shipped(4, 0.0, [], tmp_path, ["kernels"])
    assert [row["name"] for row in only] == ["kernels"]
    with pytest.raises(ValueError, match="no network 'kernel'; known: dense, filters, kernels"):
        inference.shipped(4, 0.0, [], tmp_path, ["kernel"])


def test_speeds_in_the_table_are_those_of_the_record(tmp_path):
    assert speed_tables.speed(tmp_path).empty
    (tmp_path / "bench").mkdir()
    made = {"provenance": {"hardware": {"name": "AMD EPYC Processor (2 cores)"}}}
    path = tmp_path / f"bench/runtime-{machine(made['provenance']['hardware']['name'])}.json"
    path.write_text(json.dumps(made | {"networks": [NETWORK]}))
    row = speed_tables.speed(tmp_path).iloc[0]
    assert path.name == "runtime-amd-epyc.json" and row["hardware"] == "AMD EPYC (2 cores)"
    assert (row["network"], row["MACs cut %"]) == ("ResNet-56", "71.5")
    assert row["engine 16 bits"] == "1000 fp16"
    assert row["engine fp32 / eager fp32"] == "8.0"
    assert row["engine fp32 / compiled fp32"] == "4.0"
    assert row["engine, best / compiled bf16"] == "2.5"


def test_the_best_alternative_is_the_fastest_dense_one_of_the_record_with_the_most_ways(tmp_path):
    assert speed_tables.alternatives(tmp_path).empty
    (tmp_path / "bench").mkdir()

    def write(name, created, images_per_s):
        hardware = {"name": f"{name} Processor (2 cores)"}
        row = NETWORK | {"label": "ResNet-56", "images_per_s": images_per_s}
        made = {"provenance": {"created": created, "hardware": hardware}, "networks": [row]}
        (tmp_path / f"bench/inference-{name}.json").write_text(json.dumps(made))

    write("old", "2026-01-01", {"compiled fp32": 1.0, "engine fp32": 9.0})
    found = {"eager fp32": 900.0, "compiled fp32": 200.0, "compiled bf16": 300.0}
    found |= {"openvino fp32": 400.0, "openvino int8": 800.0, "engine bf16": 1000.0}
    found |= {"onnxruntime fp32": 350.0, "filters openvino fp32": 950.0}
    found |= {"filters openvino int8": 1900.0, "engine int8": 2000.0}
    write("new", "2026-02-01", found)
    (line,) = speed_tables.alternatives(tmp_path).to_dict("records")
    assert line["torch.compile, dense"] == "300 bf16" and line["OpenVINO, dense"] == "400 fp32"
    assert line["OpenVINO int8, dense"] == "800" and line["engine, pruned"] == "1000 bf16"
    assert line["ONNX Runtime, dense"] == "350 fp32" and line["OpenVINO, filters"] == "950 fp32"
    assert line["OpenVINO int8, filters"] == "1900" and line["engine int8, pruned"] == "2000"
    assert line["gain over int8"] == "2.5"
    assert line["gain"] == "2.5" and line["hardware"] == "new (2 cores)"
    write("newer", "2026-03-01", found | {"engine bf16": 1200.0})
    (line,) = speed_tables.alternatives(tmp_path).to_dict("records")
    assert line["engine, pruned"] == "1200 bf16" and line["hardware"] == "newer (2 cores)"
    write("newest", "2026-04-01", {"eager fp32": 900.0, "engine fp32": 1000.0})  # of fewer types
    (line,) = speed_tables.alternatives(tmp_path).to_dict("records")
    assert line["hardware"] == "newer (2 cores)"
    for name in ("old", "new", "newer"):
        (tmp_path / f"bench/inference-{name}.json").unlink()
    (line,) = speed_tables.alternatives(tmp_path).to_dict("records")
    assert line["torch.compile, dense"] == line["OpenVINO, dense"] == "not measured yet"
    assert line["gain"] == "" and line["engine int8, pruned"] == "not measured yet"


def test_shipped_networks_and_densities_are_those_of_the_record(tmp_path):
    assert speed_tables.shipped(tmp_path).empty and speed_tables.density(tmp_path).empty
    (tmp_path / "bench").mkdir()
    row = {"name": "net-B", "kind": "kernels", "cut_pct": 71.48, "top1": 93.2}
    for name, way in (("a", "engine bf16"), ("b", "engine fp16")):
        made = {
            "shipped": [row | {"images_per_s": {way: 100.4}}],
            "density": [{"density": 0.5, "images_per_s": {way: 200.6}}],
            "provenance": {"hardware": {"name": name}},
        }
        (tmp_path / f"bench/runtime-{name}.json").write_text(json.dumps(made))
    table = speed_tables.shipped(tmp_path).fillna("")
    assert table.columns[-1] == "hardware"
    assert list(table["engine bf16"]) == ["100", ""] and list(table["top-1"]) == ["93.20"] * 2
    table = speed_tables.density(tmp_path).fillna("")
    assert list(table["engine fp16"]) == ["", "201"] and list(table["density"]) == ["0.5"] * 2


def test_answers_in_the_table_are_counted_from_the_record(tmp_path):
    assert speed_tables.exactness(tmp_path).empty
    (tmp_path / "bench").mkdir()

    def row(network, way, top1, differ=0, rechecked_pct=0.0):
        return dict(network=network, way=way, top1=top1, recorded=90.0, differ=differ,
                    rechecked_pct=rechecked_pct)  # fmt: skip

    rows = [row("a", "torch fp32", 90.0), row("b", "torch fp32", 91.0)]
    rows += [row("a", "engine bf16", 90.05, 20), row("b", "engine bf16", 90.9, 30)]
    rows += [row("a", "engine bf16, rechecked", 90.0, 1, 1.0)]
    rows += [row("b", "engine bf16, rechecked", 91.01, 2, 2.0)]
    made = {"rows": rows, "provenance": {"hardware": {"name": "AMD EPYC Processor"}}}
    (tmp_path / "bench/accuracy-amd-epyc.json").write_text(json.dumps(made))
    first, second = speed_tables.exactness(tmp_path).to_dict("records")
    assert first["computed in"] == "engine bf16" and first["networks"] == "2"
    assert (first["top-1 off by at most"], first["on the mean"]) == ("0.10", "-0.025")
    assert (first["other answers, at most"], second["other answers, at most"]) == ("30", "2")
    assert second["computed twice %"] == "1.5" and second["speed %"] == ""
    shipped = [
        {"images_per_s": {"engine bf16": 100.0, "engine bf16, rechecked": share}}
        for share in (95.0, 90.0, 80.0)
    ]
    (tmp_path / "bench/runtime-amd-epyc.json").write_text(
        json.dumps({"shipped": shipped, "networks": [], "provenance": made["provenance"]})
    )
    assert list(speed_tables.exactness(tmp_path)["speed %"]) == ["", "90"]


def test_bars_show_the_speeds_and_a_missing_one_is_no_bar():
    rows = [NETWORK, NETWORK | {"batch": 1, "images_per_s": SPEEDS}]
    left, right = inference_plots.speeds(rows).axes
    assert [bar.get_width() for bar in left.patches] == [100, 200, 400, 800, 1000]
    assert [bar.get_width() for bar in right.patches] == [100, 200, 400, 0, 0]


def test_the_density_figure_shows_speed_ups_over_the_right_network():
    axes = inference_plots.by_density(sweep(1000, 400, 100), SPEEDS).axes[0]
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    label = "engine fp32 over compiled fp32: even at 0.23"
    assert drawn[label] == [5, 2, 0.5]
    only = inference_plots.by_density(sweep(1000, 400, 200), {"eager fp32": 100.0}).axes[0]
    assert "engine fp32 over eager fp32: at least 2.0" in {x.get_label() for x in only.lines}


@pytest.mark.parametrize("path", sorted((ROOT / "results/bench").glob("runtime-*.json")))
def test_the_committed_record_draws(path):
    record = json.loads(path.read_text())
    names = path.stem.removeprefix("runtime-")
    drawn = inference_plots.figures(record)
    assert list(drawn) == [
        f"{title}-{names}" for title in ("speed", "speed_vs_density", "accuracy_vs_speed")
    ]
    assert all(f.axes[0].get_xlabel() and figures.what_to_see(n) for n, f in drawn.items())
    assert record["provenance"]["git_dirty"] is False


def test_of_networks_alike_the_faster_one_is_named():
    def row(name, top1, speed):
        return dict(name=name, arch="resnet_56", top1=top1, cut_pct=50.0, kind="kernels",
                    images_per_s={"engine fp32": speed})  # fmt: skip

    rows = [row("a", 92.0, 1000.0), row("b", 92.0, 1010.0), row("c", 91.0, 1020.0)]
    rows += [row("d", 90.0, 2000.0)]
    names = [text.get_text() for text in inference_plots.accuracy_vs_speed(rows).axes[0].texts]
    assert names == ["b", "d"]
