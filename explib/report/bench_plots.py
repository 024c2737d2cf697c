"""Figures of the benchmarks: their records in, a matplotlib Figure out."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from explib import registry
from explib.registry import BLUE, GREY, ORANGE
from explib.report.names import colour_of, criterion_name, network_name
from explib.report.plots import HALO, in_style, new_figure
from explib.study.records import hardware


@in_style
def training_speed(record: dict) -> Figure:
    """Images/s of the plain loop and ours, one group a network and task; of a training record."""
    rows = [row for row in record["rows"] if row["images_per_s"] and row.get("task")]
    speed = {(r["network"], r["task"], r["loop"]): r["images_per_s"] for r in rows}
    groups = list(dict.fromkeys((r["network"], r["task"]) for r in rows if r["loop"] == "plain"))
    figure, axes = new_figure(6.8, 0.9 + 0.75 * len(groups))
    for y, group in enumerate(groups):
        plain, ours = speed[*group, "plain"], speed[*group, "ours"]
        axes.barh(y - 0.19, plain, height=0.36, color=GREY)
        axes.barh(y + 0.19, ours, height=0.36, color=BLUE)
        axes.annotate(f" plain loop {plain:,.0f}", (plain, y - 0.19), va="center", fontsize=9)
        text = f" ours {ours:,.0f}, {ours / plain:.1f} times"
        axes.annotate(text, (ours, y + 0.19), va="center", fontsize=9)
    axes.set_yticks(range(len(groups)), [f"{network_name(arch)}\n{task}" for arch, task in groups])
    axes.invert_yaxis()
    axes.margins(x=0.28)
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="images/s")
    axes.set_title(f"On {record['provenance']['hardware']['name']}")
    return figure


SPENT = {
    "dense, OpenVINO": ("openvino", "dense", GREY, "s"),
    "whole filters pruned, OpenVINO": ("filters openvino", "filters pruned", BLUE, "^"),
    "kernels pruned, engine": ("engine", "kernels pruned", ORANGE, "o"),
}
"""Of a network's shapes: how the names of its ways begin, that of its top-1, colour and marker."""


_BESIDE = {"fp32": ((0, 6), "right"), "16 bits": ((0, 6), "center"), "int8": ((6, -3), "left")}
"""Where a point's name stands, so that near ones do not meet."""


@in_style
def choices(record: dict) -> Figure | None:
    """Top-1 against images/s of every way to spend accuracy on speed; of an inference record.

    Of networks whose top-1 is known. In 16 bits, where it was not measured, it is drawn as in fp32.
    """
    rows = [row for row in record["networks"] if "dense" in record["made"][row["arch"]]["top1"]]
    batches = sorted({row["batch"] for row in rows}, reverse=True)
    batches = [batch for batch in batches if batch in (batches[0], batches[-1])]
    archs = list(dict.fromkeys(row["arch"] for row in rows))
    if not rows:
        return None
    figure, grid = plt.subplots(
        len(archs), len(batches), figsize=(7.2, 2.9 * len(archs)), squeeze=False, sharey="row"
    )
    plt.close(figure)
    for row in (row for row in rows if row["batch"] in batches):
        axes = grid[archs.index(row["arch"])][batches.index(row["batch"])]
        for label, (begins, of, colour, marker) in SPENT.items():
            points = _spent(row, record["made"][row["arch"]]["top1"], begins, of)
            axes.plot([x for x, _, _ in points], [y for _, y, _ in points], f"-{marker}",
                      color=colour, label=label, markersize=6)  # fmt: skip
            for x, y, bits in points:
                offset, side = _BESIDE[bits]
                axes.annotate(bits, (x, y), xytext=offset, textcoords="offset points", ha=side,
                              fontsize=8, path_effects=[HALO])  # fmt: skip
        axes.set_title(f"{row['label']}, batch {row['batch']}")
        axes.margins(x=0.16, y=0.25)
        axes.set_xlim(0)
    for axes in grid[-1]:
        axes.set_xlabel("images per second")
    for axes in grid[:, 0]:
        axes.set_ylabel("top-1, %")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8.5)
    return figure


