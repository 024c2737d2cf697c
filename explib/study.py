"""The runs of the study: parameters in, a record and its files out."""

import copy
import time
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from explib import expectation, flops, models, pruners, records
from explib import finetune as tuning
from explib import masks as masking
from explib.data import Data, load_data
from explib.files import load_tensors, resolve, save_tensors, sha256, write_json
from explib.masks import Masks
from explib.models import Conv
from explib.params import PLACES, ParamError, Params, keep_floor


@dataclass(frozen=True)
class Dense:
    """A dense network with what a run needs to know of it."""

    model: nn.Module
    convs: list[Conv]  # in forward order
    rates: dict[str, float]  # nominal, by conv, in the order of compress_rate
    checkpoint: str = ""  # the file it came from, as named in the record
    sha256: str = ""


def seed_all(params: Params) -> None:
    """Seed initialisation, and set the number of CPU threads."""
    torch.manual_seed(params.seed)
    if params.threads:
        torch.set_num_threads(params.threads)


def fresh(params: Params) -> Dense:
    """The network of a configuration with seeded fresh weights, its rates checked against it."""
    seed_all(params)
    model = models.build(params.arch, 10)
    convs = models.find_convs(model, models.ARCHS[params.arch].image_size)
    rates = models.rates_by_name(params.arch, convs, params.rates)
    if params.start_cov >= len(convs):
        raise ParamError(f"start_cov: {params.start_cov} of {len(convs)} convs; give a lower index")
    names = [conv.name for conv in convs][params.start_cov :]
    return Dense(model, convs, {n: r for n, r in rates.items() if n in names})


def dense_path(params: Params) -> Path:
    """The checkpoint of the dense network: `resume`, else the one that 00_baseline writes."""
    if params.resume:
        return resolve(params.resume)
    return resolve(params.results_dir) / f"checkpoints/{params.dataset}/{params.arch}.safetensors"


def load_dense(params: Params) -> Dense:
    """The dense network to prune, from `dense_path`: a file of ours or a foreign torch checkpoint.

    One line of FileNotFoundError or ValueError where it is missing, damaged, of another network or
    trained with another normalization of its inputs.
    """
    network, path = fresh(params), dense_path(params)
    if not path.is_file():
        raise FileNotFoundError(
            f"resume: {path} is not there; run notebooks/00_baseline.ipynb with dataset "
            f"{params.dataset!r} and arch {params.arch!r}, or set resume to a checkpoint"
        )
    if path.suffix == ".safetensors":
        state, _, meta = masking.load_compact(path)
        if meta.get("arch", params.arch) != params.arch:
            raise ValueError(f"resume: {path} is a {meta['arch']}, not a {params.arch}")
        if meta.get("normalization", params.normalization) != params.normalization:
            raise ParamError(
                f"normalization: {params.normalization!r}, but {path.name} was trained with "
                f"{meta['normalization']!r}; set that"
            )
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            why = " ".join(str(error).split())[:160]
            raise ValueError(f"resume: {path} is no readable checkpoint ({why})") from None
        if not isinstance(state, dict):
            raise ValueError(f"resume: {path} holds a {type(state).__name__}, not a state dict")
    models.load_weights(network.model, state, f"resume: {path.name}")
    return Dense(network.model, network.convs, network.rates, path.name, sha256(path))


def choose_masks(params: Params, dense: Dense, names: list[str] | None = None) -> Masks:
    """The masks of a configuration (or of some of its convs) from the model's present weights.

    With `resume_mask` they come from that file instead.
    """
    wanted = {n: dense.rates[n] for n in (dense.rates if names is None else names)}
    if params.resume_mask:
        found, _ = masking.load(resolve(params.resume_mask))
        masking.check(dense.model, found, f"resume_mask: {params.resume_mask}")
        missing = [name for name in wanted if name not in found]
        if missing:
            raise ValueError(f"resume_mask: {params.resume_mask} lacks a mask of {missing[0]}")
        return {name: found[name] for name in wanted}
    floor = (
        keep_floor(list(dense.rates.values())) if params.keep_floor is None else params.keep_floor
    )
    return pruners.prune(
        dense.model,
        wanted,
        params.pruning_way,
        seed=params.mask_seed,
        floor=floor,
        convs=dense.convs,
        bias_in_score=params.bias_in_score,
        survivors=params.survivors,
        groups=params.groups,
        strict_rate=params.strict_rate,
    )


