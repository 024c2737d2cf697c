"""Run a notebook as the workflow does, with its progress on stderr."""

import logging
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from explib.files import write_text
from explib.study import gpus


def say(line: str) -> None:
    """A line on stderr in one write: print writes its end apart, where lines of two jobs mix."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


class Bars:
    """What takes a kernel's stdout: each state of a progress bar becomes a line on stderr."""

    said = ""

    def write(self, text: str) -> None:
        for state in text.split("\r")[1:]:
            state = state.partition("\n")[0].rstrip()
            if state not in ("", self.said):  # a bar that is closed shows its last state again
                say(state)
                self.said = state

    def flush(self) -> None:
        sys.stderr.flush()


def execute(notebook: Path, output: Path, parameters: dict) -> None:
    """Run a notebook in a kernel of its own; `output` is whole or absent at every moment."""
    import nbformat
    import papermill
    from traitlets.config import Config

    # explib itself says which parameter is unknown: those that a notebook does not list are known
    logging.getLogger("papermill").setLevel(logging.ERROR)
    name, began = output.stem, time.monotonic()
    say(f"{name}: begun")
    with tempfile.TemporaryDirectory() as folder:
        # Free ports are looked for before they are taken: kernels that start at the same moment
        # get the same ones, and one of them dies. Sockets in a folder of its own cannot collide.
        sockets = {"transport": "ipc", "connection_file": f"{folder}/kernel.json"}
        executed = papermill.execute_notebook(
            notebook,
            None,
            parameters,
            progress_bar=False,
            stdout_file=Bars(),
            # no warning at each start, no error where the interrupt that ends it comes too late
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
            config=Config({"KernelManager": sockets}),
        )
    for out in (out for cell in executed.cells for out in cell.get("outputs", ())):
        if "image/png" in (data := out.get("data", {})):  # no kernel will ever move the sliders
            data.pop("application/vnd.jupyter.widget-view+json", None)
    write_text(output, nbformat.writes(executed) + "\n")
    say(f"{name}: done, {time.monotonic() - began:.0f} s")


def run(
    notebook: Path, output: Path, parameters: dict, threads: int = 0, gpu: bool = False
) -> None:
    """Execute on so many CPU threads (0: all), with `gpu` on one that no other job has, if any."""
    # What jsonschema would check internationalized addresses with, of which notebooks have none:
    # its grammar takes longer to build than papermill to import.
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]  # as import reads it
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    with gpus.taken(gpus.visible()) if gpu else nullcontext() as taken:
        if taken:
            os.environ["CUDA_VISIBLE_DEVICES"] = taken
        execute(notebook, output, parameters)
