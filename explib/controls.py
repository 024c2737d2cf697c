"""Is the score better than chance, before anything is fine-tuned? `python -m explib.controls`.

Every criterion prunes the same network at the same rates; the test set is evaluated with
BatchNorm statistics as they were, and re-estimated. Cheap, so that it can have several seeds:
minutes on two cores. Networks named on the command line (`resnet_56 vgg_16_bn`) are measured one
after another; what the record has already is not measured again.
"""

import json
import statistics
import sys

import torch

from explib import evaluation, flops, study
from explib import masks as masking
from explib.data import load_data
from explib.files import ROOT, write_json
from explib.masks import Masks
from explib.params import Params
from explib.records import provenance
from explib.tables import published

RESULT = ROOT / "results/bench/controls.json"
STARTS = {
    "resnet_56": {
        "arch": "resnet_56",
        "dataset": "cifar10",
        "normalization": "imagenet",
        "resume": "results/checkpoints/cifar10/resnet_56-public.safetensors",
    },
    "vgg_16_bn": {"arch": "vgg_16_bn", "dataset": "cifar10"},
}
# way, survivors, whether chance has a say
CRITERIA = [
    ("A", "random", True),
    ("B", "random", True),
    ("matched", "random", True),
    ("random", "random", True),
    ("bn", "random", True),
    ("A", "l1", False),
    ("B", "l1", False),
    ("l1", "random", False),
    ("filters", "random", False),
]


def measure(start: dict, seeds: int = 3) -> list[dict]:
    """One row a published cut and criterion, appended to the record; returns all of its rows.

    top1 and top1_as_was: per cent for each mask seed, with BatchNorm statistics re-estimated and as
    they were; norm_kept_pct: `norm_kept`, mean over seeds; macs_left.
    """
    rows = json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else []
    known = {(row["arch"], row["cut_pct"], row["pruning_way"], row["survivors"]) for row in rows}
    data = load_data(Params(**start))
    for _, row in published()["rows"].iterrows():
        for way, survivors, chance in CRITERIA:
            name = survivors if way in "AB" else ""
            if row["arch"] != start["arch"]:
                continue
            if (row["arch"], row["cut_pct"], way, name) in known:
                continue
            chosen = Params(
                **start, pruning_way=way, survivors=survivors, compress_rate=row["compress_rate"]
            )
            found = [
                _before(chosen.replace(seed=seed, mask_seed=seed), data)
                for seed in range(seeds if chance else 1)
            ]
            rows.append(
                {
                    "arch": row["arch"],
                    "cut_pct": row["cut_pct"],
                    "pruning_way": way,
                    "survivors": name,
                    "top1": [one["top1"] for one in found],
                    "top1_as_was": [one["top1_as_was"] for one in found],
                    "norm_kept_pct": statistics.mean(one["norm_kept_pct"] for one in found),
                    "macs_left": found[0]["macs_left"],
                }
            )
            write_json(RESULT, {"starts": STARTS, "rows": rows, "provenance": provenance()})
            mean = statistics.mean(rows[-1]["top1"])
            print(f"{row['cut_pct']} % {way:8s} {name:7s} {mean:6.2f}", flush=True)
    return rows


def _before(params: Params, data) -> dict:
    """What pruning alone leaves of one network."""
    dense = study.load_dense(params)
    masks = study.choose_masks(params, dense)
    kept = norm_kept(dense.model, masks)
    masking.apply(dense.model, masks)
    forward = evaluation.forward_of(dense.model, params, "cpu", 0)
    as_was = evaluation.evaluate(dense.model, data, data.test, forward)
    evaluation.reestimate_bn(dense.model, data, params.bn_images)
    return {
        "top1": evaluation.evaluate(dense.model, data, data.test, forward),
        "top1_as_was": as_was,
        "norm_kept_pct": kept,
        "macs_left": flops.macs(dense.model, dense.convs, masks)["left"],
    }


@torch.no_grad()
def norm_kept(model: torch.nn.Module, masks: Masks) -> float:
    """Per cent of a conv's squared weights that a mask leaves, mean over the masks."""
    shares = []
    for name, mask in masks.items():
        squares = model.get_submodule(name).weight.double().square().sum((2, 3))
        shares.append(float((squares * mask.to(squares.device)).sum() / squares.sum()))
    return 100 * statistics.mean(shares)


if __name__ == "__main__":
    for arch in sys.argv[1:] or ["resnet_56"]:
        measure(STARTS[arch])
