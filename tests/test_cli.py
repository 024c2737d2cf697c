"""The command line, called as a user calls it: output, JSON, exit status, one-line errors."""

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from torchvision.models import shufflenet_v2_x0_5

from explib import engine, models
from explib.__main__ import SECTIONS, cli
from explib.cli import FIELDS
from explib.engine.images import CLASSES
from explib.files import load_tensors
from explib.params import Params
from explib.pruning import checkpoints
from explib.study import controls, recipes, verify
from explib.study.bench import comparison, inference, processes, training
from tests.conftest import PUBLIC, ROOT, make_folders, needs_compiler
from tests.report.test_tables import record

TINY = {"epochs": 1, "batch_size": 32, "limit_train": 64, "limit_test": 40, "bn_images": 32}
TINY |= {"threads": 1, "device": "cpu", "precision": "fp32"}
PICTURE = ROOT / "results/figures/notebook.png"
COMMANDS = [name for names in SECTIONS.values() for name in names]
# Another value for each field that some command does not show
OTHERS = {
    "name": "other", "data_url": "https://example.org/x", "resume_mask": "not-there.safetensors",
    "job_dir": "/not-there", "pruning_way": "A", "compress_rate": "[0.3]", "survivors": "l1",
    "groups": 5, "keep_floor": 0.4, "start_cov": 2, "strict_rate": True, "bias_in_score": True,
    "binary_floor": True,
    "schedule": "layerwise", "epochs": 7, "batch_size": 16, "micro_batch": 8, "lr": 0.1,
    "lr_schedule": "step", "lr_decay_step": "3", "momentum": 0.5, "nesterov": False,
    "weight_decay": 0.1, "label_smoothing": 0.1, "distill": 0.1, "fade_epochs": 1,
    "bn_images": 16, "freeze_bn": True, "validation": 9, "limit_train": 33, "limit_test": 21,
    "seed": 3, "mask_seed": 4, "device": "cpu", "precision": "bf16", "compile": "on",
    "workers": 2,
}  # fmt: skip


def call(*words, status=0):
    """Run a command in this process; its standard output."""
    done = CliRunner().invoke(cli, [str(word) for word in words])
    assert done.exit_code == status, done.output
    return done.stdout if status == 0 else done.stderr


def tiny(command, **more):
    """The options of a run of a second, as far as a command has them."""
    chosen = {name: value for name, value in TINY.items() if name in FIELDS[command]} | more
    return [command, *(f"--{name}={value}" for name, value in chosen.items())]


@pytest.fixture
def folder(tmp_path, resnet_8):
    """A results folder with a dense network of eight layers."""
    call(*tiny("baseline", results_dir=tmp_path))
    return tmp_path


