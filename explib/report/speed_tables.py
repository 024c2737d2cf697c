"""Tables of how fast networks run: records of results_dir/bench in."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from explib.files import resolve
from explib.report.names import NOT_MEASURED, network_name
from explib.study.records import hardware

SIXTEEN_BITS = ("engine bf16", "engine fp16")


def _records(results_dir: str | Path, name: str) -> Iterator[tuple[dict, str]]:
    """Every machine's record of one kind, with the machine's name."""
    for path in sorted((resolve(results_dir) / "bench").glob(f"{name}-*.json")):
        record = json.loads(path.read_text())
        yield record, record["provenance"]["hardware"]["name"]


def speed(results_dir: str | Path = "results") -> pd.DataFrame:
    """Images per second of the records that explib.study.bench.inference writes, and the speed-ups.

    The engine in fp32 against torch in fp32, in its fastest type against torch in bf16.
    """
    lines = []
    for record, name in _records(results_dir, "runtime"):
        lines += [_speed_line(row, name) for row in record["networks"]]
    return pd.DataFrame(lines)


def _speed_line(row: dict, name: str) -> dict:
    found = row["images_per_s"]
    line = {
        "network": network_name(row["arch"]),
        "MACs cut %": f"{row['cut_pct']:.1f}",
        "batch": str(row["batch"]),
        **{name: f"{found[name]:.0f}" for name in found if name not in SIXTEEN_BITS},
    }
    short = max((name for name in SIXTEEN_BITS if name in found), key=found.get, default="")
    if short:
        line["engine 16 bits"] = f"{found[short]:.0f} {short.removeprefix('engine ')}"
    fp32 = found.get("engine fp32", 0)
    for dense, engine, label in (
        ("eager fp32", fp32, "engine fp32 / eager fp32"),
        ("compiled fp32", fp32, "engine fp32 / compiled fp32"),
        ("compiled bf16", max(fp32, found.get(short, 0)), "engine, best / compiled bf16"),
    ):
        if dense in found and engine:
            line[label] = f"{engine / found[dense]:.1f}"
    return line | {"hardware": hardware(name)}


def exactness(results_dir: str | Path = "results") -> pd.DataFrame:
    """How the engine's answers on the test images differ from torch's, over the shipped networks.

    Of the records that explib.study.verify writes; the speed, as a share of that without a second
    look, of those of explib.study.bench.inference.
    """
    lines = []
    for path in sorted((resolve(results_dir) / "bench").glob("accuracy-*.json")):
        record = json.loads(path.read_text())
        rows = record["rows"]
        exact = {row["network"]: row["top1"] for row in rows if row["way"] == "torch fp32"}
        for way in dict.fromkeys(row["way"] for row in rows if row["way"] != "torch fp32"):
            own = [row for row in rows if row["way"] == way]
            off = [row["top1"] - exact[row["network"]] for row in own]
            share = _rechecked_speed(path.with_name(path.name.replace("accuracy", "runtime")), way)
            lines.append(
                {
                    "computed in": way,
                    "networks": str(len(own)),
                    "top-1 off by at most": f"{max(map(abs, off)):.2f}",
                    "on the mean": f"{statistics.mean(off):+.3f}",
                    "other answers, at most": str(max(row["differ"] for row in own)),
                    "computed twice %": f"{statistics.mean(r['rechecked_pct'] for r in own):.1f}",
                    "speed %": share,
                    "hardware": hardware(record["provenance"]["hardware"]["name"]),
                }
            )
    return pd.DataFrame(lines)


def _rechecked_speed(path: Path, way: str) -> str:
    """The median speed with a second look, in per cent of that without; nothing if not measured."""
    rows = json.loads(path.read_text())["shipped"] if path.is_file() else []
    plain, found = way.removesuffix(", rechecked"), [row["images_per_s"] for row in rows]
    shares = [s[way] / s[plain] for s in found if way != plain and way in s]
    return f"{100 * statistics.median(shares):.0f}" if shares else ""


ALTERNATIVES = {
    "torch.compile, dense": ("compiled",),
    "OpenVINO, dense": ("openvino fp32", "openvino bf16", "openvino fp16"),
    "OpenVINO int8, dense": ("openvino int8",),
    "ONNX Runtime, dense": ("onnxruntime",),
    "OpenVINO, filters": ("filters openvino fp32", "filters openvino bf16"),
    "OpenVINO int8, filters": ("filters openvino int8",),
    "engine, pruned": ("engine fp32", "engine bf16", "engine fp16"),
    "engine int8, pruned": ("engine int8",),
}
"""Columns of `alternatives`, and how the names begin of what was timed for each."""


def alternatives(results_dir: str | Path = "results") -> pd.DataFrame:
    """Images per second of each backend, at its fastest precision.

    Of the record of explib.study.bench.comparison with the most ways, of several the latest; all
    are in `inference_tables`. `gain` is the pruned network's over the fastest dense one; int8,
    whose answers differ, does not count; `gain over int8`: that of the pruned network's fastest
    precision, int8 or other, over dense int8.
    """
    found = [record for record, _ in _records(results_dir, "inference")]
    if not found:
        return pd.DataFrame()
    record = max(found, key=lambda r: (_ways(r), r["provenance"].get("created", "")))
    name, lines = record["provenance"]["hardware"]["name"], []
    for row in record["networks"]:
        best = {column: _fastest(row, names) for column, names in ALTERNATIVES.items()}
        line = {"network": row["label"], "batch": str(row["batch"])}
        for column, (speed, precision) in best.items():
            said = "" if precision in column else f" {precision}"
            line[column] = f"{speed:.0f}{said}" if speed else NOT_MEASURED
        ours = best["engine, pruned"][0]
        exact = ("torch.compile, dense", "OpenVINO, dense", "ONNX Runtime, dense")
        dense = max(best[column][0] for column in exact)
        line["gain"] = f"{ours / dense:.1f}" if ours and dense else ""
        most = max(ours, best["engine int8, pruned"][0])
        int8 = best["OpenVINO int8, dense"][0]
        line["gain over int8"] = f"{most / int8:.1f}" if most and int8 else ""
        lines.append(line | {"hardware": hardware(name)})
    return pd.DataFrame(lines)


def _ways(record: dict) -> int:
    """In how many ways a machine ran networks: fewer where it lacks a type."""
    return len({name for row in record["networks"] for name in row["images_per_s"]})


def _fastest(row: dict, names: tuple[str, ...]) -> tuple[float, str]:
    """The most images per second of what was timed under such names, and its precision."""
    found = row["images_per_s"].items()
    own = [(speed, name.split()[-1]) for name, speed in found if name.startswith(names)]
    return max(own, default=(0.0, ""))


def shipped(results_dir: str | Path = "results") -> pd.DataFrame:
    """Top-1 and images per second of the networks that shipped when a machine was measured."""
    lines = []
    for record, name in _records(results_dir, "runtime"):
        for row in record.get("shipped", []):
            lines.append(
                {
                    "network": row["name"],
                    "pruned": {"dense": "nothing"}.get(row["kind"], row["kind"]),
                    "MACs cut %": f"{row['cut_pct']:.1f}",
                    "top-1": f"{row['top1']:.2f}",
                    **{way: f"{speed:.0f}" for way, speed in row["images_per_s"].items()},
                    "hardware": hardware(name),
                }
            )
    return _hardware_last(lines)


def density(results_dir: str | Path = "results") -> pd.DataFrame:
    """Images per second of ResNet-56 in the engine, by the share of kernels that survive."""
    lines = []
    for record, name in _records(results_dir, "runtime"):
        for row in record.get("density", []):
            speeds = {way: f"{speed:.0f}" for way, speed in row["images_per_s"].items()}
            lines.append({"density": f"{row['density']:g}", **speeds, "hardware": hardware(name)})
    return _hardware_last(lines)


def _hardware_last(lines: list[dict]) -> pd.DataFrame:
    """Rows as a table whose last column is the machine, though others differ between machines."""
    table = pd.DataFrame(lines)
    return table[sorted(table, key=lambda column: column == "hardware")]
