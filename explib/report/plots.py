"""Every figure of the study, in one style: plain data in, a matplotlib Figure out."""

import io
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from scipy.optimize import isotonic_regression

from explib.files import write_bytes
from explib.registry import BLACK, BLUE, GREEN, GREY, ORANGE, SKY
from explib.report.names import colour_of
from explib.study import records

PALE = "#D9D9D9"  # what was there before
HALO = withStroke(linewidth=3, foreground="white")  # of a label over lines
STYLE: Any = {
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


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A figure and its axes; closed at once, so that a notebook shows it where it is returned."""
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), **options)
    plt.close(figure)
    return figure, axes


def in_style(draw):
    """Draw with the study's style."""

    def styled(*args, **options):
        with matplotlib.rc_context(STYLE):
            return draw(*args, **options)

    styled.__doc__, styled.__name__ = draw.__doc__, draw.__name__
    return styled


@in_style
def linear_relation(delta_e, ratio, r2: float, title: str) -> Figure:
    """Measured E[output] / E[input] of each kernel against its δ_E, both of shape (n,)."""
    figure, axes = new_figure(5.2, 4.4)
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


@in_style
def scores(delta_by_layer: dict, name: str = "") -> Figure:
    """Distribution of δ_E in each layer: median, middle half, and 1 to 99 per cent."""
    names = list(delta_by_layer)
    figure, axes = new_figure(max(6.5, 0.16 * len(names) + 1.5), 4)
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
    spread = marks[:, 4] - marks[:, 0]
    if spread.max() > 30 * spread.min() > 0:  # a straight scale would show the widest layers only
        axes.set_yscale("symlog", linthresh=10 ** np.round(np.log10(spread.min())))
    axes.set_title(f"Scores by layer: {name}" if name else "Scores by layer")
    axes.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1), fontsize=9)
    _layer_ticks(axes, names)
    return figure


@in_style
def levels(levels_by_layer: dict, name: str = "") -> Figure:
    """Share of each layer's kernels in each level, as a heat map."""
    names = list(levels_by_layer)
    found = [np.asarray(v).ravel() for v in levels_by_layer.values()]
    low, high = min(v.min() for v in found), max(v.max() for v in found)
    share = np.array([np.bincount(v - low, minlength=high - low + 1) / len(v) for v in found])
    figure, axes = new_figure(6.5, max(3.2, 0.13 * len(names) + 1.4))
    sns.heatmap(
        pd.DataFrame(100 * share, index=names, columns=range(low, high + 1)),
        ax=axes, cmap="Blues", vmin=0, cbar_kws={"label": "kernels of the layer, %", "pad": 0.02},
        linewidths=0.4, linecolor="white", yticklabels=_thinned(names, 40),
    )  # fmt: skip
    axes.set(xlabel="level")
    axes.set_title(f"Levels by layer: {name}" if name else "Levels by layer")
    axes.tick_params(axis="y", labelsize=7, rotation=0)
    axes.tick_params(axis="x", rotation=0)
    return figure


@in_style
def redundancy(rows: list[dict]) -> Figure:
    """Share of redundant kernels and number of levels per layer, of `scores.redundancy`."""
    table = pd.DataFrame(rows)
    figure, (top, bottom) = new_figure(max(6.5, 0.16 * len(table) + 1.5), 5, 2, sharex=True)
    place = np.arange(len(table))
    top.bar(place, table["redundant_pct"], color=BLUE, width=0.75)
    top.set(ylabel="kernels with a twin, %", ylim=(0, 104))
    top.set_title("Redundancy by layer")
    bottom.bar(place, table["levels"], color=ORANGE, width=0.75)
    bottom.set(ylabel="levels in use")
    _layer_ticks(bottom, list(table["layer"]))
    return figure


@in_style
def sparsity(layers: list[dict], name: str = "") -> Figure:
    """Kernels pruned per layer (bars) and asked for (marks), in per cent; layers of a record."""
    figure, axes = new_figure(max(6.5, 0.16 * len(layers) + 1.5), 3.8)
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


@in_style
def macs(layers: list[dict]) -> Figure:
    """Multiply-adds per layer, dense and left, in millions; layers of a record."""
    figure, axes = new_figure(max(6.5, 0.16 * len(layers) + 1.5), 3.8)
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


@in_style
def curves(frame: pd.DataFrame, title: str = "") -> Figure:
    """Top-1 by epoch, and the dense start it came from; rows of records.frame.

    Each way and criterion has its colour, dashed with L1 survivors. Of runs of one name, which
    differ in their seed, the mean and, pale, from the lowest to the highest. From ten epochs on the
    last fifth stands beside the whole, on a scale of its own.
    """
    courses = [_course(run) for _, run in frame.iterrows()]
    longest = max(epochs[-1] for *_, epochs, _ in courses)
    late = longest >= 10
    figure, axes = new_figure(9.5 if late else 6.5, 4, columns=1 + late, squeeze=False)
    parts = axes[0]
    tuned = frame[frame["kind"] == "finetune"]
    ends = []
    for (name, dashes, colour, epochs), own in _together(courses).items():
        middle, low, high = np.mean(own, 0), np.min(own, 0), np.max(own, 0)
        for part in parts:
            part.fill_between(epochs, low, high, color=colour, alpha=0.18, linewidth=0)
            marker = "o" if len(epochs) < 30 else ""
            part.plot(epochs, middle, dashes, color=colour, marker=marker, markersize=3)
        ends.append((float(middle[-1]), epochs[-1], name, colour))
    if late:
        _zoom(parts[1], 0.8 * longest, longest)
    for part in parts:
        for dense in sorted(set(tuned["dense"])):
            part.axhline(dense, color=GREY, linestyle=":", linewidth=1.2)
        from_0 = len(tuned) and part is parts[0]
        part.set(xlabel="epoch (0: pruned, not fine-tuned)" if from_0 else "epoch",
                 ylabel="top-1, %")  # fmt: skip
        part.xaxis.get_major_locator().set_params(integer=True)
    for dense in sorted(set(tuned["dense"]))[-1:]:
        parts[0].annotate(f"dense {dense:.2f}", (0, dense), xytext=(0, 3), color="#555555",
                          textcoords="offset points", fontsize=8.5)  # fmt: skip
        for part in parts:
            low, high = part.get_ylim()
            part.set_ylim(low, max(high, dense + 0.06 * (high - low)))  # room for the label
    direct_labels(parts[-1], ends)
    parts[0].set_title(title or ("Fine-tuning under masks" if len(tuned) else "Training"))
    return figure


