"""Tables of what is measured apart from whole runs: records of results_dir/bench in."""

import json
import statistics
from pathlib import Path

import pandas as pd

from explib import registry
from explib.files import resolve
from explib.report.names import criterion_name, network_name
from explib.study.records import hardware

SIXTEEN_BITS = ("engine bf16", "engine fp16")


def training(results_dir: str | Path = "results") -> pd.DataFrame:
    """Images/s of the plain loop and ours on every machine measured, and their ratio."""
    lines = []
    for path in sorted((resolve(results_dir) / "bench").glob("training-*.json")):
        record = json.loads(path.read_text())
        machine = hardware(record["provenance"]["hardware"]["name"])
        speed = {(r["network"], r.get("task"), r["loop"]): r for r in record["rows"]}
        for (network, task, loop), plain in speed.items():
            ours = speed.get((network, task, "ours"))
            if loop == "plain" and ours:
                lines.append(
                    {
                        "network": network_name(network),
                        "task": task,
                        "plain loop, images/s": f"{plain['images_per_s']:.0f}",
                        "ours, images/s": f"{ours['images_per_s']:.0f}",
                        "ratio": f"{ours['images_per_s'] / plain['images_per_s']:.2f}",
                        "precision": ours["precision"],
                        "batch": str(ours["batch_size"]),
                        "hardware": machine,
                    }
                )
    return pd.DataFrame(lines)


def sparse_training(results_dir: str | Path = "results") -> pd.DataFrame:
    """Images/s of one batch forward and backward, over all kernels and over the surviving ones."""
    lines = []
    for path in sorted((resolve(results_dir) / "bench").glob("training-*.json")):
        record = json.loads(path.read_text())
        for row in record.get("by_sparsity", []):
            lines.append(
                {
                    "network": network_name(row["network"]),
                    "kernels pruned %": f"{row['pruned_pct']:.0f}",
                    "all kernels, images/s": f"{row['all_kernels']:.0f}",
                    "surviving kernels, images/s": f"{row['surviving_kernels']:.0f}",
                    "ratio": f"{row['surviving_kernels'] / row['all_kernels']:.2f}",
                    "precision": row["precision"],
                    "batch": str(row["batch_size"]),
                    "hardware": hardware(record["provenance"]["hardware"]["name"]),
                }
            )
    return pd.DataFrame(lines)


def speed(results_dir: str | Path = "results") -> pd.DataFrame:
    """Images per second of the records that explib.study.bench.inference writes, and the speed-ups.

    The engine in fp32 against torch in fp32, in its fastest type against torch in bf16.
    """
    lines = []
    for path in sorted((resolve(results_dir) / "bench").glob("runtime-*.json")):
        record = json.loads(path.read_text())
        name = record["provenance"]["hardware"]["name"]
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


def processes(results_dir: str | Path = "results") -> pd.DataFrame:
    """Images/s of one run in several processes, and their share of a linear growth."""
    path = resolve(results_dir) / "bench/processes.json"
    record = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    return pd.DataFrame(
        {
            "processes": str(row["processes"]),
            "images/s": f"{row['images_per_s']:.0f}",
            "of linear growth": f"{row['efficiency']:.2f}",
            "hardware": hardware(record["provenance"]["hardware"]["name"]),
        }
        for row in record["rows"]
    )


def controls(results_dir: str | Path = "results") -> pd.DataFrame:
    """Top-1 in per cent of every criterion before fine-tuning, a column for each published cut.

    At the highest one also with BatchNorm statistics as they were before pruning, and the per cent
    of squared weights that pruning leaves.
    """
    rows, lines = _control_rows(results_dir), {}
    archs = sorted({row["arch"] for row in rows}, key=_place)
    for arch in archs:
        own = [row for row in rows if row["arch"] == arch and not row["changed"]]
        cuts = sorted({row["cut_pct"] for row in own})
        for row in own:
            name = criterion_name(row["pruning_way"], row["survivors"])
            seeds = str(len(row["top1"]))
            line = {"network": network_name(arch), "criterion": name, "seeds": seeds}
            line = lines.setdefault((arch, name), line)
            cut = ("lowest cut", "middle cut", "highest cut")[cuts.index(row["cut_pct"])]
            line[cut] = _mean(row["top1"])
            if cut == "highest cut":
                line["there, statistics as they were"] = _mean(row["top1_as_was"])
                line["squared weights left %"] = f"{row['norm_kept_pct']:.1f}"
    labels = [criterion_name(*variant) for variant in registry.variants()]
    order = {label: place for place, label in enumerate(labels)}  # others last, as measured
    ordered = sorted(lines.items(), key=lambda line: order.get(line[0][1], len(order)))
    return pd.DataFrame([line for arch in archs for (own, _), line in ordered if own == arch])


def settings(results_dir: str | Path = "results") -> pd.DataFrame:
    """Top-1 in per cent of way B before fine-tuning with other settings, at the highest cut."""
    rows, lines = _control_rows(results_dir), {}
    cuts = {row["arch"]: row["cut_pct"] for row in rows if row["changed"]}
    for row in rows:
        if row["pruning_way"] == "B" and row["cut_pct"] == cuts.get(row["arch"]):
            line = {"network": network_name(row["arch"]), "published cut %": str(row["cut_pct"])}
            line |= {"setting": row["changed"] or "as usual"}
            line = lines.setdefault((row["arch"], row["changed"]), line)
            line[criterion_name("B", row["survivors"])] = _mean(row["top1"])
    return pd.DataFrame(lines.values())


def _place(arch: str) -> int:
    """Where a network stands among others: as registered."""
    known = list(registry.NETWORKS)
    return known.index(arch) if arch in known else len(known)


def _control_rows(results_dir: str | Path) -> list[dict]:
    paths = sorted((resolve(results_dir) / "bench").glob("controls-*.json"))
    return [row for path in paths for row in json.loads(path.read_text())["rows"]]


def _mean(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"
