"""The engine beside OpenVINO, ONNX Runtime and torch.compile, on small networks."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from explib.data import Data, Split
from explib.pruning import masks as masking
from explib.report import bench_plots, inference_tables, text
from explib.study.bench import cases, comparison, inference, peers
from explib.study.records import machine
from tests.conftest import PUBLIC, ROOT, needs_compiler

needs_peers = pytest.mark.skipif(
    bool(peers.lacking()), reason=f"not installed: {', '.join(peers.lacking())}"
)


def small() -> nn.Module:
    """Two convs, the first one's filters free to go."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return inference.with_statistics(nn.Sequential(*layers), torch.randn(8, 3, 8, 8))


def network(**changed) -> cases.Network:
    dense, images = small(), torch.randn(4, 3, 8, 8)
    pruned, masks = cases.at_density(dense, images[:1], 0.5)
    own = cases.Network(dense, pruned, masks, small(), images, list(images.split(2)))
    return replace(own, **changed)


class TestPeers:
    @needs_peers
    def test_every_way_answers_as_torch_does(self, tmp_path):
        own = network()
        others = comparison.Peers(own, tmp_path, comparison.WAYS)
        assert sorted(others.files) == [
            "dense", "filters", "filters openvino int8", "openvino int8",
        ]  # fmt: skip
        for batch in (4, 1):
            images = own.images[:batch]
            with torch.no_grad():
                exact = own.dense(images)
            ways = dict(others.ways(images))
            for name in ("openvino fp32", "onnxruntime fp32", "filters openvino fp32"):
                torch.testing.assert_close(ways[name](images), exact, rtol=1e-4, atol=1e-5)
            for name in ("openvino int8", "filters openvino int8"):
                error = comparison.off(ways[name], own.dense, images)
                assert 1e-5 < error < 0.1  # as coarse as int8 is, and not broken
            if "openvino bf16" in ways:
                assert 1e-5 < comparison.off(ways["openvino bf16"], own.dense, images) < 0.05

    @needs_peers
    def test_int8_is_signed_with_a_scale_for_each_filter(self, tmp_path):
        import onnx

        own = network()
        path = peers.exported(own.dense, own.images, tmp_path / "net.onnx")
        graph = onnx.load(peers.quantized(path, own.calibration)).graph
        weights = {i.name: i for i in graph.initializer}
        signed = [i for i in graph.initializer if i.data_type == onnx.TensorProto.INT8]
        shapes = {tuple(i.dims) for i in signed if len(i.dims) == 4}
        assert shapes == {(16, 3, 3, 3), (8, 16, 3, 3)}
        scales = {tuple(w.dims) for name, w in weights.items() if name.endswith("_scale")}
        assert scales == {(16,), (8,), ()}  # one for each filter, and each activation's one

    @needs_peers
    def test_top1_counts_what_int8_gets_right(self, tmp_path):
        own = network()
        images = torch.randint(0, 255, (6, 3, 8, 8), dtype=torch.uint8)
        split = Split(images, torch.zeros(6, dtype=torch.int64))
        data = Data("noise", split, split, classes=("none",) * 8)
        others = comparison.Peers(own, tmp_path, ["openvino int8"])
        batches = list(comparison.eval_batches(data.test, data, 250))
        forward = peers.in_openvino(others.files["openvino int8"], (6, 3, 8, 8), "int8", 1)
        labels = forward(batches[0][0]).argmax(1).clone()
        assert sorted(others.files) == ["dense", "openvino int8"]
        labels[:3] += 1
        data = replace(data, test=Split(images, labels % 8))
        assert others.top1("openvino int8", data) == 50

    def test_without_the_packages_their_ways_are_lacking_and_said_to_be(
        self, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(peers, "find_spec", lambda name: None if name == "onnx" else name)
        own = network()
        others = comparison.Peers(own, tmp_path, comparison.USUAL)
        assert others.ways(own.images) == [] and not list(tmp_path.iterdir())
        assert own.lacking["openvino int8"] == 'not installed: onnx; pip install "explib[peers]"'
        assert not any(name in own.lacking for name in (*inference.ENGINE, "compiled fp32"))
        assert len(own.lacking) == 7  # six ways in OpenVINO, one in ONNX Runtime

    @needs_peers
    def test_what_the_processor_does_not_compute_in_is_said(self, tmp_path, monkeypatch):
        monkeypatch.setattr(peers, "openvino_computes", lambda precision: False)
        own = network(small=None)
        others = comparison.Peers(own, tmp_path, ("openvino bf16", "filters openvino fp32"))
        assert others.names == [] and "bf16" in own.lacking["openvino bf16"]


class TestCases:
    def test_a_share_of_the_kernels_is_left_and_the_dense_network_as_it_was(self):
        dense, example = small(), torch.zeros(1, 3, 8, 8)
        pruned, masks = cases.at_density(dense, example, 0.25)
        assert masking.sparsity(masks) == pytest.approx(0.75, abs=0.01)
        assert not masking.leaks(pruned, masks) and dense[0].weight.all()
        whole, none = cases.at_density(dense, example, 1.0)
        assert none == {} and torch.equal(whole[3].weight, dense[3].weight)

    def test_the_shipped_networks_are_those_named(self, monkeypatch, tmp_path):
        monkeypatch.setenv("EXPLIB_DATA", str(tmp_path))
        own = cases.load("resnet_56", ROOT / "results")
        assert PUBLIC.stem == cases.CASES["resnet_56"].dense
        assert own.top1 == {"dense": 93.39, "kernels pruned": 93.2, "filters pruned": 92.38}
        assert own.images.shape == (128, 3, 32, 32) and own.data is None
        assert "EXPLIB_DATA" in own.lacking["top-1 of int8"]
        assert not masking.leaks(own.pruned, own.masks) and own.small is not None

    def test_torchvisions_networks_lose_as_many_multiply_adds_either_way(self, monkeypatch):
        pytest.importorskip("torch_pruning")
        case = replace(cases.CASES["resnet18"], side=32)
        monkeypatch.setitem(cases.CASES, "resnet18", case)
        own = cases.load("resnet18")
        left = cases.counting.macs(own.dense, own.images[:1], own.masks)
        assert own.small is not None
        filters = cases.counting.macs(own.small, own.images[:1])["dense"]
        assert left["left"] / left["dense"] == pytest.approx(0.3, abs=0.01)
        assert 0.9 < filters / left["left"] <= 1.0


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Two cases of a small network; how often each is loaded."""
    loaded = []
    monkeypatch.setattr(inference, "TURN", 1e-9)  # a call each
    monkeypatch.setattr(comparison, "load", lambda arch, _: loaded.append(arch) or network())
    for name in ("resnet18", "resnet50"):
        monkeypatch.setitem(comparison.CASES, name, cases.Case(name.upper(), (4, 2, 1), 8))

    def measure(*archs, **options):
        options = {"seconds": 0.0, "names": ["engine fp32", "openvino fp32"]} | options
        return list(comparison.measure(archs, results_dir=tmp_path, threads=1, **options))

    return measure, loaded, tmp_path / "bench"


@needs_compiler
class TestMeasure:
    @needs_peers
    def test_the_record_has_every_way_and_what_it_was_measured_with(self, tiny):
        measure, _, folder = tiny
        rows = measure("resnet18", densities=(0.3, 1.0))
        (path,) = folder.iterdir()
        record = json.loads(path.read_text())
        assert path.stem == f"inference-{machine(record['provenance']['hardware']['name'])}"
        assert (
            [row["batch"] for row in record["networks"]] == [4, 2, 1] == [r["batch"] for r in rows]
        )
        for row in record["networks"]:
            assert set(row["images_per_s"]) == {"engine fp32", "openvino fp32"}
            assert row["images_per_s"].keys() == row["spread_pct"].keys() == row["off"].keys()
            assert min(row["calls"].values()) >= 5 and min(row["images_per_s"].values()) > 0
            assert row["off"]["engine fp32"] < 1e-4 and row["fallbacks"] == {"engine fp32": 0}
            assert row["density"] == pytest.approx(0.5, abs=0.01) and 0 < row["cut_pct"] < 100
        assert [(r["batch"], r["density"]) for r in record["density"]] == [
            *((4, 0.3), (4, 1.0), (1, 0.3), (1, 1.0))
        ]
        assert all(row["against"] == "openvino fp32" for row in record["density"])
        made = record["made"]["resnet18"]
        assert made["threads"] == 1 and made["versions"].keys() >= {"torch", *peers.PACKAGES}

    def test_it_goes_on_where_it_was_interrupted(self, tiny):
        measure, loaded, folder = tiny
        names = {"names": ["engine fp32"]}
        measure("resnet50", **names)
        (path,) = folder.iterdir()
        first = json.loads(path.read_text())
        found = measure("resnet18", "resnet50", **names)
        assert loaded == ["resnet50", "resnet18"] and "kept" in found[-1]
        record = json.loads(path.read_text())
        assert [r["arch"] for r in record["networks"]] == ["resnet18"] * 3 + ["resnet50"] * 3
        assert record["networks"][3:] == first["networks"]
        measure("resnet18", "resnet50", again=True, **names)
        measure("resnet18", seconds=0.001, **names)  # otherwise measured
        assert loaded == ["resnet50", "resnet18", "resnet18", "resnet50", "resnet18"]
        assert len(json.loads(path.read_text())["networks"]) == 6

    def test_quick_measures_the_smallest_batch_and_writes_nothing(self, tiny):
        measure, _, folder = tiny
        (row,) = measure("resnet18", quick=True, names=["engine fp32"])
        assert row["batch"] == 1 and not folder.exists()
        line = text.compared(row)
        assert "RESNET18 batch 1" in line and "engine fp32" in line and "images/s ±" in line

    def test_what_is_not_known_is_refused(self, tiny):
        measure, _, _ = tiny
        with pytest.raises(ValueError, match="network: 'resnet19' is unknown; known: resnet_56"):
            measure("resnet19")
        with pytest.raises(ValueError, match="way: 'engine' is unknown; known: engine fp32"):
            measure("resnet18", names=["engine"])

    def test_wrong_answers_are_not_timed(self, tmp_path):
        own = network()
        others = comparison.Peers(own, tmp_path, [])
        own.pruned[0].weight.data.zero_()
        wrong = lambda images: own.dense(images) + 1  # noqa: E731
        others.ways = lambda images: [("openvino fp32", wrong)]
        with pytest.raises(RuntimeError, match="openvino fp32: answers differ from torch's by"):
            comparison.compare(own, 2, 0.0, ["openvino fp32"], others)


SPEEDS = {
    "engine fp32": 300.0,
    "engine bf16": 500.0,
    "engine int8": 700.0,
    "compiled fp32": 80.0,
    "openvino fp32": 100.0,
    "openvino bf16": 200.0,
    "openvino int8": 400.0,
    "filters openvino fp32": 150.0,
}
ROW = {"arch": "resnet_56", "label": "ResNet-56", "batch": 128, "density": 0.234, "cut_pct": 71.48}


def write(folder, images_per_s, sweep=()):
    (folder / "bench").mkdir(exist_ok=True)
    density = [
        {"arch": "resnet_56", "batch": 128, "density": d, "images_per_s": {"engine fp32": s}}
        | {"against": "openvino fp32", "against_images_per_s": 100.0}
        for d, s in sweep
    ]
    made = {"threads": 2, "top1": {"dense": 93.39, "openvino int8": 93.2, "engine int8": 93.1}}
    record = {"networks": [ROW | {"images_per_s": images_per_s}], "density": density}
    record |= {"made": {"resnet_56": made}}
    record |= {"provenance": {"hardware": {"name": "AMD EPYC Processor (2 cores)"}}}
    (folder / "bench/inference-amd-epyc.json").write_text(json.dumps(record))


class TestTable:
    def test_the_engine_is_set_against_the_best_of_each_kind(self, tmp_path):
        assert inference_tables.inference(tmp_path).empty
        write(tmp_path, SPEEDS, [(0.2, 400.0), (0.5, 200.0), (1.0, 50.0)])
        (line,) = inference_tables.inference(tmp_path).to_dict("records")
        assert line["best dense fp32"] == "openvino" and line["openvino int8"] == "400"
        assert line["engine fp32 / best dense fp32"] == "3.00"
        assert line["engine / best dense, 16 bits"] == "2.50"
        assert line["engine, best / int8"] == line["engine int8 / int8"] == "1.75"
        assert line["engine fp32 / filters fp32"] == "2.00"
        assert line["even at density"] == "0.67"  # 5 ms at 0.5, 20 ms at 1, 10 ms between
        assert line["top-1 dense"] == "93.39" and line["top-1 int8"] == "93.20"
        assert line["top-1 kernels pruned, int8"] == "93.10"
        assert line["kernels left %"] == "23.4" and line["threads"] == "2"
        assert line["hardware"] == "AMD EPYC (2 cores)"

    @pytest.mark.parametrize(
        "sweep, even",
        [
            ([], ""),
            ([(0.2, 90.0), (1.0, 50.0)], "below 0.2"),
            ([(0.2, 900.0), (1.0, 150.0)], "above 1"),
        ],
    )
    def test_where_the_density_is_not_bracketed_a_bound_is_said(self, tmp_path, sweep, even):
        write(tmp_path, SPEEDS, sweep)
        assert inference_tables.inference(tmp_path)["even at density"].tolist() == [even]

    def test_what_was_not_timed_has_no_ratio(self, tmp_path):
        write(tmp_path, {"engine fp32": 300.0})
        (line,) = inference_tables.inference(tmp_path).to_dict("records")
        assert line["openvino fp32"] == line["best dense fp32"] == line["engine, best / int8"] == ""
        assert line["engine fp32 / best dense fp32"] == line["engine / best dense, 16 bits"] == ""


def test_what_accuracy_buys_is_drawn_of_networks_whose_accuracy_is_known(tmp_path):
    speeds = SPEEDS | {"filters openvino int8": 900.0, "engine fp16": 450.0}
    write(tmp_path, speeds)
    record = json.loads((tmp_path / "bench/inference-amd-epyc.json").read_text())
    record["networks"].append(ROW | {"arch": "resnet18", "images_per_s": speeds})
    record["made"]["resnet18"] = {"top1": {}}
    record["made"]["resnet_56"]["top1"]["kernels pruned"] = 93.0
    (axes,) = bench_plots.choices(record).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == {
        "dense, OpenVINO": [[100, 93.39], [200, 93.39], [400, 93.2]],
        "whole filters pruned, OpenVINO": [],
        "kernels pruned, engine": [[300, 93.0], [500, 93.0], [700, 93.1]],
    }
    assert bench_plots.choices({"networks": [], "made": {}}) is None


@pytest.mark.parametrize("path", sorted((ROOT / "results/bench").glob("inference-*.json")))
def test_the_committed_record_is_whole_and_of_a_clean_tree(path):
    record = json.loads(path.read_text())
    assert record["provenance"]["git_dirty"] is False
    assert {row["arch"] for row in record["networks"]} == set(record["made"])
    for row in record["networks"]:
        assert {"engine fp32", "openvino fp32", "openvino int8"} <= set(row["images_per_s"])
