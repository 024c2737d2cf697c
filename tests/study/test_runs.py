"""Whole runs on the embedded digits: checkpoints, records, interruption, and what is refused.

`resnet_56` stands for a ResNet of 8 layers here, but for the tests of the public checkpoint.
"""

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from explib import models
from explib.data import load_data
from explib.errors import ParamError
from explib.files import load_tensors, save_tensors
from explib.params import Params, from_yaml
from explib.pruning import checkpoints
from explib.pruning import masks as masking
from explib.study import folder, networks, records, runs
from explib.study.folder import Folder
from explib.training import backend, evaluation, inference, loop, soft_labels, step, timing
from tests.conftest import ROOT, TINY, make_folders, needs_compiler

PUBLIC = ROOT / "results/checkpoints/cifar10/resnet_56-public.safetensors"
KEYS = {
    *("schema", "kind", "status", "params", "hardware", "provenance", "accuracy", "layers"),
    *("macs", "weights", "sparsity", "nominal_sparsity", "wall_s", "images_per_s", "history"),
}
TIMED = {"seconds", "images_per_s", "wall_s"}
NAMES = ["conv1", *(f"layer{s}.0.conv{c}" for s in (1, 2, 3) for c in (1, 2))]


@pytest.fixture
def params(tmp_path, resnet_8):
    return TINY.replace(results_dir=str(tmp_path / "results"))


@pytest.fixture
def trained(params):
    """The same, with the dense network's checkpoint in its place."""
    runs.baseline(params.replace(epochs=1))
    return params


def as_json(found):
    return json.loads(json.dumps(found))


def untimed(found):
    history = [{k: v for k, v in entry.items() if k not in TIMED} for entry in found["history"]]
    dropped = TIMED | {"history", "params", "provenance"}
    return {k: v for k, v in found.items() if k not in dropped} | {"history": history}


def weights_of(params):
    return checkpoints.load(networks.resolve(params.job_dir) / "model.safetensors")[0]


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def interrupt(monkeypatch, after):
    """Makes the run stop, as by Ctrl-C, after so many saved states."""
    original, saved = Folder.save, []

    def save_then_stop(*args):
        original(*args)
        saved.append(1)
        if len(saved) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(folder, "STATE_EVERY_S", 0.0)
    monkeypatch.setattr(Folder, "save", save_then_stop)


class TestBaseline:
    def test_leaves_a_record_and_a_checkpoint_that_load_dense_reads(self, params):
        found = runs.baseline(params)
        assert set(found) == KEYS and found["kind"] == "baseline"
        assert found["sparsity"] == 0 and found["macs"]["left"] == found["macs"]["dense"]
        assert [entry["epoch"] for entry in found["history"]] == [1, 2]
        assert found["accuracy"]["last"] == found["history"][-1]["top1"]
        assert records.read_all(params.results_dir, "digits") == [as_json(found)]
        dense = networks.load_dense(params)
        data = load_data(params)
        assert evaluation.top1(dense.model, data, data.test) == found["accuracy"]["last"]
        assert dense.checkpoint == "resnet_56.safetensors" and len(dense.sha256) == 64

    def test_with_resume_evaluates_that_checkpoint(self, trained, tmp_path):
        own = networks.dense_path(trained)
        moved = own.rename(tmp_path / "moved.safetensors")
        found = runs.baseline(trained.replace(resume=str(moved)))
        data = load_data(trained)
        model = networks.load_dense(trained.replace(resume=str(moved))).model
        assert found["accuracy"]["last"] == evaluation.top1(model, data, data.test)
        assert found["history"] == [] and not own.exists()
        assert found["provenance"]["checkpoint"] == "moved.safetensors"

    def test_is_the_same_for_the_same_seed(self, params, tmp_path):
        other = params.replace(results_dir=str(tmp_path / "other"))
        assert untimed(runs.baseline(params)) == untimed(runs.baseline(other))
        one, two = (networks.load_dense(p).model.state_dict() for p in (params, other))
        assert equal(one, two)


