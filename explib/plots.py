"""Every figure of the study, in one style: plain data in, a matplotlib Figure out."""

import io
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from explib import records, tables
from explib.files import resolve, write_bytes
from explib.render import NAMES, WAY_NAMES

# Okabe and Ito's palette: told apart by colour-blind readers and in grey print
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK, GREY = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#8A8A8A",
)  # fmt: skip
PALE = "#D9D9D9"  # what was there before
WAY_COLOURS = {"A": BLUE, "B": RED, "random": GREY, "l1": GREEN, "bn": ORANGE, "filters": PINK}
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    "figure.facecolor": "white",
    "font.family": "sans-serif",
    "font.size": 10,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "savefig.dpi": 160,
    "svg.fonttype": "path",
    "svg.hashsalt": "explib",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A figure and its axes; closed at once, so that a notebook shows it where it is returned."""
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), **options)
    plt.close(figure)
    return figure, axes


def _style(draw):
    """Draw with the study's style."""

    def styled(*args, **options):
        with matplotlib.rc_context(STYLE):
            return draw(*args, **options)

    styled.__doc__, styled.__name__ = draw.__doc__, draw.__name__
    return styled


@_style
def linear_relation(delta_e, ratio, r2: float, title: str) -> Figure:
    """Measured E[output] / E[input] of each kernel against its δ_E, both of shape (n,)."""
    figure, axes = _figure(5.2, 4.4)
    x, y = np.asarray(delta_e), np.asarray(ratio)
    ends = np.array([min(x.min(), y.min()), max(x.max(), y.max())])
    axes.plot(ends, ends, color=GREY, linestyle="--", linewidth=1)
    size = np.clip(4000 / len(x), 3, 16)
    axes.scatter(x, y, s=size, color=BLUE, alpha=0.35, linewidths=0, rasterized=True)
    axes.set(
        xlabel="expectation scaling factor $\\delta_E$", ylabel="measured E[output] / E[input]"
    )
    axes.set_title(f"{title}: {len(x):,} kernels, R² = {r2:.3f}")
    return figure


@_style
def scores(delta_by_layer: dict) -> Figure:
    """Distribution of δ_E in each layer: median, middle half, and 1 to 99 per cent."""
    names = list(delta_by_layer)
    figure, axes = _figure(max(6.5, 0.16 * len(names) + 1.5), 4)
    marks = np.array(
        [np.percentile(np.asarray(v).ravel(), (1, 25, 50, 75, 99)) for v in delta_by_layer.values()]
    )
    place = np.arange(len(names))
    axes.vlines(place, marks[:, 0], marks[:, 4], color=SKY, linewidth=1.4, label="1 to 99 %")
    axes.vlines(place, marks[:, 1], marks[:, 3], color=BLUE, linewidth=4, label="middle half")
    axes.plot(place, marks[:, 2], "o", color="white", markersize=2.5, label="median",
              markeredgecolor=BLACK, markeredgewidth=0.6)  # fmt: skip
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set(ylabel="expectation scaling factor $\\delta_E$")
    axes.set_title("Scores by layer")
    axes.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1), fontsize=9)
    _layer_ticks(axes, names)
    return figure


@_style
def levels(levels_by_layer: dict) -> Figure:
    """Share of each layer's kernels in each level, as a heat map."""
    names = list(levels_by_layer)
    found = [np.asarray(v).ravel() for v in levels_by_layer.values()]
    low, high = min(v.min() for v in found), max(v.max() for v in found)
    share = np.array([np.bincount(v - low, minlength=high - low + 1) / len(v) for v in found])
    figure, axes = _figure(6.5, max(3.2, 0.13 * len(names) + 1.4))
    sns.heatmap(
        pd.DataFrame(100 * share, index=names, columns=range(low, high + 1)),
        ax=axes, cmap="Blues", vmin=0, cbar_kws={"label": "kernels of the layer, %", "pad": 0.02},
        linewidths=0.4, linecolor="white", yticklabels=_thinned(names, 40),
    )  # fmt: skip
    axes.set(xlabel="level")
    axes.set_title("Levels by layer")
    axes.tick_params(axis="y", labelsize=7, rotation=0)
    axes.tick_params(axis="x", rotation=0)
    return figure


@_style
def redundancy(table: pd.DataFrame) -> Figure:
    """Share of redundant kernels and number of levels per layer; see `pruners.redundancy_table`."""
    figure, (top, bottom) = _figure(max(6.5, 0.16 * len(table) + 1.5), 5, 2, sharex=True)
    place = np.arange(len(table))
    top.bar(place, table["redundant_pct"], color=BLUE, width=0.75)
    top.set(ylabel="kernels with a twin, %", ylim=(0, 104))
    top.set_title("Redundancy by layer")
    bottom.bar(place, table["levels"], color=ORANGE, width=0.75)
    bottom.set(ylabel="levels in use")
    _layer_ticks(bottom, list(table["layer"]))
    return figure


