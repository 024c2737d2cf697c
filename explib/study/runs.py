"""Whole runs, parameters in, a record and its files out; interrupted ones go on."""

import copy
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from explib import registry
from explib.data import Data, load_data, size_of
from explib.files import sha256, write_bytes
from explib.params import Params
from explib.pruning import checkpoints
from explib.pruning import masks as masking
from explib.pruning.checkpoints import load_weights
from explib.study import records
from explib.study.folder import Folder, Progress
from explib.study.networks import (
    Dense,
    choose_masks,
    counts,
    dense_path,
    fresh,
    load_dense,
    save_masks,
)
from explib.training import backend, distributed, evaluation, inference, loop, soft_labels


def _one_at_a_time(run):
    """`run(params, folder)` once at a time: the second one waits, and finds the finished record."""

    @functools.wraps(run)
    def locked(params: Params) -> dict:
        distributed.start(backend.device_of(params))
        folder = Folder(params)
        with folder.lock():
            return run(params, folder)

    return locked


def baseline(params: Params) -> dict:
    """The dense network: trained from scratch, or with `resume` loaded and evaluated.

    Leaves the checkpoint where `load_dense` looks for it, and in job_dir, from where a finished run
    puts it back if another one's has come in its place; returns the record.
    """
    unnamed = params.name == params.replace(name="").name
    name = registry.file_name(f"{params.arch}-baseline") if unnamed else params.name
    return _baseline(params.replace(name=name, distill=0.0))  # there is none to learn from


@_one_at_a_time
def _baseline(params: Params, folder: Folder) -> dict:
    path = dense_path(params.replace(resume=""))
    own = folder.path / "model.safetensors"
    done = folder.finished("baseline")
    kept = done and not params.resume and own.is_file() and distributed.rank() == 0
    if kept and not (path.is_file() and sha256(path) == sha256(own)):
        write_bytes(path, own.read_bytes())
    if done and (params.resume or path.is_file()):
        return folder.show(done)
    network = load_dense(params) if params.resume else fresh(params)
    device, data = _begin(params, network, folder)
    if params.resume:
        top1 = evaluation.top1(network.model, data, data.test)
        run = Progress(top1={"dense": top1, "before": top1})
    else:
        run = _Training("baseline", params, network, data, device, folder).run([[]])
        for place in (own, path):
            _save_network(place, params, network, data, {}, run.history[-1]["top1"], torch.float32)
    return folder.publish(_record(params, network, data, run, device, "baseline"))


@_one_at_a_time
def finetune(params: Params, folder: Folder) -> dict:
    """Prune and fine-tune one configuration; returns the record.

    An interrupted run goes on where it was; a finished one is not computed again. Leaves in
    job_dir: masks.safetensors, model.safetensors (surviving kernels only), record.json. A run
    whose loss is no longer finite raises Diverged; its record says so, and the state that was kept
    last stays in job_dir.
    """
    if done := folder.finished("finetune"):
        return folder.show(done)
    dense = load_dense(params)
    device, data = _begin(params, dense, folder)
    names = [name for name, rate in dense.rates.items() if rate > 0]
    stages = [[name] for name in names] if params.schedule == "layerwise" else [names]
    run = _Training("finetune", params, dense, data, device, folder).run(stages)
    if distributed.rank() == 0:
        save_masks(params, run.masks)
    path = folder.path / "model.safetensors"
    _save_network(path, params, dense, data, run.masks, run.history[-1]["top1"])
    return folder.publish(_record(params, dense, data, run, device, "finetune"))


def _begin(params: Params, network: Dense, folder: Folder) -> tuple[str, Data]:
    """Device and data, and a folder that can be written: all there before any long work."""
    device = backend.device_of(params)
    data = load_data(params).to(device)
    loop.pieces(data, params)
    loop.steps_of(data, params)
    folder.load(network.sha256)  # an error where it is of another run
    folder.begin()
    network.model.to(device).to(memory_format=torch.channels_last)
    distributed.synchronize_norms(network.model)
    return device, data


