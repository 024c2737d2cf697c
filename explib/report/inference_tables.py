"""The table of pruned networks beside what a user would run instead: records of bench in."""

import json
from pathlib import Path

import pandas as pd

from explib.files import resolve
from explib.study.bench.comparison import WAYS
from explib.study.bench.inference import ENGINE, crossover
from explib.study.records import hardware

SIXTEEN_BITS = ("bf16", "fp16")
TOP1 = {
    "dense": "top-1 dense",
    "openvino int8": "top-1 int8",
    "engine int8": "top-1 kernels pruned, int8",
    "filters openvino int8": "top-1 filters pruned, int8",
    "kernels pruned": "top-1 kernels pruned",
    "filters pruned": "top-1 filters pruned",
}


def inference(results_dir: str | Path = "results") -> pd.DataFrame:
    """Images per second of every way of explib.study.bench.comparison, and what the engine gains.

    Ratios: the engine in fp32 over the best dense way in fp32, in its fastest type of 16 bits over
    the best dense one in 16 bits, in its fastest type over int8, in int8 over int8, and in fp32
    over the network without whole filters in fp32. *even at density*: the share of kernels below
    which the engine is faster in fp32 than the best dense way. Top-1 in per cent.
    """
    lines = []
    for path in sorted((resolve(results_dir) / "bench").glob("inference-*.json")):
        record = json.loads(path.read_text())
        where = hardware(record["provenance"]["hardware"]["name"])
        for row in record["networks"]:
            made = record["made"][row["arch"]]
            lines.append(
                _line(row)
                | {"even at density": _even(record["density"], row)}
                | {label: _percent(made["top1"].get(of)) for of, label in TOP1.items()}
                | {"threads": str(made["threads"]), "hardware": where}
            )
    return pd.DataFrame(lines)


def _line(row: dict) -> dict:
    found = row["images_per_s"]
    line = {
        "network": row["label"],
        "batch": str(row["batch"]),
        "kernels left %": f"{100 * row['density']:.1f}",
        "MACs cut %": f"{row['cut_pct']:.1f}",
    }
    line |= {way: f"{found[way]:.0f}" if way in found else "" for way in WAYS}
    ours = {way: speed for way, speed in found.items() if way in ENGINE}
    dense = {w: s for w, s in found.items() if w not in ENGINE and not w.startswith("filters")}
    best = _best(dense, "fp32")
    line["best dense fp32"] = best.removesuffix(" fp32")
    return line | {
        "engine fp32 / best dense fp32": _ratio(ours, "engine fp32", dense, best),
        "engine / best dense, 16 bits": _ratio(
            ours, _best(ours, *SIXTEEN_BITS), dense, _best(dense, *SIXTEEN_BITS)
        ),
        "engine, best / int8": _ratio(ours, _best(ours, ""), dense, "openvino int8"),
        "engine int8 / int8": _ratio(ours, "engine int8", dense, "openvino int8"),
        "engine fp32 / filters fp32": _ratio(ours, "engine fp32", found, "filters openvino fp32"),
    }


def _best(speeds: dict[str, float], *precisions: str) -> str:
    """The fastest way in one of these precisions, or nothing."""
    own = {way: speed for way, speed in speeds.items() if way.endswith(precisions)}
    return max(own, key=lambda way: own[way], default="")


def _ratio(ours: dict[str, float], way: str, theirs: dict[str, float], other: str) -> str:
    return f"{ours[way] / theirs[other]:.2f}" if way in ours and other in theirs else ""


def _even(density: list[dict], row: dict) -> str:
    """Where the engine is as fast as the best dense way in fp32: a density, or a bound of it."""
    own = [r for r in density if (r["arch"], r["batch"]) == (row["arch"], row["batch"])]
    own = sorted(own, key=lambda r: r["density"])
    if not own:
        return ""
    dense = own[0]["against_images_per_s"]
    found = crossover(own, "engine fp32", dense)
    if found is not None:
        return f"{found:.2f}"
    wins = own[-1]["images_per_s"]["engine fp32"] > dense
    return f"above {own[-1]['density']:g}" if wins else f"below {own[0]['density']:g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
