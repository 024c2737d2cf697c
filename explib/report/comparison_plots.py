"""Figures of criteria against each other: at equal cuts, epoch by epoch length, and differences."""

from math import inf

import pandas as pd
from matplotlib.figure import Figure

from explib.rates import parse_rates
from explib.registry import GREY
from explib.report import comparisons, selection
from explib.report.names import colour_of, criterion_name, network_name
from explib.report.plots import in_style, new_figure
from explib.study import published as published_figures

PUBLISHED_EPOCHS = 30  # after each conv
_SMALL = {"textcoords": "offset points", "fontsize": 8.5}


@in_style
def criteria(frame: pd.DataFrame, arch: str, usual: bool = True) -> Figure | None:
    """Every way and criterion at one network's rates: mean of last epochs, spread over seeds.

    A row for each of the rates, in it a panel for each number of epochs, the criteria by the last.
    """
    runs = _most_compared(frame, arch, usual, also=3)
    if len(runs) < 2:
        return None
    runs = runs.assign(
        cut=100 * (1 - runs["macs"] / runs["macs_dense"]),
        panel=[published_figures.named_rates(arch, rates) for rates in runs["compress_rate"]],
    )
    usually = runs.groupby("panel")["cut"].agg(lambda cuts: cuts.round(1).mode().iloc[0])
    runs["label"] = [
        name if round(cut, 1) == usually[rates] else f"{name} (−{cut:.1f} %)"
        for name, cut, rates in zip(_names(runs), runs["cut"], runs["panel"], strict=True)
    ]
    figure, panels = _panels(runs, "last", 0.33, sharex="row")
    for (rates, trained), (axes, places, alike) in panels.items():
        seeds = int(alike["n"].mode().iloc[0])
        for _, run in alike.iterrows():
            y, look = places[run["label"]], _look(run)
            axes.errorbar(run["last"], y, xerr=run["last_std"] if run["n"] > 1 else None, **look)
            if run["n"] > 1:
                axes.plot(list(run["by_seed"].values()), [y - 0.22] * run["n"], "|",
                          color=look["color"])  # fmt: skip
            text = f"{run['last']:.2f}" + ("" if run["n"] == seeds else f" (n={run['n']})")
            axes.annotate(text, (run["last"], y), xytext=(0, 5), ha="center", **_SMALL)
        _dense(axes, alike)
        cut = f"{usually[rates]:.1f} %"
        if rates.replace(".", "").isdigit():
            cut = f"{rates} % (truly {usually[rates]:.1f})"
        axes.set_title(f"{cut}: {_epochs(trained)}, {_seeds(seeds)}", fontsize=10)
        axes.margins(x=0.12)
    figure.suptitle(f"{network_name(arch)}: every criterion, by cut and fine-tuning", **_TITLE)
    figure.supxlabel("top-1 at the last epoch, %", fontsize=10)
    return figure


@in_style
def differences(frame: pd.DataFrame, arch: str, usual: bool = True) -> Figure | None:
    """Mean differences to the criteria without a score, with their 95 % intervals.

    A row for each of a network's rates and control, in it a panel for each number of epochs, of
    pairs of at least two seeds.
    """
    runs = selection.compared(frame, usual)
    if runs.empty:
        return None
    found = comparisons.differences(runs).dropna(subset="half")
    found = found.merge(runs.drop(columns="n"), left_on="run", right_index=True)
    found = found[found["arch"] == arch]
    if found.empty:
        return None
    rates = [published_figures.named_rates(arch, rates) for rates in found["compress_rate"]]
    controls = found["control"].map(comparisons.CONTROLS.index)
    found = found.assign(panel=list(zip(rates, controls, strict=True)), label=_names(found))
    figure, panels = _panels(found, "mean", 0.27, sharex=True)
    for ((cut, control), trained), (axes, places, alike) in panels.items():
        for _, row in alike.iterrows():
            y = places[row["label"]]
            axes.errorbar(row["mean"], y, xerr=row["half"], **_look(row))
            axes.annotate(f"n={row['n']}", (row["mean"] + row["half"], y), xytext=(5, 0),
                          va="center", **_SMALL | {"fontsize": 7.5}, color="#555555")  # fmt: skip
        axes.axvline(0, color=GREY, linestyle=":", linewidth=1.2)
        other = criterion_name(comparisons.CONTROLS[control])
        axes.set_title(f"{cut} %, {_epochs(trained)}: minus {other}", fontsize=10)
        axes.margins(x=0.12)
    figure.suptitle(f"{network_name(arch)}: what a criterion gains, 95 % intervals", **_TITLE)
    figure.supxlabel("difference in top-1 at the last epoch, points", fontsize=10)
    return figure


@in_style
def lengths(frame: pd.DataFrame, arch: str, usual: bool = True) -> Figure | None:
    """Top-1 at the end of longer and shorter fine-tunings, beside the published ones.

    A panel for each of a network's rates, with the criteria that were run at several lengths.
    """
    runs = selection.compared(frame, usual)
    if runs.empty:
        return None
    runs = runs[runs["arch"] == arch]
    several = runs.groupby(["compress_rate", "pruning_way", "survivors"])["trained"]
    runs = runs[several.transform("nunique") > 1]
    if runs.empty:
        return None
    panels = [alike.sort_values("trained") for _, alike in runs.groupby("compress_rate")]
    figure, every = new_figure(max(6, 3.1 * len(panels)), 4.4, 1, len(panels), squeeze=False)
    for axes, alike in zip(every[0], panels, strict=True):
        _lengths(axes, alike)
    every[0][0].set_ylabel("top-1, %")
    legend = {line.get_label(): line for axes in every[0] for line in axes.lines}
    legend = {text: legend[text] for text in sorted(legend) if not text.startswith("_")}
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=4, fontsize=8.5,
                  handlelength=3)  # fmt: skip
    figure.suptitle(f"{network_name(arch)}: what longer fine-tuning brings", **_TITLE)
    return figure


