"""Choose and see: the interactive parts of notebooks 01 and 02.

Each call shows controls over a picture. The picture is also sent by itself, as what a reader
without a kernel gets: papermill's output, a page made from it, the repository's view of a notebook.
"""

import base64
import functools
import io
from collections.abc import Callable
from dataclasses import replace

import ipywidgets as widgets
import matplotlib
import numpy as np
import torch
from IPython.display import display
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from explib import registry
from explib.params import Params
from explib.pruning import counting
from explib.pruning import scores as scoring
from explib.registry import BLUE, GREY, SKY
from explib.report.names import network_name
from explib.report.plots import PALE, STYLE, in_style, new_figure
from explib.study import networks as study
from explib.study.networks import Dense


def scores(params: Params) -> None:
    """Choose a network, a conv and the number of level groups; see its scores and levels."""

    def draw(network, layer, groups):
        delta = study.scores(params, networks[network]())[layer]
        return layer_scores(delta, scoring.levels(delta, groups), f"{network}, {layer}")

    networks = _networks(params)
    most = max(40, params.groups)
    groups = widgets.IntSlider(params.groups, 1, most, description="groups")
    _show(draw, networks, {"groups": groups})


def masks(params: Params) -> None:
    """Choose a network, a conv, way, survivors, rate and seed; see who stays and what it saves."""

    def draw(network, layer, way, survivors, rate, seed):
        dense = networks[network]()
        chosen = params.replace(
            pruning_way=way, survivors=survivors, mask_seed=seed, compress_rate=f"[{rate}]",
            resume_mask="",
        )  # fmt: skip
        dense = replace(dense, rates=dict.fromkeys(dense.rates, rate))
        found = study.choose_masks(chosen, dense)
        delta = study.scores(chosen, dense)[layer]
        rows = counting.layer_table(dense.convs, found, dense.rates)
        level = scoring.levels(delta, params.groups)
        return layer_mask(delta, level, found[layer], rows, layer, network)

    networks = _networks(params)
    dense = networks[next(iter(networks))]()
    rate = np.clip(round(dense.rates[_first_layer(dense)], 2), 0, 0.9)
    ways = [name for name, entry in registry.CRITERIA.items() if not entry.whole_network]
    own = registry.criterion(params.pruning_way)
    way = "B" if own.whole_network else params.pruning_way
    ways += [way] if way not in ways else []
    controls = {
        "way": widgets.Dropdown(options=ways, value=way, description="way"),
        "survivors": widgets.Dropdown(
            options=list(registry.SURVIVORS), value=params.survivors, description="survivors"
        ),
        "rate": widgets.FloatSlider(float(rate), min=0, max=0.9, step=0.05, description="rate"),
        "seed": widgets.BoundedIntText(params.mask_seed, 0, 2**31 - 1, description="seed"),
    }
    _show(draw, networks, controls)


def _networks(params: Params) -> dict[str, Callable[[], Dense]]:
    """Every network by name, the configuration's own first; those not trained yet say so."""
    found: dict[str, Callable[[], Dense]] = {}
    for arch in dict.fromkeys([params.arch, *registry.NETWORKS]):
        own = arch == params.arch
        # another network has its own convs, and no checkpoint, masks or normalization of this one's
        others = {"resume": "", "resume_mask": "", "normalization": "", "compress_rate": "[0.5]"}
        wanted = params if own else params.replace(arch=arch, **others)
        trained = own or study.dense_path(wanted).is_file()
        load = functools.partial(study.load_dense if trained else study.fresh, wanted)
        found[network_name(arch) + ("" if trained else " (untrained)")] = functools.cache(load)
    return found