@_style
def sparsity(layers: list[dict], name: str = "") -> Figure:
    """Kernels pruned per layer (bars) and asked for (marks), in per cent; layers of a record."""
    figure, axes = _figure(max(6.5, 0.16 * len(layers) + 1.5), 3.8)
    place = np.arange(len(layers))
    achieved = [100 * row["pruned"] / row["kernels"] for row in layers]
    nominal = [100 * row["nominal"] / row["kernels"] for row in layers]
    axes.bar(place, achieved, color=SKY, width=0.75, label="achieved")
    axes.hlines(nominal, place - 0.45, place + 0.45, color=BLACK, linewidth=1.6, label="asked for")
    axes.set(ylabel="kernels pruned, %", ylim=(0, 104))
    axes.set_title(f"Sparsity by layer: {name}" if name else "Sparsity by layer")
    axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1), fontsize=9)
    _layer_ticks(axes, [row["name"] for row in layers])
    return figure


@_style
def macs(layers: list[dict]) -> Figure:
    """Multiply-adds per layer, dense and left, in millions; layers of a record."""
    figure, axes = _figure(max(6.5, 0.16 * len(layers) + 1.5), 3.8)
    place = np.arange(len(layers))
    dense = [row["macs_dense"] / 1e6 for row in layers]
    left = [row["macs"] / 1e6 for row in layers]
    axes.bar(place, dense, color=PALE, width=0.8, label="dense")
    axes.bar(place, left, color=GREEN, width=0.8, label="left")
    axes.set(ylabel="multiply-adds per image, millions")
    axes.set_title(f"Work by layer: {sum(left):.1f} M left of {sum(dense):.1f} M")
    axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1), fontsize=9)
    _layer_ticks(axes, [row["name"] for row in layers])
    return figure


@_style
def curves(frame: pd.DataFrame) -> Figure:
    """Top-1 by epoch, one line a run, and the dense start it came from; rows of records.frame."""
    figure, axes = _figure(6.5, 4)
    ends = []
    for i, (_, run) in enumerate(frame.iterrows()):
        colour = WAY_COLOURS.get(run["pruning_way"], BLUE) if run["kind"] == "finetune" else BLACK
        colour = colour if len(frame) <= 5 else sns.color_palette("colorblind")[i % 10]
        top1 = [entry["top1"] for entry in run["history"]]
        first = 1
        if run["kind"] == "finetune":
            top1, first = [run["before"], *top1], 0
        dashes = "-" if run["survivors"] == "random" else "--"
        axes.plot(
            range(first, first + len(top1)), top1, dashes, color=colour, marker="o", markersize=3
        )
        ends.append((top1[-1], first + len(top1) - 1, run["name"], colour))
    tuned = frame[frame["kind"] == "finetune"]
    for dense in sorted(set(tuned["dense"])):
        axes.axhline(dense, color=GREY, linestyle=":", linewidth=1.2)
    for dense in sorted(set(tuned["dense"]))[-1:]:
        axes.annotate(f"dense {dense:.2f}", (0, dense), xytext=(0, 3), color="#555555",
                      textcoords="offset points", fontsize=8.5)  # fmt: skip
    _direct_labels(axes, ends)
    axes.set(xlabel="epoch (0: pruned, not fine-tuned)" if len(tuned) else "epoch",
             ylabel="top-1, %")  # fmt: skip
    axes.set_title("Fine-tuning under masks" if len(tuned) else "Training")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