def _lengths(axes, runs: pd.DataFrame) -> None:
    """One panel of `lengths`: runs of one network at the same rates, the short ones first."""
    arch, rates = runs[["arch", "compress_rate"]].iloc[0]
    ticks = sorted(set(runs["trained"]))
    for _, own in runs.groupby(["pruning_way", "survivors"]):
        key = selection.way_of(own.iloc[0])
        line, *_ = axes.errorbar(
            own["trained"], own["last"], yerr=own["last_std"].fillna(0), marker="o",
            linestyle="--" if key[1] == "l1" else "-", capsize=3, markersize=5,
            color=colour_of(key[0]),
        )  # fmt: skip
        line.set_label(criterion_name(*key))  # in the legend without the bar
    rows = published_figures.published()["rows"]
    named = published_figures.named_rates(arch, rates)
    for _, row in rows[(rows["arch"] == arch) & (rows["cut_pct"].astype(str) == named)].iterrows():
        ticks.append(PUBLISHED_EPOCHS * len(parse_rates(rates)))
        for way, top1 in row["top1_pct"].items():
            axes.plot(ticks[-1], top1, "D", color=colour_of(way), markersize=6, alpha=0.6,
                      label=f"way {way}, published")  # fmt: skip
    for dense in sorted(set(runs["dense"].round(2))):
        axes.axhline(dense, color=GREY, linestyle=":", linewidth=1.2)
        axes.annotate(f"dense {dense:.2f}", (ticks[0], dense), xytext=(-3, 3),
                      color="#555555", **_SMALL)  # fmt: skip
    axes.margins(y=0.1)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="epochs of fine-tuning")
    published = len(ticks) > runs["trained"].nunique()
    axes.set_title(f"cut {named} %" if published else "", fontsize=10)


_TITLE = {"fontsize": 11, "fontweight": "bold", "x": 0.01, "ha": "left"}


def _panels(rows: pd.DataFrame, value: str, height: float, **shared) -> tuple[Figure, dict]:
    """A grid of panels whose lines are criteria, and {(panel, trained): (axes, places, rows)}.

    A row of the grid for each `panel`, in it a panel for each number of epochs, the few first. Its
    criteria, `label`, stand on the same lines, ordered by `value` after the most epochs. places:
    the line of each label. height: inches of a line.
    """
    orders, lengths = {}, {}
    for panel, own in rows.groupby("panel"):
        table = own.pivot_table(index="label", columns="trained", values=value)
        orders[panel] = list(table.sort_values(list(table)[::-1], na_position="first").index)
        lengths[panel] = list(table)
    columns, heights = max(map(len, lengths.values())), [len(o) + 0.6 for o in orders.values()]
    figure, grid = new_figure(
        6.8 if columns == 1 else 2.6 + 3.4 * columns,
        0.9 + height * sum(heights) + 0.5 * len(orders),
        len(orders), columns, sharey="row", squeeze=False, height_ratios=heights, **shared,
    )  # fmt: skip
    panels = {}
    for line, (panel, order) in zip(grid, orders.items(), strict=True):
        for spare in line[len(lengths[panel]) :]:
            spare.set_visible(False)
        for axes, trained in zip(line, lengths[panel], strict=False):
            own = rows[(rows["panel"] == panel) & (rows["trained"] == trained)]
            panels[panel, trained] = axes, {label: y for y, label in enumerate(order)}, own
            axes.set_yticks(range(len(order)), order)
            axes.set(ylim=(-0.8, len(order) - 0.3))
            axes.tick_params(labelbottom=True)
    return figure, panels


def _look(run: pd.Series) -> dict:
    """How a criterion's mark with its bar is drawn."""
    way, survivors = selection.way_of(run)
    hollow = {"markerfacecolor": "white"} if survivors == "l1" else {}
    return {"fmt": "o", "capsize": 3, "color": colour_of(way)} | hollow


def _names(runs: pd.DataFrame) -> list[str]:
    return [criterion_name(*selection.way_of(run)) for _, run in runs.iterrows()]


def _dense(axes, runs: pd.DataFrame) -> None:
    """A line at the accuracy of each network that runs started from."""
    for dense in sorted(set(runs["dense"].round(2))):
        axes.axvline(dense, color=GREY, linestyle=":", linewidth=1.2)
        axes.annotate(f"dense {dense:.2f}", (dense, -0.65), xytext=(-4, 0), ha="right",
                      color="#555555", **_SMALL)  # fmt: skip


def _epochs(count: float) -> str:
    return "1 epoch" if count == 1 else f"{count:g} epochs"


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def _most_compared(frame: pd.DataFrame, arch: str, usual: bool, also: float = inf) -> pd.DataFrame:
    """At each of a network's rates the groups of the epochs that most criteria were run for.

    And of others that at least `also` criteria were run for.
    """
    runs = selection.compared(frame, usual)
    if runs.empty:
        return runs
    runs = runs[runs["arch"] == arch].sort_values(["others", "trained"], ascending=False)
    chosen = runs.groupby("compress_rate")["trained"].transform("first")
    return runs[(runs["trained"] == chosen) | (runs["others"] >= also)]
