"""The study as one HTML page: `make report`, or `explib report [PAGE]`.

Findings first, then a section a question: figures, then tables, each number linked to its record.
Pictures and script are inside, nothing is fetched; links lead to the files of the results folder.
"""

import base64
import os
import re
from collections.abc import Callable
from html import escape
from importlib.resources import files
from pathlib import Path

import pandas as pd

from explib import registry
from explib.files import resolve, write_text
from explib.report import comparisons, conclusions, figures, markup, tables
from explib.report.names import network_name
from explib.study import records

TITLE = "EXP pruning: report"
PIXELS = 1.5  # a point of a figure's width
Link = Callable[[str | Path], str]
"""A file's path below the results folder in, its address from the page out; "" if not there."""

SECTIONS = {
    "Is the score worth anything?": (
        ("finding", "criteria", "differences", "lengths"),
        ("overview", "criteria", "elsewhere", "order"),
    ),
    "Accuracy after fine-tuning, beside the published": (
        ("accuracy_vs_cut", "curves"),
        ("reached", "as_published", "ours", "sensitivity", "baselines"),
    ),
    "Before fine-tuning": (("controls",), ("controls", "settings")),
    "FLOPs, recounted": (("published_vs_true",), ("flops",)),
    "Speed of pruned networks": (
        ("choices", "speed", "accuracy_vs_speed", "speed_vs_density"),
        ("alternatives", "inference", "speed", "shipped", "density", "exactness"),
    ),
    "Speed of training, and its recipe": (
        ("training", "sparse_training", "recipes"),
        ("training", "sparse_training", "processes", "recipes"),
    ),
    "Layer by layer": (("scores", "levels", "sparsity"), ()),
}  # fmt: skip
"""Each section's kinds of figures and tables; what is in none follows at the end."""
SHOWN = {
    "as_published": "network | way | published cut %~ | true cut % | published top-1 | last epoch"
    " | change~ | best epoch~ | dense~ | epochs",
    "criteria": "network | published cut % | epochs | criterion | last epoch"
    " | against random kernels~ | against B's norms~ | against L1 kernels~",
    "sensitivity": "network | way | changed | last epoch | usual setting | epochs~ | hardware~",
    "baselines": "network | name~ | last epoch | epochs | MACs M~ | weights M~ | hardware~",
    "controls": "network | criterion | lowest cut~ | middle cut~ | highest cut"
    " | there, statistics as they were~ | squared weights left %~ | seeds~",
    "flops": "network | published cut % | convention cut %~ | true cut % | MACs dense M~"
    " | MACs left M~ | weights left M~",
    "speed": "network | batch | MACs cut %~ | compiled fp32~ | compiled bf16 | engine fp32~"
    " | engine 16 bits | engine fp32 / compiled fp32~ | engine, best / compiled bf16 | hardware~",
    "settings": "network | published cut %~ | setting | B, random survivors | B, L1 survivors~"
    " | A, random survivors~ | A, L1 survivors~",
    "alternatives": "network | batch | torch.compile, dense~ | OpenVINO, dense"
    " | OpenVINO int8, dense~ | OpenVINO, filters~ | OpenVINO int8, filters~ | engine, pruned"
    " | engine int8, pruned~ | gain | gain over int8~",
    "inference": "network | batch | MACs cut %~ | compiled fp32~ | openvino fp32~ | openvino bf16"
    " | openvino int8~ | filters openvino bf16~ | engine fp32~ | engine bf16 | engine fp16~"
    " | engine int8~",
    "shipped": "network | MACs cut %~ | top-1 | compiled bf16~ | engine fp32 | engine bf16~"
    " | hardware~",
}
"""Columns of tables that would be wider than the page; ~: left out on a phone."""
SHOWN["ours"] = SHOWN["as_published"]
SHOWN["elsewhere"] = SHOWN["criteria"] + " | hardware~"
GIVEN = {
    *("network", "way", "criterion", "criteria", "name", "changed", "setting", "recipe", "task"),
    *("pruned", "published cut %", "published top-1", "usual setting", "epochs", "batch", "seeds"),
    *("computed in", "networks", "precision", "hardware", "density", "kernels pruned %"),
    *("processes", "MACs cut %", "survivors", "that is"),
}
"""Columns that say what was measured; all others are numbers that lead to their records."""
BENCH = {
    **dict.fromkeys(("training", "sparse_training"), "training-{machine}"),
    **dict.fromkeys(("speed", "shipped", "density"), "runtime-{machine}"),
    **dict.fromkeys(("alternatives", "inference"), "inference-{machine}"),
    **dict.fromkeys(("controls", "settings"), "controls-{arch}"),
    "exactness": "accuracy-{machine}",
    "processes": "processes",
    "recipes": "recipes",
}
"""The file below bench/ of a row of these tables."""


