"""Figures of speed, in the study's style: measured rows in, a matplotlib Figure out."""

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from explib.registry import BLACK, BLUE, GREEN, GREY, ORANGE, RED, SKY
from explib.report.names import network_name
from explib.report.plots import HALO, in_style, new_figure
from explib.study.bench.inference import DENSE, ENGINE, crossover
from explib.study.records import hardware, machine

COLOURS = {
    "eager fp32": GREY,
    "compiled fp32": SKY,
    "compiled bf16": BLUE,
    "engine fp32": ORANGE,
    "engine bf16": RED,
    "engine fp16": GREEN,
    "engine int8": BLACK,
}
AGAINST = {
    "engine fp32": "compiled fp32",
    "engine bf16": "compiled bf16",
    "engine fp16": "compiled bf16",
    "engine int8": "compiled bf16",
}
WIDTHS = {
    "fp32": ("eager fp32", "compiled fp32", "engine fp32"),
    "16 bits": ("compiled bf16", "engine bf16", "engine fp16"),
    "8 bits": ("engine int8",),
}
KINDS = {"dense": "dense", "kernels": "kernels pruned", "filters": "whole filters pruned"}
MARKERS = {"dense": "s", "kernels": "o", "filters": "^"}
ARCH_COLOURS = (BLUE, RED, GREEN, ORANGE, SKY)


@in_style
def speeds(rows: list[dict]) -> Figure:
    """Images per second of whole networks, dense and in the engine; rows of bench.by_network."""
    columns = min(2, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure, grid = new_figure(4.4 * columns, 2.6 * lines, lines, columns, squeeze=False)
    names = [n for n in (*DENSE, *ENGINE) if any(n in row["images_per_s"] for row in rows)]
    for spare in grid.flat[len(rows) :]:
        spare.set_visible(False)
    for axes, row in zip(grid.flat, rows, strict=False):
        values = [row["images_per_s"].get(name, 0) for name in names]
        axes.barh(range(len(names)), values, color=[COLOURS[name] for name in names], height=0.7)
        for y, value in enumerate(values):
            axes.annotate(f"{value:,.0f}" if value else "—", (value, y), xytext=(3, 0),
                          va="center", fontsize=8.5, textcoords="offset points")  # fmt: skip
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="images per second", xlim=(0, 1.28 * max(values)))
        cut, batch = f"−{row['cut_pct']:.0f} %", f"batch {row['batch']}"
        axes.set_title(f"{network_name(row['arch'])}, {cut}, {batch}", fontsize=9.5)
        axes.grid(axis="y", visible=False)
        axes.locator_params(axis="x", nbins=4)
        axes.invert_yaxis()
    return figure


@in_style
def by_density(rows: list[dict], dense: dict[str, float], where: str = "") -> Figure:
    """Speed-up over dense torch against the density of kernels; rows of bench.by_density.

    dense: images per second by the names of bench.DENSE; of those, the compiled network of the
    same width of numbers is the one to beat, or the eager one where no other was measured. where:
    the machine, for the title.
    """
    figure, axes = new_figure(6.5, 4.2)
    density = np.array([row["density"] for row in rows])
    axes.plot(density, 1 / density, color=GREY, linestyle="--", linewidth=1.2, label="1 / density")
    axes.axhline(1, color="#444444", linewidth=0.8)
    for engine in ENGINE:
        against = AGAINST[engine] if AGAINST[engine] in dense else "eager fp32"
        if against not in dense or engine not in rows[0]["images_per_s"]:
            continue
        speed = np.array([row["images_per_s"][engine] for row in rows])
        even = crossover(rows, engine, dense[against])
        least = (speed / dense[against]).min()
        label = f"{engine} over {against}: " + (
            f"even at {even:.2f}" if even else f"at least {least:.1f}"
        )
        axes.plot(density, speed / dense[against], "-o", color=COLOURS[engine], markersize=4,
                  label=label)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="share of kernels that survive",
             ylabel="speed-up over dense torch")  # fmt: skip
    for axis, ticks in (
        (axes.xaxis, [0.1, 0.2, 0.3, 0.5, 0.7, 1]),
        (axes.yaxis, [0.5, 1, 2, 4, 8, 16]),
    ):
        axis.set_ticks(ticks)
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_title(_titled("What a lower density buys", where))
    axes.legend(fontsize=8.5)
    return figure