def scores(params: Params, dense: Dense) -> dict[str, torch.Tensor]:
    """The expectation scaling factors (F, C) of the convs that the configuration prunes."""
    modules = {name: dense.model.get_submodule(name) for name in dense.rates}
    return {
        name: expectation.delta_e(
            module.weight, module.bias if params.bias_in_score else None, name
        )
        for name, module in modules.items()
    }


def save_masks(params: Params, masks: Masks) -> Path:
    """Write masks where `finetune` leaves those of the same configuration."""
    path = resolve(params.job_dir) / "masks.safetensors"
    return masking.save(path, masks, {"arch": params.arch, "name": params.name})


def counting_table(params: Params, dense: Dense, left: dict) -> pd.DataFrame:
    """One pruned network counted as published and from its masks; `left` as of `counts`."""
    total, published = left["macs"]["dense"] / 1e6, left["macs"]["published_m"]
    kernels = left["macs"]["left"] / 1e6
    rows = {
        "published convention": (total, published, 100 * (1 - published / total)),
        "true, from the masks": (total, kernels, 100 * (1 - kernels / total)),
    }
    columns = ["dense, millions", "left, millions", "cut, %"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).round(2)


def counts(params: Params, dense: Dense, masks: Masks) -> dict:
    """What masks leave of a network, as a record says it: layers, MACs, weights, sparsity."""
    layers = flops.layer_table(dense.convs, masks, dense.rates)
    published = flops.published_convention(dense.model, dense.convs, dense.rates)
    size = models.ARCHS[params.arch].image_size
    kernels = sum(row["kernels"] for row in layers)
    return {
        "layers": layers,
        "macs": flops.macs(dense.model, dense.convs, masks, size)
        | {"published_m": published["macs_m"]},
        "weights": flops.weights(dense.model, masks),
        "sparsity": sum(row["pruned"] for row in layers) / kernels,
        "nominal_sparsity": sum(row["nominal"] for row in layers) / kernels,
    }


def baseline(params: Params) -> dict:
    """The dense network: trained from scratch, or with `resume` loaded and evaluated.

    Leaves the checkpoint where `load_dense` looks for it, and returns the record.
    """
    unnamed = params.name == f"{params.arch}-{params.pruning_way}"
    name = f"{params.arch}-baseline" if unnamed else params.name
    params = params.replace(name=name, distill=0.0)  # there is no other network to learn from
    path = dense_path(params.replace(resume=""))
    if (done := _finished(params, "baseline")) and (params.resume or path.is_file()):
        return _publish(params, done)
    network = load_dense(params) if params.resume else fresh(params)
    device, data = _begin(params, network)
    if params.resume:
        top1 = tuning.evaluate(network.model, data, data.test)
        run = _Run(top1={"dense": top1, "before": top1})
    else:
        run = _train(params, network, data, device, stages=[[]])
        _save_network(path, params, network, {}, run.history[-1]["top1"], torch.float32)
    return _publish(params, _record(params, network, data, run, device, "baseline"))


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
    save_masks(params, run.masks)
    path = resolve(params.job_dir) / "model.safetensors"
    _save_network(path, params, dense, run.masks, run.history[-1]["top1"])
    return _publish(params, _record(params, dense, data, run, device, "finetune"))


@dataclass
class _Run:
    """What a run has come to so far."""

    masks: Masks = field(default_factory=dict)
    top1: dict[str, float] = field(default_factory=dict)  # dense, and before fine-tuning
    history: list[dict] = field(default_factory=list)
    wall_s: float = 0.0


def _begin(params: Params, network: Dense) -> tuple[str, Data]:
    """Device and data, and a folder that can be written: all there before any long work."""
    device = tuning.device_of(params)
    data = load_data(params).to(device)
    _load_state(resolve(params.job_dir) / "state.safetensors", params)
    write_json(resolve(params.job_dir) / "params.json", params.asdict())
    network.model.to(device, memory_format=torch.channels_last)
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
    return record


