"""A run's record, one JSON file that explains itself, and all records as one DataFrame."""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import pandas as pd
import torch

import explib
from explib.files import resolve, write_json
from explib.params import Params, from_mapping
from explib.registry import file_name
from explib.training.timing import processor

SCHEMA = 1
KINDS = ("baseline", "finetune")
STATES = ("done", "diverged")


def provenance(device: str = "cpu") -> dict:
    """Code, library versions and hardware of this process, for a record.

    A copy without its history, as on a rented machine, is told its commit by EXPLIB_COMMIT; whether
    it is as that was committed, nobody can say then.
    """
    told = os.environ.get("EXPLIB_COMMIT", "")
    changes = (
        None if told else _git("status", "--porcelain", "--untracked-files=all", "--", "explib")
    )
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": told or _git("rev-parse", "HEAD") or "",
        "git_dirty": None if changes is None else bool(changes),
        "versions": {
            "explib": explib.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": metadata.version("torchvision"),
            "numpy": numpy.__version__,
        },
        "hardware": {
            "device": device,
            "name": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
            "threads": torch.get_num_threads(),
        },
    }


def write_bench(name: str, found: dict, results_dir: str | Path = "results") -> Path:
    """Write what was measured apart from runs to results_dir/bench/NAME.json.

    With its provenance, unless `found` has it. MACHINE in the name stands for this machine's.
    """
    origin = found.get("provenance") or provenance()
    name = name.replace("MACHINE", machine(origin["hardware"]["name"]))
    path = resolve(results_dir) / f"bench/{name}.json"
    return write_json(path, {**found, "provenance": origin})


def _git(*words: str) -> str | None:
    """Ask git about the package's own checkout; None where it is installed from none."""
    checkout = Path(explib.__file__).resolve().parent.parent
    if not (checkout / ".git").exists():  # nor is it of a checkout that only lies around it
        return None
    try:
        done = subprocess.run(["git", *words], cwd=checkout, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    """The processor as the system names it, its cores, and the vectors that torch uses."""
    cores, vectors = os.cpu_count(), torch.backends.cpu.get_cpu_capability()
    return f"{processor()} ({cores} cores, {vectors})"


def identity(record: dict) -> str:
    """A short name of the experiment: equal for equal parameters, kind and hardware."""
    params = Params(**record["params"])
    text = f"{record['kind']} {params.digest} {record['hardware']['name']}"
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]
    return f"{params.name}-e{params.epochs}-s{params.seed}-{digest}"


def write(record: dict, results_dir: str | Path = "results") -> Path:
    """Write a record to results_dir/records/DATASET/; a later equal run replaces its own only."""
    return write_json(resolve(results_dir) / place(record), record)


def place(record: dict) -> str:
    """Where a record is, from the results folder: `records/DATASET/KIND-IDENTITY.json`."""
    folder = file_name(record["params"]["dataset"])
    return f"records/{folder}/{record['kind']}-{identity(record)}.json"


