"""A run's folder, job_dir: its lock, its record, and the state that it goes on from."""

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import nn

from explib import registry
from explib.data import load_data
from explib.errors import DataError, ParamError
from explib.files import load_tensors, locked, resolve, save_tensors, write_json
from explib.params import PLACES, Params, from_mapping
from explib.pruning.checkpoints import origin
from explib.pruning.masks import Masks
from explib.study import records
from explib.study.networks import dense_path
from explib.training import distributed

STATE_EVERY_S = 30.0
"""Seconds between two states: writing one may take longer than an epoch on a GPU."""


@dataclass
class Progress:
    """What a run has come to so far, and how it is computed, chosen when it began."""

    masks: Masks = field(default_factory=dict)
    top1: dict[str, float] = field(default_factory=dict)  # dense, and before fine-tuning
    history: list[dict] = field(default_factory=list)
    wall_s: float = 0.0
    precision: str = ""
    how: str = ""  # the network runs in training
    taught_by: str = ""  # how the dense network runs, whose soft labels are learned
    measured: dict[str, float] = field(default_factory=dict)  # images/s of each way that was timed


class Folder:
    """The files of one run. Of several processes rank 0 writes."""

    def __init__(self, params: Params):
        self.params, self.path = params, resolve(params.job_dir)
        self.state = self.path / "state.safetensors"
        self.saved = time.monotonic()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder's lock: another process at the same run waits."""
        writes = distributed.rank() == 0
        with locked(self.path / ".lock") if writes else contextlib.nullcontext():
            distributed.wait()
            yield

    def begin(self) -> None:
        """Write the run's parameters."""
        if distributed.rank() == 0:
            write_json(self.path / "params.json", self.params.asdict())
        distributed.wait()  # what is read is read, so that rank 0 may write

    def finished(self, kind: str) -> dict | None:
        """The record of this very run where it is complete already."""
        path = self.path / "record.json"
        if not path.is_file():
            return None
        record = records.read(path)
        if record["kind"] != kind:
            raise ParamError(f"job_dir: {self.path} holds a {record['kind']}; give another job_dir")
        self._same(record["params"], path)
        known, dense = record.get("provenance", {}), dense_path(self.params)
        if (kind == "finetune" or self.params.resume) and dense.is_file():
            self._same_dense(known.get("checkpoint_sha256"), origin(dense))
        then, found = known.get("data", {}).get("sha256"), None
        if not registry.dataset(self.params.dataset).fixed:
            with contextlib.suppress(DataError):  # of images that are there no more
                found = load_data(self.params).sha256
        if then and found and found != then:
            raise ParamError(
                f"data_dir: {self.path} holds a run on other images; give another job_dir, or "
                "delete that one to start over"
            )
        return record

    def show(self, record: dict) -> dict:
        """Publish a record that was there, and say on stderr that nothing was computed for it."""
        if distributed.rank() == 0:
            made = record.get("provenance", {}).get("created", "")[:10] or "earlier"
            print(f"{self.params.name}: nothing trained, its record of {made}", file=sys.stderr)
        return self.publish(record)

    def publish(self, record: dict) -> dict:
        """Write the record here and, under its own name, among the others; returns it."""
        if distributed.rank() == 0:
            write_json(self.path / "record.json", record)
            records.write(record, self.params.results_dir)
            self.state.unlink(missing_ok=True)
        return record

    def save(
        self, model: nn.Module, run: Progress, dense: str, stage: int, progress: dict, last: bool
    ) -> None:
        """Keep all that continues the run after this epoch, bit for bit; only now and then.

        dense: SHA-256 of the network it starts from. progress: as of `loop.train`. last: the
        stage's last epoch, which is always kept.
        """
        if distributed.rank() or not (last or time.monotonic() - self.saved >= STATE_EVERY_S):
            return
        tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
        tensors |= {f"momentum.{k}": v for k, v in progress["momentum"].items()}
        tensors |= {f"masks.{k}": v for k, v in run.masks.items()}
        meta = {
            "params": self.params.asdict(),
            "dense": dense,
            "stage": stage,
            "epoch": progress["epoch"],
            "run": {k: v for k, v in asdict(run).items() if k != "masks"},
        }
        save_tensors(self.state, tensors, meta)
        self.saved = time.monotonic()

    def load(self, dense: str) -> dict | None:
        """The state of an interrupted run, or None: model, momentum, masks, stage, epoch, run.

        dense: SHA-256 of the network it starts from.
        """
        if not self.state.is_file():
            return None
        tensors, state = load_tensors(self.state)
        missing = [name for name in ("params", "stage", "epoch", "run") if name not in state]
        if missing:
            raise ValueError(
                f"{self.state}: no state of a run, lacks {missing[0]}; delete it to start over"
            )
        self._same(state["params"], self.state)
        self._same_dense(state.get("dense"), dense)
        for part in ("model", "momentum", "masks"):
            own = {k: v for k, v in tensors.items() if k.startswith(f"{part}.")}
            state[part] = {k.removeprefix(f"{part}."): v for k, v in own.items()}
        state["run"] = Progress(masks=state["masks"], **state["run"])
        return state

    def _same(self, saved: dict, path: Path) -> None:
        """ParamError if the files here are of a run with other parameters."""
        if from_mapping(saved, str(path)).digest != self.params.digest:
            own = self.params.asdict()
            name = next(k for k in own if k not in PLACES and saved.get(k) != own[k])
            raise ParamError(
                f"job_dir: {self.path} holds a run with {name} {saved.get(name)!r}, this one has "
                f"{own[name]!r}; give another job_dir, or delete that one to start over"
            )

    def _same_dense(self, saved: str | None, found: str) -> None:
        """ParamError if the files here are of a run from another dense network."""
        if saved and saved != found:
            raise ParamError(
                f"resume: {self.path} holds a run from another dense network (SHA-256 "
                f"{saved[:10]}, this one has {found[:10]}); give another job_dir, or delete that "
                "one to start over"
            )
