"""Criteria against each other: groups of `selection.compared`, and their table, in."""

import math

import numpy as np
import pandas as pd
from scipy import stats

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

    Columns: run (the group's index), control, mean (points of top-1), half (of the 95 % interval,
    NaN for one seed), p (of a paired t-test, by Holm's method over all rows), n (seeds).
    """
    rows = []
    for index, run in runs.iterrows():
        way = run["pruning_way"]
        for control in CONTROLS[: CONTROLS.index(way)] if way in CONTROLS else CONTROLS:
            same = (runs[[*RATES, "trained"]] == run[[*RATES, "trained"]]).all(axis=1)
            others = runs[(runs["pruning_way"] == control) & same]
            if others.empty:
                continue
            other = others.iloc[0]["by_seed"]
            if seeds := sorted(set(run["by_seed"]) & set(other)):
                found = _paired([run["by_seed"][s] for s in seeds], [other[s] for s in seeds])
                rows.append({"run": index, "control": control, **found})
    table = pd.DataFrame(rows, columns=["run", "control", "mean", "half", "p", "n"])
    return table.assign(p=holm(table["p"]))


def _paired(own: list[float], other: list[float]) -> dict:
    """Mean difference of pairs, half of its 95 % interval, p of a paired t-test, and their number.

    One pair has no interval and no test: NaN.
    """
    mean = sum(own) / len(own) - sum(other) / len(other)
    if len(own) == 1:
        return {"mean": mean, "half": math.nan, "p": math.nan, "n": 1}
    test = stats.ttest_rel(own, other)
    half = test.confidence_interval(0.95).high - mean
    return {"mean": mean, "half": half, "p": float(test.pvalue), "n": len(own)}


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
    if row["n"] == 1:
        return f"{row['mean']:+.2f} (n=1)"
    return f"{row['mean']:+.2f} ± {row['half']:.2f} (p = {row['p']:.3f}, n={row['n']})"
