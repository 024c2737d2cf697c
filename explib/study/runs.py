"""Whole runs, parameters in, a record and its files out; interrupted ones go on."""

import contextlib
import copy
import functools
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from explib import registry
from explib.data import Data, load_data, size_of
from explib.errors import DataError, ParamError
from explib.files import (
    load_tensors,
    locked,
    resolve,
    save_tensors,
    sha256,
    write_bytes,
    write_json,
)
from explib.params import PLACES, Params, from_mapping
from explib.pruning import checkpoints
from explib.pruning import masks as masking
from explib.pruning.checkpoints import load_weights
from explib.pruning.masks import Masks
from explib.study import records
from explib.study.networks import (
    Dense,
    choose_masks,
    counts,
    dense_path,
    fresh,
    load_dense,
    save_masks,
)
from explib.training import backend, distributed, evaluation, loop, soft_labels


def _alone(run):
    """`run(params)` once at a time: the second one waits, and finds the finished record."""

    @functools.wraps(run)
    def alone(params: Params) -> dict:
        distributed.start(backend.device_of(params))
        writes = distributed.rank() == 0
        with locked(resolve(params.job_dir) / ".lock") if writes else contextlib.nullcontext():
            distributed.wait()
            return run(params)

    return alone


def baseline(params: Params) -> dict:
    """The dense network: trained from scratch, or with `resume` loaded and evaluated.

    Leaves the checkpoint where `load_dense` looks for it, and in job_dir, from where a finished run
    puts it back if another one's has come in its place; returns the record.
    """
    unnamed = params.name == params.replace(name="").name
    name = registry.file_name(f"{params.arch}-baseline") if unnamed else params.name
    return _baseline(params.replace(name=name, distill=0.0))  # there is none to learn from


@_alone
def _baseline(params: Params) -> dict:
    path = dense_path(params.replace(resume=""))
    own = resolve(params.job_dir) / "model.safetensors"
    done = _finished(params, "baseline")
    kept = done and not params.resume and own.is_file() and distributed.rank() == 0
    if kept and not (path.is_file() and sha256(path) == sha256(own)):
        write_bytes(path, own.read_bytes())
    if done and (params.resume or path.is_file()):
        return _publish(params, done)
    network = load_dense(params) if params.resume else fresh(params)
    device, data = _begin(params, network)
    if params.resume:
        top1 = evaluation.evaluate(network.model, data, data.test)
        run = _Run(top1={"dense": top1, "before": top1})
    else:
        run = _train(params, network, data, device, stages=[[]])
        for place in (own, path):
            _save_network(place, params, network, data, {}, run.history[-1]["top1"], torch.float32)
    return _publish(params, _record(params, network, data, run, device, "baseline"))


@_alone
def finetune(params: Params) -> dict:
    """Prune and fine-tune one configuration; returns the record.

    An interrupted run goes on where it was; a finished one is not computed again. Leaves in
    job_dir: masks.safetensors, model.safetensors (surviving kernels only), record.json. A run
    whose loss is no longer finite raises Diverged; its record says so, and the last good epoch
    stays in job_dir.
    """
    if done := _finished(params, "finetune"):
        return _publish(params, done)
    dense = load_dense(params)
    device, data = _begin(params, dense)
    names = [name for name, rate in dense.rates.items() if rate > 0]
    stages = [[name] for name in names] if params.schedule == "layerwise" else [names]
    run = _train(params, dense, data, device, stages)
    if distributed.rank() == 0:
        save_masks(params, run.masks)
    path = resolve(params.job_dir) / "model.safetensors"
    _save_network(path, params, dense, data, run.masks, run.history[-1]["top1"])
    return _publish(params, _record(params, dense, data, run, device, "finetune"))


@dataclass
class _Run:
    """What a run has come to so far."""

    masks: Masks = field(default_factory=dict)
    top1: dict[str, float] = field(default_factory=dict)  # dense, and before fine-tuning
    history: list[dict] = field(default_factory=list)
    wall_s: float = 0.0
    precision: str = ""  # chosen when it began, and kept wherever it goes on
    how: str = ""  # the network ran in training


def _begin(params: Params, network: Dense) -> tuple[str, Data]:
    """Device and data, and a folder that can be written: all there before any long work."""
    device = backend.device_of(params)
    data = load_data(params).to(device)
    loop.pieces(data, params)
    loop.steps_of(data, params)
    _load_state(resolve(params.job_dir) / "state.safetensors", params, network.sha256)
    if distributed.rank() == 0:
        write_json(resolve(params.job_dir) / "params.json", params.asdict())
    distributed.wait()  # what is read is read, so that rank 0 may write
    network.model.to(device).to(memory_format=torch.channels_last)
    distributed.synchronize_norms(network.model)
    return device, data


def _finished(params: Params, kind: str) -> dict | None:
    """The record of this very run where it is complete already."""
    path = resolve(params.job_dir) / "record.json"
    if not path.is_file():
        return None
    record = records.read(path)
    if record["kind"] != kind:
        raise ParamError(f"job_dir: {path.parent} holds a {record['kind']}; give another job_dir")
    _same(params, record["params"], path)
    known, dense = record.get("provenance", {}), dense_path(params)
    if (kind == "finetune" or params.resume) and dense.is_file():
        _same_dense(known.get("checkpoint_sha256"), sha256(dense), path)
    then, found = known.get("data", {}).get("sha256"), None
    if not registry.dataset(params.dataset).fixed:
        with contextlib.suppress(DataError):  # of images that are there no more
            found = load_data(params).sha256
    if then and found and found != then:
        raise ParamError(
            f"data_dir: {path.parent} holds a run on other images; give another job_dir, or delete "
            "that one to start over"
        )
    return record


