"""Many runs: Snakemake with the real notebooks, two jobs at once, twice at once, killed, submitted.

One of the two notebooks prunes its network in one shot, the other layer by layer.
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import nbformat
import pytest

from explib.params import PLACES
from tests.conftest import ROOT

KILLS = 6
TINY = {
    "epochs": 3,
    "batch_size": 32,
    "limit_train": 64,
    "limit_test": 40,
    "bn_images": 32,
    "precision": "fp32",
    "compile": "off",
    "threads": 1,
}
NOTEBOOKS = ["03_finetune-resnet_56-A", "03_finetune-resnet_56-B"]
LAYERWISE = """
name: resnet_56-B
arch: resnet_56
dataset: digits
pruning_way: B
schedule: layerwise
compress_rate: "[0.0]*52+[0.5]*3"
"""
TIMED = {"seconds", "images_per_s", "wall_s", "created", *PLACES}
COMMITTED = {"git_commit", "git_dirty"}  # somebody may commit while the tests run


@dataclass
class Folder:
    """A folder to run Snakemake in, with the project's files and results of its own."""

    path: Path

    def __post_init__(self):
        self.path.mkdir()
        self.results = self.path / "results"
        configurations = self.path / "params/digits"
        configurations.mkdir(parents=True)
        (configurations / "resnet_56-B.yaml").write_text(LAYERWISE)
        linked = ("params/digits/resnet_56-A.yaml", "params/digits/resnet_56-baseline.yaml")
        for name in ("Snakefile", "notebooks", "params/profiles", *linked):
            (self.path / name).symlink_to(ROOT / name)
        self.environment = {
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self.path),
            "XDG_CACHE_HOME": str(self.path),  # where the locks of GPUs are
            "MPLCONFIGDIR": matplotlib.get_cachedir(),  # whose list of fonts takes seconds to make
            "CUDA_VISIBLE_DEVICES": "10,11",  # two to lock, and none that torch would find
        }

    def start(self, profile: str, *options: str, notebooks=NOTEBOOKS, **environment):
        """Snakemake under way, in a process group of its own."""
        targets = [f"{self.results}/notebooks/digits/{name}.ipynb" for name in notebooks]
        config = [f"{key}={value}" for key, value in TINY.items()]
        command = [sys.executable, "-m", "snakemake", "--profile", f"params/profiles/{profile}"]
        return subprocess.Popen(
            [*command, *options, *targets, "--config", *config, f"results_dir={self.results}"],
            cwd=self.path,
            env=os.environ | self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, *processes: subprocess.Popen) -> list[str]:
        """What the workflows said, all of which have to succeed; nothing is left half done."""
        said = [process.communicate()[0] for process in processes]
        for process, text in zip(processes, said, strict=True):
            assert process.returncode == 0, text[-3000:]
        assert {path.name for path in self.results.rglob(".*")} == {".lock"}
        return said

    def executed(self, name: str):
        return nbformat.read(self.results / f"notebooks/digits/{name}.ipynb", 4)

    def files(self) -> set[tuple[Path, int]]:
        """The results so far, each with when it was written; nothing that is hidden."""
        found = set()
        with contextlib.suppress(FileNotFoundError):  # what goes meanwhile is seen the next time
            for path in self.results.rglob("[!.]*.*"):
                found.add((path, path.stat().st_mtime_ns))
        return found

    def outcome(self) -> dict:
        """Masks, weights and records by file name, without times and places."""
        found = {}
        for path in sorted(self.results.rglob("*.*")):
            if path.suffix == ".safetensors":
                found[path.relative_to(self.results)] = path.read_bytes()
            elif path.suffix == ".json" and path.parent.parent.name == "records":
                found[path.relative_to(self.results)] = timeless(json.loads(path.read_text()))
        return found