def build(
    results_dir: str | Path = "results", dataset: str = "cifar10", page: str | Path = ""
) -> Path:
    """Write a data set's records as one page, by default results_dir/report.html; returns its path.

    FileNotFoundError where there are no figures of it, ValueError where there is no record.
    """
    folder, name = resolve(results_dir), registry.file_name(dataset)
    page = Path(page or folder / "report.html")
    pictures = {path.stem: path for path in sorted((folder / "figures" / name).glob("*.svg"))}
    if not pictures:
        raise FileNotFoundError(f"{folder}/figures/{name}: no figures; `make tables` draws them")
    runs = list(records.each(results_dir, dataset))
    if not runs:
        raise ValueError(f"{folder}/records/{name}: no records; `make study` makes some")

    def link(path: str | Path) -> str:
        target = folder / path
        relative = os.path.relpath(target, page.absolute().parent)
        return Path(relative).as_posix() if target.is_file() else ""

    made = tables.make(results_dir, dataset, sources=True)
    first = _findings(made, pictures, link) if dataset == "cifar10" else _no_findings(dataset)
    sections = _sections(made, pictures, link, f"tables/{name}")
    sections["Where the numbers come from"] = _origins(runs, link)
    return write_text(page, _page(first, sections))


def _page(first: str, sections: dict[str, str]) -> str:
    """The whole page, its contents between the findings and the sections."""
    style, script = (
        (files("explib.report") / f"page.{kind}").read_text() for kind in ("css", "js")
    )
    contents = "".join(f'<li><a href="#{_id(title)}">{title}</a></li>' for title in sections)
    body = "".join(
        f'<section id="{_id(title)}"><h2>{title}</h2>{content}</section>\n'
        for title, content in sections.items()
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{TITLE}</title><style>{style}</style></head>\n<body><h1>{TITLE}</h1>\n{first}\n"
        f'<nav aria-label="Contents"><ol>{contents}</ol></nav>\n{body}'
        f"<script>{script}</script></body></html>\n"
    )


def _id(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title.lower()).strip("-")


def _findings(made: dict[str, pd.DataFrame], pictures: dict[str, Path], link: Link) -> str:
    """Verdict and answers; their figure is taken out of `pictures`, so that it is shown once."""
    rows = "".join(
        f"<dt>{escape(question)}</dt><dd>{escape(answer)}</dd>"
        for question, answer in conclusions.answers(made).items()
    )
    main = next((stem for stem in pictures if stem.startswith("finding-")), "")
    figure = _figure(path, link(path)) if (path := pictures.pop(main, None)) else ""
    return (
        f'<p class="verdict">{escape(conclusions.VERDICT)}</p>{figure}\n'
        f'<dl>{rows}</dl><p class="quiet">{escape(conclusions.NOTE)}</p>'
    )


def _no_findings(dataset: str) -> str:
    return (
        f'<p class="verdict">These are runs on {escape(dataset)}. They show that everything works; '
        "the study's findings are those on CIFAR-10, in the report of its records.</p>"
    )


def _sections(
    made: dict[str, pd.DataFrame], pictures: dict[str, Path], link: Link, whole: str
) -> dict[str, str]:
    """{title: HTML}, of the SECTIONS that have something in them; `whole`: the folder of tables."""
    rest = dict.fromkeys(made), dict.fromkeys(figures.kind_of(stem) for stem in pictures)
    listed = [{x for section in SECTIONS.values() for x in section[i]} for i in (1, 0)]
    others = [[x for x in rest[i] if x not in listed[i]] for i in (0, 1)]
    found = {}
    for title, (kinds, names) in {**SECTIONS, "More": (others[1], others[0])}.items():
        own = [s for kind in kinds for s in pictures if figures.kind_of(s) == kind]
        parts = [_figure(pictures[s], link(pictures[s])) for s in own]
        if title == "Layer by layer" and len(parts) > 2:
            more = f"<details><summary>{len(parts) - 2} more figures</summary>"
            parts = [*parts[:2], more, *parts[2:], "</details>"]
        parts += [_table(name, made, link, whole) for name in names if name in made]
        if parts:
            found[title] = "\n".join(parts)
    return found


