"""Is the score better than chance before fine-tuning? `explib controls` measures it.

Every criterion prunes the same network at the same rates, and way B also with other settings; the
test set is evaluated with BatchNorm statistics re-estimated, and at the highest cut also as they
were. Cheap, so that it can have several seeds: minutes on two cores, in the engine that runs what
is left.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from explib import registry
from explib.data import Data, load_data
from explib.errors import ParamError
from explib.files import resolve
from explib.params import Params
from explib.pruning import counting
from explib.pruning import masks as masking
from explib.pruning.checkpoints import origin
from explib.pruning.layers import conv_at
from explib.pruning.masks import Masks
from explib.rates import keep_floor, parse_rates
from explib.study import networks
from explib.study.published import published
from explib.study.records import write_bench
from explib.training import evaluation

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

# As the published code rounds what stays of a set, at the cuts where that makes a difference
BINARY = {"binary_floor": True}


def measure(
    start: dict, results_dir: str | Path = "results", seeds: int = 3, more: Sequence[str] = ()
) -> Iterator[dict]:
    """Yield one row a criterion or setting and cut, each when it is in the record.

    Of every registered criterion, and `more`: package.module:function of others. start: the
    parameters of the dense network. The record is results_dir/bench/controls-ARCH.json; what it has
    already of this very network is not measured again. Rows: changed: the setting, "" for the usual
    ones; top1: per cent for each mask seed, with BatchNorm statistics re-estimated, and at the
    highest cut in top1_as_was as they were; norm_kept_pct: `norm_kept`, mean over seeds; macs_left.
    """
    arch, name = start["arch"], f"controls-{start['arch']}"
    path = resolve(results_dir) / f"bench/{name}.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    network = origin(networks.dense_path(Params(**{"results_dir": str(results_dir), **start})))
    rows = record["rows"] if record.get("checkpoint_sha256") == network else []
    data, plan = load_data(Params(**start)), _plan(arch, more)
    highest = max(cut["cut_pct"] for cut, *_ in plan)
    for cut, way, survivors, changed in plan:
        row = {
            "arch": arch,
            "cut_pct": cut["cut_pct"],
            "pruning_way": way,
            "survivors": survivors,
            "changed": ", ".join(f"{field} {value}" for field, value in changed.items()),
        }
        if known := [known for known in rows if row.items() <= known.items()]:
            yield known[0]
            continue
        settings = {**changed, "pruning_way": way, "survivors": survivors or "random"}
        params = Params(**start, **settings, compress_rate=cut["compress_rate"])
        as_was = cut["cut_pct"] == highest and not changed
        row |= _over_seeds(params, data, seeds, as_was)
        rows.append(row)
        found = {"start": start, "checkpoint_sha256": network, "rows": rows}
        write_bench(name, found, results_dir)
        yield row


def start_of(arch: str) -> dict:
    """The parameters of a dense network of STARTS. ParamError for another."""
    if arch not in STARTS:
        raise ParamError(f"arch: {arch!r} has no controls; known: {', '.join(STARTS)}")
    return STARTS[arch]


def _over_seeds(params: Params, data: Data, seeds: int, as_was: bool) -> dict:
    """What `_before` finds with several mask seeds, or with one where nothing is random."""
    fixed = ("l1", "global_l1", "taylor", "filters")
    chance = params.survivors == "random" and params.pruning_way not in fixed
    found = [
        _before(params.replace(seed=seed, mask_seed=seed), data, as_was)
        for seed in range(seeds if chance else 1)
    ]
    row = {"top1": [one["top1"] for one in found]}
    if as_was:
        row["top1_as_was"] = [one["top1_as_was"] for one in found]
    row["norm_kept_pct"] = statistics.mean(one["norm_kept_pct"] for one in found)
    return row | {"macs_left": found[0]["macs_left"]}


def _plan(arch: str, more: Sequence[str] = ()) -> list[tuple]:
    """What to measure: (published row, way, survivors, changed settings)."""
    cuts = [row for row in published()["rows"].to_dict("records") if row["arch"] == arch]
    highest = max(cuts, key=lambda row: row["cut_pct"])
    criteria = [*registry.variants(), *((name, "") for name in more)]
    usual = [(cut, *criterion, {}) for cut in cuts for criterion in criteria]
    other = [(highest, "B", name, changed) for changed in SETTINGS for name in ("random", "l1")]
    rounded = [
        cut for cut in cuts if keep_floor(_rates(cut), binary=True) > keep_floor(_rates(cut))
    ]
    return usual + other + [(cut, way, "random", BINARY) for cut in rounded for way in "AB"]


def _rates(cut: dict) -> list[float]:
    return parse_rates(cut["compress_rate"])


def _before(params: Params, data: Data, as_was: bool) -> dict:
    """What pruning alone leaves of one network."""
    dense = networks.load_dense(params)
    masks = networks.choose_masks(params, dense)
    kept = norm_kept(dense.model, masks)
    masking.apply(dense.model, masks)
    evaluate = partial(evaluation.top1, dense.model, data, data.test)
    found = {"top1_as_was": evaluate()} if as_was else {}
    evaluation.recalibrate_bn(dense.model, evaluation.bn_batches(data, params.bn_images))
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
        squares = conv_at(model, name).weight.double().square().sum((2, 3))
        shares.append(float((squares * mask.to(squares.device)).sum() / squares.sum()))
    return 100 * statistics.mean(shares)
