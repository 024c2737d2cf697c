"""The package installed, not in its checkout: the core by itself, and the study from elsewhere."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILD = "import sys; from setuptools import build_meta as b; b.build_wheel(sys.argv[1])"
IMPORTED_AS = {"pillow": "PIL", "scikit-learn": "sklearn", "ipython": "IPython"}
NEEDED = """
import explib
calls = [
    lambda: explib.load_data(explib.Params(dataset="digits")),
    lambda: explib.load_data(explib.Params(dataset="cifar10")),
    lambda: explib.build("resnet_50"),
]
for call in calls:
    try:
        call()
    except ModuleNotFoundError as error:
        print(error)
"""
STUDY = """
import json
import explib
from explib.report import tables
from explib.study import published, runs
params = explib.Params(
    epochs=1, batch_size=16, limit_train=16, limit_test=10, bn_images=16, threads=1,
    device="cpu", precision="fp32", compile="off",
)
runs.baseline(params)
record = runs.finetune(params)
print(json.dumps({
    "package": explib.__file__,
    "published": len(published.recounted()),
    "provenance": record["provenance"],
    "job_dir": record["params"]["job_dir"],
    "written": [str(path) for path in tables.build("results", "digits")],
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with what `pip install .` puts into site-packages, built offline."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "explib", source / "explib")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = run([sys.executable, "-c", BUILD, folder], source)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def core(installed, tmp_path_factory) -> Path:
    """An environment with the core and what its metadata ask for, and nothing else; its python."""
    folder = tmp_path_factory.mktemp("core")
    venv.create(folder, symlinks=True, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    for path in installed.iterdir():
        (site / path.name).symlink_to(path)
    wanted, linked = list(PROJECT["dependencies"]), set()
    while wanted:
        requirement = Requirement(wanted.pop())
        name = canonicalize_name(requirement.name)
        marker = requirement.marker
        if name in linked or (marker and not marker.evaluate({"extra": ""})):
            continue
        linked.add(name)
        package = importlib.metadata.distribution(name)
        wanted += package.requires or []
        for top in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(package.locate_file(top))
    return folder / "bin/python"


def run(command, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_the_core_does_everything_with_its_five_packages(core, tmp_path):
    assert len(PROJECT["dependencies"]) == 5
    study = [Requirement(line).name for line in PROJECT["optional-dependencies"]["study"]]
    absent = [IMPORTED_AS.get(name, name.replace("-", "_")) for name in study]
    done = run([core, "-I", ROOT / "tests/system/core_alone.py", *absent], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == ("native" if shutil.which("c++") else "torch")
    assert [path.name for path in tmp_path.iterdir()] == ["pruned.safetensors"]


def test_what_needs_the_study_says_so_in_one_line(core, tmp_path):
    done = run([core, "-I", "-c", NEEDED], tmp_path)
    assert done.stdout.splitlines() == [
        f'{name} is not installed; pip install "explib[study]"'
        for name in ("sklearn", "torchvision", "torchvision")
    ], done.stderr
    command = run([core, "-I", "-m", "explib"], tmp_path)
    wanted = 'explib: click is not installed; pip install "explib[study]"\n'
    assert (command.returncode, command.stderr) == (1, wanted)


def test_the_study_runs_from_an_installed_copy_in_any_folder(installed, tmp_path):
    done = run([sys.executable, "-c", STUDY], tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["package"] == str(installed / "explib/__init__.py")
    assert found["published"] == 12
    assert found["provenance"]["git_commit"] == "" and found["provenance"]["git_dirty"] is None
    assert (tmp_path / found["job_dir"] / "model.safetensors").is_file()
    results = tmp_path / "results"
    assert found["written"] and all(results in Path(path).parents for path in found["written"])
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
