"""Records: written under a name of their own, read with one-line errors, gathered in a table."""

import json
import re

import pytest

from explib.params import Params
from explib.study import records
from tests.conftest import ROOT


def record(kind="finetune", hardware="a processor", **changes):
    params = Params(**changes)
    return {
        "schema": 1,
        "kind": kind,
        "status": "done",
        "params": params.asdict(),
        "hardware": {"device": "cpu", "name": hardware, "threads": 2},
        "provenance": {},
        "accuracy": {"dense": 90.0, "before": 20.0, "last": 88.5, "best": 89.0, "best_epoch": 2},
        "layers": [],
        "macs": {"dense": 1000, "left": 400, "published_m": 0.38},
        "weights": {"dense": 100, "left": 50},
        "sparsity": 0.5,
        "nominal_sparsity": 0.52,
        "wall_s": 3.0,
        "images_per_s": 100.0,
        "history": [{"epoch": 1, "top1": 88.5}],
    }


def test_what_is_written_comes_back(tmp_path):
    path = records.write(record(), tmp_path)
    assert path.parent == tmp_path / "records/digits"
    assert path.name.startswith("finetune-resnet_56-B-e10-s0-")
    assert records.read(path) == record()
    assert records.read_all(tmp_path, "digits") == [record()]
    assert records.read_all(tmp_path, "cifar10") == []


def test_an_equal_run_replaces_its_own_record_only(tmp_path):
    first = records.write(record(), tmp_path)
    assert records.write(record(), tmp_path) == first
    assert records.write(record(job_dir="elsewhere", threads=1), tmp_path) == first
    others = [
        *(record(seed=1), record(epochs=3), record("baseline"), record(hardware="another")),
        *(record(survivors="l1"), record(mask_seed=4), record(name="x")),
    ]
    names = {records.write(other, tmp_path).name for other in others} | {first.name}
    assert len(names) == len(others) + 1 == len(records.read_all(tmp_path, "digits"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[]", "not a record, lacks schema"),
        ("{}", "not a record, lacks schema, kind"),
        (json.dumps({**record(), "schema": 99}), "schema 99"),
        (json.dumps({**record(), "kind": "dream"}), "'dream' is unknown"),
        (json.dumps({k: v for k, v in record().items() if k != "macs"}), "lacks macs"),
    ],
)
def test_what_is_no_record_is_one_line_that_names_the_file(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=rf"a\.json: .*{message}") as caught:
        records.read(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_one_line(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"a\.json"):
        records.read(tmp_path / "a.json")


def test_the_table_has_a_row_for_each_with_parameters_and_results():
    table = records.frame([record(seed=3), record("baseline", lr=1)])
    assert table.seed.tolist() == [3, 0] and table.lr.tolist() == [0.04, 1.0]
    first = table.iloc[0]
    assert (first.macs_dense, first.macs, first.weights) == (1000, 400, 50)
    assert (first.dense, first.before, first["last"], first.best) == (90, 20, 88.5, 89)
    assert (first.sparsity, first.wall_s, first.hardware) == (0.5, 3, "a processor")
    assert table.kind.tolist() == ["finetune", "baseline"]


def test_epochs_add_up_over_stages_and_parts_of_epochs():
    assert records.epochs_of([]) == []
    whole = [{"epoch": 1}, {"epoch": 2}, {"epoch": 1}, {"epoch": 2}]  # of two convs, layerwise
    assert records.epochs_of(whole) == [1, 2, 3, 4]
    assert records.epochs_of([{"epoch": 1}, {"epoch": 1.5}]) == [1, 1.5]
    # five epochs among 54 convs
    table = records.frame([record() | {"history": [{"epoch": 0.0926, "top1": 90.0}] * 54}])
    assert table.trained.tolist() == [5.0]


def test_provenance_names_the_code_and_the_machine():
    found = records.provenance()
    if (ROOT / ".git").exists():
        assert re.fullmatch("[0-9a-f]{40}", found["git_commit"])
        assert found["git_dirty"] in (True, False)
    assert {"explib", "python", "torch", "torchvision", "numpy"} <= set(found["versions"])
    assert found["hardware"]["device"] == "cpu" and found["hardware"]["name"]
    json.dumps(found, allow_nan=False)


def test_where_git_says_nothing_a_record_does_not_call_the_code_clean(monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = records.provenance()
    assert (found["git_commit"], found["git_dirty"]) == ("", None)


def test_a_copy_without_its_history_is_told_its_commit(monkeypatch):
    monkeypatch.setenv("EXPLIB_COMMIT", "0123456789abcdef")
    found = records.provenance()
    assert (found["git_commit"], found["git_dirty"]) == ("0123456789abcdef", None)


def test_the_committed_records_are_sound():
    paths = sorted((ROOT / "results/records/cifar10").glob("*.json"))
    assert len(paths) > 70
    for path in paths:
        found = records.read(path)
        assert path.name == f"{found['kind']}-{records.identity(found)}.json"
        layers = found["layers"]
        linear = found["macs"]["dense"] - sum(row["macs_dense"] for row in layers)
        assert found["macs"]["left"] == sum(row["macs"] for row in layers) + linear
        if found["history"]:
            assert found["accuracy"]["last"] == found["history"][-1]["top1"]


def test_a_record_older_than_a_parameter_has_its_default(tmp_path):
    path = records.write(record(), tmp_path)
    content = json.loads(path.read_text())
    del content["params"]["data_url"], content["params"]["groups"]
    path.write_text(json.dumps(content))
    (row,) = records.frame(records.read_all(tmp_path, "digits")).to_dict("records")
    assert row["data_url"] == "" and row["groups"] == 13


def test_origin_says_which_code_machine_and_data():
    known = {
        "created": "2026-11-23T10:00:00+00:00",
        "git_commit": "0123456789abcdef",
        "git_dirty": True,
        "versions": {"torch": "2.11"},
        "data": {"name": "digits", "sha256": "f" * 64},
        "checkpoint": "dense.safetensors",
    }
    record = {"kind": "finetune", "params": {"name": "one", "seed": 3}, "provenance": known}
    line = records.origin(record | {"hardware": {"name": "CPU", "precision": "fp32"}})
    assert list(line.values()) == [
        "finetune one", 3, "2026-11-23", "0123456789+", "2.11", "CPU", "fp32",
        "digits ffffffffff", "dense.safetensors",
    ]  # fmt: skip


def test_what_is_measured_apart_from_runs_says_where(tmp_path):
    path = records.write_bench("speed-MACHINE", {"rows": [1]}, tmp_path)
    name = records.machine(records.provenance()["hardware"]["name"])
    assert path == tmp_path / f"bench/speed-{name}.json"
    found = json.loads(path.read_text())
    assert found["rows"] == [1] and found["provenance"]["hardware"]["device"] == "cpu"
    origin = {"hardware": {"name": "abacus"}}
    other = records.write_bench("speed-MACHINE", {"provenance": origin}, tmp_path)
    assert other.name == "speed-abacus.json"
    assert json.loads(other.read_text())["provenance"] == origin
