"""Everything a user can get wrong, through the command line: one line that names it, no traceback.

And before any long work: no case leaves a record of a run behind.
"""

import json
import os
import pickle
import shutil

import pytest
import torch
from click.testing import CliRunner

from explib import models
from explib.__main__ import cli
from explib.errors import ParamError
from explib.files import load_tensors, save_tensors
from explib.params import Params
from explib.pruning import checkpoints
from explib.study import networks, records, runs
from tests.conftest import TINY, make_folders

CONVS = ["conv1", *(f"layer{s}.0.conv{c}" for s in (1, 2, 3) for c in (1, 2))]
DEEP = "epochs: " + "[" * 3000

# what the YAML file says beside what is right, and what the answer has to say; status 2
PARAMETERS = {
    "a word for a number": ("epochs: many", "epochs: 'many' is a str; give float or int"),
    "a fraction of a seed": ("seed: 2.5", "seed: 2.5 is a float; give int"),
    "less than a step": ("epochs: 0.001", "is less than one step; give at least 0.5"),
    "a truth for a number": ("epochs: true", "epochs: True is a bool; give float or int"),
    "nothing for a number": ("epochs:", "epochs: None is a NoneType; give float or int"),
    "no epoch": ("epochs: 0", "epochs: 0 is out of range; give above 0 to"),
    "no learning rate": ("lr: 0", "lr: 0.0 is out of range"),
    "a learning rate that is no number": ("lr: .nan", "lr: nan is out of range"),
    "an infinite learning rate": ("lr: .inf", "lr: inf is out of range"),
    "a negative batch": ("batch_size: -1", "batch_size: -1 is out of range"),
    "no level groups": ("groups: 0", "groups: 0 is out of range"),
    "more than all survive": ("keep_floor: 2", "keep_floor: 2.0 is out of range; give 0 to 1"),
    "a negative seed": ("seed: -1", "seed: -1 is out of range"),
    "a seed too large": ("seed: 99999999999", "seed: 99999999999 is out of range"),
    "a misspelt network": ("arch: resnet56", "did you mean 'resnet_56'"),
    "a misspelt data set": ("dataset: cifar", "did you mean 'cifar10'"),
    "an unknown way": ("pruning_way: C", "pruning_way: 'C' is unknown; known: 'A', 'B'"),
    "unknown survivors": ("survivors: l2", "survivors: 'l2' is unknown"),
    "a misspelt schedule": ("schedule: layer", "schedule: 'layer' is unknown"),
    "an unknown device": ("device: tpu", "device: 'tpu' is unknown"),
    "an unknown precision": ("precision: fp8", "precision: 'fp8' is unknown"),
    "a misspelt parameter": ("eppochs: 3", "unknown parameter 'eppochs'; did you mean 'epochs'?"),
    "a rate without brackets": ("compress_rate: 0.5", "compress_rate: 0.5 is a float; give str"),
    "all kernels": ('compress_rate: "[1.0]"', "rate 1.0 in '[1.0]'; give 0 to below 1"),
    "a rate no times": ('compress_rate: "[0.5]*0"', "count 0 in '[0.5]*0'"),
    "a rate too often": ('compress_rate: "[0.5]*99999"', "count 99999"),
    "a rate to a power": ('compress_rate: "[0.5]**2"', "cannot read '[0.5]**2'"),
    "a sum without its end": ('compress_rate: "[0.5]*7+"', "compress_rate: cannot read ''"),
    "a rate that is code": ("compress_rate: \"__import__('os')\"", 'cannot read "__import__'),
    "a wrong number of rates": ('compress_rate: "[0.5]*3"', "3 rates for 7 convs of resnet_56"),
    "steps that descend": ('lr_decay_step: "25,15"', "lr_decay_step: '25,15' is not ascending"),
    "a name that is a path": ('name: "../../x"', "name: '../../x'; give letters"),
    "a folder outside": ('job_dir: "../../x"', "job_dir: '../../x' leaves the project; give an"),
    "results outside": ("results_dir: a/../../x", "results_dir: 'a/../../x' leaves the project"),
    "a name that is a command": ('name: "; rm -rf ~"', "name: '; rm -rf ~'; give letters"),
    "an address of another kind": ("data_url: ftp://x", "data_url: 'ftp://x'; give an address"),
    "normalized digits": ("normalization: cifar10", "normalization: 'cifar10' is not for dataset"),
    "digits of another size": ("image_size: 64", "image_size: 64, but images of 'digits' have 32"),
    "filters one conv at a time": (
        "pruning_way: filters\nschedule: layerwise",
        "schedule: 'layerwise' is not for filters",
    ),
    "pieces that do not fill a batch": ("micro_batch: 5", "32 images cannot be divided"),
    "a start beyond the end": ("start_cov: 100", "start_cov: 100 of 7 convs; give a lower index"),
    "a list": ("[1, 2]", "holds a list; give `name: value` lines"),
    "no YAML": ("a: b: c", "not YAML"),
    "a parameter given twice": ("lr: 1\nlr: 2", "'lr' is given twice"),
    "a byte that is no text": ("lr: \x00", "not YAML"),
    "YAML with code": ("!!python/object/apply:os.system [touch canary]", "not YAML"),
    "YAML without an end": (DEEP, "not YAML"),
}