def _course(run: pd.Series) -> tuple:
    """(name, dashes, colour, epochs, top-1 after each) of a run."""
    tuned = run["kind"] == "finetune"
    epochs = records.epochs_of(run["history"])
    top1 = [entry["top1"] for entry in run["history"]]
    if tuned:
        top1, epochs = [run["before"], *top1], [0, *epochs]
    colour = colour_of(run["pruning_way"]) if tuned else BLACK
    return run["name"], "-" if run["survivors"] == "random" else "--", colour, epochs, top1


def _together(courses: list[tuple]) -> dict[tuple, list]:
    """The courses of runs of one name and equal epochs, by all that they have in common."""
    found: dict[tuple, list] = {}
    for name, dashes, colour, epochs, top1 in courses:
        found.setdefault((name, dashes, colour, tuple(epochs)), []).append(top1)
    return found


def _zoom(axes, first: float, last: float) -> None:
    """Show from `first` to `last`, as high as what is drawn there."""
    lines = [line.get_xydata() for line in axes.lines]
    shown = np.concatenate([line[line[:, 0] >= first] for line in lines])[:, 1]
    spare = 0.08 * max(np.ptp(shown), 0.5)
    axes.set(xlim=(first, last), ylim=(shown.min() - spare, shown.max() + spare))


def _thinned(names: list[str], most: int) -> list[str]:
    step = -(-len(names) // most)
    return [name if i % step == 0 else "" for i, name in enumerate(names)]


def _layer_ticks(axes, names: list[str]) -> None:
    """Layer names under the axis, as many as can be read."""
    shown = [(i, name) for i, name in enumerate(_thinned(names, 28)) if name]
    axes.set_xticks([i for i, _ in shown], [name for _, name in shown], rotation=90, fontsize=7.5)
    axes.set_xlim(-0.8, len(names) - 0.2)
    axes.grid(axis="x", visible=False)


def direct_labels(axes, ends: list[tuple]) -> None:
    """Each line's name beside the longest one's end, names kept apart from each other.

    ends: (y, x, name, colour) of each line. Thin lines join names with the ends of shorter ones.
    """
    low, high = axes.get_ylim()
    edge, ends = max(x for _, x, _, _ in ends), sorted(ends)
    places = apart([value for value, *_ in ends], 0.05 * (high - low), high - 0.02 * (high - low))
    for (value, x, name, colour), place in zip(ends, places, strict=True):
        if x < edge:
            axes.annotate("", (x, value), xytext=(edge, place), annotation_clip=False,
                          arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6,
                                      "alpha": 0.7, "shrinkA": 0, "shrinkB": 3})  # fmt: skip
        axes.annotate(f"{name} {value:.2f}", (edge, place), color=colour, fontsize=8.5,
                      xytext=(7, 0), textcoords="offset points", va="center",
                      annotation_clip=False, path_effects=[HALO])  # fmt: skip
    axes.set_ylim(low, high)


def apart(values: list[float], gap: float, high: float) -> list[float]:
    """Places of labels: nearest to their ascending values, `gap` apart, none above `high`."""
    steps = gap * np.arange(len(values))
    low = np.subtract(values, steps)  # nowhere falling is what gives each label its gap
    return list(np.minimum(isotonic_regression(low).x, high - steps[-1:].sum()) + steps)


def save(figure: Figure, path: str | Path) -> list[Path]:
    """Write `path`.svg and `path`.png; equal figures give equal files."""
    svg, png, path = io.BytesIO(), io.BytesIO(), Path(path)
    with matplotlib.rc_context(STYLE):
        # by the canvases themselves and the layout solved once: savefig draws each file twice
        figure.dpi = STYLE["savefig.dpi"]
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None})
        figure.set_layout_engine("none")
        figure.dpi = STYLE["savefig.dpi"]  # an SVG has 72
        FigureCanvasAgg(figure).print_png(png)
        figure.dpi = STYLE["figure.dpi"]
    return [
        write_bytes(path.with_name(f"{path.name}.{kind}"), stream.getvalue())
        for kind, stream in {"svg": svg, "png": png}.items()
    ]


def picture(path: str | Path, width: int = 680):
    """A PNG file as a notebook's output of at most `width` pixels and 64 colours: some 20 KB."""
    from IPython.display import Image
    from PIL import Image as pillow

    with pillow.open(path) as whole:
        height = round(whole.height * min(1, width / whole.width))
        small = whole.convert("RGB").resize(
            (min(width, whole.width), height), pillow.Resampling.LANCZOS
        )
    stream = io.BytesIO()
    colours = small.quantize(64, pillow.Quantize.FASTOCTREE, dither=pillow.Dither.NONE)
    colours.save(stream, "PNG", optimize=True)
    return Image(stream.getvalue(), format="png")
