"""Records in, tables out: nothing is typed by hand. `selection` chooses the runs."""

import re
from pathlib import Path
from typing import Any

import pandas as pd

from explib import registry
from explib.files import resolve, write_text
from explib.rates import parse_rates
from explib.report import bench_tables as bench
from explib.report import comparisons, inference_tables, selection, speed_tables
from explib.report.markup import fill, to_html, to_markdown
from explib.report.names import NOT_MEASURED, criterion_name, network_name
from explib.study import published, records
from explib.study.records import hardware

CAPTIONS = {
    "as_published": "Ways A and B with random survivors, as published",
    "ours": "Ways A and B with the survivors of largest L1 norm",
    "reached": "How many rows reach their published accuracy, at the last epoch",
    "overview": "Criteria at a glance: top-1 at the last epoch, of one seed where no n is given",
    "criteria": "Criteria at the same rates; differences ± half their 95 % interval, p by Holm",
    "elsewhere": "The same criteria on other machines, where several seeds were run",
    "order": "Rank correlation of top-1 before and after fine-tuning, over the criteria",
    "sensitivity": "Other settings, schedules and mask seeds, after fine-tuning",
    "baselines": "Dense networks",
    "flops": "Published cuts, recounted",
    "controls": "Every criterion before fine-tuning",
    "recipes": "Recipes of fine-tuning, on a validation split",
    "settings": "Other settings of way B before fine-tuning",
    "training": "Training and evaluation, the plain loop and ours",
    "sparse_training": "One batch forward and backward, over all kernels and the surviving ones",
    "processes": "One run in several processes",
    "alternatives": "Images per second, at the fastest precision each",
    "shipped": "The shipped networks: top-1 and images per second, batch 128",
    "density": "ResNet-56 in the engine, by the share of kernels that survive",
    "inference": "Images per second, the engine beside what one would use instead",
    "speed": "Images per second, dense in torch and in the engine",
    "exactness": "The engine's answers beside torch's, over the shipped networks",
}
COLUMNS = ["network", "way", "published cut %", "cut by its convention %", "true cut %"]
COLUMNS += ["kernels pruned %", "weights M", "published top-1", "dense", "last epoch"]
COLUMNS += ["best epoch", "before fine-tuning", "change", "epochs", "hours", "precision"]
COLUMNS += ["hardware", "records"]
ALWAYS = ("vgg_16_bn", "resnet_56")
"""Networks whose rows are in the tables even before they are measured."""
_RATES = ["arch", "compress_rate"]


def accuracy(frame: pd.DataFrame, dataset: str, survivors: str, usual: bool = True) -> pd.DataFrame:
    """The accuracy table of one kind of survivors: the published rows with what was measured.

    On CIFAR-10 every published row of VGG-16 and ResNet-56 is there, measured or not: its longest
    run, and where those of several dense networks are as long, one for each. Runs at rates that
    nobody published follow, each at its longest; where nothing was published, one row for each
    network and way. Cuts in per cent of multiply-adds, top-1 in per cent.
    """
    runs = selection.groups(frame, usual)
    if not runs.empty:
        runs = runs[runs["pruning_way"].isin(["A", "B"]) & (runs["survivors"] == survivors)]
    rows = published.published()["rows"]
    rows = rows[rows["dataset"] == dataset]
    if rows.empty:
        runs = runs.drop_duplicates(["arch", "pruning_way"]) if not runs.empty else runs
        lines = [_line(run, None) for _, run in runs.iterrows()]
        return _ordered(lines).sort_values(["network", "way"]) if lines else pd.DataFrame()
    lines, measured = [], {}
    for _, run in runs.iterrows():
        rates = tuple(parse_rates(run["compress_rate"]))
        starts = measured.setdefault((run["arch"], run["pruning_way"], rates), {})
        if all(longer["trained"] <= run["trained"] for longer in starts.values()):
            starts.setdefault(run["start"], run)
    for _, row in rows.iterrows():
        for way in "AB":
            key = row["arch"], way, tuple(parse_rates(row["compress_rate"]))
            unmeasured = [None] if row["arch"] in ALWAYS else []
            of_row = measured.pop(key, {}).values() or unmeasured
            lines += [_line(run, row, way) for run in of_row]
    others = [run for starts in measured.values() for run in starts.values()]
    return _ordered(lines + [_line(run, None) for run in others])