def _train(params: Params, dense: Dense, data: Data, device: str, stages: list) -> _Run:
    """Stage by stage: mask the stage's convs, then train; none to mask is the dense baseline.

    Goes on where an earlier call was interrupted.
    """
    path = resolve(params.job_dir) / "state.safetensors"
    state = _load_state(path, params, dense.sha256)
    run = state["run"] if state else _Run()
    if not run.precision:
        short = backend.precision_of(params, device) == "bf16"
        run.precision = "bf16" if distributed.as_rank_0(short, device) else "fp32"
    computed = params.replace(precision=run.precision)
    pruning = stages != [[]]
    images = params.epochs * len(stages) * len(data.train)
    if pruning and not state:
        run.top1["dense"] = evaluation.evaluate(dense.model, data, data.test)
    teacher = keep = None
    if pruning and params.distill:
        unpruned = copy.deepcopy(dense.model).eval()
        asked = params.precision != "auto"
        teacher = backend.teacher_of(unpruned, computed, device, images, exact=asked)
        keep = soft_labels.folder(params, data, dense.sha256)
    for stage, names in enumerate(stages):
        resume = None
        if state and stage < state["stage"]:
            continue
        if state and stage == state["stage"]:
            resume = state
            load_weights(dense.model, state["model"], str(path))
        elif names:
            run.masks.update(choose_masks(params, dense, names))
            pruned = copy.deepcopy(dense.model) if params.fade_epochs else dense.model
            masking.apply(pruned, run.masks)
            evaluation.reestimate_bn(pruned, data, params.bn_images)
            run.top1.setdefault("before", evaluation.evaluate(pruned, data, data.test))
        masks = {} if params.fade_epochs else run.masks  # fading kernels are not zero yet
        forward = backend.forward_of(dense.model, computed, device, images, masks)
        run.how = forward.how
        label = params.name if len(stages) == 1 else f"{params.name} {stage + 1}/{len(stages)}"
        began = time.perf_counter() - run.wall_s
        epochs = loop.train(
            dense.model, data, params, run.masks,
            forward=forward, teacher=teacher, keep=keep, resume=resume, label=label,
            before=stage * loop.steps_of(data, params),
        )  # fmt: skip
        try:
            for entry, progress in epochs:
                run.history.append({**entry, "stage": stage})
                run.wall_s = time.perf_counter() - began
                _save_state(path, params, dense, run, stage, progress)
        except loop.Diverged as error:
            record = _record(
                params, dense, data, run, device, "finetune" if pruning else "baseline"
            )
            if distributed.rank() == 0:
                record |= {"status": "diverged", "error": str(error)}
                records.write(record, params.results_dir)
            raise
    return run


def _record(params, dense: Dense, data: Data, run: _Run, device: str, kind: str) -> dict:
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
        "precision": run.precision or backend.precision_of(params, device),
        "trained_by": run.how,
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


def _publish(params: Params, record: dict) -> dict:
    """The record into job_dir and, under its own name, among the others."""
    if distributed.rank():
        return record
    folder = resolve(params.job_dir)
    write_json(folder / "record.json", record)
    records.write(record, params.results_dir)
    (folder / "state.safetensors").unlink(missing_ok=True)
    return record


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
    checkpoints.save_compact(path, dense.model, masks, meta, dtype)


def _same(params: Params, saved: dict, path: Path) -> None:
    """ParamError if the files in job_dir are of a run with other parameters."""
    if from_mapping(saved, str(path)).digest != params.digest:
        own = params.asdict()
        name = next(k for k in own if k not in PLACES and saved.get(k) != own[k])
        raise ParamError(
            f"job_dir: {path.parent} holds a run with {name} {saved.get(name)!r}, this one has "
            f"{own[name]!r}; give another job_dir, or delete that one to start over"
        )


def _same_dense(saved: str | None, found: str, path: Path) -> None:
    """ParamError if the files in job_dir are of a run from another dense network."""
    if saved and saved != found:
        raise ParamError(
            f"resume: {path.parent} holds a run from another dense network (SHA-256 {saved[:10]}, "
            f"this one has {found[:10]}); give another job_dir, or delete that one to start over"
        )


def _save_state(path, params, dense, run: _Run, stage, progress) -> None:
    """Everything that continues the run after this epoch, bit for bit."""
    if distributed.rank():
        return
    tensors = {f"model.{k}": v for k, v in dense.model.state_dict().items()}
    tensors |= {f"momentum.{k}": v for k, v in progress["momentum"].items()}
    tensors |= {f"masks.{k}": v for k, v in run.masks.items()}
    meta = {
        "params": params.asdict(),
        "dense": dense.sha256,
        "stage": stage,
        "epoch": progress["epoch"],
        "run": {k: getattr(run, k) for k in ("top1", "history", "wall_s", "precision")},
    }
    save_tensors(path, tensors, meta)


def _load_state(path: Path, params: Params, dense: str) -> dict | None:
    """The state of an interrupted run, or None. dense: SHA-256 of the network it starts from."""
    if not path.is_file():
        return None
    tensors, state = load_tensors(path)
    missing = [name for name in ("params", "stage", "epoch", "run") if name not in state]
    if missing:
        raise ValueError(f"{path}: no state of a run, lacks {missing[0]}; delete it to start over")
    _same(params, state["params"], path)
    _same_dense(state.get("dense"), dense, path)
    for part in ("model", "momentum", "masks"):
        own = {k: v for k, v in tensors.items() if k.startswith(f"{part}.")}
        state[part] = {k.removeprefix(f"{part}."): v for k, v in own.items()}
    state["run"] = _Run(masks=state["masks"], **state["run"])
    return state
