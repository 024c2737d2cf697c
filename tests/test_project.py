"""What holds the project together: one list of packages, one name per configuration, its pages."""

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
from explib.report import tables
from tests.conftest import ROOT

CONFIGURATIONS = sorted((ROOT / "params").glob("*/*.yaml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_conda_users_get_the_same_packages():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    extras = PROJECT["optional-dependencies"]
    own = PROJECT["dependencies"] + extras["study"] + extras["test"]
    by_pip = next(entry["pip"] for entry in environment if isinstance(entry, dict))
    assert sorted(by_pip) == sorted([*own, "--editable ."])
    assert f"python{PROJECT['requires-python']}" in environment


LOCKS = {
    name: (ROOT / name).read_text() for name in ("requirements.lock", "requirements-peers.lock")
}


def locked(name):
    """The packages of a lock file, each at its version."""
    lines = [line for line in LOCKS[name].splitlines() if not line.startswith(" ")]
    return [Requirement(line.rstrip(" \\")) for line in lines]


def test_every_package_asked_for_is_locked_at_a_version_within_its_bound():
    extras = dict(PROJECT["optional-dependencies"])
    peers = {"requirements-peers.lock": extras.pop("peers")}  # only who measures needs them
    asked = {"requirements.lock": sum(extras.values(), PROJECT["dependencies"])} | peers
    for name, packages in asked.items():
        for wanted in (r for r in map(Requirement, packages) if r.name != "explib"):
            found = [r for r in locked(name) if r.name == canonicalize_name(wanted.name)]
            versions = [next(iter(requirement.specifier)).version for requirement in found]
            assert versions, f"{wanted.name} is not in {name}; run make lock"
            assert all(wanted.specifier.contains(v) for v in versions), f"{wanted}: {versions}"


@pytest.mark.parametrize("name", LOCKS)
def test_the_lock_holds_names_versions_and_hashes_only(name):
    for line in LOCKS[name].splitlines():
        assert re.fullmatch(
            r"[a-z0-9-]+==[^ ]+( ; [^/]+)? \\|    --hash=sha256:[0-9a-f]{64}( \\)?", line
        )
    hashes = re.split(r"^\S.*", LOCKS[name], flags=re.M)[1:]
    assert len(hashes) == len(locked(name)) and all("sha256" in each for each in hashes)


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


PAGES = [path for names in (*tables.PAGES, "CONTRIBUTING.md") for path in sorted(ROOT.glob(names))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PAGES}
EXAMPLE = re.compile(r"<!-- example:.*?-->\n```python\n(.*?)```(?:\n\n```\n(.*?)```)?", re.S)
EXAMPLES = {
    f"{name}-{number}": found
    for name, text in TEXTS.items()
    for number, found in enumerate(EXAMPLE.findall(text))
}


def _shape(text: str) -> list[str]:
    """Lines of an output, their numbers left out, and the lines of progress."""
    lines = [line for line in text.replace("\r", "\n").splitlines() if "step" not in line]
    return [" ".join(re.sub(r"[\d.]+", "0", line).split()) for line in lines if line.strip()]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_the_pages_run(tmp_path, name):
    code, shown = EXAMPLES[name]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pruned.safetensors").is_file() == ("explib.save(" in code)
    if shown:
        assert _shape(done.stdout) == _shape(shown)


def test_there_are_examples_on_the_pages_for_users():
    assert {name.rpartition("-")[0] for name in EXAMPLES} == {
        "README.md",
        "docs/any-network.md",
        "docs/speed.md",
    }


def _anchors(text: str) -> set[str]:
    """The anchors that a page's headings get where it is shown."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    words = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in words}


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_of_a_page_leads_somewhere(name):
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", TEXTS[name])
    links += [(target, "") for target in re.findall('src="(.*?)"', TEXTS[name])]
    for target, anchor in links:
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), target
        assert not anchor or anchor in _anchors(path.read_text()), f"{target}#{anchor}"


def test_the_readme_is_short_and_leads_to_every_page():
    assert (ROOT / "README.md").stat().st_size <= 12_288
    linked = re.findall(r"\]\(([^)#]+)", TEXTS["README.md"])
    assert set(TEXTS) - {"README.md"} <= set(linked)
