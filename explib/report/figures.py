"""The figures that the records allow: runs against each other, and against what was published."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from explib import registry
from explib.files import resolve
from explib.params import from_mapping
from explib.pruning import scores as scoring
from explib.registry import BLUE, GREY, RED
from explib.report import bench_plots as bench
from explib.report import comparison_plots as comparison
from explib.report import finding, inference_plots, plots, selection
from explib.report.names import colour_of, criterion_name, network_name
from explib.report.plots import curves, in_style, new_figure, save, sparsity
from explib.study import networks, records
from explib.study import published as published_figures


@in_style
def accuracy_vs_cut(frame: pd.DataFrame, arch: str) -> Figure:
    """Top-1 against the cut of multiply-adds: both ways measured, published, and other methods.

    What the ways are compared with at the same cut is drawn by `criteria`.
    """
    figure, axes = new_figure(8.2, 5.8)
    published, rows = published_figures.published(), _published_rows()
    rows = rows[rows["arch"] == arch]
    for way, marker in (("A", "s"), ("B", "D")):
        top1 = [cell[way] for cell in rows["top1_pct"]]
        axes.hlines(top1, rows["true_cut_pct"], rows["cut_pct"], color="#CCCCCC", linewidth=1)
        axes.plot(rows["cut_pct"], top1, marker, color=colour_of(way), markerfacecolor="none",
                  markersize=6, alpha=0.6)  # fmt: skip
        axes.plot(rows["true_cut_pct"], top1, marker, color=colour_of(way), markersize=6,
                  alpha=0.6, label=f"published, way {way} (hollow: as claimed)")  # fmt: skip
    others = published["others"][published["others"]["arch"] == arch]
    runs = _best_of(frame, arch)
    runs = runs[runs["pruning_way"].isin(["A", "B"])] if len(runs) else runs
    # what lies far below all of ours and the published ones is named at the edge
    lowest = min([min(cell.values()) for cell in rows["top1_pct"]] + list(runs.get("last", [])))
    below, others = (others[(others["top1_pct"] < lowest - 0.7) == far] for far in (True, False))
    axes.plot(others["cut_pct"], others["top1_pct"], "x", color=GREY, markersize=6,
              label="other methods, as they claim")  # fmt: skip
    claimed = [rows.assign(top1_pct=[cell[way] for cell in rows["top1_pct"]]) for way in "AB"]
    marks = pd.concat([others.assign(room=0.25), *(own.assign(room=0.1) for own in claimed)])
    marks = marks[["cut_pct", "top1_pct", "room"]].astype(float)
    shown, cuts = False, 100 * (1 - runs["macs"] / runs["macs_dense"]) if len(runs) else None
    names: dict[tuple, list] = {}  # of stars one above the other
    for _, run in runs[::-1].iterrows():
        key = selection.way_of(run)
        style = {"markerfacecolor": "white"} if key[1] == "l1" else {}
        axes.errorbar(
            100 * (1 - run["macs"] / run["macs_dense"]), run["last"],
            yerr=run["last_std"] if run["n"] > 1 else None, fmt="*", markersize=13, capsize=3,
            color=colour_of(key[0]), markeredgewidth=1.3, **style,
            label=None if shown else "measured, epochs in brackets (hollow: L1 survivors)",
        )  # fmt: skip
        shown = True
        cut = 100 * (1 - run["macs"] / run["macs_dense"])
        # names and marks of others to the right
        right, off = (marks["cut_pct"] - cut).between(0, 5), (marks["top1_pct"] - run["last"]).abs()
        beside = (cuts - cut).between(0.5, 5).any() or (right & (off < marks["room"])).any()
        # the star says which survivors
        seeds = f", n={run['n']}" if run["n"] > 1 else ""
        text = f"{key[0]} {run['last']:.2f} ({run['trained']:g}{seeds})"
        label = (run["last"], cut, text, colour_of(key[0]))
        names.setdefault((beside, round(cut)), []).append(label)
    axes.set(xlabel="multiply-adds removed, %", ylabel="top-1 on CIFAR-10's test set, %")
    axes.set_title(f"{network_name(arch)}: accuracy against cut")
    axes.legend(fontsize=8.5, ncols=2, loc="upper left", bbox_to_anchor=(-0.07, -0.14))
    axes.margins(x=0.2, y=0.08)
    stars = runs.assign(cut=cuts)[["cut", "last"]].values if len(runs) else ()
    _name(axes, others, [*marks[["cut_pct", "top1_pct"]].values, *stars])
    low, high = axes.get_ylim()
    for _, other in below.iterrows():
        axes.annotate(f"{other['name']} {other['top1_pct']:.2f} ↓", (other["cut_pct"], low),
                      xytext=(0, 4), ha="center", textcoords="offset points", fontsize=8,
                      color="#555555")  # fmt: skip
    for (beside, _), labels in names.items():
        labels.sort()
        places = plots.apart([last for last, *_ in labels], 0.032 * (high - low), high)
        for place, (_, cut, text, colour) in zip(places, labels, strict=True):
            axes.annotate(
                text, (cut, place), color=colour, xytext=(-10 if beside else 10, -3),
                ha="right" if beside else "left", fontsize=8.5, textcoords="offset points",
            )  # fmt: skip
    return figure


def _name(axes, others: pd.DataFrame, marks: list) -> None:
    """Write each name beside its cross, on the first side where it meets no mark and no name."""
    size = np.array([axes.bbox.width, axes.bbox.height]) * 72 / axes.figure.dpi
    units = size / [np.ptp(axes.get_xlim()), np.ptp(axes.get_ylim())]  # points a unit
    taken = [(*(at * units - 5), *(at * units + 5)) for at in marks]
    for _, other in others.iterrows():
        at, half = (other["cut_pct"], other["top1_pct"]), 2.6 * len(other["name"])
        middles = [(6 + half, 0), (-6 - half, 0), (0, 10), (0, -10)]
        boxes = [(*(at * units + middle - (half, 4)), *(at * units + middle + (half, 4)))
                 for middle in middles]  # fmt: skip
        free = [
            all(box[2] < t[0] or t[2] < box[0] or box[3] < t[1] or t[3] < box[1] for t in taken)
            for box in boxes
        ]
        chosen = free.index(True) if any(free) else 0
        taken.append(boxes[chosen])
        axes.annotate(other["name"], at, xytext=middles[chosen], textcoords="offset points",
                      ha="center", va="center", fontsize=8, color="#555555")  # fmt: skip


@in_style
def published_vs_true() -> Figure:
    """The published cut of every row against the true one."""
    rows = _published_rows().iloc[::-1]
    figure, axes = new_figure(6.5, 4.6)
    place = np.arange(len(rows))
    axes.hlines(place, rows["true_cut_pct"], rows["cut_pct"], color="#BBBBBB", linewidth=2)
    axes.plot(rows["true_cut_pct"], place, "o", color=BLUE, label="true")
    axes.plot(rows["cut_pct"], place, "o", color=RED, markerfacecolor="white", label="published")
    for y, (_, row) in zip(place, rows.iterrows(), strict=True):
        axes.annotate(f"{row['true_cut_pct'] - row['cut_pct']:+.2f}", (row["true_cut_pct"], y),
                      xytext=(-6, 0), textcoords="offset points", ha="right", va="center",
                      fontsize=8.5, color="#333333")  # fmt: skip
    axes.set_yticks(
        place, [f"{network_name(r['arch'])}, {r['cut_pct']:.1f} %" for _, r in rows.iterrows()]
    )
    axes.set(xlabel="FLOPs or multiply-adds removed, %")
    axes.set_title("Every published cut is overstated (difference in points)")
    axes.legend(ncols=2, loc="lower right", fontsize=9)
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    return figure


def _published_rows() -> pd.DataFrame:
    """The published rows with true_cut_pct, by kernels, as in the table of FLOPs."""
    rows = published_figures.published()["rows"]
    return rows.assign(true_cut_pct=published_figures.recounted()["true cut %"].values)


def _best_of(frame: pd.DataFrame, arch: str) -> pd.DataFrame:
    """The group of runs that the tables choose for each way, criterion and rates of a network.

    The longest; where those of several dense networks are as long, one for each.
    """
    runs = selection.groups(frame)
    if runs.empty:
        return runs
    row = ["pruning_way", "survivors", "compress_rate"]
    runs = runs[runs["arch"] == arch]
    runs = runs[runs["trained"] == runs.groupby(row)["trained"].transform("max")]
    return runs.drop_duplicates([*row, "start"])


def _longest_compared(frame: pd.DataFrame, arch: str, usual: bool) -> pd.DataFrame:
    """At each of a network's rates the longest groups that many criteria were run for.

    Many: at least half as many as for any other number of epochs.
    """
    runs = selection.compared(frame, usual)
    if runs.empty:
        return runs
    runs = runs[runs["arch"] == arch]
    by_rates = runs.groupby("compress_rate")
    runs = runs[2 * runs["others"] >= by_rates["others"].transform("max")]
    longest = runs.groupby("compress_rate")["trained"].transform("max")
    return runs[runs["trained"] == longest].sort_values("others", ascending=False, kind="stable")


_SEE = {
    "published_vs_true": "every published cut (hollow) lies to the right of the true one.",
    "curves": "each line starts where pruning left the network; the dotted line is the network "
    "before pruning, and the distance to it at the right end is the price.",
    "criteria": "how far right each way and criterion ends, at the same rates; the dotted line is "
    "the network before pruning. Bars reach one standard deviation, small marks are the seeds; "
    "hollow: L1 survivors. A value of more or fewer seeds and a name of another cut say so. "
    "Left few epochs, right many, the same criterion on the same line.",
    "finding": "how far chance alone comes, and how little of the differences after few epochs is "
    "left after many. Lines join what few epochs and many bring, on machines that the axis names.",
    "differences": "which intervals lie to one side of 0. They are of the seeds of one dense "
    "network, not corrected for how many there are; the table of criteria has corrected p values.",
    "lengths": "whether what a criterion gains in a few epochs is still there after many. Diamonds "
    "are the published runs, their best epoch on the test set.",
    "controls": "each line joins the three published cuts of a criterion. If a score knew more "
    "than the magnitudes of what it keeps, its line would lie above the black one, random kernels "
    "of the magnitudes that way B keeps; below it, the score does harm.",
    "recipes": "each recipe is one change away from ours (orange).",
    "training": "the plain loop and ours, by turns in one run.",
    "speed": "whole networks, dense in torch and in the engine; a dash is a type of numbers that "
    "this machine was not measured in.",
    "choices": "what accuracy buys: a network dense, without whole filters and without kernels, "
    "each in its backend, in fp32, 16 and 8 bits.",
    "speed_vs_density": "the engine against dense torch in numbers of the same width; where a "
    "line crosses 1, leaving out kernels begins to pay.",
    "accuracy_vs_speed": "up and to the right is better; pale marks are beaten in both by another "
    "network of their kind.",
    "sparse_training": "what leaving out pruned kernels brings in training, by turns in one run.",
    "scores": "most kernels of a layer lie near 0, where they neither pass on nor invert the mean "
    "of their input; the long tails are the few that do.",
    "levels": "a dark column is one large redundant set: to the mean, any kernel in it may stand "
    "for the others.",
    "sparsity": "bars that end below their mark did not meet their rate. Runs that prune as many "
    "kernels of every layer share one figure.",
    "accuracy_vs_cut": "up and to the right is better. Stars were measured here, a row's longest "
    "run from each dense network. What random kernels and others reach at the same cuts, "
    "`criteria` shows. Grey lines join a published cut as claimed (hollow) with the true one of "
    "the same row.",
}


def what_to_see(name: str) -> str:
    """A sentence on what a figure of `build` shows, by the name of its file."""
    return _SEE[kind_of(name)]


def chosen(drawn: list[Path]) -> list[Path]:
    """Of the files of `build` those to look at first: of figures that show single runs one each."""
    pictures = [path for path in drawn if path.suffix == ".png"]
    single = {"curves", "levels", "scores", "sparsity"}
    first = {kind_of(path.stem): path for path in reversed(pictures)}
    return [p for p in pictures if kind_of(p.stem) not in single or first[kind_of(p.stem)] == p]


def kind_of(name: str) -> str:
    """What a figure of `build` is of, by the name of its file: `criteria-resnet_56` is criteria."""
    return name.split("-")[0]


def _benchmarks(folder: Path) -> dict[str, Figure]:
    """The figures of what was measured apart from whole runs, where it was."""
    draw = {
        "controls-*": bench.controls,
        "recipes": bench.recipes,
        "training-*": bench.training_speed,
    }
    figures = {
        path.stem: figure(json.loads(path.read_text()))
        for names, figure in draw.items()
        for path in sorted(folder.glob(f"{names}.json"))
    }
    for path in sorted(folder.glob("training-*.json")):
        figures[f"sparse_{path.stem}"] = bench.sparse_training(json.loads(path.read_text()))
    for path in sorted(folder.glob("runtime-*.json")):
        figures |= inference_plots.figures(json.loads(path.read_text()))
    for path in sorted(folder.glob("inference-*.json")):
        figures[f"choices-{path.stem.removeprefix('inference-')}"] = bench.choices(
            json.loads(path.read_text())
        )
    return figures


def _scores(params: dict) -> dict[str, Figure]:
    """The scores and levels of the dense network that a run started from, where it is there."""
    run = from_mapping(params)
    if run.arch not in registry.NETWORKS or run.dataset not in registry.DATASETS:
        return {}  # what a record names is not imported
    try:
        dense = networks.load_dense(run.replace(pruning_way="B"))  # any will do
        delta = networks.scores(run, dense)
    except (OSError, ValueError):  # the records are what a figure needs; this one needs more
        return {}
    level = {name: scoring.levels(values, run.groups) for name, values in delta.items()}
    return {
        f"scores-{run.arch}": plots.scores(delta, network_name(run.arch)),
        f"levels-{run.arch}": plots.levels(level, network_name(run.arch)),
    }


def _by_layer(params: dict, layers: list[dict]) -> bool:
    """Whether the layers of a run say more than their rates, which most criteria meet."""
    entry = registry.criterion(params["pruning_way"])
    missed = any(row["pruned"] != row["nominal"] for row in layers)
    return entry.redundant_sets or (missed and not entry.whole_network)


def build(results_dir: str | Path = "results", dataset: str = "cifar10") -> list[Path]:
    """Draw every figure that the records allow into results_dir/figures/DATASET."""
    frame = records.frame(records.each(results_dir, dataset))
    figures, usual = {}, dataset != "digits"
    if dataset == "cifar10":
        for arch in ("resnet_56", "vgg_16_bn"):
            figures[f"accuracy_vs_cut-{arch}"] = accuracy_vs_cut(frame, arch)
        figures["published_vs_true"] = published_vs_true()
        figures |= _benchmarks(resolve(results_dir) / "bench")
    done = frame[frame["status"] == "done"] if not frame.empty else frame
    tuned = done[done["kind"] == "finetune"] if len(done) else done
    for arch in dict.fromkeys(tuned["arch"]) if len(tuned) else []:
        figures[f"criteria-{arch}"] = comparison.criteria(frame, arch, usual)
        figures[f"finding-{arch}"] = finding.draw(frame, arch, usual)
        figures[f"differences-{arch}"] = comparison.differences(frame, arch, usual)
        figures[f"lengths-{arch}"] = comparison.lengths(frame, arch, usual)
        chosen = _longest_compared(frame, arch, usual).get("runs", [])
        by_rates = frame.loc[sorted(i for runs in chosen for i in runs)]
        by_rates = by_rates.groupby("compress_rate", sort=False)
        for _, alike in by_rates:
            cut = int(100 * (1 - alike["macs"].min() / alike["macs_dense"].iloc[0]))
            names = [criterion_name(*selection.way_of(run)) for _, run in alike.iterrows()]
            title = f"{network_name(arch)}, −{cut} % of multiply-adds: fine-tuning under masks"
            figures[f"curves-{arch}" + (f"-{cut}" if len(by_rates) > 1 else "")] = curves(
                alike.assign(name=names), title
            )
    scored, drawn = set(), []
    for record in records.each(results_dir, dataset):
        if record["kind"] != "finetune":
            continue
        params, layers = record["params"], record["layers"]
        if params["arch"] not in scored:
            scored.add(params["arch"])
            figures |= _scores(params | {"results_dir": str(results_dir)})
        # runs that differ in who survives look the same
        if record["status"] == "done" and _by_layer(params, layers) and layers not in drawn:
            drawn.append(layers)
            figures[f"sparsity-{params['name']}"] = sparsity(layers, params["name"])
    folder = resolve(results_dir) / "figures" / registry.file_name(dataset)
    return [
        p for name, f in figures.items() if f for p in save(f, folder / registry.file_name(name))
    ]