def test_two_at_once_compute_a_run_once(trained, monkeypatch):
    trainings, train = [], loop.train
    monkeypatch.setattr(
        loop, "train", lambda *args, **kw: trainings.append(1) or train(*args, **kw)
    )
    with ThreadPoolExecutor(2) as pool:  # each opens the lock itself, as two processes would
        one, two = pool.map(runs.finetune, [trained, trained])
    assert as_json(one) == as_json(two) and len(trainings) == 1


def test_a_finished_baseline_puts_its_network_back(params):
    long, short = params.replace(epochs=2), params.replace(epochs=1)
    record = runs.baseline(long)
    known = weights(networks.load_dense(params).model)
    runs.baseline(short)
    assert not equal(weights(networks.load_dense(params).model), known)
    assert as_json(runs.baseline(long)) == as_json(record)
    assert equal(weights(networks.load_dense(params).model), known)


class TestFinetune:
    def test_record_files_and_masks_say_the_same(self, trained):
        found = runs.finetune(trained)
        assert set(found) == KEYS and found["kind"] == "finetune"
        folder = networks.resolve(trained.job_dir)
        assert json.loads((folder / "record.json").read_text()) == as_json(found)
        assert as_json(found) in records.read_all(trained.results_dir, "digits")
        masks, _ = checkpoints.load_masks(folder / "masks.safetensors")
        state, same, meta = checkpoints.load(folder / "model.safetensors")
        assert equal(masks, same) and list(masks) == NAMES
        assert found["sparsity"] == pytest.approx(masking.sparsity(masks)) and meta["num_classes"]
        model = models.build("resnet_56", 10)
        model.load_state_dict(state)
        assert masking.held(model, masks)
        left = {row["name"]: row["pruned"] for row in found["layers"]}
        assert left == {name: int((~mask).sum()) for name, mask in masks.items()}
        data = load_data(trained)
        # the file is of half precision: one of 40 images may go the other way
        top1 = evaluation.top1(model, data, data.test)
        assert abs(top1 - found["accuracy"]["last"]) <= 100 / 40
        curve = [entry["top1"] for entry in found["history"]]
        assert found["accuracy"]["best"] == max(curve) and found["accuracy"]["last"] == curve[-1]
        assert found["accuracy"]["best_epoch"] == curve.index(max(curve)) + 1

    def test_a_finished_run_is_not_computed_again(self, trained, monkeypatch, capsys):
        found = as_json(runs.finetune(trained))
        monkeypatch.setattr(runs, "_Training", None)
        capsys.readouterr()
        assert runs.finetune(trained) == found
        said = capsys.readouterr().err
        assert f"{trained.name}: nothing trained, its record of 20" in said
        for path in (networks.resolve(trained.results_dir) / "records/digits").glob("finetune*"):
            path.unlink()
        runs.finetune(trained)
        assert found in records.read_all(trained.results_dir, "digits")

    @pytest.mark.parametrize(
        ("changes", "after"),
        [
            ({}, 1),
            ({}, 2),
            ({"fade_epochs": 1}, 1),
            ({"schedule": "layerwise", "start_cov": 5}, 1),
            ({"schedule": "layerwise", "start_cov": 5}, 2),
            ({"schedule": "layerwise", "start_cov": 5, "survivors": "l1"}, 3),
            pytest.param({"compile": "sparse", "threads": 2}, 1, marks=needs_compiler),
            pytest.param({"compile": "sparse", "precision": "bf16"}, 1, marks=needs_compiler),
        ],
    )
    def test_an_interrupted_run_goes_on_bit_for_bit(
        self, trained, tmp_path, monkeypatch, changes, after
    ):
        whole = trained.replace(**changes)
        broken = whole.replace(job_dir=str(tmp_path / "broken"))
        found = runs.finetune(whole)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt(patch, after)
            runs.finetune(broken)
        assert not (tmp_path / "broken/record.json").exists()
        again = runs.finetune(broken)
        assert untimed(again) == untimed(found)
        assert equal(weights_of(broken), weights_of(whole))
        assert broken.digest == whole.digest

    def test_it_goes_on_in_the_precision_that_it_began_in(self, trained, monkeypatch):
        params = trained.replace(precision="auto", compile="auto")
        monkeypatch.setattr(backend, "_takes_bf16", lambda: True)
        monkeypatch.setattr(backend, "bf16_wins", lambda: True)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt(patch, 1)
            runs.finetune(params)
        monkeypatch.setattr(backend, "bf16_wins", lambda: False)
        assert runs.finetune(params)["hardware"]["precision"] == "bf16"
        other = runs.finetune(params.replace(mask_seed=1))
        assert other["hardware"]["precision"] == "fp32"

    @needs_compiler
    def test_what_was_measured_is_recorded_and_kept_when_it_goes_on(self, trained, monkeypatch):
        params = trained.replace(precision="auto", compile="auto", distill=0.5)
        monkeypatch.setattr(backend, "_takes_bf16", lambda: True)
        monkeypatch.setattr(backend, "SHARE", 0)  # however short the run
        asked = []

        def remembered(question, measure):
            asked.append(question["what"])
            found = dict.fromkeys(measure(), 1.0)
            return found | {name: 2.0 for name in found if name == first}

        monkeypatch.setattr(timing, "remembered", remembered)
        first = "surviving kernels, bf16"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt(patch, 1)
            runs.finetune(params)
        assert asked == ["training", "soft labels"]
        _, state = load_tensors(networks.resolve(params.job_dir) / "state.safetensors")
        assert (state["run"]["how"], state["run"]["precision"]) == tuple(first.split(", "))
        first = "fused passes, fp32"  # what would be chosen now
        hardware = runs.finetune(params)["hardware"]
        assert (hardware["trained_by"], hardware["precision"]) == ("surviving kernels", "bf16")
        assert hardware["measured"] == {
            "surviving kernels, fp32": 1.0,
            "surviving kernels, bf16": 2.0,
            "fused passes, fp32": 1.0,
            "fused passes, bf16": 1.0,
        }
        assert hardware["taught_by"] == state["run"]["taught_by"] != ""
        other = runs.finetune(params.replace(mask_seed=1))["hardware"]
        assert (other["trained_by"], other["precision"]) == tuple(first.split(", "))

    @needs_compiler
    def test_what_this_machine_cannot_go_on_with_is_said(self, trained, monkeypatch):
        params = trained.replace(compile="auto")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt(patch, 1)
            runs.finetune(params)
        monkeypatch.setattr(backend.training, "sparse", lambda *_: None)
        said = "began with surviving kernels, which is not possible here; .* fused passes, fp32$"
        with pytest.warns(UserWarning, match=said):
            found = runs.finetune(params)
        assert found["hardware"]["trained_by"] == "fused passes"

    def test_a_state_of_before_this_was_kept_goes_on(self, trained, monkeypatch):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt(patch, 1)
            runs.finetune(trained)
        path = networks.resolve(trained.job_dir) / "state.safetensors"
        tensors, meta = load_tensors(path)
        for name in ("how", "taught_by", "measured"):
            del meta["run"][name]
        save_tensors(path, tensors, meta)
        assert runs.finetune(trained)["hardware"]["trained_by"] == "eager"

    def test_its_state_is_written_now_and_then_and_at_the_end(self, trained, monkeypatch):
        written, save, now = [], folder.save_tensors, [0.0]
        monkeypatch.setattr(
            folder, "save_tensors", lambda *a: written.append(a[2]["epoch"]) or save(*a)
        )
        monkeypatch.setattr(folder, "time", SimpleNamespace(monotonic=lambda: now[0]))
        train = loop.train

        def slowly(*args, **kwargs):  # an epoch takes 20 s
            for epoch in train(*args, **kwargs):
                now[0] += 20
                yield epoch

        monkeypatch.setattr(loop, "train", slowly)
        runs.finetune(trained.replace(epochs=5, limit_train=32))
        assert written == [2, 4, 5]

    def test_another_seed_prunes_other_kernels(self, trained):
        one, two = (runs.finetune(trained.replace(mask_seed=seed, epochs=1)) for seed in (0, 1))
        paths = (networks.resolve(f["params"]["job_dir"]) / "masks.safetensors" for f in (one, two))
        first, second = (checkpoints.load_masks(path)[0] for path in paths)
        assert not equal(first, second)

    def test_of_one_dense_network_they_share_its_soft_labels(self, trained, monkeypatch):
        kept, save = [], soft_labels.save_tensors
        monkeypatch.setattr(soft_labels, "save_tensors", lambda *a: kept.append(a[0]) or save(*a))
        for way in ("B", "l1"):
            runs.finetune(trained.replace(pruning_way=way, name=way, distill=0.5))
            assert len(set(kept)) == len(kept) == trained.epochs
        runs.finetune(trained.replace(seed=1, name="other", distill=0.5))
        assert len(set(kept)) == len(kept) == 2 * trained.epochs

    @pytest.mark.parametrize(("precision", "exact"), [("auto", False), ("fp32", True)])
    def test_soft_labels_are_exact_where_a_precision_is_asked_for(
        self, trained, monkeypatch, precision, exact
    ):
        asked, made = [], inference.teacher_of
        monkeypatch.setattr(
            inference, "teacher_of", lambda *a, **k: asked.append(k["exact"]) or made(*a, **k)
        )
        runs.finetune(trained.replace(precision=precision, distill=0.5, epochs=1))
        assert asked == [exact]

    @pytest.mark.parametrize("way", ["A", "B", "random", "l1", "bn", "matched", "taylor"])
    def test_every_way_runs(self, trained, way):
        params = trained.replace(pruning_way=way, name=f"way-{way}", epochs=1, strict_rate=True)
        found = runs.finetune(params)
        assert found["sparsity"] == pytest.approx(0.5, abs=0.01)

    def test_layerwise_trains_once_per_conv_and_prunes_them_all(self, trained):
        found = runs.finetune(trained.replace(schedule="layerwise", start_cov=5, epochs=1))
        assert [entry["stage"] for entry in found["history"]] == [0, 1]
        pruned = {row["name"] for row in found["layers"] if row["pruned"]}
        assert pruned == set(NAMES[5:])
        masks, _ = checkpoints.load_masks(
            networks.resolve(found["params"]["job_dir"]) / "masks.safetensors"
        )
        assert list(masks) == NAMES[5:]

    def test_layerwise_shows_each_conv_other_images(self, trained, monkeypatch):
        # one of the two batches of an epoch for each of two convs
        shown, make = [], step.train_batch
        monkeypatch.setattr(
            step, "train_batch", lambda data, *i: shown.extend(i[0][0].tolist()) or make(data, *i)
        )
        half = {"schedule": "layerwise", "start_cov": 5, "epochs": 0.5}
        found = runs.finetune(trained.replace(**half))
        assert sorted(shown) == list(range(64))
        assert [entry["epoch"] for entry in found["history"]] == [0.5, 0.5]

    def test_layerwise_the_best_epoch_is_one_with_all_convs_pruned(self, trained):
        half = {"schedule": "layerwise", "start_cov": 5, "compress_rate": "[0.9]", "epochs": 1}
        found = runs.finetune(trained.replace(**half))
        first, last = found["history"]
        assert (first["stage"], last["stage"]) == (0, 1)
        assert (found["accuracy"]["best"], found["accuracy"]["best_epoch"]) == (last["top1"], 2)

    def test_before_fading_the_kernels_are_gone_all_the_same(self, trained):
        at_once = runs.finetune(trained.replace(epochs=1))
        fading = runs.finetune(trained.replace(epochs=1, fade_epochs=1))
        assert fading["accuracy"]["before"] == at_once["accuracy"]["before"]
        model, masks, meta = checkpoints.load_network(
            networks.resolve(fading["params"]["job_dir"]) / "model.safetensors"
        )
        assert meta["top1"] == fading["accuracy"]["last"] and masking.held(model, masks)

    def test_start_cov_beyond_the_last_conv(self, trained):
        with pytest.raises(ParamError, match="start_cov: 7 of 7 convs"):
            runs.finetune(trained.replace(start_cov=7))

    def test_its_masks_are_not_overwritten_by_those_of_other_weights(self, trained):
        record = runs.finetune(trained.replace(epochs=1))
        params = Params(**record["params"])
        path = networks.resolve(params.job_dir) / "masks.safetensors"
        before = path.read_bytes()
        other = {k: torch.ones_like(mask) for k, mask in checkpoints.load_masks(path)[0].items()}
        assert networks.save_masks(params, other) == path and path.read_bytes() == before

    def test_a_wrong_number_of_rates_names_both(self, trained):
        with pytest.raises(ParamError, match="compress_rate: 6 rates for 7 convs of resnet_56"):
            runs.finetune(trained.replace(compress_rate="[0.5]*6"))

    def test_a_run_that_diverges_leaves_a_record_that_says_so(self, trained, monkeypatch):
        params = trained.replace(lr=100.0, epochs=30, weight_decay=1.0, distill=0.0)
        monkeypatch.setattr(folder, "STATE_EVERY_S", 0.0)
        with pytest.raises(loop.Diverged, match="use a smaller lr") as caught:
            runs.finetune(params)
        found = {r["status"]: r for r in records.read_all(trained.results_dir, "digits")}
        lost, job = found["diverged"], networks.resolve(params.job_dir)
        assert set(found) == {"done", "diverged"} and 0 < len(lost["history"]) < 30
        assert lost["error"] == str(caught.value)
        assert not (job / "record.json").exists()
        tensors, last_good = load_tensors(job / "state.safetensors")
        assert last_good["epoch"] == len(lost["history"])
        assert all(tensor.isfinite().all() for tensor in tensors.values())