def _spent(row: dict, top1: dict, begins: str, of: str) -> list[tuple[float, float, str]]:
    """Images/s, top-1 and bits of one shape of a network, in fp32, 16 and 8 bits."""
    speeds, points = row["images_per_s"], []
    for bits, names in (("fp32", ("fp32",)), ("16 bits", ("bf16", "fp16")), ("int8", ("int8",))):
        found = [speeds[f"{begins} {name}"] for name in names if f"{begins} {name}" in speeds]
        accuracy = top1.get(f"{begins} int8" if bits == "int8" else of)
        if found and accuracy is not None and of in top1:
            points.append((max(found), accuracy, bits))
    return points


@in_style
def sparse_training(record: dict) -> Figure | None:
    """Images/s forward and backward against kernels pruned, all of them multiplied or the rest."""
    rows = record.get("by_sparsity")
    if not rows:
        return None
    figure, axes = new_figure(6.8, 4.2)
    for arch, marker in (("resnet_56", "o"), ("vgg_16_bn", "s")):
        own = [row for row in rows if row["network"] == arch]
        x = [row["pruned_pct"] for row in own]
        for way, colour in (("all_kernels", GREY), ("surviving_kernels", ORANGE)):
            axes.plot(x, [row[way] for row in own], f"{marker}-", color=colour, markersize=5,
                      label=f"{network_name(arch)}, {way.replace('_', ' ')}")  # fmt: skip
        for row in own:
            text = f"{row['surviving_kernels'] / row['all_kernels']:.1f}×"
            axes.annotate(text, (row["pruned_pct"], row["surviving_kernels"]), fontsize=8.5,
                          xytext=(0, 6), textcoords="offset points", ha="center",
                          path_effects=[HALO])  # fmt: skip
    axes.set(xlabel="kernels pruned, %", ylabel="images per second, forward and backward")
    axes.set_ylim(0)
    axes.margins(y=0.12)
    axes.set_title(f"Training, {hardware(record['provenance']['hardware']['name'])}")
    axes.legend(fontsize=8.5, loc="best")
    return figure


@in_style
def recipes(record: dict) -> Figure:
    """Validation top-1 of every recipe after the same epochs, sorted; of the record of recipes."""
    rows = sorted(record["rows"], key=lambda row: row["last"])
    figure, axes = new_figure(6.8, 1.0 + 0.3 * len(rows))
    for y, row in enumerate(rows):
        ours = row["recipe"].startswith("ours")
        axes.plot(row["last"], y, "o", color=ORANGE if ours else BLUE)
        axes.annotate(f"{row['last']:.2f}", (row["last"], y), xytext=(7, 0), va="center",
                      textcoords="offset points", fontsize=8.5)  # fmt: skip
    axes.set_yticks(range(len(rows)), [row["recipe"] for row in rows])
    axes.set(xlabel=f"top-1 on {record['pruned']['validation']:,} validation images, %")
    axes.margins(x=0.1)
    axes.set_title(f"{record['pruned']['epochs']} epochs under masks, by recipe")
    return figure


@in_style
def controls(record: dict) -> Figure:
    """Top-1 before fine-tuning against the squared weights left, by criterion and published cut."""
    usual = [row for row in record["rows"] if not row["changed"]]
    figure, axes = new_figure(7, 4.8)
    measured = dict.fromkeys((r["pruning_way"], r["survivors"]) for r in usual)
    for key in dict.fromkeys([*registry.variants(), *measured]):
        rows = [r for r in usual if (r["pruning_way"], r["survivors"]) == key]
        if not rows:
            continue
        rows = sorted(rows, key=lambda row: row["norm_kept_pct"])
        x = [row["norm_kept_pct"] for row in rows]
        y = [sum(row["top1"]) / len(row["top1"]) for row in rows]
        hollow = {"markerfacecolor": "white"} if key[1] == "l1" else {}
        axes.plot(x, y, "o-", color=colour_of(key[0]), linewidth=1, **hollow,
                  label=criterion_name(*key))  # fmt: skip
    axes.set(xlabel="squared weights left, %, mean over convs",
             ylabel="top-1 before fine-tuning, %")  # fmt: skip
    axes.set_title(f"{network_name(usual[0]['arch'])}: top-1 against the magnitude that survives")
    axes.legend(fontsize=8.5, loc="best")
    return figure
