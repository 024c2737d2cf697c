"""How fast whole networks are scored and pruned: `explib bench scoring`.

The plain loop does per kernel what the vectorised code does per layer, as the published
implementation is written; it is timed on one layer only, since all of VGG-16 would take it minutes.
"""

import math
import random
import time
from collections import Counter, defaultdict

import torch

from explib.models import build
from explib.pruning.criteria import Layer, prune
from explib.pruning.layers import conv_at, find_convs
from explib.pruning.ways import way_b
from explib.rates import keep_floor, number_to_prune, parse_rates

RATES = "[0.1]*2+[0.4]*2+[0.5]*2+[0.6]*2+[0.7]*3+[0.6]*2"


def plain_loop(weight: torch.Tensor, rate: float, floor: float, groups: int = 13) -> int:
    """Way B for one layer (F, C, K, K), kernel by kernel; returns how many kernels were pruned."""
    filters, channels = weight.shape[:2]
    delta = {(f, c): float(weight[f, c].sum()) for f in range(filters) for c in range(channels)}
    top = max(delta.values())
    sets = defaultdict(list)
    for place, value in delta.items():
        sets[round((1 / (1 + math.exp(-2 * value / top)) - 0.5) * groups)].append(place)
    sizes = Counter({level: len(places) for level, places in sets.items()})
    wanted, mask = number_to_prune(rate, filters * channels), torch.ones(filters, channels)
    pruned = 0
    for level in sorted(sizes, key=lambda level: (-sizes[level], level)):
        places = random.sample(sets[level], sizes[level])
        for place in places[math.ceil(sizes[level] * floor - 1e-9) :]:
            if pruned < wanted:
                mask[place] = 0
                pruned += 1
    return pruned


def best_of(work, repeats: int) -> float:
    """Seconds of the fastest of several calls, after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def measure() -> dict[str, float]:
    """Scores and masks of all 13 layers of VGG-16 on one core, and one 512x512 layer both ways."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = build("vgg_16_bn")
    convs, rates = find_convs(model, torch.zeros(1, 3, 32, 32)), parse_rates(RATES)
    result = {
        f"vgg_16_bn, way {way}, {survivors} survivors, s": best_of(
            lambda way=way, survivors=survivors: prune(
                model, None, rates, way, convs=convs, survivors=survivors
            ),
            5,
        )
        for way in "AB"
        for survivors in ("random", "l1")
    }
    weight, floor = conv_at(model, convs[-1].name).weight.detach(), keep_floor(rates)
    layer = Layer(convs[-1].name, weight, rate=0.6)
    ours = best_of(lambda: way_b(layer, floor=floor), 5)
    started = time.perf_counter()
    pruned = plain_loop(weight, 0.6, floor)
    plain = time.perf_counter() - started
    assert pruned == int((~way_b(layer, floor=floor)).sum())
    torch.set_num_threads(threads)
    return result | {
        "512x512 layer, way B, s": ours,
        "512x512 layer, plain loop, s": plain,
        "plain loop / ours": plain / ours,
    }