def _first_layer(dense: Dense) -> str:
    """The conv shown first: the middle one, since the first looks like no other."""
    return list(dense.rates)[len(dense.rates) // 2]


def _show(draw: Callable[..., Figure], networks: dict, controls: dict) -> None:
    """The controls over what `draw` makes of their values, drawn anew at every change."""
    network = widgets.Dropdown(options=list(networks), description="network")
    first = networks[network.value]()
    layer = widgets.Dropdown(
        options=list(first.rates), value=_first_layer(first), description="layer"
    )
    controls = {"network": network, "layer": layer, **controls}
    picture = widgets.Image(format="png", layout=widgets.Layout(max_width="100%", width="880px"))
    picture.layout.object_fit = "contain"

    def update(change=None):
        if change is not None and change["owner"] is network:
            dense = networks[network.value]()
            layer.unobserve(update, "value")
            layer.options = list(dense.rates)
            layer.value = _first_layer(dense)
            layer.observe(update, "value")
        picture.value = _png(draw(**{name: control.value for name, control in controls.items()}))

    for control in controls.values():
        control.observe(update, "value")
    update()
    row = widgets.Layout(flex_flow="row wrap")
    box = widgets.VBox([widgets.Box(list(controls.values()), layout=row), picture])
    still = {"image/png": base64.b64encode(picture.value).decode()}
    display({**box._repr_mimebundle_(), **still}, raw=True)


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


@in_style
def layer_scores(delta: torch.Tensor, level: torch.Tensor, title: str) -> Figure:
    """One conv: how its scores spread, and the level of every kernel; both (F, C)."""
    figure, (spread, levels) = new_figure(8, 3.6, columns=2)
    spread.hist(delta.flatten().numpy(), bins=60, color=BLUE)
    spread.axvline(0, color=GREY, linewidth=0.8)
    spread.set(xlabel="expectation scaling factor $\\delta_E$", ylabel="kernels")
    spread.set_title(title)
    _map(figure, levels, level, "level", "PuOr_r", level.abs().max())
    used = level.unique().numel()
    levels.set_title(f"{delta.numel():,} kernels in {used} levels")
    return figure


@in_style
def layer_mask(
    delta: torch.Tensor,
    level: torch.Tensor,
    keep: torch.Tensor,
    rows: list[dict],
    layer: str,
    network: str,
) -> Figure:
    """One conv under its mask: scores, levels and mask, each (F, C), and multiply-adds by `rows`.

    rows: of flops.layer_table, all convs of the network.
    """
    figure, ((scores, levels), (mask, work)) = new_figure(8, 6, 2, columns=2)
    _map(figure, scores, delta, "$\\delta_E$", "PuOr_r", delta.abs().max())
    scores.set_title(f"{network}, {layer}: scores")

    kinds, place = level.unique(return_inverse=True)
    every = torch.bincount(place.flatten(), minlength=len(kinds)).numpy()
    stay = torch.bincount(place[keep], minlength=len(kinds)).numpy()
    levels.bar(kinds.numpy(), every, color=PALE, width=0.85)
    levels.bar(kinds.numpy(), stay, color=BLUE, width=0.85)
    levels.set(xlabel="level", ylabel="kernels")
    levels.set_title("Levels: all (grey), left (blue)")
    levels.xaxis.get_major_locator().set_params(integer=True)

    mask.imshow(keep.numpy(), cmap=ListedColormap(["white", BLUE]), vmin=0, vmax=1, aspect="auto",
                interpolation="nearest")  # fmt: skip
    mask.set(xlabel="input channel", ylabel="filter")
    mask.set_title(f"Mask: {int(keep.sum()):,} of {keep.numel():,} kernels stay")
    mask.grid(visible=False)

    own = next(row for row in rows if row["name"] == layer)
    whole = {"macs": sum(r["macs"] for r in rows), "macs_dense": sum(r["macs_dense"] for r in rows)}
    for y, (name, row, colour) in enumerate([("this conv", own, SKY), ("all convs", whole, BLUE)]):
        left = 100 * row["macs"] / row["macs_dense"]
        work.barh(y, 100, color=PALE, height=0.55)
        work.barh(y, left, color=colour, height=0.55)
        millions = f"{row['macs'] / 1e6:.2f} of {row['macs_dense'] / 1e6:.2f} M"
        text = f"{name}: {millions}, −{100 - left:.1f} %"
        work.annotate(text, (0, y + 0.3), xytext=(4, 3), textcoords="offset points", fontsize=9)
    work.set(xlabel="multiply-adds left, %", yticks=[], ylim=(-0.5, 1.75), xlim=(0, 100))
    work.set_title("Work left")
    work.grid(axis="y", visible=False)
    return figure


def _map(figure, axes, values, label: str, colours: str, most) -> None:
    """An (F, C) picture with white at zero."""
    most = float(most) or 1.0
    image = axes.imshow(values.numpy(), cmap=colours, vmin=-most, vmax=most, aspect="auto",
                        interpolation="nearest")  # fmt: skip
    axes.set(xlabel="input channel", ylabel="filter")
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, label=label, pad=0.02)
