"""Criteria against each other: groups of `selection.compared`, and differences between them."""

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy import stats

from explib.report.selection import ENVIRONMENT

RATES = ["arch", "compress_rate"]


def overview(compared: pd.DataFrame, cells: str = "last epoch") -> pd.DataFrame:
    """The table of `criteria` at a glance: a line a criterion, a column a network, cut and epochs.

    Cells are of this column, by default top-1 at the last epoch, by which what ranks highest on the
    mean of the columns stands first.
    """
    if compared.empty:
        return compared
    epochs = compared["epochs"].map(lambda e: "1 epoch" if e == "1" else f"{e} epochs")
    column = compared["network"] + ", " + compared["published cut %"] + " %, " + epochs
    table = compared.assign(column=column).pivot(index="criterion", columns="column")
    ranks = table["last epoch"].map(lambda cell: float(cell.split()[0]), na_action="ignore")
    ranks = ranks.rank(pct=True).mean(axis=1).sort_values(ascending=False, kind="stable")
    found = table[cells].loc[ranks.index, list(dict.fromkeys(column))]
    if cells == "last epoch":
        found = found.replace({r" \(n=1\)": ""}, regex=True)
    return found.rename_axis(columns=None).reset_index()


def order(compared: pd.DataFrame) -> pd.DataFrame:
    """Whether criteria rank after fine-tuning as they do before: Spearman's rank correlation.

    Of the table of `criteria`, for each network, cut and number of epochs with four or more.
    """
    if compared.empty:
        return compared
    lines, key = [], ["network", "published cut %", "epochs"]
    for values, own in compared.groupby(key, sort=False):
        before = pd.to_numeric(own["before fine-tuning"])
        last = own["last epoch"].map(lambda cell: float(cell.split()[0]))
        if before.notna().sum() > 3 and min(before.nunique(), last.nunique()) > 1:
            found = before.corr(last, method="spearman")
            line = dict(zip(key, values, strict=True)) | {"criteria": str(before.notna().sum())}
            lines.append(line | {"rank correlation": f"{found:.2f}"})
    return pd.DataFrame(lines)


CONTROLS = ("random", "matched", "l1")
"""Criteria without a score, which the others, and the later of these, are set against."""


def differences(runs: pd.DataFrame) -> pd.DataFrame:
    """Each group of `selection.compared` against each of CONTROLS, over the seeds that both have.

    Columns: run (the group's index), control, mean (points of top-1), half (of the 95 % interval),
    p (of a t-test, by Holm's method over all rows), n (seeds). half and p come from the `scatter`
    of all that was run at the same rates and epochs, since that of three pairs is itself chance;
    of one seed they are NaN.
    """
    rows = []
    for _, alike in runs.groupby([*RATES, "trained", *ENVIRONMENT], sort=False, dropna=False):
        deviation, freedom = scatter(alike["by_seed"])
        for index, run in alike.iterrows():
            way = run["pruning_way"]
            for control in CONTROLS[: CONTROLS.index(way)] if way in CONTROLS else CONTROLS:
                others = alike[alike["pruning_way"] == control]
                if others.empty:
                    continue
                other = others.iloc[0]["by_seed"]
                if seeds := sorted(set(run["by_seed"]) & set(other)):
                    mean = float(np.mean([run["by_seed"][s] - other[s] for s in seeds]))
                    half = p = math.nan
                    if len(seeds) > 1:
                        error = deviation * math.sqrt(2 / len(seeds))
                        half = error * float(stats.t.ppf(0.975, freedom))
                        p = 2 * float(stats.t.sf(abs(mean) / error, freedom))
                    found = {"mean": mean, "half": half, "p": p, "n": len(seeds)}
                    rows.append({"run": index, "control": control, **found})
    table = pd.DataFrame(rows, columns=["run", "control", "mean", "half", "p", "n"])
    return table.assign(p=holm(table["p"]))


def scatter(by_seed: Iterable[dict[int, float]]) -> tuple[float, int]:
    """How far runs lie from what their criterion and their seed explain: (deviation, degrees).

    by_seed: of each criterion, top-1 by seed. The residual standard deviation of top-1 = criterion
    + seed, by least squares (two-way analysis of variance), and its degrees of freedom; NaN where
    there are none. Of two criteria it is what a paired t-test takes.
    """
    runs = [(n, seed, top1) for n, own in enumerate(by_seed) for seed, top1 in own.items()]
    criteria, seeds, top1 = (np.array(column) for column in zip(*runs, strict=True))
    columns = [criteria == n for n in np.unique(criteria)] + [seeds == s for s in np.unique(seeds)]
    design = np.stack(columns, axis=1).astype(float)
    fit, _, rank, _ = np.linalg.lstsq(design, top1, rcond=None)
    freedom = len(runs) - int(rank)
    if not freedom:
        return math.nan, 0
    return float(np.sqrt(((top1 - design @ fit) ** 2).sum() / freedom)), freedom


def holm(values: pd.Series) -> pd.Series:
    """p values corrected for their number by Holm's method; NaN counts as no test."""
    tests = values.dropna().sort_values()
    steps = tests * np.arange(len(tests), 0, -1)
    return steps.cummax().clip(upper=1).reindex(values.index)


def cell(against: pd.DataFrame, index: int, control: str) -> str:
    """A cell of `differences`: the mean, half its interval, p and the number of seeds."""
    rows = against[(against["run"] == index) & (against["control"] == control)]
    if rows.empty:
        return ""
    row = rows.iloc[0]
    if math.isnan(row["half"]):
        return f"{row['mean']:+.2f} (n={row['n']})"
    p = f"p = {row['p']:.3f}" if row["p"] >= 0.001 else "p < 0.001"
    return f"{row['mean']:+.2f} ± {row['half']:.2f} ({p}, n={row['n']})"