def reached(kinds: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """How many measured rows of `accuracy` reach what was published, a line a kind of survivors."""
    lines = []
    for survivors, table in kinds.items():
        known = table.get("published top-1", pd.Series(dtype=str)).notna()
        rows = table[known & (table["last epoch"] != NOT_MEASURED)] if known.any() else table[:0]
        if rows.empty:
            continue
        last = rows["last epoch"].str.split().str[0].astype(float)
        off = (last - rows["published top-1"].astype(float)).round(2)
        worst = rows.loc[off.idxmin()]
        lines.append(
            {
                "survivors": survivors,
                "rows": str(len(rows)),
                "at or above": str(int((off >= 0).sum())),
                "less than 0.1 below": str(int(((off < 0) & (off > -0.1)).sum())),
                "mean difference": f"{off.mean():+.2f}",
                "furthest below": f"{off.min():+.2f}",
                "that is": f"{worst['network']}, {worst['way']}, {worst['published cut %']} %",
                "records": [path for own in rows["records"] for path in own],
            }
        )
    return pd.DataFrame(lines)


def _ordered(lines: list[dict]) -> pd.DataFrame:
    table = pd.DataFrame(lines)
    return table[[column for column in COLUMNS if column in table]]


def _line(run: Any, row: Any, way: str = "") -> dict:
    """One line of the accuracy table: a run and a published row, each a pd.Series or None."""
    line = {
        "network": network_name((run if row is None else row)["arch"]),
        "way": way or run["pruning_way"],
    }
    if row is not None:
        line["published cut %"] = f"{row['cut_pct']:.1f}"
    if run is None:
        line |= {
            "true cut %": "",
            "weights M": "",
            "published top-1": f"{row['top1_pct'][way]:.2f}",
        }
        return line | {"last epoch": NOT_MEASURED}
    if row is not None:
        line["cut by its convention %"] = f"{_cut(run['published_m'], run['macs_dense'] / 1e6):.2f}"
    line["true cut %"] = f"{_cut(run['macs'], run['macs_dense']):.2f}"
    line["weights M"] = f"{run['weights'] / 1e6:.3f}"
    if row is not None:
        line["published top-1"] = f"{row['top1_pct'][line['way']]:.2f}"
    short = run["nominal_sparsity"] - run["sparsity"] > 5e-5
    return line | {
        "dense": f"{run['dense']:.2f}",
        "last epoch": _spread(run),
        "best epoch": f"{run['best']:.2f}",
        "before fine-tuning": _before(run),
        "change": f"{run['last'] - run['dense']:+.2f}",
        "epochs": f"{run['trained']:g}",
        "hours": _hours(run["wall_s"]),
        "kernels pruned %": f"{100 * run['sparsity']:.2f}"
        + (f" of {100 * run['nominal_sparsity']:.2f}" if short else ""),
        "precision": run["computed_in"],
        "hardware": hardware(run["hardware"]),
        "records": run["records"],
    }


def _hours(seconds: float) -> str:
    """Nothing where they are not known; of a few minutes two digits, which are not 0.0."""
    hours = seconds / 3600
    return "" if not hours >= 0 else f"{hours:.2f}" if hours < 0.1 else f"{hours:.1f}"


def _spread(run: pd.Series) -> str:
    """Mean ± standard deviation of the last epochs of a group, and its number of seeds."""
    spread = f" ± {run['last_std']:.2f}" if run["n"] > 1 else ""
    return f"{run['last']:.2f}{spread} (n={run['n']})"


def _before(run: pd.Series) -> str:
    """Top-1 before fine-tuning; conv by conv it would be that of one conv's mask."""
    return f"{run['before']:.2f}" if run["schedule"] == "oneshot" else ""


def _cut(left: float, dense: float) -> float:
    return 100 * (1 - left / dense)


def criteria(frame: pd.DataFrame, usual: bool = True, elsewhere: bool = False) -> pd.DataFrame:
    """All ways and criteria side by side where one of comparison was run at the same rates.

    By network, rates and epochs, the best one first. Differences to the criteria that know no
    score are means over the seeds both sides have, with their 95 % interval and a t-test (see
    `comparisons.differences`), whose p values are Holm's for all tests of the table. elsewhere: of
    other environments than the one shown, as far as they have several seeds.
    """
    runs = selection.compared(frame, usual, elsewhere)
    runs = runs[runs["n"] > 1] if elsewhere and len(runs) else runs
    if runs.empty:
        return runs
    runs = runs.assign(rates=[published.named_rates(*pair) for pair in runs[_RATES].values])
    controlled = runs.assign(control=~runs["pruning_way"].isin(["A", "B"]))
    together = [*_RATES, "trained", *selection.ENVIRONMENT]
    runs = runs[controlled.groupby(together, dropna=False)["control"].transform("any")]
    runs = runs.sort_values(
        ["arch", "rates", "trained", "last"], ascending=[True, True, False, False]
    )
    against = comparisons.differences(runs)
    lines = []
    for index, run in runs.iterrows():
        line = _line(run, None)
        first = {
            "network": line["network"],
            "published cut %": run["rates"],
            "epochs": line["epochs"],
            "criterion": criterion_name(*selection.way_of(run)),
            "last epoch": line["last epoch"],
            "against random kernels": comparisons.cell(against, index, "random"),
            "against B's norms": comparisons.cell(against, index, "matched"),
            "against L1 kernels": comparisons.cell(against, index, "l1"),
        }
        lines.append(
            first | {k: line[k] for k in COLUMNS if k in line and k not in (*first, "way")}
        )
    return pd.DataFrame(lines)


def sensitivity(frame: pd.DataFrame) -> pd.DataFrame:
    """What one setting changes: runs of ways A and B with another one than the study's usual.

    Each beside the usual runs that are equal otherwise, after as many epochs, where there are any.
    """
    whole = selection.finished(frame, "finetune")
    runs, reference = selection.groups(whole, usual=False), selection.groups(frame)
    if runs.empty:
        return runs
    lines = []
    for _, run in runs[runs["pruning_way"].isin(["A", "B"])].iterrows():
        if not (changed := _changes(run)):
            continue
        same = ["arch", "start", "compress_rate", "pruning_way", "survivors", "trained"]
        same += selection.ENVIRONMENT
        equal: Any = reference[(reference[same] == run[same]).all(axis=1)] if len(reference) else []
        equal = (
            [other for _, other in equal.iterrows() if not _changes(other)] if len(equal) else []
        )
        if equal:
            changed += [
                f"{name} {run[name]}" for name in selection.RECIPE if run[name] != equal[0][name]
            ]
        lines.append(
            {
                "network": network_name(run["arch"]),
                "published cut %": published.named_rates(*run[_RATES]),
                "way": criterion_name(*selection.way_of(run)),
                "changed": ", ".join(changed),
                "last epoch": _spread(run),
                "usual setting": _spread(equal[0]) if equal else "",
                "before fine-tuning": _before(run),
                "epochs": f"{run['trained']:g}",
                "precision": run["computed_in"],
                "hardware": hardware(run["hardware"]),
                "records": run["records"],
            }
        )
    return pd.DataFrame(lines)


def _changes(run: pd.Series) -> list[str]:
    """The settings of a run that are not the usual ones, as `name value`."""
    changed = []
    for field, usual in {**selection.SETTINGS, "schedule": "oneshot"}.items():
        value = None if pd.isna(run[field]) else run[field]
        if value != usual:
            changed.append(f"{field} {value}")
    if run["mask_seed"] != run["seed"]:
        changed.append("mask_seed varied")
    return changed


def baselines(frame: pd.DataFrame, usual: bool = True) -> pd.DataFrame:
    """The dense networks: top-1 at the last and best epoch in per cent, MACs and weights in M."""
    lines = [
        {
            "network": network_name(run["arch"]),
            "name": run["name"],
            "last epoch": f"{run['last']:.2f}",
            "best epoch": f"{run['best']:.2f}",
            "epochs": f"{run['trained']:g}" if run["history"] else "none, loaded",
            "MACs M": f"{run['macs_dense'] / 1e6:.2f}",
            "weights M": f"{run['weights_dense'] / 1e6:.3f}",
            "hardware": hardware(run["hardware"]),
            "records": [run["record"]],
        }
        for _, run in selection.finished(frame, "baseline", usual).iterrows()
    ]
    return pd.DataFrame(lines)


def recount() -> pd.DataFrame:
    """The published configurations counted both ways; see `flops.published_rows`."""
    table = published.recounted()
    table = table.assign(arch=table["arch"].map(network_name))
    table = table.rename(columns={"arch": "network"}).drop(columns="rates")
    return table.map(lambda value: f"{value:.2f}" if isinstance(value, float) else value)


def make(
    results_dir: str | Path = "results", dataset: str = "cifar10", sources: bool = False
) -> dict[str, pd.DataFrame]:
    """Every table of a data set by name, the empty ones left out; all cells are text.

    sources: tables of runs get one more column, records: the files of each row's runs, lists of
    paths below results_dir.
    """
    frame = records.frame(records.each(results_dir, dataset))
    usual, main = dataset != "digits", dataset == "cifar10"
    compared = criteria(frame, usual)
    rows = {kind: accuracy(frame, dataset, kind, usual) for kind in ("random", "l1")}
    tables = {
        "as_published": rows["random"],
        "ours": rows["l1"],
        "reached": reached({"random": rows["random"], "L1": rows["l1"]}),
        "overview": comparisons.overview(compared),
        "criteria": compared,
        "elsewhere": criteria(frame, usual, elsewhere=True),
        "order": comparisons.order(compared),
        "sensitivity": sensitivity(frame),
        "baselines": baselines(frame, usual),
        "flops": recount() if main else pd.DataFrame(),
        "controls": bench.controls(results_dir) if main else pd.DataFrame(),
        "settings": bench.settings(results_dir) if main else pd.DataFrame(),
        "recipes": bench.recipes(results_dir) if main else pd.DataFrame(),
        "training": bench.training(results_dir) if main else pd.DataFrame(),
        "sparse_training": bench.sparse_training(results_dir) if main else pd.DataFrame(),
        "processes": bench.processes(results_dir) if main else pd.DataFrame(),
        "alternatives": speed_tables.alternatives(results_dir) if main else pd.DataFrame(),
        "inference": inference_tables.inference(results_dir) if main else pd.DataFrame(),
        "speed": speed_tables.speed(results_dir) if main else pd.DataFrame(),
        "density": speed_tables.density(results_dir) if main else pd.DataFrame(),
        "shipped": speed_tables.shipped(results_dir) if main else pd.DataFrame(),
        "exactness": speed_tables.exactness(results_dir) if main else pd.DataFrame(),
    }
    left_out = [] if sources else ["records"]
    return {
        name: table.fillna("").drop(columns=left_out, errors="ignore")
        for name, table in tables.items()
        if not table.empty
    }


PAGES = ("README.md", "results/README.md", "docs/*.md")
"""The pages of a checkout whose tables and numbers come from records."""


def build(
    results_dir: str | Path = "results", dataset: str = "cifar10", pages: str | Path = ""
) -> list[Path]:
    """Write every table as CSV, Markdown and HTML to results_dir/tables/DATASET; returns paths.

    pages: a folder whose PAGES are written anew, too, where their marks say; see `fill`. ValueError
    where its README.md has no marks.
    """
    folder = resolve(results_dir) / "tables" / registry.file_name(dataset)
    tables = make(results_dir, dataset)
    written = _fill_pages(Path(pages), tables) if pages else []
    for name, table in tables.items():
        written += [
            write_text(folder / f"{name}.csv", table.to_csv(index=False)),
            write_text(folder / f"{name}.md", to_markdown(table)),
            write_text(folder / f"{name}.html", to_html(table, CAPTIONS[name])),
        ]
    return written


def _fill_pages(folder: Path, tables: dict[str, pd.DataFrame]) -> list[Path]:
    paths = [path for names in PAGES for path in sorted(folder.glob(names))]
    texts = {path: path.read_text() for path in paths}
    if "<!-- table:" not in texts.get(folder / "README.md", ""):
        raise ValueError(
            f"{folder}/README.md: has no table between <!-- table:NAME --> and its end"
        )
    return [
        write_text(path, fill(text, tables))
        for path, text in texts.items()
        if re.search("<!-- (table|n|cell):", text)
    ]


def counting_table(left: dict) -> pd.DataFrame:
    """One pruned network counted as published and from its masks; `left` as of `counts`."""
    total, published = left["macs"]["dense"] / 1e6, left["macs"]["published_m"]
    kernels = left["macs"]["left"] / 1e6
    rows = {
        "published convention": (total, published, 100 * (1 - published / total)),
        "true, from the masks": (total, kernels, 100 * (1 - kernels / total)),
    }
    columns = ["dense, millions", "left, millions", "cut, %"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).round(2)