def timeless(value):
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in TIMED | COMMITTED}
    return [timeless(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder in which the workflow has run, and what two at once said."""
    folder = Folder(tmp_path_factory.mktemp("whole") / "project")
    both = [folder.start("local", "--cores", "2") for _ in range(2)]
    return folder, folder.finish(*both)


def test_two_workflows_at_once_share_the_work(whole):
    folder, said = whole
    waiting = f"{folder.results}/runs/digits: another process is at work here; waiting\n"
    assert sorted(text.count(waiting) for text in said) == [0, 1]
    assert sorted(text.count("Finished jobid") for text in said) == [0, 3]
    # dense, as shipped and in its run; masks and weights; records; the soft labels of three epochs
    # for each of three convs, of which the run in one go learns from the first three
    assert len(folder.outcome()) == 2 + 2 * 2 + 3 + 3 * 3


def test_a_workflow_says_what_it_is_doing(whole):
    (text,) = (text for text in whole[1] if "Finished jobid" in text)
    for name in ("00_baseline-resnet_56", *NOTEBOOKS):
        assert re.search(rf"^{name}: begun\n(.*\n)*{name}: done, \d+ s$", text, re.M)
    assert re.search(r"^resnet_56-A: step 6 of 6, .* epoch 3: top-1 \d+\.\d\d %", text, re.M)
    assert re.search(r"^3 of 3 steps \(100%\) done", text, re.M)
    assert "unknown parameter" not in text and "WARNING" not in text


def test_two_jobs_run_at_once_each_with_a_gpu_of_its_own(whole):
    one, two = (whole[0].executed(name).metadata.papermill for name in NOTEBOOKS)
    assert max(one.start_time, two.start_time) < min(one.end_time, two.end_time)
    assert not one.exception and not two.exception
    locks = [path.stem for path in (whole[0].path / "explib").glob("gpu-*.lock")]
    assert sorted(name.split("-")[-1] for name in locks) == ["10", "11"]


def test_a_workflow_killed_at_random_moments_ends_as_one_that_was_not(whole, tmp_path):
    """Each life ends at work: a moment after its first new file, or its second."""
    folder, chance = Folder(tmp_path / "project"), random.Random(6)
    for _ in range(KILLS):
        process, before = folder.start("local", "--cores", "2"), folder.files()
        wanted = chance.choice((1, 2))
        while len(folder.files() - before) < wanted:
            assert process.poll() is None, process.communicate()[0][-3000:]  # nothing is left
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()
        for name in NOTEBOOKS:
            if (folder.results / f"notebooks/digits/{name}.ipynb").exists():
                nbformat.validate(folder.executed(name))
    folder.finish(folder.start("local", "--cores", "2"))
    assert folder.outcome() == whole[0].outcome()
    assert not any(folder.executed(name).metadata.papermill.exception for name in NOTEBOOKS)


def tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path):
    """A folder with the commands of SLURM, which run a job here and now, as a node would."""
    pytest.importorskip("snakemake_executor_plugin_slurm", reason="pip install '.[slurm]'")
    place = tmp_path / "bin"
    place.mkdir()
    tool(place, "sinfo", "echo 'main*'")
    tool(place, "srun", 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"')
    tool(place, "sacct", f'case "$*" in *Account*) echo none;; *) cat {place}/state;; esac')
    tool(
        place,
        "sbatch",
        f"""for word; do echo "$word"; case $word in --wrap=*) job=${{word#--wrap=}};; esac
        done > {place}/asked
        state=FAILED
        SLURM_JOB_ID=7 sh -c "$job" > {place}/said 2>&1 && state=COMPLETED
        echo "7|$state" > {place}/state; echo 7""",
    )
    return place


def test_slurm_gets_a_job_with_its_resources_and_the_node_runs_it(whole, cluster):
    folder, name = whole[0], "02_pruning-resnet_56-A"
    path = f"{cluster}:{os.environ['PATH']}"
    options = ("--slurm-init-seconds-before-status-checks", "1")
    folder.finish(folder.start("slurm", *options, notebooks=[name], PATH=path))
    asked = (cluster / "asked").read_text().split("\n")
    assert "--gpus=1" in asked and "--cpus-per-task=8" in asked
    assert asked[asked.index("--mem") + 1] == "3000" and asked[asked.index("-t") + 1] == "1440"
    assert "% of the kernels pruned" in nbformat.writes(folder.executed(name))


def test_slurm_plans_every_run_with_its_resources(whole):
    pytest.importorskip("snakemake_executor_plugin_slurm", reason="pip install '.[slurm]'")
    process = whole[0].start("slurm", "--dry-run", "--forceall", notebooks=NOTEBOOKS)
    plan = process.communicate()[0]
    assert process.returncode == 0, plan[-3000:]
    jobs = re.findall(r"^rule (\w+):\n(.*?\n)(?=\[|\n|$)", plan, re.M | re.S)
    asked = [
        dict(pair.split("=") for pair in re.findall(r"\b(?:mem_mb|runtime|gpu)=\d+", job))
        for rule, job in jobs
        if rule in ("baseline", "notebook")
    ]
    assert asked == 3 * [{"mem_mb": "3000", "runtime": "1440", "gpu": "1"}]


def test_started_in_another_folder_with_results_below_home(tmp_path):
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--summary"]
    done = subprocess.run(
        [*command, "study", "--cores", "1", "--config", "results_dir=~/found"],
        cwd=tmp_path,
        env=os.environ | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert f"{tmp_path}/found/notebooks/digits/02_pruning-resnet_56-A.ipynb" in done.stdout
    assert not (tmp_path / "~").exists(), done.stderr
