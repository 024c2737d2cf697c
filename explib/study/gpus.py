"""Which GPU a job takes, where a machine has several: one that no other job has."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from explib.files import cache_dir, locked


def visible() -> list[str]:
    """The GPUs to choose from, as CUDA_VISIBLE_DEVICES names them.

    Those it lists already, else all that nvidia-smi finds; none in a SLURM job, whose GPUs the
    scheduler has chosen.
    """
    if "SLURM_JOB_ID" in os.environ:
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"],
            capture_output=True, text=True,
        )  # fmt: skip
    except FileNotFoundError:
        return []
    return listed.stdout.split() if listed.returncode == 0 else []


@contextmanager
def taken(names: list[str]) -> Iterator[str | None]:
    """One of the GPUs `names`, for this process alone until the block or the process ends.

    None where there are none; where others have them all, waits for the first that comes free.
    """
    with ExitStack() as held:
        own, waiting = None, False
        while names and own is None:
            if waiting:
                time.sleep(0.5)
            for name in names:
                try:
                    held.enter_context(
                        locked(cache_dir() / f"gpu-{platform.node()}-{name}.lock", False)
                    )
                except BlockingIOError:
                    continue
                own = name
                break
            if own is None and not waiting:
                print(f"all GPUs ({', '.join(names)}) are taken; waiting for one", file=sys.stderr)
                waiting = True
        yield own
