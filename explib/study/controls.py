"""Is the score better than chance before fine-tuning? `python -m explib.study.controls`.

Every criterion prunes the same network at the same rates, and way B also with other settings; the
test set is evaluated with BatchNorm statistics re-estimated, and at the highest cut also as they
were. Cheap, so that it can have several seeds: minutes on two cores, in the engine that runs what
is left. Networks named on the command line (`resnet_56 vgg_16_bn`) are measured one after another,
each into a record of its own, results/bench/controls-ARCH.json; what that has already is not
measured again.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from functools import partial

import torch

from explib import registry
from explib.data import load_data
from explib.files import ROOT, write_json
from explib.params import Params
from explib.pruning import counting
from explib.pruning import masks as masking
from explib.pruning.masks import Masks
from explib.study import networks
from explib.study.published import published
from explib.study.records import provenance
from explib.training import evaluation

FOLDER = ROOT / "results/bench"
STARTS = {
    "resnet_56": {
        "arch": "resnet_56",
        "dataset": "cifar10",
        "normalization": "imagenet",
        "resume": "results/checkpoints/cifar10/resnet_56-public.safetensors",
    },
    "vgg_16_bn": {"arch": "vgg_16_bn", "dataset": "cifar10"},
}
# What way B could do otherwise at the highest cut; one group is no score, only the survivors' rule
SETTINGS = [{"groups": n} for n in (1, 3, 5, 25, 100)] + [{"keep_floor": f} for f in (0.0, 0.2)]


def measure(start: dict, seeds: int = 3, more: Sequence[str] = ()) -> list[dict]:
    """One row a criterion or setting and cut, appended to the record; returns all of its rows.

    Of every registered criterion, and `more`: package.module:function of others.

    changed: the setting, "" for the usual ones. top1: per cent for each mask seed, with BatchNorm
    statistics re-estimated, and at the highest cut in top1_as_was as they were; norm_kept_pct:
    `norm_kept`, mean over seeds; macs_left.
    """
    path = FOLDER / f"controls-{start['arch']}.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    data, plan = load_data(Params(**start)), _plan(start["arch"], more)
    highest = max(cut["cut_pct"] for cut, *_ in plan)
    for cut, way, survivors, changed in plan:
        row = {
            "arch": start["arch"],
            "cut_pct": cut["cut_pct"],
            "pruning_way": way,
            "survivors": survivors,
            "changed": ", ".join(f"{name} {value}" for name, value in changed.items()),
        }
        if any(row.items() <= known.items() for known in rows):
            continue
        params = Params(
            **start,
            **changed,
            pruning_way=way,
            survivors=survivors or "random",
            compress_rate=cut["compress_rate"],
        )
        as_was = cut["cut_pct"] == highest and not changed
        chance = survivors != "l1" and way not in ("l1", "filters")
        found = [
            _before(params.replace(seed=seed, mask_seed=seed), data, as_was)
            for seed in range(seeds if chance else 1)
        ]
        row["top1"] = [one["top1"] for one in found]
        if as_was:
            row["top1_as_was"] = [one["top1_as_was"] for one in found]
        row["norm_kept_pct"] = statistics.mean(one["norm_kept_pct"] for one in found)
        row["macs_left"] = found[0]["macs_left"]
        rows.append(row)
        write_json(path, {"start": start, "rows": rows, "provenance": provenance()})
        mean = statistics.mean(row["top1"])
        said = f"{row['cut_pct']} % {way:8s} {row['survivors']:7s} {row['changed']:15s}"
        print(f"{said} {mean:6.2f}", flush=True)
    return rows


def _plan(arch: str, more: Sequence[str] = ()) -> list[tuple]:
    """What to measure: (published row, way, survivors, changed settings)."""
    cuts = [row for row in published()["rows"].to_dict("records") if row["arch"] == arch]
    highest = max(cuts, key=lambda row: row["cut_pct"])
    criteria = [*registry.variants(), *((name, "") for name in more)]
    usual = [(cut, *criterion, {}) for cut in cuts for criterion in criteria]
    return usual + [
        (highest, "B", survivors, changed) for changed in SETTINGS for survivors in ("random", "l1")
    ]


def _before(params: Params, data, as_was: bool) -> dict:
    """What pruning alone leaves of one network."""
    dense = networks.load_dense(params)
    masks = networks.choose_masks(params, dense)
    kept = norm_kept(dense.model, masks)
    masking.apply(dense.model, masks)
    evaluate = partial(evaluation.evaluate, dense.model, data, data.test)
    found = {"top1_as_was": evaluate()} if as_was else {}
    evaluation.reestimate_bn(dense.model, data, params.bn_images)
    return found | {
        "top1": evaluate(),
        "norm_kept_pct": kept,
        "macs_left": counting.macs(dense.model, networks.example_of(params), masks)["left"],
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
    more = [word for word in sys.argv[1:] if registry.is_path(word)]
    chosen = [word for word in sys.argv[1:] if word not in more] or ["resnet_56"]
    if unknown := [arch for arch in chosen if arch not in STARTS]:
        sys.exit(f"controls: {unknown[0]!r} is unknown; known: {', '.join(STARTS)}")
    for arch in chosen:
        measure(STARTS[arch], more=more)
