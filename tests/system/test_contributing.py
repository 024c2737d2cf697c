"""What CONTRIBUTING.md shows runs as it stands there, in a folder of its own."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from tests.conftest import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
FILES = {name: code for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", TEXT, re.S)}
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S)
    for line in block.split("\n")
    if line
]
TRAINED = ["--limit_train", "64", "--threads", "1", "--device", "cpu", "--precision", "fp32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of the examples, and two records to draw."""
    folder = tmp_path_factory.mktemp("contributing")
    for name, code in FILES.items():
        (folder / name).write_text(code)
    records = folder / "results/records/cifar10"
    records.mkdir(parents=True)
    for path in sorted((ROOT / "results/records/cifar10").glob("finetune-*.json"))[:2]:
        (records / path.name).write_bytes(path.read_bytes())
    return folder


def call(folder, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_is_an_example_of_each_extension():
    assert list(FILES) == ["peak.py", "small.py", "stripes.py", "seconds.py"]
    assert len(COMMANDS) == 4 and all(line.startswith("explib ") for line in COMMANDS)


def test_a_criterion_prunes_half(folder):
    assert call(folder, "peak.py") == "0.50 of the kernels pruned\n"


def test_a_figure_is_drawn_from_records(folder):
    assert call(folder, "seconds.py").split() == ["seconds.svg", "seconds.png"]
    assert (folder / "seconds.svg").stat().st_size > 1000


def test_the_commands_take_what_was_added(folder):
    lines = [shlex.split(line) for line in COMMANDS]
    criterion, network = (call(folder, "-m", *words) for words in lines[:2])
    dense, pruned = (call(folder, "-m", *words, *TRAINED) for words in lines[2:])
    # int(0.6 n) of the kernels n: 48, 256 (18 convs), 512, 1024 (17), 2048 and 4096 (17)
    convs = {48: 1, 256: 18, 512: 1, 1024: 17, 2048: 1, 4096: 17}
    pruned_pct = 100 * sum(6 * n // 10 * k for n, k in convs.items())
    pruned_pct /= sum(n * k for n, k in convs.items())
    assert f"kernels pruned      {pruned_pct:.2f} % (asked for: {pruned_pct:.2f} %)" in criterion
    # 3 x 16 kernels at a fifth and 16 x 32 at three fifths: int(9.6) and int(307.2) of 560
    assert f"kernels pruned      {100 * (9 + 307) / 560:.2f} %" in network
    assert "baseline small" in dense and "finetune small" in pruned