@_style
def accuracy_vs_cut(frame: pd.DataFrame, arch: str) -> Figure:
    """Top-1 against the cut of multiply-adds: measured, published and of other methods."""
    figure, axes = _figure(7, 5.6)
    published = tables.published()
    rows = published["rows"][published["rows"]["arch"] == arch]
    for way, marker in (("A", "s"), ("B", "D")):
        top1 = [cell[way] for cell in rows["top1_pct"]]
        axes.hlines(top1, rows["true_cut_pct"], rows["cut_pct"], color="#CCCCCC", linewidth=1)
        axes.plot(rows["cut_pct"], top1, marker, color=WAY_COLOURS[way], markerfacecolor="none",
                  markersize=6, alpha=0.6)  # fmt: skip
        axes.plot(rows["true_cut_pct"], top1, marker, color=WAY_COLOURS[way], markersize=6,
                  alpha=0.6, label=f"published, way {way} (hollow: as claimed)")  # fmt: skip
    others = published["others"][published["others"]["arch"] == arch]
    axes.plot(others["cut_pct"], others["top1_pct"], "x", color=GREY, markersize=6,
              label="other methods, as they claim")  # fmt: skip
    # names to the right of their crosses, of close ones around them in turn
    around = [((6, -3), "left"), ((-6, -7), "right"), ((0, 6), "center"), ((6, -3), "left")]
    for i, (_, other) in enumerate(others.sort_values("cut_pct").iterrows()):
        right = (others["cut_pct"] - other["cut_pct"]).between(0.01, 3)
        crowded = right & ((others["top1_pct"] - other["top1_pct"]).abs() < 0.2)
        offset, side = around[i % 4 if crowded.any() else 0]
        axes.annotate(other["name"], (other["cut_pct"], other["top1_pct"]), xytext=offset, ha=side,
                      textcoords="offset points", fontsize=8, color="#555555")  # fmt: skip
    runs = _best_of(frame, arch)
    shown = set()
    for _, run in runs[::-1].iterrows():
        key = (run["pruning_way"], run["survivors"] if run["pruning_way"] in "AB" else "")
        style = {"markerfacecolor": "white"} if key[1] == "l1" else {}
        axes.errorbar(
            100 * (1 - run["macs"] / run["macs_dense"]), run["last"],
            yerr=run["last_std"] if run["n"] > 1 else None, fmt="*", markersize=13, capsize=3,
            color=WAY_COLOURS[key[0]], markeredgewidth=1.3, **style,
            label=None if shown else "measured here (hollow: L1 survivors)",
        )  # fmt: skip
        if key not in shown:
            axes.annotate(
                f"{WAY_NAMES[key]} {run['last']:.2f}", (100 * (1 - run["macs"] / run["macs_dense"]),
                run["last"]), xytext=(11, -3), textcoords="offset points", fontsize=9,
                color=WAY_COLOURS[key[0]],
            )  # fmt: skip
        shown.add(key)
    axes.set(xlabel="multiply-adds removed, %", ylabel="top-1 on CIFAR-10's test set, %")
    axes.set_title(f"{NAMES[arch]}: accuracy against cut")
    axes.legend(fontsize=8.5, ncols=2, loc="upper left", bbox_to_anchor=(0, -0.14))
    axes.margins(x=0.09, y=0.08)
    return figure


@_style
def published_vs_true() -> Figure:
    """The published cut of every row against the true one."""
    rows = tables.published()["rows"].iloc[::-1]
    figure, axes = _figure(6.5, 4.6)
    place = np.arange(len(rows))
    axes.hlines(place, rows["true_cut_pct"], rows["cut_pct"], color="#BBBBBB", linewidth=2)
    axes.plot(rows["true_cut_pct"], place, "o", color=BLUE, label="true")
    axes.plot(rows["cut_pct"], place, "o", color=RED, markerfacecolor="white", label="published")
    for y, (_, row) in zip(place, rows.iterrows(), strict=True):
        axes.annotate(f"{row['true_cut_pct'] - row['cut_pct']:+.2f}", (row["true_cut_pct"], y),
                      xytext=(-6, 0), textcoords="offset points", ha="right", va="center",
                      fontsize=8.5, color="#333333")  # fmt: skip
    axes.set_yticks(
        place, [f"{NAMES[r['arch']]}, {r['cut_pct']:.1f} %" for _, r in rows.iterrows()]
    )
    axes.set(xlabel="FLOPs or multiply-adds removed, %")
    axes.set_title("Every published cut is overstated (difference in points)")
    axes.legend(ncols=2, loc="lower right", fontsize=9)
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    return figure


@_style
def criteria(frame: pd.DataFrame, arch: str, usual: bool = True) -> Figure | None:
    """Every way and criterion at one network's rates: mean of last epochs, interval over seeds."""
    runs = _best_of(frame, arch, usual)
    if len(runs) < 2:
        return None
    rates = list(dict.fromkeys(runs["compress_rate"]))
    figure, axes = _figure(6.8, 1.3 + 0.42 * len(runs))
    runs = runs.assign(cut=100 * (1 - runs["macs"] / runs["macs_dense"]))
    runs = runs.sort_values(["compress_rate", "last"], key=lambda c: c if c.name == "last" else
                            c.map(rates.index))  # fmt: skip
    labels = []
    for y, (_, run) in enumerate(runs.iterrows()):
        key = (run["pruning_way"], run["survivors"] if run["pruning_way"] in "AB" else "")
        axes.errorbar(run["last"], y, xerr=run["last_std"] if run["n"] > 1 else None, fmt="o",
                      color=WAY_COLOURS[key[0]], capsize=3)  # fmt: skip
        axes.annotate(f"{run['last']:.2f}", (run["last"], y), xytext=(0, 6), fontsize=8.5,
                      textcoords="offset points", ha="center")  # fmt: skip
        labels.append(
            f"{WAY_NAMES[key]}\n{run['epochs']} epochs, n={run['n']}, −{run['cut']:.1f} %"
        )
    for dense in sorted(set(runs["dense"].round(2))):
        axes.axvline(dense, color=GREY, linestyle=":", linewidth=1.2)
        axes.annotate(f"dense {dense:.2f}", (dense, -0.55), xytext=(-4, 0), ha="right",
                      textcoords="offset points", fontsize=8.5, color="#555555")  # fmt: skip
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="top-1 at the last epoch, %", ylim=(-0.7, len(labels) - 0.3))
    axes.set_title(f"{NAMES[arch]}: who should go, who should stay")
    axes.margins(x=0.12)
    return figure