@dataclass
class _Training:
    """A run while it trains, conv by conv or all at once; with no conv to mask, the baseline."""

    kind: str
    params: Params
    dense: Dense
    data: Data
    device: str
    folder: Folder

    def run(self, stages: list[list[str]]) -> Progress:
        """Mask each stage's convs, then train; goes on where an earlier call was interrupted."""
        state = self.folder.load(self.dense.sha256)
        self.progress = state["run"] if state else Progress()
        self.stages = len(stages)
        self.images = round(self.params.epochs * len(stages) * len(self.data.train))
        distills = self.kind == "finetune" and self.params.distill
        self.unpruned = copy.deepcopy(self.dense.model).eval() if distills else None
        self.teacher: Callable | None = None
        if self.kind == "finetune" and not state:
            self.progress.top1["dense"] = self.evaluate(self.dense.model)
        first = state["stage"] if state else 0
        for stage, names in enumerate(stages[first:], first):
            if state and stage == first:
                load_weights(self.dense.model, state["model"], str(self.folder.state))
                self.train(stage, state)
            else:
                if names:
                    self.prune(names)
                self.train(stage)
        return self.progress

    def prune(self, names: list[str]) -> None:
        """Mask these convs; the first ones' accuracy before any fine-tuning is kept."""
        run, params = self.progress, self.params
        run.masks.update(choose_masks(params, self.dense, names))
        pruned = copy.deepcopy(self.dense.model) if params.fade_epochs else self.dense.model
        masking.apply(pruned, run.masks)
        if params.bn_images:
            evaluation.recalibrate_bn(pruned, evaluation.bn_batches(self.data, params.bn_images))
        run.top1.setdefault("before", self.evaluate(pruned))

    def evaluate(self, model: torch.nn.Module) -> float:
        return evaluation.top1(model, self.data, self.data.test)

    def choose(self, resumed: bool) -> backend.Backend:
        """How the network is trained, and the first time how the unpruned one is computed."""
        run, params = self.progress, self.params
        masks = {} if params.fade_epochs else run.masks  # fading kernels are not zero yet
        asked = params.replace(precision=run.precision or params.precision)
        model, device, images = self.dense.model, self.device, self.images
        chosen = backend.choose(model, asked, device, images, masks, run.how if resumed else "")
        run.how, run.precision = chosen.how, chosen.precision
        run.measured |= chosen.measured
        if self.unpruned is not None and self.teacher is None:
            teacher = inference.teacher_of(
                self.unpruned, asked.replace(precision=run.precision), device, images,
                exact=params.precision != "auto", kept=run.taught_by,
            )  # fmt: skip
            self.teacher, run.taught_by = teacher, teacher.name
        return chosen

    def train(self, stage: int, state: dict | None = None) -> None:
        """Train one stage; its progress is kept in the folder. Diverged leaves a record."""
        run, params, dense, data = self.progress, self.params, self.dense, self.data
        forward = self.choose(resumed=state is not None)
        one = self.stages == 1
        epochs = loop.train(
            dense.model, data, params, run.masks,
            forward=forward, teacher=self.teacher, resume=state,
            keep=soft_labels.folder(params, data, dense.sha256) if self.teacher else None,
            before=stage * loop.steps_of(data, params),
            label=params.name if one else f"{params.name} {stage + 1}/{self.stages}",
        )  # fmt: skip
        began = time.perf_counter() - run.wall_s
        try:
            for entry, progress in epochs:
                run.history.append({**entry, "stage": stage})
                run.wall_s = time.perf_counter() - began
                last = progress["epoch"] >= params.epochs
                self.folder.save(dense.model, run, dense.sha256, stage, progress, last)
        except loop.Diverged as error:
            record = _record(params, dense, data, run, self.device, self.kind)
            if distributed.rank() == 0:
                record |= {"status": "diverged", "error": str(error)}
                records.write(record, params.results_dir)
            raise


def _record(params, dense: Dense, data: Data, run: Progress, device: str, kind: str) -> dict:
    """The record of a run: last epoch first, the best one (by `top1` of the history) beside it.

    Conv by conv the best of the last stage: before it, not all convs were pruned.
    """
    before = run.top1.get("before")
    curve = [entry["top1"] for entry in run.history] or [before]
    last = [i for i, e in enumerate(run.history) if e["stage"] == run.history[-1]["stage"]] or [0]
    best = max(last, key=lambda i: curve[i] or 0)
    seconds = sum(entry["seconds"] for entry in run.history)
    images = sum(entry["images_per_s"] * entry["seconds"] for entry in run.history)
    origin = records.provenance(device)
    hardware = origin.pop("hardware") | {
        "precision": run.precision or "fp32",  # of the evaluation, where nothing was trained
        "trained_by": run.how,
        "taught_by": run.taught_by,
        "measured": run.measured,  # images/s
        "processes": distributed.world(),
    }
    return {
        "schema": records.SCHEMA,
        "kind": kind,
        "status": "done",
        "params": params.asdict(),
        "hardware": hardware,
        "provenance": {
            **origin,
            "data": data.summary(),
            "checkpoint": dense.checkpoint,
            "checkpoint_sha256": dense.sha256,
        },
        "accuracy": {
            "dense": run.top1.get("dense", curve[-1]),
            "before": before,
            "last": curve[-1],
            "best": curve[best],
            "best_epoch": best + 1 if run.history else 0,
        },
        **counts(params, dense, run.masks),
        "wall_s": run.wall_s,
        "images_per_s": images / seconds if seconds else None,
        "history": run.history,
    }


def _save_network(path, params, dense, data, masks, top1, dtype=torch.float16) -> None:
    if distributed.rank():
        return
    meta = {
        "arch": params.arch,
        "num_classes": len(data.classes),
        "image_size": size_of(params)[1][-1],
        "dataset": params.dataset,
        "normalization": params.normalization,
        "name": params.name,
        "top1": top1,
        "evaluated_on": data.evaluated_on,
    }
    checkpoints.save(path, dense.model, masks, meta, dtype)