def read(path: str | Path) -> dict:
    """One record. ValueError names the file, and what it lacks or what in it cannot be."""
    try:
        record = json.loads(Path(path).read_text(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); restore or delete it") from None
    needed = ("schema", "kind", "params", "macs", "weights", "accuracy", "history", "hardware")
    missing = [k for k in needed if not isinstance(record, dict) or k not in record]
    if missing:
        raise ValueError(f"{path}: not a record, lacks {', '.join(missing)}; restore or delete it")
    if record["schema"] != SCHEMA or record["kind"] not in KINDS:
        raise ValueError(f"{path}: schema {record['schema']}, kind {record['kind']!r} is unknown")
    try:
        _check(record)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; restore or delete it") from None
    return record


def _no_constant(name: str):
    raise ValueError(f"{name} is no number")


def _check(record: dict) -> None:
    """ValueError names what in a record cannot be: somebody may have edited it by hand."""
    done = record.setdefault("status", "done") == "done"
    if record["status"] not in STATES:
        raise ValueError(f"status: {record['status']!r} is unknown; known: {', '.join(STATES)}")
    for part in ("params", "hardware", "macs", "weights", "accuracy"):
        _mapping(part, record[part])
    from_mapping(record["params"])
    for name in ("device", "name"):
        if not isinstance(record["hardware"].get(name), str):
            raise ValueError(f"hardware.{name}: {record['hardware'].get(name)!r}; give text")
    for part in ("macs", "weights"):
        _numbers(part, record[part], ("dense", "left"))
    shares = [name for name in ("sparsity", "nominal_sparsity") if name in record]
    _numbers("record", record, shares, 1)
    tuned = ("dense", "before") if record["kind"] == "finetune" else ()
    top1 = (*tuned, "last", "best") if done else ()  # there is none after no epoch
    _numbers("accuracy", record["accuracy"], top1, 100)
    for part, names, most in (
        ("history", ("top1",), 100),
        ("history", ("epoch",), math.inf),
        ("layers", ("kernels", "nominal", "pruned", "macs_dense", "macs"), math.inf),
    ):
        rows = record.get(part, [])
        if not isinstance(rows, list):
            raise ValueError(f"{part}: is a {type(rows).__name__}; give a list")
        for number, row in enumerate(rows):
            _mapping(f"{part}[{number}]", row)
            _numbers(f"{part}[{number}]", row, names, most)
    last = record["history"][-1]["top1"] if done and record["history"] else None
    if last is not None and record["accuracy"]["last"] != last:
        raise ValueError(f"accuracy.last: {record['accuracy']['last']}, its last epoch had {last}")


def _mapping(place: str, value) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: is a {type(value).__name__}; give a mapping")


def _numbers(place: str, found: dict, names: Iterable[str], most: float = math.inf) -> None:
    """ValueError unless each of the names is a number from 0 to `most`."""
    for name in names:
        value: Any = found.get(name)
        if type(value) not in (int, float) or not 0 <= value <= most or value == math.inf:
            wanted = "a number, 0 or more" if most == math.inf else f"a number from 0 to {most}"
            raise ValueError(f"{place}.{name}: {value!r}; give {wanted}")


def each(results_dir: str | Path = "results", dataset: str = "cifar10") -> Iterator[dict]:
    """The records of a data set one after another, in the order of their file names."""
    folder = resolve(results_dir) / "records" / file_name(dataset)
    return map(read, sorted(folder.glob("*.json")))


def read_all(results_dir: str | Path = "results", dataset: str = "cifar10") -> list[dict]:
    """All records of a data set, in the order of their file names."""
    return list(each(results_dir, dataset))


def frame(records: Iterable[dict]) -> pd.DataFrame:
    """One row per record: every parameter, and what came out.

    Columns beside the parameters: kind, status, start (the SHA-256 of the checkpoint that it starts
    from); macs_dense, macs (multiply-adds), weights_dense, weights (counts), published_m (millions,
    the published convention); dense, before, last, best (top-1, per cent), best_epoch; sparsity,
    nominal_sparsity (share of kernels), wall_s, images_per_s, device, hardware, computed_in (the
    precision that `precision: auto` became), torch (its version), history (a list), record (its
    `place`), trained (epochs in all, to two decimals, which `epochs` is not for a layerwise run).
    Of the layers, most of a record, nothing.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(Params)}
    rows = [
        {
            **defaults,  # of parameters that are younger than the record
            **record["params"],
            "kind": record["kind"],
            "status": record["status"],
            "start": record.get("provenance", {}).get("checkpoint_sha256", ""),
            "macs_dense": record["macs"]["dense"],
            "macs": record["macs"]["left"],
            "published_m": record["macs"].get("published_m"),
            "weights_dense": record["weights"]["dense"],
            "weights": record["weights"]["left"],
            **{
                k: record["accuracy"].get(k)
                for k in ("dense", "before", "last", "best", "best_epoch")
            },
            "sparsity": record.get("sparsity"),
            "nominal_sparsity": record.get("nominal_sparsity"),
            "wall_s": record.get("wall_s"),
            "images_per_s": record.get("images_per_s"),
            "device": record["hardware"]["device"],
            "hardware": record["hardware"]["name"],
            "computed_in": record["hardware"].get("precision", ""),
            "torch": record.get("provenance", {}).get("versions", {}).get("torch", ""),
            "history": record["history"],
            "record": place(record),
            "trained": round((epochs_of(record["history"]) or [0])[-1], 2),
        }
        for record in records
    ]
    return pd.DataFrame(rows)


def epochs_of(history: list[dict]) -> list[float]:
    """How many epochs the run had trained by each line of its history, all stages together.

    A line's own `epoch` begins anew in every stage; what is left of it over a whole number is the
    length of a stage's last epoch, where that was a part of one.
    """
    return list(itertools.accumulate(line["epoch"] % 1 or 1 for line in history))


def origin(record: dict) -> dict:
    """One line on where a record comes from: when, by which code, on what, from which data."""
    known = record.get("provenance", {})
    versions, data = known.get("versions", {}), known.get("data", {})
    commit = known.get("git_commit", "")[:10] + ("+" if known.get("git_dirty") else "")
    return {
        "run": f"{record['kind']} {record['params']['name']}",
        "seed": record["params"]["seed"],
        "made": known.get("created", "")[:10],
        "commit": commit or "unknown",
        "torch": versions.get("torch", ""),
        "hardware": record["hardware"]["name"],
        "precision": record["hardware"].get("precision", ""),
        "data (SHA-256)": f"{data.get('name', '')} {data.get('sha256', '')[:10]}",
        "starts from": known.get("checkpoint", ""),
    }


def hardware(name: str) -> str:
    """A processor's or accelerator's name without the words that tell nothing."""
    return re.sub(r"\((?:R|TM)\)| (?:Processor|CPU)\b", "", name)


def machine(name: str) -> str:
    """A processor's name as part of a file name: `amd-epyc`."""
    return re.sub(r"\W+", "-", hardware(name).split("(")[0].strip().lower())
