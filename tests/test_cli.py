"""The command line, called as a user calls it: output, JSON, exit status, one-line errors."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from explib.__main__ import cli
from explib.files import ROOT
from explib.params import Params

TINY = ["--epochs", "1", "--batch_size", "32", "--limit_train", "64", "--limit_test", "40"]
TINY += ["--bn_images", "32", "--threads", "1"]


def call(*words, status=0):
    """Run a command in this process; its standard output."""
    done = CliRunner().invoke(cli, [str(word) for word in words])
    assert done.exit_code == status, done.output
    return done.stdout if status == 0 else done.stderr


@pytest.fixture
def folder(tmp_path, resnet_8):
    """A results folder with a dense network of eight layers."""
    call("baseline", "--results_dir", tmp_path, *TINY)
    return tmp_path


def test_as_a_process_help_is_quick_and_needs_no_torch():
    code = "import sys, explib.__main__ as m; assert 'torch' not in sys.modules; m.cli(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "finetune" in done.stdout, done.stderr
    module = [sys.executable, "-m", "explib", "nonsense"]
    assert subprocess.run(module, capture_output=True, cwd=ROOT).returncode == 2


def test_every_parameter_is_an_option_with_its_explanation():
    text = " ".join(call("finetune", "--help").split())
    for field in dataclasses.fields(Params):
        assert f"--{field.name} " in text or f"--{field.name}," in text, field.name
    assert "weight of the dense network's soft labels in the loss [default: 0.9]" in text
    assert "share of each redundant set that stays; null: 1-max(rates)-0.1" in text


def test_names_complete():
    words = {"_EXPLIB_COMPLETE": "bash_complete", "COMP_CWORD": "2"}
    words["COMP_WORDS"] = "explib finetune --pruning_"
    done = subprocess.run(
        [sys.executable, "-c", "from explib.__main__ import cli; cli(prog_name='explib')"],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **words},
    )  # fmt: skip
    assert "--pruning_way" in done.stdout


def test_the_whole_way(folder):
    words = ["--results_dir", folder, *TINY]
    rows = json.loads(call("score", *words, "--json"))
    assert len(rows) == 7 and rows[0]["kernels"] == 48
    pruned = json.loads(call("prune", *words, "--json"))
    assert (folder / "runs").is_dir() and os.path.isfile(pruned["masks"])
    assert f"{100 * pruned['sparsity']:.2f} %" in call("flops", *words)
    record = json.loads(call("finetune", *words, "--json"))
    assert record["status"] == "done" and record["params"]["epochs"] == 1
    assert "last" in call("finetune", *words)  # done already: shown, not computed again
    network = f"{record['params']['job_dir']}/model.safetensors"
    found = json.loads(call("evaluate", network, "--json"))
    assert {row["recorded"] for row in found} == {record["accuracy"]["last"]}
    assert found[0]["way"] == "torch fp32" and found[0]["network"] == network
    assert all(0 <= row["top1"] <= 100 for row in found)
    written = json.loads(call("tables", "--results_dir", folder, "--dataset", "digits", "--json"))
    assert any(path.endswith(".csv") for path in written)


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
        (["flops", "--arch", "resnet_5"], 2, "'resnet_5' is not one of"),
        (["flops", "--compress_rate", "[1.5]"], 2, "compress_rate: rate 1.5"),
        (["flops", "--lr", "many"], 2, "'many' is not a valid float"),
        (["flops", "-f", "not-there.yaml"], 2, "not-there.yaml: cannot be read"),
        (["prune", "--resume", "not-there.th"], 1, "not-there.th is not there"),
        (["evaluate", "not-there.safetensors"], 1, "not-there.safetensors"),
    ],
)
def test_errors_are_one_line_and_a_status(words, status, message):
    text = call(*words, status=status)
    errors = [line for line in text.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and message in errors[0]