class TestJobDir:
    def test_of_another_run_is_refused_and_left_alone(self, trained, tmp_path):
        folder = tmp_path / "job"
        runs.finetune(trained.replace(job_dir=str(folder), epochs=1))
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(ParamError, match=r"^job_dir: .* holds a run with lr 0.04, .* 0.01"):
            runs.finetune(trained.replace(job_dir=str(folder), epochs=1, lr=0.01))
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    def test_of_another_unfinished_run_is_refused(self, trained, tmp_path, monkeypatch):
        broken = trained.replace(job_dir=str(tmp_path / "job"))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt(patch, 1)
            runs.finetune(broken)
        before = {path.name: path.read_bytes() for path in (tmp_path / "job").iterdir()}
        with pytest.raises(ParamError, match=r"holds a run with survivors 'random', .* 'l1'"):
            runs.finetune(broken.replace(survivors="l1"))
        assert {path.name: path.read_bytes() for path in (tmp_path / "job").iterdir()} == before

    def test_of_a_run_from_another_dense_network_is_refused(self, trained):
        done = runs.finetune(trained)
        runs.baseline(trained.replace(epochs=2))
        with pytest.raises(ParamError, match=r"^resume: .* holds a run from another dense network"):
            runs.finetune(trained)
        runs.baseline(trained.replace(epochs=1))
        assert as_json(runs.finetune(trained)) == as_json(done)

    def test_of_an_interrupted_run_from_another_dense_network_is_refused(
        self, trained, monkeypatch
    ):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            interrupt(patched, after=1)
            runs.finetune(trained)
        runs.baseline(trained.replace(epochs=2))
        with pytest.raises(ParamError, match=r"^resume: .* holds a run from another dense network"):
            runs.finetune(trained)

    def test_of_a_baseline_is_not_a_fine_tunings(self, params, tmp_path):
        params = params.replace(name="x", distill=0.0, job_dir=str(tmp_path / "job"))
        runs.baseline(params)
        with pytest.raises(ParamError, match=r"^job_dir: .* holds a baseline"):
            runs.finetune(params)

    def test_that_cannot_be_written_is_one_line(self, trained, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="cannot write") as caught:
            runs.finetune(trained.replace(job_dir=str(tmp_path / "file/x")))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("name", ["record.json", "state.safetensors"])
    def test_a_damaged_file_in_it_is_one_line_that_names_it(self, trained, tmp_path, name):
        (tmp_path / "job").mkdir()
        (tmp_path / "job" / name).write_bytes(b'{"schema"')
        with pytest.raises(ValueError, match=name) as caught:
            runs.finetune(trained.replace(job_dir=str(tmp_path / "job")))
        assert "\n" not in str(caught.value)


