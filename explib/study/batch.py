"""Several configurations in one process: one after another, or several at once on one GPU."""

import contextlib
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from explib.files import resolve
from explib.params import Params, from_yaml
from explib.study import runs
from explib.study.networks import dense_path
from explib.training import turns

Job = tuple[Callable[[Params], dict], Params]


def run(
    files: Sequence[str | Path],
    seeds: int = 1,
    seconds: float = 0.0,
    results_dir: str | Path = "results",
    *,
    at_once: int = 1,
    **changes,
) -> Iterator[tuple[bool, str]]:
    """Run the configurations of YAML files; yields after each whether it failed, and a line.

    Baselines, files named *-baseline.yaml, come first and once; the others once for each of
    `seeds` seeds from 0. Where `seconds` is not 0, no run is begun that would end later if it took
    as long as the longest one so far. at_once: so many share a GPU; one that starts from a dense
    network which is still in training waits for it. changes: other values of parameters, in all.
    """
    jobs = _order(files, seeds, {"results_dir": str(results_dir), **changes})
    yield from run_all(jobs, seconds, at_once)


def run_all(jobs: Sequence[Job], seconds: float = 0.0, at_once: int = 1) -> Iterator:
    """Run (function, Params) after (function, Params); see `run`."""
    if at_once > 1 and not gpu_there():
        print("at once: no GPU here; runs come one after another", file=sys.stderr)
        at_once = 1
    waiting = _Waiting(jobs, seconds)
    if at_once == 1:
        while job := waiting.next():
            with contextlib.redirect_stdout(sys.stderr):
                answer = waiting.run(job)
            yield answer
    else:
        yield from _threads(waiting, at_once)
    for _, params in waiting.jobs:
        yield waiting.lost, f"{params.name}, seed {params.seed}: not begun, {waiting.why}"


def gpu_there() -> bool:
    """Whether runs can share a GPU."""
    return torch.cuda.is_available()


class _Waiting:
    """What is not begun yet, and what those that run have told about the rest."""

    def __init__(self, jobs: Sequence[Job], seconds: float):
        # each run once: a second one of the same would wait for the first
        self.jobs = list({resolve(params.job_dir): (do, params) for do, params in jobs}.values())
        self.seconds, self.started, self.longest = seconds, time.monotonic(), 0.0
        self.training: list[Path] = []  # dense networks
        self.why, self.lost = "the time is over", False

    def next(self) -> Job | None:
        """The next one that can begin; None where none can, for now or at all."""
        gone = time.monotonic() - self.started
        if self.lost or (self.seconds and gone + self.longest > self.seconds):
            return None
        for number, job in enumerate(self.jobs):
            if (path := _dense(job)) not in self.training:
                del self.jobs[number]
                if job[0] is runs.baseline:
                    self.training.append(path)
                return job
        return None

    def run(self, job: Job) -> tuple[bool, str]:
        """Run one; what became of it, as `run` yields it."""
        execute, params = job
        began = time.monotonic()
        try:
            record = execute(params)
        except (ValueError, OSError, RuntimeError) as error:
            self.lost = gpu_there() and _gpu_lost()
            self.why = "the GPU takes no more work of this process; start it again"
            return True, f"{params.name}, seed {params.seed}: {' '.join(str(error).split())}"
        finally:
            if execute is runs.baseline:
                self.training.remove(_dense(job))
        took = time.monotonic() - began
        self.longest = max(self.longest, took)
        return False, _line(record, params, took)


def _dense(job: Job) -> Path:
    """The dense network that a run makes or starts from."""
    execute, params = job
    return dense_path(params.replace(resume="") if execute is runs.baseline else params)


def _gpu_lost() -> bool:
    """Whether an error has left the process's CUDA context unusable."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _threads(waiting: _Waiting, count: int) -> Iterator[tuple[bool, str]]:
    """Run them in threads that share a GPU, each with streams of its own."""
    answers: queue.Queue = queue.Queue()

    def work() -> None:
        try:
            with turns.held():
                # others wait for a dense network: its kernels come before theirs
                usual, first = torch.cuda.Stream(), torch.cuda.Stream(priority=-1)
                while job := _next(waiting):
                    with torch.cuda.stream(first if job[0] is runs.baseline else usual):
                        answers.put(waiting.run(job))
            answers.put(None)
        except BaseException as error:  # what `run` does not expect: it ends them all
            answers.put(error)

    for _ in range(count):
        threading.Thread(target=work, daemon=True).start()
    while count:
        with contextlib.redirect_stdout(sys.stderr):
            answer = answers.get()
        if isinstance(answer, BaseException):
            raise answer
        if answer is None:
            count -= 1
        else:
            yield answer


def _next(waiting: _Waiting) -> Job | None:
    """The next run; None once there is none that could begin later, either."""
    while not (job := waiting.next()) and waiting.jobs and waiting.training:
        with turns.passed():
            time.sleep(0.02)
    return job


def _order(files: Sequence[str | Path], seeds: int, changes: dict) -> list[Job]:
    """What to run; every file is read and checked before anything runs."""
    dense = [file for file in files if str(file).endswith("-baseline.yaml")]
    pruned = [file for file in files if file not in dense]
    return [(runs.baseline, from_yaml(file, **changes)) for file in dense] + [
        (runs.finetune, from_yaml(file, seed=seed, **changes))
        for seed in range(seeds)
        for file in pruned
    ]


def _line(record: dict, params: Params, took: float) -> str:
    top1, speed = record["accuracy"], record["images_per_s"] or 0
    return (
        f"{params.name:28s} seed {params.seed}  last {top1['last']:.2f}  best "
        f"{top1['best']:.2f}  {speed:8,.0f} images/s  {took:6.0f} s"
    )
