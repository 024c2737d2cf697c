"""What is never done: run what was only loaded, or what a parameter says."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from click.testing import CliRunner

from explib import Params
from explib.__main__ import cli
from tests.conftest import ROOT

PYTHON = sorted(ROOT.glob("explib/**/*.py"))
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
FORBIDDEN_CALLS = {"eval", "exec", "__import__"}
FORBIDDEN_MODULES = {"pickle", "shelve", "marshal", "dill", "joblib", "cloudpickle"}
WORKFLOW = [sys.executable, "-m", "snakemake", "--profile", "params/profiles/local"]
HOSTILE = ["; touch canary", "$(touch canary)", "`touch canary`", "| touch canary #", "-rf ~"]


def offences(source: str) -> list[str]:
    """What of the forbidden a piece of Python does."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            found += [name for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
            found += ["import *" for alias in node.names if alias.name == "*"]
        if isinstance(node, ast.Call):
            name, words = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
            found += [name] if name in FORBIDDEN_CALLS else []
            found += [name] if name in ("os.system", "os.popen", "torch.save") else []
            safe = ast.unparse(words.get("weights_only", ast.Constant(False))) == "True"
            found += [name] if name == "torch.load" and not safe else []
            found += [f"{name}(shell)"] if "shell" in words or "allow_pickle" in words else []
            plain = name == "yaml.load" and "_NoDuplicates" not in ast.unparse(node)
            found += [name] if plain else []
    return found


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_package_runs_no_strings_and_writes_no_pickle(path):
    assert offences(path.read_text()) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_so_the_notebooks(path):
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code":
            assert not re.search(r"^\s*[!%]", cell.source, re.M), "a shell or magic command"
            assert offences(cell.source) == []


def test_so_the_workflow():
    text = (ROOT / "Snakefile").read_text()
    assert not re.search(r"\b(eval|exec|system|popen)\s*[:(]", text)
    # the one command of a shell, in which every name and value is quoted
    assert set(re.findall(r"shell:\s*(.*)", text)) == {
        "RUN",
        'RUN + " --threads {threads}"',
        'RUN + " --threads {threads} --gpu"',
    }
    command = "".join(re.findall(r"^RUN \+?= (.*)$", text, re.M))
    assert set(re.findall(r"{(.*?)}", command)) == {
        "shlex.quote(sys.executable)", "input.notebook:q", "output.notebook:q", "params.given:q"
    }  # fmt: skip


def test_the_walk_sees_what_it_looks_for():
    bad = [
        *("eval('1')", "import pickle", "from pickle import loads", "from os import *"),
        *("torch.load('x')", "torch.load('x', weights_only=False)", "torch.save(1, 'x')"),
        *("subprocess.run('ls', shell=True)", "os.system('ls')", "yaml.load(text, yaml.Loader)"),
    ]
    assert all(len(offences(source)) == 1 for source in bad)
    assert offences("model.eval(); torch.load('x', weights_only=True)") == []


class TestNamesAreNeverCommands:
    @pytest.mark.parametrize("text", [*HOSTILE, "../../x", "a/b"])
    def test_a_name_of_a_run_is_refused(self, text):
        with pytest.raises(ValueError, match=r"name: .*; give letters, digits"):
            Params(name=text)

    @pytest.mark.parametrize("text", HOSTILE)
    def test_a_folder_of_a_run_is_a_folder(self, text, tmp_path, monkeypatch, resnet_8):
        monkeypatch.chdir(tmp_path)
        job = tmp_path / text
        words = [
            f"--job_dir={job}",
            f"--results_dir={tmp_path / 'results'}",
        ]
        dense = CliRunner().invoke(cli, ["baseline", "--epochs=1", "--limit_train=32", words[1]])
        assert dense.exit_code == 0, dense.output
        done = CliRunner().invoke(cli, ["prune", *words])
        assert done.exit_code == 0, done.output
        assert (job / "masks.safetensors").is_file()
        assert {path.name for path in tmp_path.iterdir()} == {text, "results"}

    def test_in_the_workflow_too(self, tmp_path):
        results = tmp_path / "; touch canary $(touch canary) `touch canary`"
        target = f"{results}/runs/digits/data.ok"
        done = subprocess.run(
            [*WORKFLOW, target, "--config", f"results_dir={results}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert Path(target).is_file()
        assert not any(Path(folder, "canary").exists() for folder in (ROOT, tmp_path, Path.home()))

    def test_a_wrong_value_stops_the_workflow_before_anything_runs(self, tmp_path):
        done = subprocess.run(
            [*WORKFLOW, "study", "--config", f"results_dir={tmp_path}", "name=; touch canary"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode != 0 and "give letters, digits" in done.stderr + done.stdout
        assert not list(tmp_path.iterdir()) and not (ROOT / "canary").exists()


def test_jupyter_listens_to_this_machine_only_and_keeps_its_token():
    from jupyter_server.auth.identity import IdentityProvider
    from jupyter_server.serverapp import ServerApp

    done = subprocess.run(["make", "-n", "lab"], cwd=ROOT, capture_output=True, text=True)
    (command,) = [line for line in done.stdout.splitlines() if "jupyter" in line]
    # one option, the page that opens
    assert command.split()[:2] == [".venv/bin/jupyter", "lab"] and command.count("--") == 1
    assert "--LabApp.default_url='/lab/tree/notebooks/README.md?" in command
    app = ServerApp()
    assert app.ip == "localhost" and not app.allow_remote_access and not app.allow_origin
    assert len(IdentityProvider(parent=app).token) >= 32


@pytest.mark.audit
def test_no_package_has_a_known_vulnerability():
    done = subprocess.run(
        [sys.executable, "-m", "pip_audit", "--skip-editable", "--progress-spinner=off", "-f=json"],
        capture_output=True,
        text=True,
        env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    try:
        found = json.loads(done.stdout)["dependencies"]
    except ValueError:
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        pytest.skip(f"the advisory database cannot be reached: {reason[:100]}")
    if not any("vulns" in package for package in found):
        pytest.skip("the advisory database cannot be reached: it knows none of the packages")
    known = [
        f"{package['name']} {package['version']}: {flaw['id']}, mended in {flaw['fix_versions']}"
        for package in found
        for flaw in package.get("vulns", [])
        if flaw["fix_versions"]
    ]
    assert not known, "\n".join(known)