def _train(params: Params, dense: Dense, data: Data, device: str, stages: list) -> _Run:
    """Stage by stage: mask the stage's convs, then train; none to mask is the dense baseline.

    Goes on where an earlier call was interrupted.
    """
    path = resolve(params.job_dir) / "state.safetensors"
    state = _load_state(path, params)
    run = state["run"] if state else _Run()
    pruning = stages != [[]]
    images = params.epochs * len(stages) * len(data.train)
    if pruning and not state:
        run.top1["dense"] = tuning.evaluate(dense.model, data, data.test)
    teacher = None
    if pruning and params.distill:
        unpruned = copy.deepcopy(dense.model).eval()
        teacher = tuning.forward_of(unpruned, params, device, images)
    forward = tuning.forward_of(dense.model, params, device, images)
    for stage, names in enumerate(stages):
        resume = None
        if state and stage < state["stage"]:
            continue
        if state and stage == state["stage"]:
            resume = state
            dense.model.load_state_dict(state["model"])
        elif names:
            run.masks.update(choose_masks(params, dense, names))
            if not params.fade_epochs:
                masking.apply(dense.model, run.masks)
            tuning.reestimate_bn(dense.model, data, params.bn_images)
            run.top1.setdefault("before", tuning.evaluate(dense.model, data, data.test))
        label = params.name if len(stages) == 1 else f"{params.name} {stage + 1}/{len(stages)}"
        began = time.perf_counter() - run.wall_s
        epochs = tuning.train(
            dense.model, data, params, run.masks,
            forward=forward, teacher=teacher, resume=resume, label=label,
        )  # fmt: skip
        try:
            for entry, progress in epochs:
                run.history.append({**entry, "stage": stage})
                run.wall_s = time.perf_counter() - began
                _save_state(path, params, dense, run, stage, progress)
        except tuning.Diverged:
            record = _record(
                params, dense, data, run, device, "finetune" if pruning else "baseline"
            )
            records.write(record | {"status": "diverged"}, params.results_dir)
            raise
    return run


def _record(params, dense: Dense, data: Data, run: _Run, device: str, kind: str) -> dict:
    """The record of a run: last epoch first, the best one (by `top1` of the history) beside it."""
    before = run.top1.get("before")
    curve = [entry["top1"] for entry in run.history] or [before]
    best = max(range(len(curve)), key=lambda i: curve[i] or 0)
    seconds = sum(entry["seconds"] for entry in run.history)
    images = sum(entry["images_per_s"] * entry["seconds"] for entry in run.history)
    origin = records.provenance(device)
    hardware = origin.pop("hardware") | {"precision": tuning.precision_of(params, device)}
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
    folder = resolve(params.job_dir)
    write_json(folder / "record.json", record)
    records.write(record, params.results_dir)
    (folder / "state.safetensors").unlink(missing_ok=True)
    return record


def _save_network(path, params, dense, masks, top1, dtype=torch.float16) -> None:
    meta = {
        "arch": params.arch,
        "num_classes": 10,
        "dataset": params.dataset,
        "normalization": params.normalization,
        "name": params.name,
        "top1": top1,
    }
    masking.save_compact(path, dense.model, masks, meta, dtype)


def _same(params: Params, saved: dict, path: Path) -> None:
    """ParamError if the files in job_dir are of a run with other parameters."""
    if Params(**saved).digest != params.digest:
        own = params.asdict()
        name = next(k for k in own if k not in PLACES and saved.get(k) != own[k])
        raise ParamError(
            f"job_dir: {path.parent} holds a run with {name} {saved.get(name)!r}, this one has "
            f"{own[name]!r}; give another job_dir, or delete that one to start over"
        )


def _save_state(path, params, dense, run: _Run, stage, progress) -> None:
    """Everything that continues the run after this epoch, bit for bit."""
    tensors = {f"model.{k}": v for k, v in dense.model.state_dict().items()}
    tensors |= {f"momentum.{k}": v for k, v in progress["momentum"].items()}
    tensors |= {f"masks.{k}": v for k, v in run.masks.items()}
    meta = {
        "params": params.asdict(),
        "stage": stage,
        "epoch": progress["epoch"],
        "run": {"top1": run.top1, "history": run.history, "wall_s": run.wall_s},
    }
    save_tensors(path, tensors, meta)


def _load_state(path: Path, params: Params) -> dict | None:
    """The state of an interrupted run; None where there is none."""
    if not path.is_file():
        return None
    tensors, state = load_tensors(path)
    _same(params, state["params"], path)
    for part in ("model", "momentum", "masks"):
        own = {k: v for k, v in tensors.items() if k.startswith(f"{part}.")}
        state[part] = {k.removeprefix(f"{part}."): v for k, v in own.items()}
    state["run"] = _Run(masks=state["masks"], **state["run"])
    return state