class Code:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (self.path,)


class TestCheckpoints:
    def test_a_missing_one_says_what_to_run(self, params):
        with pytest.raises(FileNotFoundError, match=r"run notebooks/00_baseline\.ipynb") as caught:
            runs.finetune(params)
        assert "'digits'" in str(caught.value) and "'resnet_56'" in str(caught.value)

    def refused(self, params, path, message):
        with pytest.raises(ValueError, match=message) as caught:
            networks.load_dense(params.replace(resume=str(path)))
        assert "\n" not in str(caught.value) and path.name in str(caught.value)

    @pytest.mark.parametrize("suffix", ["safetensors", "th"])
    @pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
    def test_a_truncated_one(self, trained, tmp_path, suffix, share):
        path = tmp_path / f"a.{suffix}"
        if suffix == "th":
            torch.save(networks.load_dense(trained).model.state_dict(), path)
        else:
            path.write_bytes(networks.dense_path(trained).read_bytes())
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        self.refused(trained, path, "not a readable safetensors|no readable checkpoint")

    @pytest.mark.parametrize("nested", [False, True])
    def test_one_of_torch(self, trained, tmp_path, nested):
        state = networks.load_dense(trained).model.state_dict()
        torch.save({"state_dict": state} if nested else state, tmp_path / "a.th")
        found = networks.load_dense(trained.replace(resume=str(tmp_path / "a.th")))
        assert equal(found.model.state_dict(), state)

    def test_with_code_in_it_and_no_code_is_run(self, trained, tmp_path):
        bad = Code()
        bad.path = str(tmp_path / "was-run")
        path = tmp_path / "a.th"
        torch.save({"state_dict": bad}, path)
        self.refused(trained, path, "no readable checkpoint")
        path.write_bytes(pickle.dumps({"state_dict": bad}, protocol=2))
        self.refused(trained, path, "no readable checkpoint")
        assert not os.path.exists(bad.path)

    def test_that_is_no_state_dict(self, trained, tmp_path):
        torch.save([torch.ones(1)], tmp_path / "a.th")
        self.refused(trained, tmp_path / "a.th", "holds a list, not a state dict")

    def test_of_another_arch(self, trained, tmp_path):
        path = tmp_path / "a.th"
        torch.save(models.build("vgg_16_bn").state_dict(), path)
        self.refused(trained, path, "does not fit the network: lacks conv1.weight")
        tensors, meta = load_tensors(networks.dense_path(trained))
        path = save_tensors(tmp_path / "b.safetensors", tensors, {**meta, "arch": "vgg_16_bn"})
        self.refused(trained, path, "is a vgg_16_bn, not a resnet_56")

    def test_with_nan(self, trained, tmp_path):
        tensors, meta = load_tensors(networks.dense_path(trained))
        tensors["conv1.weight"][0, 0] = float("nan")
        path = save_tensors(tmp_path / "a.safetensors", tensors, meta)
        self.refused(trained, path, "conv1.weight has NaN")

    def test_safetensors_of_others(self, trained, tmp_path):
        path = save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(1)}, {})
        self.refused(trained, path, "does not fit the network: lacks conv1.weight")
        state = networks.load_dense(trained).model.state_dict()
        save_file({f"model.{name}": tensor for name, tensor in state.items()}, path)
        loaded = networks.load_dense(trained.replace(resume=str(path))).model.state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())

    def test_trained_with_another_normalization(self, params):
        changed = params.replace(dataset="cifar10", normalization="cifar10", resume=str(PUBLIC))
        with pytest.raises(ParamError, match=r"^normalization: 'cifar10', but .* with 'imagenet'"):
            networks.load_dense(changed)