@pytest.fixture
def good(tmp_path, resnet_8, monkeypatch):
    """A configuration that runs, its dense network in its place, and `tmp_path` to stand in."""
    monkeypatch.chdir(tmp_path)
    params = TINY.replace(results_dir=str(tmp_path / "results"), epochs=1)
    network = networks.fresh(params)
    meta = {"arch": "resnet_56", "num_classes": 10}
    checkpoints.save(networks.dense_path(params), network.model, {}, meta, torch.float32)
    return params


def answer(*command):
    """Exit status and the one line of the answer."""
    done = CliRunner().invoke(cli, [str(word) for word in command])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output
    return done.exit_code, done.output.strip().splitlines()[-1]


def refused(params, status, message, **changes):
    """The fine-tuning ends with this status and a line that says this, and left no record."""
    derived = ("job_dir", "mask_seed", "name")  # follow the others unless given
    own = {k: v for k, v in params.asdict().items() if k not in derived}
    given = {k: v for k, v in (own | changes).items() if v != getattr(Params(), k)}
    words = [word for k, v in given.items() for word in (f"--{k}", v)]
    before = records_of(params)
    found, line = answer("finetune", *words)
    assert (found, line[:7]) == (status, "Error: ") and message in line, line
    assert records_of(params) == before


def records_of(params):
    return sorted(networks.resolve(params.results_dir).glob("records/*/*"))


@pytest.mark.parametrize("case", PARAMETERS)
def test_parameters(good, tmp_path, case):
    content, message = PARAMETERS[case]
    file = tmp_path / "wrong.yaml"
    usual = {k: v for k, v in good.asdict().items() if v != getattr(Params(), k)}
    usual = {k: v for k, v in usual.items() if k not in ("job_dir", "mask_seed", "name")}
    given = {line.split(":")[0] for line in content.splitlines()}
    lines = [f"{k}: {json.dumps(v)}" for k, v in usual.items() if k not in given]
    whole = case in ("a list", "no YAML", "YAML with code", "YAML without an end")
    file.write_text(content if whole else "\n".join([*lines, content]) + "\n")
    status, line = answer("finetune", "-f", file)
    assert (status, line[:7]) == (2, "Error: ") and message in line, line
    assert not records_of(good) and not os.path.exists("canary")


class _Code:
    def __reduce__(self):
        return os.system, ("touch canary",)


def _changed(state, **changes):
    return {k: v for k, v in (state | changes).items() if v is not None}


