"""What holds the project together: one list of packages, one README, one name per configuration."""

import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from explib import params
from explib import rates as rates_module
from tests.conftest import ROOT

CONFIGURATIONS = sorted((ROOT / "params").glob("*/*.yaml"))
README = (ROOT / "README.md").read_text()


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_conda_users_get_the_same_packages():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    extras = PROJECT["optional-dependencies"]
    own = PROJECT["dependencies"] + extras["study"] + extras["test"]
    by_pip = next(entry["pip"] for entry in environment if isinstance(entry, dict))
    assert sorted(by_pip) == sorted([*own, "--editable ."])
    assert f"python{PROJECT['requires-python']}" in environment


LOCK = (ROOT / "requirements.lock").read_text()
LOCKED = [Requirement(line.rstrip(" \\")) for line in LOCK.splitlines() if not line.startswith(" ")]


def test_every_package_asked_for_is_locked_at_a_version_within_its_bound():
    asked = sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"])
    for wanted in (r for r in map(Requirement, asked) if r.name != "explib"):
        found = [r for r in LOCKED if r.name == canonicalize_name(wanted.name)]
        versions = [next(iter(requirement.specifier)).version for requirement in found]
        assert versions, f"{wanted.name} is not in requirements.lock; run make lock"
        assert all(wanted.specifier.contains(v) for v in versions), f"{wanted}: {versions}"


def test_the_lock_holds_names_versions_and_hashes_only():
    for line in LOCK.splitlines():
        assert re.fullmatch(
            r"[a-z0-9-]+==[^ ]+( ; [^/]+)? \\|    --hash=sha256:[0-9a-f]{64}( \\)?", line
        )
    hashes = re.split(r"^\S.*", LOCK, flags=re.M)[1:]
    assert len(hashes) == len(LOCKED) and all("sha256" in each for each in hashes)


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_configuration_is_named_like_its_file(path):
    loaded = params.from_yaml(path)
    assert loaded.name == path.stem and loaded.dataset == path.parent.name


def test_every_published_row_has_its_configurations():
    rows = yaml.safe_load((ROOT / "explib/study/published.yaml").read_text())["rows"]
    ours = [params.from_yaml(path) for path in CONFIGURATIONS]
    found = {(p.arch, p.dataset, tuple(p.rates), p.pruning_way, p.survivors) for p in ours}
    wanted = {
        (
            *(row["arch"], row["dataset"]),
            tuple(rates_module.parse_rates(row["compress_rate"])),
            way,
            survivors,
        )
        for row in rows
        for rates in [row["compress_rate"]]
        for way in "AB"
        for survivors in ("random", "l1")
    }
    assert len(wanted) == 48 and wanted <= found


EXAMPLES = re.findall(r"<!-- example:.*?-->\n```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_readme_examples_run(tmp_path, code):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pruned.safetensors").is_file() == ("explib.save(" in code)


def test_every_file_the_readme_names_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