def _figure(path: Path, address: str) -> str:
    """A figure inside the page, as SVG or PNG, whichever is smaller, and a line on what to see.

    Letters are as large in all figures: a picture is as wide as it was drawn, where the page is.
    """
    kinds = {path: "svg+xml", path.with_suffix(".png"): "png"}
    best = min((p for p in kinds if p.is_file()), key=lambda p: p.stat().st_size)
    data, seen = base64.b64encode(best.read_bytes()).decode(), figures.what_to_see(path.stem)
    drawn = re.search(r'<svg[^>]* width="([\d.]+)', path.read_text())
    width = f' width="{round(float(drawn[1]) * PIXELS)}"' if drawn else ""
    picture = f'<img alt="{escape(path.stem)}"{width} src="data:image/{kinds[best]};base64,{data}">'
    picture = f'<a href="{address}">{picture}</a>' if address else picture
    return f"<figure>{picture}<figcaption>What to see: {escape(seen)}</figcaption></figure>"


def _table(name: str, made: dict[str, pd.DataFrame], link: Link, whole: str) -> str:
    """A table with its caption, and links to all of its columns."""
    table = made[name]
    wanted = [c.strip() for c in SHOWN.get(name, "").split("|") if c.strip()] or list(table)
    wide = {column.removesuffix("~") for column in wanted if column.endswith("~")}
    wide |= {"hardware", "precision"}
    columns = [c for c in (w.removesuffix("~") for w in wanted) if c in table and c != "records"]
    columns = [c for c in columns if table[c].astype(bool).any()]  # none that is empty
    cells = _linked(name, table, columns, made, link)
    if "hardware" in columns:  # what is in brackets is in the whole table
        cells["hardware"] = [re.sub(r" \([^)]*\)", "", cell) for cell in cells["hardware"]]
    files_of = [(f"{whole}/{name}.html", "all columns"), (f"{whole}/{name}.csv", "CSV")]
    more = " · ".join(f'<a href="{link(f)}">{text}</a>' for f, text in files_of if link(f))
    return (
        f'<h3 id="{name}">{escape(tables.CAPTIONS[name])}</h3>'
        f"{markup.to_cells(table[columns], cells, wide)}"
        f'<p class="more">{more}</p>'
    )


def _linked(
    name: str, table: pd.DataFrame, columns: list[str], made: dict[str, pd.DataFrame], link: Link
) -> dict[str, list[str]]:
    """{column: its cells as HTML}: what was measured leads to its record, means to every seed's."""
    if name == "overview":
        sources = comparisons.overview(made["criteria"], "records")
    elif "records" in table:
        sources = pd.DataFrame(dict.fromkeys(columns, table["records"]))
    else:
        own = [[_bench_file(name, row)] for row in table.to_dict("records")]
        sources = pd.DataFrame(dict.fromkeys(columns, pd.Series(own, index=table.index)))
    means = columns[1:] if name == "overview" else ["last epoch", "mean difference"]
    return {
        column: [
            escape(cell) if column in GIVEN else _cell(cell, source, link, column in means)
            for cell, source in zip(table[column], sources[column], strict=True)
        ]
        for column in columns
    }


def _cell(text: str, paths: object, link: Link, each: bool) -> str:
    """A cell that leads to its record; a mean of several, with `each`, to every one by number."""
    found = (
        [address for path in paths if (address := link(path))] if isinstance(paths, list) else []
    )
    if not text or not found or (len(found) > 1 and not each):
        return escape(text)
    if len(found) == 1:
        return f'<a href="{found[0]}">{escape(text)}</a>'
    seeds = "".join(f'<a href="{a}">{i}</a>' for i, a in enumerate(found, 1))
    return f'{escape(text)}<small aria-label="records">{seeds}</small>'


def _bench_file(name: str, row: dict) -> str:
    """The record below bench/ that a row was read from; of the recount the published figures."""
    if name == "flops":
        return "../explib/study/published.yaml"
    arch = next((a for a in registry.NETWORKS if network_name(a) == row.get("network")), "")
    machine = records.machine(row.get("hardware", ""))
    return f"bench/{BENCH[name].format(arch=arch, machine=machine)}.json" if name in BENCH else ""


def _origins(runs: list[dict], link: Link) -> str:
    """One line a record: the code, the libraries, the machine and the data behind each run."""
    table = pd.DataFrame([records.origin(run) for run in runs]).astype(str)
    table = table.drop(columns="data (SHA-256)")
    cells = {column: [escape(cell) for cell in table[column]] for column in table}
    cells["run"] = [
        f'<a href="{link(records.place(run))}">{cell}</a>'
        for run, cell in zip(runs, cells["run"], strict=True)
    ]
    wide = {"commit", "torch", "hardware", "starts from", "precision"}
    return (
        "<p>One line a record: code (+ where it was changed after that commit), torch and machine. "
        "A record itself holds every parameter, all versions and the data's checksum.</p>"
        f"<details><summary>{len(runs)} records</summary>"
        f"{markup.to_cells(table, cells, wide)}</details>"
    )
