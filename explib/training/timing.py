"""Time several ways to compute the same thing, briefly and once a machine, and remember the result.

What was measured is kept in ~/.cache/explib/measured (or below $XDG_CACHE_HOME), one JSON file for
each question, so that equal runs on one machine are computed alike, bit for bit, however close two
ways are. It is measured anew where processor, threads, torch, the compiled kernels or the question
differ; after the folder is deleted; and with EXPLIB_MEASURE=again, once in each process.
"""

import hashlib
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from explib.files import cache_dir, locked, write_json

ROUNDS = 3
"""Timed rounds of every way, after one that warms up."""
BUDGET_S = 5.0
"""Seconds after which no further round begins, the first timed one excepted."""
HOPELESS = 2.0
"""A way that takes so many times as long as the fastest is timed no further; twice that before all
are warmed up."""
CLEARLY = 1.2
"""How many times as fast as fp32 another precision has to be: its accuracy is not quite the same,
and bits should not follow a speed that nobody notices."""

CPUINFO = Path("/proc/cpuinfo")

Speeds = dict[str, float]
"""Images per second of each way, by its name, which ends in its precision."""

clock = time.perf_counter
_known: dict[str, Speeds] = {}


def speeds(ways: Mapping[str, Callable[[], object]], images: int) -> Speeds:
    """Time each way on its `images` images, by turns; medians over the rounds, in images/s."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    began = clock()
    for number in range(1 + ROUNDS):
        if number > 1 and clock() - began > BUDGET_S:
            break
        limit = HOPELESS * (2 if number == 1 else 1)
        fastest = min((times[-1] for times in taken.values() if times), default=0.0)
        for name, way in ways.items():
            if taken[name] and taken[name][-1] > limit * fastest:
                continue
            started = clock()
            way()
            taken[name].append(clock() - started)
    return {name: round(images / statistics.median(t[1:] or t), 1) for name, t in taken.items()}


def ranking(found: Speeds) -> list[str]:
    """Names from the way to choose to the slowest: fp32 unless another is CLEARLY faster."""
    names = sorted(found, key=lambda name: -found[name])
    exact = [name for name in names if name.endswith("fp32")]
    if exact and found[names[0]] < CLEARLY * found[exact[0]]:
        names.remove(exact[0])
        names.insert(0, exact[0])
    return names


def remembered(question: dict, measure: Callable[[], Speeds]) -> Speeds:
    """What `measure()` found when this question was first asked on this machine.

    question: JSON values that name everything the answer depends on, the machine excepted. One
    process measures at a time. Where nothing can be kept, a warning says so.
    """
    asked = json.dumps(question | machine(), sort_keys=True)
    if asked not in _known:
        path = cache_dir() / f"measured/{hashlib.sha256(asked.encode()).hexdigest()[:16]}.json"
        try:
            with locked(path.parent / ".lock"):
                if (found := _kept(path, asked)) is None:
                    found = measure()
                    write_json(path, {"question": json.loads(asked), "images_per_s": found})
        except OSError as error:
            warnings.warn(f"how fast what is here is not kept: {error}", stacklevel=2)
            found = measure()
        _known[asked] = found
    return _known[asked]


def _kept(path: Path, asked: str) -> Speeds | None:
    """The speeds in a file of `remembered`; None where it is not there, or of another question."""
    if os.environ.get("EXPLIB_MEASURE") == "again":
        return None
    try:
        kept = json.loads(path.read_text())
        same = json.dumps(kept["question"], sort_keys=True) == asked
        return (
            {name: float(speed) for name, speed in kept["images_per_s"].items()} if same else None
        )
    except (OSError, ValueError, TypeError, LookupError, AttributeError):  # damaged: made anew
        return None


def machine() -> dict:
    """What speeds on this machine depend on, whatever is asked."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "onednn": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
    }


def processor() -> str:
    """The processor as the system names it, with its family and model where it has them.

    Servers give several generations one name ("AMD EPYC"); they compute at other speeds, and sum
    in another order.
    """
    try:
        text = CPUINFO.read_text()
    except OSError:
        text = ""
    lines = [line.partition(":") for line in text.split("\n\n")[0].splitlines()]
    said = {key.strip(): value.strip() for key, _, value in lines}
    if "model name" not in said:
        return platform.processor() or platform.machine()
    keys = {"cpu family": "family", "model": "model"}
    numbers = [f"{word} {said[key]}" for key, word in keys.items() if key in said]
    return " ".join([said["model name"], *numbers])
