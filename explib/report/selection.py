"""Which runs belong together: seeds of one experiment, and experiments that can be compared.

Of several groups of runs (equal but for their seeds) for one row and dense network tables and
figures show the one with most epochs, then the one with most seeds, then the one from where most
others of as many epochs come from. A machine, a precision or a version of torch makes another
group: what it adds to a difference is not the seed's or the criterion's. Runs that diverged, or
that used only a part of the data, are no results (of the digits, which are there to try things on,
also a part).
"""

import pandas as pd

from explib import registry
from explib.params import PLACES, Params
from explib.rates import parse_rates

SETTINGS: dict[str, object] = {"groups": 13, "keep_floor": None, "strict_rate": False}
SETTINGS |= {
    "binary_floor": False,
    "start_cov": 0,
    "bias_in_score": False,
    "resume_mask": "",
    "freeze_bn": False,
}
"""The published method's, which most runs have."""
RECIPE = ["lr", "lr_schedule", "lr_decay_step", "batch_size", "momentum", "nesterov"]
RECIPE += ["weight_decay", "label_smoothing", "distill", "fade_epochs", "bn_images"]
ENVIRONMENT = ["hardware", "computed_in", "torch"]
"""What runs that are averaged or tested against each other have in common."""
_WHOLE = {"limit_train": 0, "limit_test": 0, "validation": 0}
_USUAL = {**SETTINGS, **_WHOLE}


def way_of(run: pd.Series) -> tuple[str, str]:
    """(pruning way, survivors), "" where the criterion has no redundant sets to choose from."""
    way = run["pruning_way"]
    return way, run["survivors"] if registry.criterion(way).redundant_sets else ""


def finished(frame: pd.DataFrame, kind: str, usual: bool = True) -> pd.DataFrame:
    """The runs of a kind that ended; with `usual` only those on all the data and its test set."""
    if frame.empty:
        return frame
    chosen = (frame["kind"] == kind) & (frame["status"] == "done")
    if usual:
        chosen &= (frame[list(_WHOLE)] == pd.Series(_WHOLE)).all(axis=1)
    return frame[chosen]


def _spelt_alike(rates: pd.Series) -> pd.Series:
    """compress_rate, the same text for the same rates: the first one that says them."""
    said = {text: tuple(parse_rates(text)) for text in rates.unique()}
    first = {values: text for text, values in reversed(said.items())}
    return rates.map({text: first[values] for text, values in said.items()})


def groups(frame: pd.DataFrame, usual: bool = True) -> pd.DataFrame:
    """Runs equal but for their seeds, one row a group, the chosen one first.

    Adds to the columns of `records.frame`: n (seeds), by_seed (their last accuracies), last_std
    (None for one seed), runs (the index of each in `frame`), records (the file of each); last,
    best, before, dense, macs, weights, sparsity, nominal_sparsity and wall_s are means. survivors
    are "" where nobody chooses them, rates spelt alike. Takes finished fine-tunes; with `usual`
    only those with the published method's settings, masks that follow the seed, and all the data.
    """
    chosen = finished(frame, "finetune", usual)
    if chosen.empty:
        return chosen
    # what is not read makes no other experiment, nor does another spelling of the same rates
    chosen = chosen.assign(
        survivors=[way_of(run)[1] for _, run in chosen.iterrows()],
        compress_rate=_spelt_alike(chosen["compress_rate"]),
    )
    if usual:
        for field, value in _USUAL.items():
            column = chosen[field]
            chosen = chosen[column.isna() if value is None else column == value]
        chosen = chosen[chosen["mask_seed"] == chosen["seed"]]
    if chosen.empty:
        return chosen
    key = _experiments(chosen)
    means = ["last", "best", "before", "dense", "macs", "weights", "sparsity", "nominal_sparsity"]
    means += ["wall_s"]
    table = chosen[~key.duplicated()].copy()
    same = key[table.index]  # the order of `table`, in which every group stands once
    table["runs"] = same.map(chosen.groupby(key, sort=False).groups)
    by = chosen.astype(dict.fromkeys(means, float)).groupby(key, sort=False)
    table[means] = by[means].mean().loc[same].values
    table["records"] = by["record"].agg(list).loc[same].values
    table["n"] = by.size().loc[same].values
    table["last_std"] = by["last"].std().loc[same].values
    scores = by[["seed", "last"]].agg(list).loc[same]
    table["by_seed"] = [dict(zip(*row, strict=True)) for row in scores.values.tolist()]
    together = table.groupby(["arch", "trained", *ENVIRONMENT], dropna=False)["n"].transform("size")
    table = table.assign(together=together)
    table = table.sort_values(["trained", "n", "together"], ascending=False, kind="stable")
    return table.drop(columns="together")


def _experiments(frame: pd.DataFrame) -> pd.Series:
    """A number for each run, equal for runs of one experiment, which differ by their seed only."""
    ignored = {*PLACES, "name", "seed", "resume"}  # where a dense network lies, not which it is
    fields = [field for field in Params.__dataclass_fields__ if field not in ignored]
    chosen = frame[[*fields, "start", *ENVIRONMENT]].copy()
    # training seeds with their masks make one group, mask seeds under one training seed another
    chosen["mask_seed"] = frame["mask_seed"] != frame["seed"]
    return chosen.groupby(list(chosen), sort=False, dropna=False).ngroup()


def compared(frame: pd.DataFrame, usual: bool = True, elsewhere: bool = False) -> pd.DataFrame:
    """The groups of runs that were fine-tuned in one go, one of each way, criterion and epochs.

    What a comparison of criteria takes: at equal rates and epochs, from one dense network, by one
    recipe of fine-tuning and in one environment; those that most criteria were run with, of
    environments the one with most runs; with `elsewhere` all others. Adds others: how many criteria
    were run at these, the group's own included.
    """
    runs = groups(frame, usual)
    if runs.empty:
        return runs
    equal = ["arch", "compress_rate", "trained"]
    runs = runs[runs["schedule"] == "oneshot"]
    alike = runs.groupby([*equal, "start", *RECIPE], sort=False, dropna=False).ngroup()
    many = (runs["pruning_way"] + runs["survivors"]).groupby(alike).transform("nunique")
    first = runs.assign(alike=alike, many=many).sort_values("many", ascending=False, kind="stable")
    runs = runs[alike.isin(first.drop_duplicates(equal)["alike"])]
    runs = runs.drop_duplicates([*equal, *ENVIRONMENT, "pruning_way", "survivors"])
    sizes = runs.groupby([*equal, *ENVIRONMENT])["n"].agg(["size", "sum"]).reset_index()
    sizes = sizes.sort_values(["sum", "size"], ascending=False, kind="stable")
    first = sizes.drop_duplicates(equal)
    chosen = sizes.drop(first.index) if elsewhere else first
    runs = runs.merge(chosen[[*equal, *ENVIRONMENT]])
    return runs.assign(others=runs.groupby([*equal, *ENVIRONMENT])["n"].transform("size"))
