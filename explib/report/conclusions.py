"""What the study found, as questions with answers; every number comes from the tables.

In an answer `{n:TABLE; cell; cell; column}` is a number and `{cell:...}` a whole cell of a table,
written as in the marks of `markup.fill`.
"""

import re

import pandas as pd

from explib.report import tables
from explib.report.markup import fill
from explib.study import records

VERDICT = (
    "EXP's score ends above chance, by less after 50 epochs than after 5, and no gain over simply "
    "keeping the kernels of largest L1 norm was found."
)
NOTE = (
    "Differences are in points of top-1, for ResNet-56 at its highest published cut, EXP over "
    "whole layers (way B). ± is half of a 95 % interval, not corrected for the number of tests as "
    "p is (Holm), n is the number of seeds. L1 stands for keeping the kernels of largest L1 norm."
)
_NORMS = "B's norms"
_EXP = "criteria; ResNet-56; 71.9; epochs={epochs}; B, {survivors} survivors; against {control}"


def _against(control: str, epochs: int, survivors: str = "random") -> str:
    """The place of a difference between EXP and a control at ResNet-56's highest cut."""
    return "{cell:" + _EXP.format(epochs=epochs, survivors=survivors, control=control) + "}"


CONCLUSIONS = {
    "dense": (
        "How accurate are the networks before pruning?",
        "ResNet-56 {n:baselines; resnet_56-public; last epoch} % top-1 (a public checkpoint), "
        "VGG-16 {n:baselines; vgg_16_bn-baseline; epochs=150; last epoch} % (trained here). The "
        "rows of the tables start from these two.",
    ),
    "cuts": (
        "Are the published cuts right?",
        "No: on CIFAR-10 they are {n:flops; 70.00; published cut % minus flops; 70.00; true cut %} "
        "to {n:flops; 53.10; published cut % minus flops; 53.10; true cut %} points too high, "
        "since they mix units.",
    ),
    "before": (
        "Does the score find the kernels that matter, before any fine-tuning?",
        "No: at its highest cut ResNet-56 has "
        "{cell:controls; ResNet-56; B, random survivors; highest cut} % top-1 with the kernels "
        "that EXP keeps, and {cell:controls; ResNet-56; random, B's norms; highest cut} % with "
        "random ones of the same norms.",
    ),
    "chance": (
        "Is the score better than chance?",
        "After 5 epochs yes, after 50 hardly: EXP as published − random kernels: "
        f"{_against('random kernels', 5)} after 5 epochs, "
        f"{_against('random kernels', 50)} after 50.",
    ),
    "score": (
        "Is it the score that helps?",
        "Not shown. EXP as published − random kernels of the same norms: "
        f"{_against(_NORMS, 5)} after 5 epochs, {_against(_NORMS, 50)} after 50.",
    ),
    "magnitude": (
        "Is it better than magnitude?",
        f"No: EXP as published − L1: {_against('L1 kernels', 5)} after 5 epochs, "
        f"{_against('L1 kernels', 50)} after 50. With the largest kernels of each redundant set "
        f"kept no difference was found: {_against('L1 kernels', 5, 'L1')} and "
        f"{_against('L1 kernels', 50, 'L1')}.",
    ),
    "cost": (
        "What does pruning cost?",
        "Without {n:ours; ResNet-56; B; 71.9; true cut %} % of its multiply-adds ResNet-56 has "
        "{n:ours; ResNet-56; B; 71.9; last epoch} instead of "
        "{n:ours; ResNet-56; B; 71.9; dense} % top-1, after {n:ours; ResNet-56; B; 71.9; epochs} "
        "epochs, with the largest kernels of each redundant set kept, one seed.",
    ),
    "speed": (
        "Is a pruned network faster?",
        "On a CPU of two cores, in the engine: at the highest cut and batch 128 ResNet-56 runs "
        "{n:alternatives; ResNet-56; batch=128; gain} times as fast as the fastest dense one in 32 "
        "or 16 bits, and in int8 {n:alternatives; ResNet-56; batch=128; gain over int8} times as "
        "fast as dense int8. On a GPU: no.",
    ),
    "training": (
        "Is fine-tuning faster?",
        "The loop here trains ResNet-56 {n:training; ResNet-56; task=train; AMD EPYC; ratio} times "
        "as fast as a plain loop in torch. With 70 % of the kernels pruned, "
        "computing the surviving ones only is another "
        "{n:sparse_training; ResNet-56; 70; AMD EPYC; ratio} times as fast. "
        "Both on two cores of an AMD EPYC.",
    ),
}


def answers(made: dict[str, pd.DataFrame], *names: str) -> dict[str, str]:
    """{question: answer} of some CONCLUSIONS, or of all, filled from the tables of `tables.make`.

    What no record gives, or no table is there for, is `not measured yet`.
    """
    found = {}
    if "ours" in made:  # of rows that nobody measured it lacks columns
        made = made | {"ours": made["ours"].reindex(columns=tables.COLUMNS, fill_value="")}
    for name in names or CONCLUSIONS:
        question, answer = CONCLUSIONS[name]
        marks = re.sub(r"\{(n|cell):(.*?)\}", r"<!-- \1:\2 -->not measured yet<!-- /\1 -->", answer)
        found[question] = re.sub(r"<!-- .*? -->", "", fill(marks, made))
    return found


def show(*names: str, results_dir: str = "results"):
    """Some CONCLUSIONS as the last output of a notebook, from the records of CIFAR-10."""
    from IPython.display import Markdown

    if next(records.each(results_dir, "cifar10"), None) is None:
        return Markdown(f"No record of CIFAR-10 is below `{results_dir}`.")
    lines = [f"- **{q}** {a}" for q, a in answers(tables.make(results_dir), *names).items()]
    told = "**Found on CIFAR-10**, read from the records that ship with the project:"
    return Markdown("\n".join([told, "", *lines]))