def _truncated(path, keep=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


# name of the checkpoint: how it is made from a state dict, and what the answer has to say
CHECKPOINTS = {
    "missing.pth": (None, "missing.pth is not there; run notebooks/00_baseline.ipynb"),
    "empty.pth": (lambda p, s: p.touch(), "empty.pth is no readable checkpoint"),
    "empty.safetensors": (lambda p, s: p.touch(), "not a readable safetensors file"),
    "folder.pth": (lambda p, s: p.mkdir(), "folder.pth is not there"),
    "text.pth": (lambda p, s: p.write_text("hello"), "text.pth is no readable checkpoint"),
    "half.pth": (
        lambda p, s: (torch.save(s, p), _truncated(p)),
        "half.pth is no readable checkpoint",
    ),
    "code.pth": (
        lambda p, s: p.write_bytes(pickle.dumps(_Code())),
        "code.pth is no readable checkpoint",
    ),
    "code-in-zip.pth": (
        lambda p, s: torch.save({"state_dict": _Code()}, p),
        "code-in-zip.pth is no readable checkpoint",
    ),
    "list.pth": (lambda p, s: torch.save([1, 2], p), "holds a list, not a state dict"),
    "nothing.pth": (lambda p, s: torch.save({}, p), "lacks conv1.weight"),
    "incomplete.pth": (
        lambda p, s: torch.save(_changed(s, **{"conv1.weight": None}), p),
        "lacks conv1.weight",
    ),
    "more.pth": (
        lambda p, s: torch.save(_changed(s, extra=torch.ones(1)), p),
        "has unknown extra",
    ),
    "shape.pth": (
        lambda p, s: torch.save(_changed(s, **{"conv1.weight": torch.ones(8, 3, 3, 3)}), p),
        "conv1.weight is (8, 3, 3, 3), not (16, 3, 3, 3)",
    ),
    "number.pth": (
        lambda p, s: torch.save(_changed(s, **{"conv1.weight": 3}), p),
        "conv1.weight is a int, not a tensor",
    ),
    "nan.pth": (
        lambda p, s: torch.save(_changed(s, **{"bn1.bias": torch.full((16,), torch.nan)}), p),
        "bn1.bias has NaN or infinite values",
    ),
    "other.pth": (
        lambda p, s: torch.save(models.build("vgg_16_bn").state_dict(), p),
        "does not fit the network: lacks conv1.weight",
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(good, tmp_path, name):
    make, message = CHECKPOINTS[name]
    path = tmp_path / name
    if make:
        make(path, models.build("resnet_56").state_dict())
    refused(good, 1, message, resume=str(path))
    assert not os.path.exists("canary")


def test_a_checkpoint_of_another_network_or_normalization(good, tmp_path):
    path = tmp_path / "other.safetensors"
    model = networks.fresh(good).model
    checkpoints.save(path, model, {}, {"arch": "googlenet", "num_classes": 10})
    refused(good, 1, "is a googlenet, not a resnet_56", resume=str(path))
    meta = {"arch": "resnet_56", "num_classes": 10, "normalization": "imagenet"}
    checkpoints.save(path, model, {}, meta)
    refused(good, 2, "was trained with 'imagenet'; set that", resume=str(path))


def _masks(**changes):
    usual = {name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()}
    return {k: v for k, v in (usual | changes).items() if v is not None}


SHAPES = dict(
    zip(CONVS, [(16, 3), (16, 16), (16, 16), (32, 16), (32, 32), (64, 32), (64, 64)], strict=True)
)
# masks, and what the answer has to say
MASKS = {
    "of another network": (_masks(features=torch.ones(2, 2).bool()), "'features' is no conv"),
    "of another shape": (_masks(conv1=torch.ones(3, 16).bool()), "conv1 has a torch.bool mask"),
    "all zero": (_masks(conv1=torch.zeros(16, 3).bool()), "conv1 would lose every kernel"),
    "without a layer": (_masks(conv1=None), "lacks a mask of conv1"),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks(good, tmp_path, case):
    masks, message = MASKS[case]
    path = checkpoints.save_masks(tmp_path / "masks.safetensors", masks)
    refused(good, 1, message, resume_mask=str(path))


def test_files_that_are_no_masks(good, tmp_path):
    path = checkpoints.save_masks(tmp_path / "masks.safetensors", _masks())
    refused(good, 1, "no such file", resume_mask=str(tmp_path / "missing"))
    refused(good, 1, "is a folder; give a file", resume_mask=str(tmp_path))
    refused(good, 1, "holds no masks", resume_mask=str(networks.dense_path(good)))
    _truncated(path)
    refused(good, 1, "not a readable safetensors file", resume_mask=str(path))


# what a file of masks says of itself instead, and what the answer has to say
MASKS_META = {
    "no shapes": ({"shapes": None}, "lacks the shapes of its masks"),
    "a shape that is no list": ({"shapes": {"conv1": 3}}, "conv1 has a mask of shape 3"),
    "a shape of words": ({"shapes": {"conv1": ["a", "b"]}}, "conv1 has a mask of shape ['a', 'b']"),
    "a negative shape": ({"shapes": {"conv1": [-16, -3]}}, "conv1 has a mask of shape [-16, -3]"),
    "a shape beyond memory": ({"shapes": {"conv1": [10**9] * 2}}, "lacks the 10000000000000000"),
    "a mask that is not there": ({"shapes": {"conv9": [16, 3]}}, "lacks the 48 bits of conv9"),
    "another kind": ({"kind": "compact"}, "holds no masks"),
    "a list": ([], "its meta data are a list"),
    "nothing": (None, "its meta data are a NoneType"),
}


@pytest.mark.parametrize("case", MASKS_META)
def test_masks_that_are_not_what_they_say(good, tmp_path, case):
    changes, message = MASKS_META[case]
    path = checkpoints.save_masks(tmp_path / "masks.safetensors", _masks())
    tensors, meta = load_tensors(path)
    save_tensors(path, tensors, meta | changes if isinstance(changes, dict) else changes)
    refused(good, 1, message, resume_mask=str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("record.json", "{", "not JSON"),
        ("record.json", "[]", "not a record, lacks schema"),
        ("record.json", '{"schema": 1}', "not a record, lacks kind"),
        ("state.safetensors", "", "not a readable safetensors file"),
        ("state.safetensors", "half", "not a readable safetensors file"),
    ],
)
def test_damaged_files_of_an_earlier_run(good, tmp_path, name, content, message):
    job = tmp_path / "job"
    job.mkdir()
    (job / name).write_text(content)
    refused(good, 1, message, job_dir=str(job))


def test_images_of_a_size_that_a_network_does_not_take(tmp_path):
    root = make_folders(tmp_path / "images", {"a": 4, "b": 4})
    params = TINY.replace(dataset="imagenet", data_dir=str(root), arch="vgg_16_bn")
    message = r"^image_size: vgg_16_bn does not run on images \(3, 224, 224\) .* 32 pixels a side$"
    with pytest.raises(ParamError, match=message):
        networks.fresh(params)


@pytest.mark.parametrize(("command", "status"), [("controls", 2), ("verify", 1)])
def test_what_a_command_does_not_know_is_one_line(command, status):
    found, line = answer(command, "nothing")
    assert (found, line[:7]) == (status, "Error: ") and "nothing" in line, line


def test_folders_of_something_else(good, tmp_path):
    (tmp_path / "file").touch()
    refused(good, 1, "cannot write", job_dir=str(tmp_path / "file"))
    first = good.replace(job_dir=str(tmp_path / "job"))
    runs.finetune(first)
    refused(good, 2, "holds a run with lr 0.04, this one has 0.02", job_dir=first.job_dir, lr=0.02)


DAMAGED_DATA = {
    "no CIFAR-10 and no network": ("cifar10", "no complete CIFAR-10 here"),
    "a CIFAR-10 with a wrong byte": ("cifar10", "data_batch_1: damaged (its MD5 is wrong)"),
    "no class folders": ("imagenet", "train: cannot be read"),
    "classes that differ": ("imagenet", "class 'b' is in only one of train and val"),
    "an unreadable JPEG": ("imagenet", "no readable image ("),
}


@pytest.mark.parametrize("case", DAMAGED_DATA)
def test_data(good, tmp_path, case):
    dataset, message = DAMAGED_DATA[case]
    root = tmp_path / "data"
    root.mkdir()
    if case == "a CIFAR-10 with a wrong byte":
        (root / "cifar-10-batches-py").mkdir()
        (root / "cifar-10-batches-py/data_batch_1").write_bytes(b"\0")
    if case in ("classes that differ", "an unreadable JPEG"):
        make_folders(root, {name: 12 for name in "ab"})
        if case == "classes that differ":
            shutil.move(root / "val/b", root / "val/c")
        else:
            next((root / "train/b").glob("*1.*")).write_bytes(b"no image")
    meta = {"arch": "resnet_56", "num_classes": 2 if (root / "train").exists() else 10}
    model = models.build("resnet_56", meta["num_classes"])
    path = checkpoints.save(tmp_path / "dense.safetensors", model, {}, meta)
    changes = {"image_size": 32, "limit_test": 0, "limit_train": 0} if dataset == "imagenet" else {}
    changes |= {"data_url": "https://localhost:1/nothing"} if "no network" in case else {}
    refused(
        *(good.replace(normalization=""), 1, message),
        **{"dataset": dataset, "data_dir": str(root), "resume": str(path), "batch_size": 8},
        **{"normalization": "", "workers": 1, **changes},
    )


def test_a_validation_split_of_everything(good):
    refused(good, 1, "validation: 5000 of 1437 training images; give fewer", validation=5000)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a record, lacks schema"),
        ('{"schema": 1, "kind": "finetune"}', "not a record, lacks params"),
        ("[" * 100_000, "not JSON"),
        ('{"schema": NaN}', "NaN is no number"),
    ],
    ids=lambda text: text[:20],
)
def test_files_that_are_no_records(good, content, message):
    path = networks.resolve(good.results_dir) / "records/digits/a.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    status, line = answer("tables", "--results_dir", good.results_dir, "--dataset", "digits")
    assert status == 1 and "a.json: " in line and message in line, line


# where a record is edited, what is put there, and what the answer has to say
EDITS = [
    ("schema", 2, "schema 2, kind 'finetune' is unknown"),
    ("kind", "x", "schema 1, kind 'x' is unknown"),
    ("status", "perfect", "status: 'perfect' is unknown; known: done, diverged"),
    ("params", [], "params: is a list; give a mapping"),
    ("params.lr", "fast", "lr: 'fast' is a str; give float"),
    ("params.eppochs", 3, "unknown parameter 'eppochs'; did you mean 'epochs'?"),
    ("hardware", None, "hardware: is a NoneType; give a mapping"),
    ("hardware.name", None, "hardware.name: None; give text"),
    ("macs.left", "few", "macs.left: 'few'; give a number, 0 or more"),
    ("weights.dense", -1, "weights.dense: -1; give a number, 0 or more"),
    ("sparsity", 1.5, "record.sparsity: 1.5; give a number from 0 to 1"),
    ("accuracy", 93.0, "accuracy: is a float; give a mapping"),
    ("accuracy.last", None, "accuracy.last: None; give a number from 0 to 100"),
    ("accuracy.best", 101, "accuracy.best: 101; give a number from 0 to 100"),
    ("accuracy.before", True, "accuracy.before: True; give a number"),
    ("accuracy.last", 99.5, "accuracy.last: 99.5, its last epoch had "),
    ("history", {}, "history: is a dict; give a list"),
    ("history", [3], "history[0]: is a int; give a mapping"),
    ("history", [{"top1": "93"}], "history[0].top1: '93'; give a number from 0 to 100"),
    ("history", [{"top1": 93.0}], "history[0].epoch: None; give a number, 0 or more"),
    ("layers", [{"kernels": 3}], "layers[0].nominal: None; give a number"),
]


@pytest.mark.parametrize(
    ("place", "value", "message"), EDITS, ids=[e[0] + "-" + e[2] for e in EDITS]
)
def test_records_edited_by_hand(good, tmp_path, place, value, message):
    made = {"status": "done", "hardware": {"device": "cpu", "name": "abacus", "threads": 1}}
    made |= {"macs": {"dense": 9, "left": 4}, "weights": {"dense": 9, "left": 4}}
    made |= {"accuracy": {"dense": 93.0, "before": 20.0, "last": 92.0, "best": 92.0}}
    made |= {"schema": 1, "kind": "finetune", "params": good.asdict(), "layers": []}
    path = records.write(made | {"history": [{"epoch": 1, "top1": 92.0}]}, good.results_dir)
    command = ("tables", "--results_dir", good.results_dir, "--dataset", "digits")
    assert answer(*command)[0] == 0
    record = json.loads(path.read_text())
    inside, *rest = place.split(".")
    if rest:
        record[inside][rest[0]] = value
    else:
        record[inside] = value
    path.write_text(json.dumps(record))
    status, line = answer(*command)
    assert status == 1 and f"{path.name}: " in line and message in line, line
    assert line.endswith(("restore or delete it", "is unknown"))


def test_a_state_that_is_no_state_of_a_run(good, tmp_path):
    save_tensors(tmp_path / "job/state.safetensors", {}, {"params": good.asdict()})
    refused(good, 1, "no state of a run, lacks stage", job_dir=str(tmp_path / "job"))
    meta = {"params": {"eppochs": 1}, "stage": 0, "epoch": 1, "run": {}}
    save_tensors(tmp_path / "job/state.safetensors", {}, meta)
    refused(good, 2, "unknown parameter 'eppochs'", job_dir=str(tmp_path / "job"))
    same = good.replace(job_dir=str(tmp_path / "job"))
    meta |= {"params": same.asdict(), "run": {"top1": {}, "history": [], "wall_s": 0.0}}
    save_tensors(tmp_path / "job/state.safetensors", {"model.x": torch.ones(1)}, meta)
    refused(good, 1, "does not fit the network: lacks conv1.weight", job_dir=same.job_dir)


# what a network says of itself instead, and what the answer has to say
NETWORKS = {
    "of an unknown arch": ({"arch": "lenet"}, "its arch is 'lenet'; known: vgg_16_bn"),
    "whose arch is a list": ({"arch": []}, "its arch is []; known: vgg_16_bn"),
    "of no classes": ({"num_classes": None}, "num_classes is None; give how many"),
    "of negative classes": ({"num_classes": -5}, "num_classes is -5; give how many"),
    "of other classes": ({"num_classes": 7}, "linear.weight is (10, 64), not (7, 64)"),
    "without masks": ({"shapes": 3}, "lacks the shapes of its masks"),
    "from nowhere": ({"dataset": None}, "does not say its dataset"),
    "of unknown accuracy": ({"top1": None}, "does not say its top1"),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_networks_to_evaluate(good, tmp_path, case):
    changes, message = NETWORKS[case]
    usual = {"arch": "resnet_56", "num_classes": 10, "dataset": "digits", "normalization": ""}
    path = tmp_path / "network.safetensors"
    checkpoints.save(path, networks.fresh(good).model, {}, usual | {"top1": 10.0})
    assert answer("evaluate", path)[0] == 0
    tensors, meta = load_tensors(path)
    save_tensors(path, tensors, {k: v for k, v in (meta | changes).items() if v is not None})
    status, line = answer("evaluate", path)
    assert status == 1 and path.name in line and message in line, line


def test_files_that_are_no_networks(tmp_path):
    assert "no such file" in answer("evaluate", tmp_path / "missing.safetensors")[1]
    path = checkpoints.save_masks(tmp_path / "masks.safetensors", _masks())
    assert "no compact network" in answer("evaluate", path)[1]