class TestResumeMask:
    def test_masks_of_a_file_are_used_as_they_are(self, trained):
        first = runs.finetune(trained.replace(epochs=1, mask_seed=7))
        path = networks.resolve(first["params"]["job_dir"]) / "masks.safetensors"
        again = trained.replace(epochs=1, resume_mask=str(path))
        runs.finetune(again)
        assert equal(
            checkpoints.load_masks(networks.resolve(again.job_dir) / "masks.safetensors")[0],
            checkpoints.load_masks(path)[0],
        )

    @pytest.mark.parametrize(
        ("masks", "message"),
        [
            ({"features.conv0": (64, 3)}, "'features.conv0' is no conv of this network"),
            ({"conv1": (64, 3)}, r"conv1 has a torch.bool mask \(64, 3\); give bool \(16, 3\)"),
            ({"conv1": (16, 3)}, "lacks a mask of layer1.0.conv1"),
        ],
    )
    def test_masks_that_do_not_fit_are_refused(self, trained, tmp_path, masks, message):
        given = {name: torch.ones(shape, dtype=torch.bool) for name, shape in masks.items()}
        path = checkpoints.save_masks(tmp_path / "m.safetensors", given)
        with pytest.raises(ValueError, match=rf"^resume_mask: .*m\.safetensors.*{message}"):
            runs.finetune(trained.replace(resume_mask=str(path)))

    def test_a_file_that_is_not_there(self, trained, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors: no such file"):
            runs.finetune(trained.replace(resume_mask=str(tmp_path / "nothing.safetensors")))


class TestClassFolders:
    """ImageNet's layout, from the dense network to the pruned one, with a dozen classes."""

    @pytest.fixture
    def images(self, params, tmp_path):
        make_folders(tmp_path / "images", {f"n{i:08d}": 4 for i in range(12)})
        return params.replace(
            dataset="imagenet",
            data_dir=str(tmp_path / "images"),
            image_size=32,
            batch_size=16,
            limit_train=0,
            limit_test=0,
            workers=2,
        )

    def test_runs_and_says_top_1_and_top_5(self, images):
        runs.baseline(images.replace(epochs=1))
        found = runs.finetune(images)
        assert found["provenance"]["data"]["train_images"] == 48
        for entry in found["history"]:
            assert 0 <= entry["top1"] <= entry["top5"] <= 100
        model, masks, meta = checkpoints.load_network(
            networks.resolve(images.job_dir) / "model.safetensors"
        )
        assert meta["num_classes"] == 12 and model.linear.out_features == 12
        assert masking.held(model, masks)
        data = load_data(images)
        again = evaluation.accuracy(model.half().float(), data, data.test)
        assert again["top1"] == pytest.approx(found["accuracy"]["last"], abs=5)

    def test_interrupted_it_goes_on_bit_for_bit(self, images, monkeypatch, tmp_path):
        runs.baseline(images.replace(epochs=1))
        whole = runs.finetune(images)
        broken = images.replace(job_dir=str(tmp_path / "broken"), workers=1)
        with monkeypatch.context() as patch:
            interrupt(patch, 1)
            with pytest.raises(KeyboardInterrupt):
                runs.finetune(broken)
        assert untimed(runs.finetune(broken)) == untimed(whole)
        assert equal(weights_of(broken), weights_of(images))

    def test_other_images_are_another_run(self, images, tmp_path):
        runs.baseline(images.replace(epochs=1))
        make_folders(tmp_path / "more", {f"n{i:08d}": 5 for i in range(12)})
        with pytest.raises(ParamError, match=r"^data_dir: .* holds a run on other images"):
            runs.baseline(images.replace(epochs=1, data_dir=str(tmp_path / "more")))
        gone = images.replace(epochs=1, data_dir=str(tmp_path / "gone"))
        assert runs.baseline(gone)["status"] == "done"  # a record can be read without the images

    def test_without_the_data_the_network_has_its_own_classes(self, params):
        for known, classes in ((params.replace(dataset="imagenet"), 1000), (params, 10)):
            assert networks.fresh(known.replace(arch="resnet_50")).model.fc.out_features == classes


class TestPublicCheckpoint:
    def test_evaluates_to_93_39(self, public, cifar10_root):
        params = Params(dataset="cifar10", normalization="imagenet", data_dir=str(cifar10_root))
        data = load_data(params)
        model = public.model.to(memory_format=torch.channels_last)
        assert evaluation.top1(model, data, data.test) == 93.39

    def test_is_what_the_configurations_start_from(self):
        params = from_yaml("params/cifar10/resnet_56-B-53.yaml")
        assert networks.dense_path(params) == PUBLIC
        assert len(networks.load_dense(params).rates) == 55