@in_style
def accuracy_vs_speed(rows: list[dict], where: str = "") -> Figure:
    """Top-1 against images per second of the project's networks; rows of bench.shipped.

    Of each network its fastest way in fp32, and in 16 bits (a dense one's in torch). Pale is what
    another one of its kind and architecture beats: more accurate and, but for 5 %, as fast, or as
    accurate and faster; the rest is named. where: the machine, for the title.
    """
    figure, axes = new_figure(7, 4.6)
    colours = dict(zip(dict.fromkeys(row["arch"] for row in rows), ARCH_COLOURS, strict=False))
    ways = {}
    for bits in WIDTHS:
        points = [(row, *fastest) for row in rows if (fastest := _fastest(row, bits))]
        for row, speed, how in points:
            beaten = _beaten(row, speed, points)
            look: dict[str, Any] = {
                "marker": MARKERS[row["kind"]],
                "markersize": 8,
                "linestyle": "",
            }
            if bits != "fp32":
                look["markerfacecolor"] = "white"
            ways[f"{KINDS[row['kind']]}: {how}"] = look
            pale = {"markersize": 5, "alpha": 0.3} if beaten else {}
            axes.plot(speed, row["top1"], color=colours[row["arch"]], **look | pale)
            if bits != "fp32" or beaten:  # the same network, named once
                continue
            name = row["name"].removeprefix(f"{row['arch']}-") if row["cut_pct"] else "dense"
            crowded = any(
                speed < fast < 1.4 * speed and abs(other["top1"] - row["top1"]) < 0.12
                for other, fast, _ in points
                if not _beaten(other, fast, points)
            )  # a mark stands where the name would, so it stands to the left
            axes.annotate(name, (speed, row["top1"]), xytext=(-7 if crowded else 7, 0), va="center",
                          ha="right" if crowded else "left", fontsize=7.5, color="#333333",
                          textcoords="offset points", zorder=1.9, path_effects=[HALO])  # fmt: skip
    handles: list[Any] = [
        Patch(color=colour, label=network_name(arch)) for arch, colour in colours.items()
    ]
    handles += [Line2D([], [], color="#555555", label=way, **look) for way, look in ways.items()]
    axes.set(xscale="log", xlabel="images per second, batch 128", ylabel="top-1 on CIFAR-10, %")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(_titled("Accuracy against measured speed", where))
    axes.legend(handles=handles, fontsize=8.5, ncols=2, loc="upper center",
                bbox_to_anchor=(0.5, -0.16))  # fmt: skip
    axes.margins(x=0.1, y=0.1)
    return figure


def _beaten(row: dict, speed: float, points: list[tuple]) -> bool:
    """Whether one of its kind and network is more accurate and, but for 5 %, as fast, or faster."""
    return any(
        (other["top1"], fast) > (row["top1"], speed) and fast > 0.95 * speed
        for other, fast, _ in points
        if (other["arch"], other["kind"]) == (row["arch"], row["kind"])
    )


def _fastest(row: dict, bits: str) -> tuple[float, str] | None:
    """The most images per second of a row of bench.shipped in one of WIDTHS, and what gave them.

    Of dense networks in torch.
    """
    names = [name for name in WIDTHS[bits] if row["kind"] != "dense" or name in DENSE]
    found = [(row["images_per_s"][name], name) for name in names if name in row["images_per_s"]]
    return max(found, default=None)


def _titled(title: str, where: str) -> str:
    return f"{title}, {where}" if where else title


def figures(record: dict) -> dict[str, Figure]:
    """The figures of a record of explib.study.bench.inference, by the names of their files."""
    dense, name = record["networks"][0]["images_per_s"], record["provenance"]["hardware"]["name"]
    figures = {
        "speed": speeds(record["networks"]),
        "speed_vs_density": by_density(record["density"], dense, hardware(name)),
        "accuracy_vs_speed": accuracy_vs_speed(record["shipped"], hardware(name)),
    }
    return {f"{title}-{machine(name)}": figure for title, figure in figures.items()}
