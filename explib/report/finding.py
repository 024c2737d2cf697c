"""The figure at the top of the README: what the score is worth beside chance and magnitude."""

import pandas as pd
from matplotlib.figure import Figure

from explib import registry
from explib.registry import GREY
from explib.report import selection
from explib.report.names import colour_of, criterion_name, network_name
from explib.report.plots import in_style, new_figure

PANEL = ["compress_rate", "trained"]
ROLES = {
    "A": {"random": "EXP as published, filter by filter", "l1": "EXP, the largest of a set stay"},
    "B": {"random": "EXP as published", "l1": "EXP, the largest of a set stay"},
    "random": {"": "chance"},
    "matched": {"": "chance, sizes as EXP's"},
    "l1": {"": "magnitude: the largest stay"},
    "global_l1": {"": "magnitude, all layers at once"},
    "taylor": {"": "least effect on the loss goes"},
    "filters": {"": "whole filters"},
}
"""What a criterion of the study is to a reader who knows none of their names."""


@in_style
def draw(frame: pd.DataFrame, arch: str, usual: bool = True) -> Figure | None:
    """EXP's score against chance and magnitude, after a short and a long fine-tuning.

    At the rates and the two lengths that most criteria were run for, at equal cuts.
    """
    runs = selection.compared(frame, usual)
    if runs.empty:
        return None
    sizes = runs[runs["arch"] == arch].groupby(PANEL).size()  # criteria
    sizes = sizes[sizes > 2].sort_values(ascending=False, kind="stable")
    several = [own for _, own in sizes.groupby("compress_rate") if len(own) > 1]
    if not several:
        return None
    chosen = max(several, key=lambda own: own.iloc[:2].sum()).index[:2]
    rates, (short, long) = chosen[0][0], sorted(trained for _, trained in chosen)
    runs = runs[(runs["compress_rate"] == rates) & runs["trained"].isin([short, long])]
    runs = runs[runs["arch"] == arch]
    runs = runs.assign(key=[selection.way_of(run) for _, run in runs.iterrows()])
    keys = sorted(set(runs["key"]), key=_place_of)
    figure, axes = new_figure(7, 1.3 + 0.42 * len(keys))
    for y, key in enumerate(keys):
        own = runs[runs["key"] == key].sort_values("trained")
        colour = colour_of(key[0])
        axes.plot(own["last"], [y] * len(own), color=colour, linewidth=1.5, alpha=0.35)
        for _, run in own.iterrows():
            size = 9 if run["trained"] == long else 5
            axes.errorbar(run["last"], y, xerr=run["last_std"] if run["n"] > 1 else None, fmt="o",
                          capsize=3, markersize=size, color=colour)  # fmt: skip
            text = f"{run['last']:.2f} (n={run['n']})"
            axes.annotate(text, (run["last"], y), xytext=(0, 6), textcoords="offset points",
                          fontsize=8.5, ha="center")  # fmt: skip
    dense = runs["dense"].iloc[0]
    axes.axvline(dense, color=GREY, linestyle=":", linewidth=1.2)
    axes.annotate(f"dense {dense:.2f}", (dense, -0.65), xytext=(-4, 0), ha="right",
                  textcoords="offset points", fontsize=8.5, color="#555555")  # fmt: skip
    cuts = 100 * (1 - runs["macs"] / runs["macs_dense"])
    names = [
        f"{ROLES.get(key[0], {}).get(key[1], '')}\n{criterion_name(*key)}".strip()
        + _other(cuts[runs["key"] == key].median(), cuts.median())
        for key in keys
    ]
    axes.set_yticks(range(len(keys)), names)
    places = {length: _machine(runs[runs["trained"] == length]) for length in (short, long)}
    axes.set(ylim=(-0.9, len(keys) - 0.3))
    axes.set_xlabel(
        "top-1 on CIFAR-10's test set, %; bars: standard deviation of n seeds\n"
        f"small: {places[short]}\nlarge: {places[long]}",
        fontsize=9,
    )
    axes.margins(x=0.11)
    axes.grid(axis="y", visible=False)
    axes.set_title(
        f"{network_name(arch)} without {cuts.median():.1f} % of its multiply-adds,\n"
        f"fine-tuned for {short:g} epochs (small) and for {long:g} (large)"
    )
    return figure


def _other(cut: float, usual: float) -> str:
    """A criterion's own cut, where it is another than the title's."""
    return f" (without {cut:.1f} %)" if abs(cut - usual) > 0.1 else ""


def _machine(runs: pd.DataFrame) -> str:
    """Where the runs of one length were computed, which is one place."""
    return f"{runs['hardware'].iloc[0]}, {runs['computed_in'].iloc[0]}"


def _place_of(key: tuple[str, str]) -> tuple:
    """Where a criterion stands in reports, from chance to structure; others last, by name."""
    known = registry.variants()
    return (known.index(key) if key in known else len(known), key)