def _best_of(frame: pd.DataFrame, arch: str, usual: bool = True) -> pd.DataFrame:
    """The group of runs that the tables choose for each way, criterion and rates of a network."""
    runs = tables.groups(frame, usual)
    if runs.empty:
        return runs
    runs = runs[runs["arch"] == arch]
    return runs.drop_duplicates(["pruning_way", "survivors", "compress_rate"])


def _thinned(names: list[str], most: int) -> list[str]:
    step = -(-len(names) // most)
    return [name if i % step == 0 else "" for i, name in enumerate(names)]


def _layer_ticks(axes, names: list[str]) -> None:
    """Layer names under the axis, as many as can be read."""
    shown = [(i, name) for i, name in enumerate(_thinned(names, 28)) if name]
    axes.set_xticks([i for i, _ in shown], [name for _, name in shown], rotation=90, fontsize=7.5)
    axes.set_xlim(-0.8, len(names) - 0.2)
    axes.grid(axis="x", visible=False)


def _direct_labels(axes, ends: list[tuple]) -> None:
    """Each line's name beside the longest one's end, names kept apart from each other."""
    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    gap, last = 0.05 * (high - low), -np.inf
    edge = max(x for _, x, _, _ in ends)
    for value, _, name, colour in sorted(ends):
        last = max(value, last + gap)
        axes.annotate(f"{name} {value:.2f}", (edge + 0.02 * (right - left), last), color=colour,
                      fontsize=8.5, va="center", annotation_clip=False)  # fmt: skip
    axes.set_ylim(low, max(high, last))


_SEE = {
    "published_vs_true": "every published cut (hollow) lies to the right of the true one.",
    "curves": "each line starts where pruning left the network; the dotted line is the network "
    "before pruning, and the distance to it at the right end is the price.",
    "criteria": "how far right each way and criterion ends, at the same rates; the dotted line is "
    "the network before pruning. Compare only rows with as many epochs.",
    "sparsity": "bars that end below their mark did not meet their rate.",
    "accuracy_vs_cut": "up and to the right is better. Stars were measured here; grey lines join "
    "a published cut as claimed (hollow) with the true one of the same row.",
}


def what_to_see(name: str) -> str:
    """A sentence on what a figure of `build` shows, by the name of its file."""
    return _SEE[name.split("-")[0]]


def save(figure: Figure, path: str | Path) -> list[Path]:
    """Write `path`.svg and `path`.png; equal figures give equal files."""
    written = []
    for kind in ("svg", "png"):
        stream = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            figure.savefig(stream, format=kind, metadata={"Date": None} if kind == "svg" else None)
        target = Path(path)
        written.append(write_bytes(target.with_name(f"{target.name}.{kind}"), stream.getvalue()))
    return written


def build(results_dir: str | Path = "results", dataset: str = "cifar10") -> list[Path]:
    """Draw every figure that the records allow into results_dir/figures/DATASET."""
    frame = records.frame(records.read_all(results_dir, dataset))
    figures = {}
    if dataset == "cifar10":
        for arch in ("resnet_56", "vgg_16_bn"):
            figures[f"accuracy_vs_cut-{arch}"] = accuracy_vs_cut(frame, arch)
        figures["published_vs_true"] = published_vs_true()
    tuned = frame
    if not frame.empty:  # what diverged is no result, in no figure
        tuned = frame[(frame["kind"] == "finetune") & (frame["status"] == "done")]
    for arch in dict.fromkeys(tuned["arch"]) if len(tuned) else []:
        runs = tuned[tuned["arch"] == arch]
        figures[f"criteria-{arch}"] = criteria(frame, arch, dataset == "cifar10")
        figures[f"curves-{arch}"] = curves(runs)
        for _, run in runs.drop_duplicates("name").iterrows():
            figures[f"sparsity-{run['name']}"] = sparsity(run["layers"], run["name"])
    folder = resolve(results_dir) / "figures" / dataset
    return [p for name, f in figures.items() if f for p in save(f, folder / name)]
