"""Is the score better than chance, before anything is fine-tuned? `python -m explib.controls`.

Every criterion prunes the same network at the same rates; BatchNorm statistics are re-estimated,
and the test set is evaluated. Cheap, so that it can have several seeds: minutes on two cores.
"""

import statistics

from explib import evaluation, flops, study
from explib import masks as masking
from explib.data import load_data
from explib.files import ROOT, write_json
from explib.params import Params
from explib.records import provenance
from explib.tables import published

RESULT = ROOT / "results/bench/controls.json"
START = {
    "arch": "resnet_56",
    "dataset": "cifar10",
    "normalization": "imagenet",
    "resume": "results/checkpoints/cifar10/resnet_56-public.safetensors",
}
# way, survivors, whether chance has a say
CRITERIA = [
    ("A", "random", True),
    ("B", "random", True),
    ("random", "random", True),
    ("bn", "random", True),
    ("A", "l1", True),
    ("B", "l1", True),
    ("l1", "random", False),
    ("filters", "random", False),
]


def measure(start: dict = START, seeds: int = 3) -> list[dict]:
    """One row a published cut and criterion: top-1 in per cent of each mask seed, MACs left."""
    rows, data = [], load_data(Params(**start))
    for _, row in published()["rows"].iterrows():
        if row["arch"] != start["arch"]:
            continue
        for way, survivors, chance in CRITERIA:
            top1 = []
            for seed in range(seeds if chance else 1):
                params = Params(
                    **start,
                    pruning_way=way,
                    survivors=survivors,
                    compress_rate=row["compress_rate"],
                    seed=seed,
                )
                top1.append(_before(params, data))
            rows.append(
                {
                    "cut_pct": row["cut_pct"],
                    "pruning_way": way,
                    "survivors": survivors if way in "AB" else "",
                    "top1": [value for value, _ in top1],
                    "macs_left": top1[0][1],
                }
            )
            write_json(RESULT, {"start": start, "rows": rows, "provenance": provenance()})
            mean = statistics.mean(rows[-1]["top1"])
            print(f"{row['cut_pct']} % {way:8s} {survivors:7s} {mean:6.2f}", flush=True)
    return rows


def _before(params: Params, data) -> tuple[float, int]:
    """Top-1 in per cent after pruning, before fine-tuning, and the MACs left."""
    dense = study.load_dense(params)
    masks = study.choose_masks(params, dense)
    masking.apply(dense.model, masks)
    evaluation.reestimate_bn(dense.model, data, params.bn_images)
    forward = evaluation.forward_of(dense.model, params, "cpu", 0)
    left = flops.macs(dense.model, dense.convs, masks)["left"]
    return evaluation.evaluate(dense.model, data, data.test, forward), left


if __name__ == "__main__":
    measure()
