"""Several configurations one after another in one process: torch is imported once for all."""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from explib.params import Params, from_yaml
from explib.study import runs


def run(
    files: Sequence[str | Path],
    seeds: int = 1,
    seconds: float = 0.0,
    results_dir: str | Path = "results",
) -> Iterator[tuple[bool, str]]:
    """Run the configurations of YAML files; yields after each whether it failed, and a line.

    Baselines, files named *-baseline.yaml, come first and once; the others once for each of
    `seeds` seeds from 0. Where `seconds` is not 0, no run is begun that would end later if it took
    as long as the longest one so far.
    """
    started, longest = time.monotonic(), 0.0
    for execute, params in _order(files, seeds, str(results_dir)):
        began = time.monotonic()
        if seconds and began - started + longest > seconds:
            yield False, f"{params.name}, seed {params.seed}: not begun, the time is over"
            continue
        try:
            with contextlib.redirect_stdout(sys.stderr):
                record = execute(params)
        except (ValueError, OSError, RuntimeError) as error:
            yield True, f"{params.name}, seed {params.seed}: {' '.join(str(error).split())}"
            continue
        took = time.monotonic() - began
        longest = max(longest, took)
        yield False, _line(record, params, took)


def _order(files: Sequence[str | Path], seeds: int, results_dir: str) -> list[tuple]:
    """What to run, (function, Params); every file is read and checked before anything runs."""
    dense = [file for file in files if str(file).endswith("-baseline.yaml")]
    pruned = [file for file in files if file not in dense]
    return [(runs.baseline, from_yaml(file, results_dir=results_dir)) for file in dense] + [
        (runs.finetune, from_yaml(file, seed=seed, results_dir=results_dir))
        for seed in range(seeds)
        for file in pruned
    ]


def _line(record: dict, params: Params, took: float) -> str:
    top1, speed = record["accuracy"], record["images_per_s"] or 0
    return (
        f"{params.name:28s} seed {params.seed}  last {top1['last']:.2f}  best "
        f"{top1['best']:.2f}  {speed:8,.0f} images/s  {took:6.0f} s"
    )
