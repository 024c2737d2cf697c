"""Shipped networks: loaded in one call, measured against what they claim."""

import json

import pytest
import torch

from explib import models
from explib.pruning import checkpoints
from explib.pruning import masks as masking
from explib.pruning.criteria import prune
from explib.study import networks, runs, verify
from tests.conftest import TINY, image, make_folders, needs_compiler


@pytest.fixture
def shipped(tmp_path, resnet_8):
    """A compact file of a small network with a wrong claim about its accuracy."""
    torch.manual_seed(0)
    model = models.build("resnet_56", 10)
    masks = prune(model, image(32), 0.5, "B")
    masking.apply(model, masks)
    meta = {"arch": "resnet_56", "num_classes": 10, "dataset": "digits", "normalization": ""}
    path = tmp_path / "net.safetensors"
    checkpoints.save(path, model, masks, {**meta, "top1": 99.0})
    return path, model, masks


def test_a_network_is_loaded_in_one_call(shipped):
    path, model, masks = shipped
    loaded, found, meta = checkpoints.load_network(path)
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())
    assert masking.held(loaded, masks) and meta["top1"] == 99.0 and not loaded.training
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(x), model.eval()(x), rtol=0.01, atol=0.01)


def test_a_file_of_an_unknown_network_is_one_line(shipped, tmp_path):
    _, model, masks = shipped
    checkpoints.save(tmp_path / "x.safetensors", model, masks, {"arch": "lenet"})
    with pytest.raises(ValueError, match="its arch is 'lenet'; known: vgg_16_bn"):
        checkpoints.load_network(tmp_path / "x.safetensors")


@needs_compiler
def test_a_wrong_claim_is_found(shipped, monkeypatch):
    path, _, _ = shipped
    found = list(verify.verify_all([path]))
    assert {row["network"] for row in found} == {"net"}
    assert not any(row["passed"] for row in verify.worst(found))
    rows = {row["way"]: row for row in found}
    torch_row = rows["torch fp32"]
    assert torch_row["recorded"] == 99.0 and 0 <= torch_row["top1"] < 60  # an untrained network
    assert set(verify._engine_types()) == {n for n in rows if "engine" in n and "," not in n}
    assert rows["engine fp32"]["differ"] == rows["engine fp32"]["rechecked_pct"] == 0
    for name in rows:
        assert abs(rows[name]["top1"] - torch_row["top1"]) < 1
        if "rechecked" in name:  # an untrained network is sure of nothing
            assert rows[name]["rechecked_pct"] > 50
            assert rows[name]["differ"] <= rows[name.removesuffix(", rechecked")]["differ"]
    _, masks, meta = checkpoints.load(path)
    model, _, _ = checkpoints.load_network(path)
    meta = {k: v for k, v in meta.items() if k not in ("kind", "shapes")}
    checkpoints.save(path, model, masks, {**meta, "top1": torch_row["top1"]})
    monkeypatch.setattr(verify, "_engine_types", lambda: {"engine fp32": torch.float32})
    off = {row["way"]: row for row in verify.worst(list(verify.verify_all([path])))}
    assert off["engine fp32"]["networks"] == 1 and off["engine fp32"]["off"] == 0
    assert all(row["passed"] for row in off.values())


def test_the_worst_of_several_networks_counts_for_each_way():
    def row(way, top1):
        return {"way": way, "top1": top1, "recorded": 90.0}

    rows = [row("torch fp32", 90.0), row("engine bf16", 89.9), row("engine bf16, rechecked", 90.0)]
    rows += [row("torch fp32", 89.94), row("engine bf16", 90.12)]
    rows += [row("engine bf16, rechecked", 90.05)]
    torch_row, short, twice = verify.worst(rows)
    assert (torch_row["networks"], torch_row["allowed"], torch_row["passed"]) == (2, 0.05, False)
    assert (short["allowed"], short["passed"]) == (0.15, True)  # nothing of float32 in it
    assert short["off"] == pytest.approx(0.12)
    assert (twice["allowed"], twice["passed"]) == (0.05, True)


def test_the_shipped_networks_are_those_of_the_results(tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoints/cifar10: no networks"):
        verify.shipped(tmp_path)
    (tmp_path / "checkpoints/cifar10").mkdir(parents=True)
    (tmp_path / "checkpoints/cifar10/b.safetensors").touch()
    (tmp_path / "checkpoints/cifar10/a.safetensors").touch()
    assert [path.stem for path in verify.shipped(tmp_path)] == ["a", "b"]
    written = json.loads(verify.write([{"way": "torch fp32"}], tmp_path).read_text())
    assert written["rows"] == [{"way": "torch fp32"}] and written["recheck"] == verify.RECHECK
    assert list(tmp_path.glob("bench/accuracy-*.json"))


def test_images_are_measured_at_the_size_that_it_was_trained_with(tmp_path, resnet_8, monkeypatch):
    folders = make_folders(tmp_path / "images", {"ants": 6, "bees": 6})
    params = TINY.replace(
        dataset="imagenet", data_dir=str(folders), image_size=32, results_dir=str(tmp_path),
        limit_train=0, limit_test=0, batch_size=4, epochs=1, pruning_way="random",
    )  # fmt: skip
    runs.baseline(params)
    record = runs.finetune(params)
    monkeypatch.setattr(verify, "_engine_types", dict)
    path = networks.resolve(params.job_dir) / "model.safetensors"
    (row,) = verify.verify(path, str(folders))
    assert row["recorded"] == record["accuracy"]["last"]
    assert row["top1"] == pytest.approx(row["recorded"], abs=20)  # an image, of few


def test_what_was_measured_on_validation_images_is_not_compared_with_the_test_set(shipped):
    path, model, masks = shipped
    _, _, meta = checkpoints.load(path)
    meta = {k: v for k, v in meta.items() if k not in ("kind", "shapes")}
    meta["evaluated_on"] = "validation (10 training images)"
    checkpoints.save(path, model, masks, meta)
    with pytest.raises(ValueError, match=r"was evaluated on validation \(10 training images\)"):
        verify.verify(path)