class TestHelp:
    def test_it_is_quick_and_needs_no_torch(self):
        """As a process, for every command; nor what draws and tabulates."""
        commands = [["-h"], *([name, "--help"] for name in COMMANDS)]
        commands += [["bench", name, "--help"] for name in cli.commands["bench"].commands]
        code = f"""
import sys, explib.__main__ as m
for words in {commands}:
    m.cli(words, standalone_mode=False)
slow = {{"torch", "pandas", "matplotlib", "numpy"}} & set(sys.modules)
assert not slow, slow
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.count("Usage:") == len(commands), done.stderr

    def test_every_command_is_in_a_section(self):
        assert sorted(COMMANDS) == sorted(cli.commands)
        text = call("--help")
        titles = [line[:-1] for line in text.splitlines() if re.fullmatch(r"[A-Z].*:", line)]
        assert titles == ["Options", *SECTIONS]
        assert text.count("...") == 1  # of the usage: no line is cut off

    def test_every_parameter_is_an_option_with_its_explanation(self):
        text = " ".join(call("finetune", "--help").split())
        for field in dataclasses.fields(Params):
            assert f"--{field.name} " in text or f"--{field.name}," in text, field.name
        assert "weight of the dense network's soft labels in the loss [default: 0.9]" in text
        assert "share of each redundant set that stays; null: 1-max(rates)-0.1" in text

    def test_options_stand_under_the_headings_of_the_parameters(self):
        lines = call("finetune", "--help").splitlines()
        titles = [line[:-1] for line in lines if line.endswith(":") and line[0] != " "]
        assert titles[1:] == [
            "What is pruned, and on which images",
            "How kernels are chosen (method: score, levels, way)",
            "How the network is trained",
            "The machine",
        ]
        at = {line.split()[0]: number for number, line in enumerate(lines) if line[:4] == "  --"}
        assert at["--arch"] < at["--pruning_way,"] < at["--epochs"] < at["--device"]

    @pytest.mark.parametrize(
        ("words", "found"),
        [
            ("explib finetune --pruning_", "--pruning_way"),
            ("explib finetune --arch resnet_1", "resnet_110"),
            ("explib ver", "verify"),
            ("explib bench tr", "training"),
        ],
    )
    def test_names_complete(self, words, found):
        place = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        done = subprocess.run(
            [sys.executable, "-c", "from explib.__main__ import cli; cli(prog_name='explib')"],
            capture_output=True, text=True,
            env={**os.environ, "_EXPLIB_COMPLETE": "bash_complete", **place},
        )  # fmt: skip
        assert found in done.stdout, done.stderr


class TestOptions:
    """A command shows the fields of Params that it uses, and no others."""

    def result(self, tmp_path, command, **more):
        """What a command computes, without times and places."""
        found = json.loads(call(*tiny(command, **more), "--json"))
        if command == "prune":
            masks, _ = load_tensors(found.pop("masks"))
            return found, {name: mask.tolist() for name, mask in masks.items()}
        if command == "baseline":
            weights, _ = load_tensors(f"{found['params']['job_dir']}/model.safetensors")
            curve = [(e["train_loss"], e["top1"]) for e in found["history"]]
            return found["accuracy"], curve, {k: v.tolist() for k, v in weights.items()}
        return found

    @pytest.mark.parametrize("command", ["score", "flops", "prune", "baseline"])
    def test_a_field_that_is_not_shown_changes_nothing(self, folder, tmp_path, command):
        hidden = [f.name for f in dataclasses.fields(Params) if f.name not in FIELDS[command]]
        assert hidden and set(hidden) <= set(OTHERS)
        (tmp_path / "x.yaml").write_text(yaml.safe_dump({name: OTHERS[name] for name in hidden}))
        (tmp_path / "plain.yaml").write_text("{}")
        plain, changed = (
            self.result(tmp_path, command, file=tmp_path / name, results_dir=tmp_path)
            for name in ("plain.yaml", "x.yaml")
        )
        assert changed == plain

    @pytest.fixture
    def read(self, monkeypatch):
        """The fields that are read outside of Params itself, as they are read."""
        found, whole = set(), {"rates": ["compress_rate"], "side": ["image_size", "dataset"]}
        plain = Params.__getattribute__

        def reading(params, name):
            if sys._getframe(1).f_code.co_filename != inspect.getfile(Params):
                found.update(whole.get(name, [name]))
            return plain(params, name)

        monkeypatch.setattr(Params, "__getattribute__", reading)
        return found

    @pytest.mark.parametrize("command", FIELDS)
    def test_a_field_that_is_shown_is_read(self, tmp_path, resnet_8, read, command):
        images = make_folders(tmp_path / "images", {"a": 4, "b": 4})
        model = models.build("resnet_56", 2)
        meta = {"arch": "resnet_56", "num_classes": 2}
        dense = checkpoints.save(tmp_path / "dense.safetensors", model, {}, meta)
        of_folders = {"dataset": "imagenet", "data_dir": images, "image_size": 32}
        of_folders |= {"results_dir": tmp_path, "resume": dense}
        sizes = {"batch_size": 2, "lr_schedule": "step", "limit_train": 0, "limit_test": 0}
        of_folders |= {name: value for name, value in sizes.items() if name in FIELDS[command]}
        call(*tiny(command, **of_folders))
        if command in ("baseline", "finetune"):  # from scratch; and from an address without data
            call(*tiny("baseline", **of_folders | {"resume": ""}))
            nowhere = {"dataset": "cifar10", "data_dir": tmp_path, "results_dir": tmp_path}
            nowhere |= {"data_url": "https://127.0.0.1:9/x"}
            call(*tiny("baseline", **nowhere), status=1)
        assert set(FIELDS[command]) <= read

    def test_of_another_command_it_is_refused(self):
        assert "No such option" in call("prune", "--epochs", "3", status=2)
        assert "No such option" in call("baseline", "--survivors", "l1", status=2)


def test_the_whole_way(folder):
    rows = json.loads(call(*tiny("score", results_dir=folder), "--json"))
    assert len(rows) == 7 and rows[0]["kernels"] == 48
    weights, _, _ = checkpoints.load(folder / "checkpoints/digits/resnet_56.safetensors")
    sums = weights[f"{rows[1]['layer']}.weight"].sum((2, 3))
    assert (rows[1]["delta_e_min"], rows[1]["delta_e_max"]) == pytest.approx(
        (float(sums.min()), float(sums.max())), abs=1e-5
    )
    assert -7 <= rows[1]["level_min"] < rows[1]["level_max"] == 5  # (1 / (1 + e^-2) - 0.5) * 13
    pruned = json.loads(call(*tiny("prune", results_dir=folder), "--json"))
    assert (folder / "runs").is_dir() and os.path.isfile(pruned["masks"])
    assert f"{100 * pruned['sparsity']:.2f} %" in call(*tiny("flops", results_dir=folder))
    record = json.loads(call(*tiny("finetune", results_dir=folder), "--json"))
    assert record["status"] == "done" and record["params"]["epochs"] == 1
    # done already: shown, not computed again
    assert "last" in call(*tiny("finetune", results_dir=folder))
    network = f"{record['params']['job_dir']}/model.safetensors"
    found = json.loads(call("evaluate", network, "--json"))
    assert {row["recorded"] for row in found} == {record["accuracy"]["last"]}
    assert found[0]["way"] == "torch fp32" and found[0]["network"] == network
    assert all(0 <= row["top1"] <= 100 for row in found)
    written = json.loads(call("tables", "--results_dir", folder, "--dataset", "digits", "--json"))
    assert any(path.endswith(".csv") for path in written)
    assert any(path.endswith(".svg") for path in written)
    few = call("tables", "--results_dir", folder, "--dataset", "digits", "--no-figures")
    assert few.split() == [path for path in written if "/tables/" in path]


def test_a_batch_begins_with_baselines_and_survives_a_failure(tmp_path, resnet_8):
    common = (
        "epochs: 1\nbatch_size: 32\nlimit_train: 64\nlimit_test: 40\nbn_images: 32\nthreads: 1\n"
    )
    files = {
        "net-A.yaml": f"{common}name: net-A\npruning_way: A\n",
        "net-baseline.yaml": f"{common}name: net-baseline\n",
        "net-lost.yaml": f"{common}name: net-lost\nresume: not-there.th\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    paths = [tmp_path / name for name in files]
    words = ["batch", *paths, "--seeds", 2, "--results_dir", tmp_path / "results"]
    done = CliRunner().invoke(cli, [str(word) for word in words])
    assert done.exit_code == 1, done.output
    lines = done.stdout.splitlines()
    names = [line.split()[0].rstrip(",") for line in lines]
    assert names == ["net-baseline", "net-A", "net-lost", "net-A", "net-lost"]
    assert all("last" in line for line in lines if "net-lost" not in line)
    assert "not-there.th is not there" in lines[2]
    assert len(list((tmp_path / "results/records/digits").glob("*.json"))) == 3
    over = call(*words[:-4], "--results_dir", tmp_path / "none", "--seconds", 1e-9)
    assert over.count("not begun") >= 2


def test_options_stand_above_the_file(tmp_path):
    (tmp_path / "x.yaml").write_text("compress_rate: '[0.25]'\nfilters: 3\n")
    message = call("flops", "-f", tmp_path / "x.yaml", status=2)
    assert "unknown parameter 'filters'" in message
    (tmp_path / "x.yaml").write_text("compress_rate: '[0.25]'\ndataset: cifar10\n")
    assert "50.00 % (asked for: 50.00 %)" in call(
        "flops", "-f", tmp_path / "x.yaml", "--compress-rate", "[0.5]"
    )


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["flops", "--arch", "resnet_5"], 2, "'resnet_5' is unknown; did you mean 'resnet_56'"),
        (["tables", "--dataset", "cifar11"], 2, "dataset: 'cifar11' is unknown"),
        (["tables", "--dataset", "digits", "--readme"], 2, "README.md has the tables of 'cifar10'"),
        (["controls", "googlenet"], 2, "arch: 'googlenet' has no controls"),
        (["recipes", "-f", "not-there.yaml"], 2, "not-there.yaml: cannot be read"),
        (["report", "--dataset", "cifar11"], 1, "cifar11: no figures"),
        (["verify", "not-there.safetensors"], 1, "not-there.safetensors"),
        (["bench", "processes", "0"], 2, "0 is not in the range"),
        (["flops", "--compress_rate", "[1.5]"], 2, "compress_rate: rate 1.5"),
        (["baseline", "--lr", "many"], 2, "'many' is not a valid float"),
        (["flops", "-f", "not-there.yaml"], 2, "not-there.yaml: cannot be read"),
        (["prune", "--resume", "not-there.th"], 1, "not-there.th is not there"),
        (["evaluate", "not-there.safetensors"], 1, "not-there.safetensors"),
        (["run", "not-there.safetensors", "."], 1, ".: no images in it"),
        (["run", "not-there.safetensors", PICTURE], 1, "not-there.safetensors: no such file"),
        (["run", PUBLIC, PUBLIC], 1, "resnet_56-public.safetensors: no readable image"),
        (["run", PUBLIC, PICTURE, "--dtype", "fp64"], 2, "'fp64' is not one of"),
        (["export", "not-there.safetensors", "x.onnx"], 1, "not-there.safetensors: no such file"),
    ],
)
def test_errors_are_one_line_and_a_status(words, status, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = call(*words, status=status)
    errors = [line for line in text.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and message in errors[0]


class TestRun:
    """Networks as files, away from the checkout: images in, classes out."""

    @needs_compiler
    def test_every_image_gets_a_line_and_the_last_one_says_how_fast(self, tmp_path, monkeypatch):
        torch.manual_seed(0)
        monkeypatch.chdir(tmp_path)
        make_folders(tmp_path / "images", {"a": 6, "b": 4})
        model = shufflenet_v2_x0_5(num_classes=3).eval()
        names = ["cat", "dog", "owl"]
        engine.save(tmp_path / "net.safetensors", model, torch.zeros(1, 3, 32, 32), classes=names)
        words = ["run", "net.safetensors", "images", "--top", 2, "--batch-size", 4, "--threads", 1]
        *lines, last = call(*words).splitlines()
        line = r"images/(train|val)/[ab]/\d\.(JPEG|png)(  (cat|dog|owl) 0\.\d{3}){2}"
        assert len(lines) == 15 and all(re.fullmatch(line, each) for each in lines), lines
        speeds = r"15 images, [\d.e+]+ images/s, with reading [\d.e+]+; in the engine, "
        assert re.fullmatch(speeds + r"float32, 1 thread, \d+-bit vectors", last), last
        found = json.loads(call(*words, "--json"))
        assert [row["file"] for row in found["images"]] == [each.split("  ")[0] for each in lines]
        assert found["ran"]["kernels"] > 0 and found["ran"]["fallbacks"] == []

    def test_what_is_no_image_is_said_and_the_others_get_their_lines(self, tmp_path):
        make_folders(tmp_path / "images", {"a": 2, "b": 2})
        (tmp_path / "images/train/a/broken.png").write_text("no image")
        words = ["run", str(PUBLIC), str(tmp_path / "images/train"), "--json"]
        done = CliRunner().invoke(cli, words)
        found = json.loads(done.stdout)
        assert done.exit_code == 1 and len(found["images"]) == 4
        assert [row["file"] for row in found["unreadable"]] == [
            str(tmp_path / "images/train/a/broken.png")
        ]
        errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
        assert len(errors) == 1 and "broken.png: no readable image" in errors[0]

    @needs_compiler
    def test_a_shipped_network_takes_images_too(self, tmp_path):
        make_folders(tmp_path / "images", {"a": 2, "b": 2})
        lines = call("run", PUBLIC, tmp_path / "images/train").splitlines()
        assert len(lines) == 5 and "4 images" in lines[-1]
        assert {line.split()[1] for line in lines[:-1]} <= {*CLASSES["cifar10"]}

    def test_without_a_compiler_it_says_so_and_goes_on(self, tmp_path, monkeypatch):
        monkeypatch.setenv("CXX", "no-such-compiler")
        make_folders(tmp_path / "images", {"a": 2, "b": 2})
        words = ["run", str(PUBLIC), str(tmp_path / "images/train"), "--threads", "1"]
        done = CliRunner().invoke(cli, words)
        assert done.exit_code == 0 and "in torch, float32, 1 thread" in done.stdout
        assert done.stderr.count("\n") == 1 and "no C++ compiler" in done.stderr

    def test_as_onnx(self, tmp_path):
        onnx = pytest.importorskip("onnx", reason="pip install '.[peers]'")
        path = tmp_path / "net.onnx"
        assert call("export", PUBLIC, path).strip() == str(path)
        onnx.checker.check_model(str(path), full_check=True)

    def test_without_onnx_it_says_what_to_install(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnx", None)
        text = call("export", PUBLIC, tmp_path / "net.onnx", status=1)
        assert text == 'Error: onnx is not installed; pip install "explib[peers]"\n'


class TestStudy:
    """The commands of the study: what they measure is tested beside it, here is what they show."""

    def test_a_network_that_is_worse_than_it_claims_is_status_1(self, tmp_path, monkeypatch):
        row = {"way": "torch fp32", "top1": 90.0, "recorded": 90.0, "differ": 0}
        monkeypatch.setattr(verify, "verify", lambda path, data_dir: [row])
        path = tmp_path / "checkpoints/cifar10/a.safetensors"
        path.parent.mkdir(parents=True)
        path.touch()
        assert "torch fp32: the worst of 1 off by 0.00, allowed 0.05" in call("verify", path)
        assert not (tmp_path / "bench").exists()  # one network is not all that are shipped
        found = json.loads(call("verify", "--results_dir", tmp_path, "--json"))
        assert json.loads(Path(found["file"]).read_text())["rows"] == found["rows"]
        assert found["rows"] == [{"network": "a", **row}]
        row["top1"] = 89.9
        done = CliRunner().invoke(cli, ["verify", str(path)])
        assert done.exit_code == 1 and "off by 0.10" in done.stdout

    def test_rows_are_shown_as_they_come(self, tmp_path, monkeypatch):
        row = {"arch": "vgg_16_bn", "cut_pct": 53.1, "pruning_way": "B", "survivors": "l1"}
        row |= {"changed": "groups 1", "top1": [80.0, 82.0]}
        given = []

        def measure(start, results_dir, seeds, more):
            given.append((start, results_dir, seeds, more))
            yield row

        monkeypatch.setattr(controls, "measure", measure)
        words = ["controls", "vgg_16_bn", "--seeds", 2, "--results_dir", tmp_path]
        words += ["--criterion", "mine:peak", "--criterion", "mine:mean"]
        assert call(*words).splitlines()[0].split() == [
            *("vgg_16_bn", "53.1", "%", "B", "l1", "groups", "1", "81.00")
        ]
        more = ("mine:peak", "mine:mean")
        assert given == [(controls.STARTS["vgg_16_bn"], str(tmp_path), 2, more)]
        assert json.loads(call(*words, "--json")) == [row]
        done = {"recipe": "ours", "before": 20.0, "last": 91.5}
        monkeypatch.setattr(recipes, "compare", lambda file, results_dir: iter([done]))
        assert "20.00 → 91.50 %" in call("recipes", "--results_dir", tmp_path)

    def test_a_page_is_written_where_it_is_asked_for(self, tmp_path, monkeypatch):
        record(tmp_path)
        picture = tmp_path / "figures/cifar10/criteria-resnet_56.svg"
        picture.parent.mkdir(parents=True)
        picture.write_text("<svg/>")
        found = call("report", "--results_dir", tmp_path).strip()
        assert found == str(tmp_path / "report.html") and "made-up" in Path(found).read_text()
        monkeypatch.chdir(tmp_path)
        assert call("report", "page.html", "--results_dir", tmp_path).strip() == "page.html"
        assert (tmp_path / "page.html").read_bytes() == (tmp_path / "report.html").read_bytes()


class TestBench:
    def test_inference_hands_on_what_it_is_asked_for(self, tmp_path, monkeypatch):
        given = []

        def measure(networks, **options):
            given.append((networks, options))
            yield {"arch": "resnet18", "kept": "2026-01-01"}

        monkeypatch.setattr(comparison, "measure", measure)
        text = call("bench", "inference", "resnet18", "--quick", "--results_dir", tmp_path)
        assert "resnet18: measured already, 2026-01-01" in text and "1 rows" in text
        call("bench", "inference", "--sweep", "--threads", 2, "--way", "openvino int8")
        (first, quick), (every, sweep) = given
        assert first == ("resnet18",) and every == tuple(comparison.CASES)
        assert quick["quick"] and quick["names"] == comparison.USUAL and not quick["densities"]
        assert sweep["densities"] == comparison.DENSITIES and sweep["threads"] == 2
        assert sweep["names"] == ("openvino int8",) and not sweep["again"]

    def test_runtime_writes_its_record_and_draws_it(self, tmp_path, monkeypatch):
        path = ROOT / "results/bench/runtime-amd-epyc.json"
        record, given = json.loads(path.read_text()), []

        def measure(threads, results_dir):
            given.append((threads, results_dir))
            return record

        monkeypatch.setattr(inference, "measure", measure)
        text = call("bench", "runtime", "--threads", 2, "--results_dir", tmp_path)
        assert given == [(2, str(tmp_path))] and "resnet_56 batch 128" in text
        assert (tmp_path / "bench" / path.name).read_bytes() == path.read_bytes()
        drawn = sorted(path.name for path in (tmp_path / "figures/cifar10").glob("*.svg"))
        names = ("accuracy_vs_speed", "speed", "speed_vs_density")
        assert drawn == sorted(f"{name}-amd-epyc.svg" for name in names)

    def test_training_ends_with_its_ratios(self, tmp_path, monkeypatch):
        plain = {"network": "resnet_56", "task": "train", "loop": "plain", "images_per_s": 200.0}
        rows = [plain, plain | {"loop": "ours", "images_per_s": 500.0}]
        rows.append({"network": "resnet_56", "pruned_pct": 50.0, "all_kernels": 1.0})
        rows[-1]["surviving_kernels"] = 2.0
        monkeypatch.setattr(training, "record", lambda params, results_dir: iter(rows))
        last = call("bench", "training", "--results_dir", tmp_path).splitlines()[-1]
        assert last.split() == ["resnet_56,", "train:", "ours", "/", "plain", "2.5"]

    def test_processes_are_as_many_as_asked_for(self, tmp_path, resnet_8, monkeypatch):
        small = processes.RUN.replace(limit_train=32, batch_size=16, limit_test=8)
        monkeypatch.setattr(processes, "RUN", small)
        monkeypatch.setattr(processes, "images_per_s", lambda count, params: 100.0 * count**0.5)
        text = call("bench", "processes", 1, 4, "--results_dir", tmp_path)
        assert "4 processes: 200 images/s, 0.50 of linear" in text
        assert (tmp_path / "bench/processes.json").is_file()


class TestElsewhere:
    """Paths that a user gives are relative to where one stands."""

    def test_another_folder_than_the_project(self, folder, tmp_path_factory):
        away = tmp_path_factory.mktemp("away")
        (away / "x.yaml").write_text("compress_rate: '[0.5]'\n")
        words = ["flops", "-f", "x.yaml", "--results_dir", "found", "--threads", "1"]
        done = subprocess.run(
            [sys.executable, "-m", "explib", *words], cwd=away, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0 and "50.00 % (asked for: 50.00 %)" in done.stdout, done.stderr

    def test_the_tables_of_a_readme(self, tmp_path, monkeypatch):
        monkeypatch.setattr("explib.__main__.resolve", lambda path: tmp_path / path)
        words = ["tables", "--readme", "--no-figures", "--results_dir", tmp_path / "found"]
        (tmp_path / "README.md").write_text("no marks")
        assert "README.md: has no table" in call(*words, status=1)
        (tmp_path / "README.md").write_text("<!-- table:flops -->\n<!-- /table:flops -->\n")
        found = call(*words).split()
        assert str(tmp_path / "README.md") in found
        assert "| VGG-16 | 53.10 |" in (tmp_path / "README.md").read_text()
        assert (tmp_path / "found/tables/cifar10/flops.csv").is_file()


def test_no_other_module_reads_arguments():
    paths = sorted((ROOT / "explib").glob("**/*.py"))
    doors = [path.name for path in paths if "__name__ ==" in path.read_text()]
    assert doors == ["__main__.py"]
    assert not [path for path in paths if re.search(r"argparse|sys\.argv", path.read_text())]
