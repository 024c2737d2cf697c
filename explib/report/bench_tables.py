"""Tables of what is measured apart from whole runs: records of results_dir/bench in."""

import json
import statistics
from pathlib import Path

import pandas as pd

from explib import registry
from explib.files import resolve
from explib.report.names import criterion_name, network_name
from explib.study.records import hardware


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
    """Top-1 in per cent of ways A and B before fine-tuning with other settings.

    A line for the usual ones stands first at each cut where there are others.
    """
    rows, lines = _control_rows(results_dir), {}
    rows = [row for row in rows if row["pruning_way"] in ("A", "B")]
    changed = {(row["arch"], row["cut_pct"], row["pruning_way"]) for row in rows if row["changed"]}
    for row in sorted(rows, key=lambda row: -row["cut_pct"]):
        if (row["arch"], row["cut_pct"], row["pruning_way"]) in changed:
            line = {"network": network_name(row["arch"]), "published cut %": str(row["cut_pct"])}
            line |= {"setting": row["changed"] or "as usual"}
            line = lines.setdefault((row["arch"], row["cut_pct"], row["changed"]), line)
            line[criterion_name(row["pruning_way"], row["survivors"])] = _mean(row["top1"])
    return pd.DataFrame(lines.values()).fillna("")


def recipes(results_dir: str | Path = "results") -> pd.DataFrame:
    """Top-1 in per cent of each recipe of fine-tuning, on a validation split, and its length."""
    path = resolve(results_dir) / "bench/recipes.json"
    record = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    return pd.DataFrame(
        {
            "recipe": row["recipe"],
            "before fine-tuning": "" if row["before"] is None else f"{row['before']:.2f}",
            "last epoch": f"{row['last']:.2f}",
            "epochs": f"{record['pruned']['epochs']:g}",
            "hardware": hardware(record["provenance"]["hardware"]["name"]),
        }
        for row in record["rows"]
    )


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
