"""Run a notebook as the workflow does, with its progress on stderr.

`python -m explib.study.notebooks NOTEBOOK OUTPUT --parameters JSON`; the Snakefile starts this.
"""

import argparse
import json
import logging
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from explib.files import write_text
from explib.study import gpus


class Bars:
    """What takes a kernel's stdout: each state of a progress bar becomes a line on stderr."""

    said = ""

    def write(self, text: str) -> None:
        for state in text.split("\r")[1:]:
            state = state.partition("\n")[0].rstrip()
            if state not in ("", self.said):  # a bar that is closed shows its last state again
                print(state, file=sys.stderr)
                self.said = state

    def flush(self) -> None:
        sys.stderr.flush()


def execute(notebook: Path, output: Path, parameters: dict) -> None:
    """Run a notebook in a kernel of its own; `output` is whole or absent at every moment."""
    import nbformat
    import papermill

    # explib itself says which parameter is unknown: those that a notebook does not list are known
    logging.getLogger("papermill").setLevel(logging.ERROR)
    name, began = output.stem, time.monotonic()
    print(f"{name}: begun", file=sys.stderr, flush=True)
    executed = papermill.execute_notebook(
        notebook,
        None,
        parameters,
        progress_bar=False,
        stdout_file=Bars(),
        extra_arguments=["--IPKernelApp.log_level=ERROR"],  # no warning at each start
    )
    write_text(output, nbformat.writes(executed) + "\n")
    print(f"{name}: done, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m explib.study.notebooks")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--parameters", type=json.loads, default={}, help="as JSON")
    parser.add_argument("--threads", help="CPU threads; all of them without it")
    parser.add_argument("--gpu", action="store_true", help="take one, where there are any")
    given = parser.parse_args(arguments)
    # What jsonschema would check internationalized addresses with, of which notebooks have none:
    # its grammar takes longer to build than papermill to import.
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]  # as import reads it
    if given.threads:
        os.environ["OMP_NUM_THREADS"] = given.threads
    with gpus.taken(gpus.found()) if given.gpu else nullcontext() as gpu:
        if gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        execute(given.notebook, given.output, given.parameters)


if __name__ == "__main__":
    main()
