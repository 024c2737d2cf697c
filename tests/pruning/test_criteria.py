"""Which kernels go, against a slow reading of the method's text, and the properties it implies."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from explib import models
from explib.errors import ParamError
from explib.params import WAYS
from explib.pruning import counting
from explib.pruning import layers as layer_finding
from explib.pruning.criteria import prune, prune_layer
from explib.pruning.layers import prunable
from explib.pruning.scores import delta_e, levels, redundancy
from explib.rates import keep_floor, number_to_prune, parse_rates
from tests.conftest import image

RATES_71 = "[0.0]+[0.7]*17+[0.4]*2+[0.7]*16+[0.5]*2+[0.8]*17"


def slow_counts(weight, gamma, rate, floor, way, groups=13, strict=False):
    """How many kernels go from each set, {(filter, level): n} for A and {level: n} for B.

    Plain loops over the text of the method, section 2; rate and floor are decimal strings.
    """
    filters, channels = len(weight), len(weight[0])
    delta = [[sum(float(x) for x in kernel.ravel()) for kernel in row] for row in weight]
    top = max(map(max, delta))
    if top <= 0:
        top = max(abs(value) for row in delta for value in row) or 1.0
    level = [
        [round((1 / (1 + math.exp(-2 * x / top)) - 0.5) * groups) for x in row] for row in delta
    ]
    held = Counter(value for row in level for value in row)
    by_frequency = sorted(held, key=lambda value: (-held[value], value))
    if way == "A":
        by_gamma = sorted(range(filters), key=lambda f: (abs(gamma[f]), f))
        sets = [
            ((f, value), level[f].count(value))
            for f in by_gamma
            for value in by_frequency
            if value in level[f]
        ]
    else:
        sets = [(value, held[value]) for value in by_frequency]
    n = int(Fraction(rate) * filters * channels)
    pruned = Counter()
    for survivors_too in (False, True) if strict else (False,):
        for key, size in sets:
            stay = math.ceil(Fraction(floor) * size)
            candidates = stay if survivors_too else size - stay
            taken = min(candidates, n - pruned.total())
            pruned[key] += taken
    return +pruned


def counts(mask, level, way):
    """How many kernels a mask prunes from each set, as `slow_counts`."""
    gone = [tuple(place) for place in (~mask).nonzero().tolist()]
    return Counter((f, int(level[f, c])) if way == "A" else int(level[f, c]) for f, c in gone)


@st.composite
def layers(draw):
    """Weights in steps of 1/8 and scales with ties, both exact."""
    filters, channels, side = (draw(st.integers(1, n)) for n in (9, 9, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**20)))
    low, high = draw(st.sampled_from([(-8, 9), (-3, 1), (0, 3)]))
    weight = random.integers(low, high, (filters, channels, side, side)) / 8
    gamma = random.integers(-3, 4, filters) / 4
    return torch.from_numpy(weight).float(), torch.from_numpy(gamma).float()


shares = st.integers(0, 99).map(lambda hundredths: f"{hundredths / 100:.2f}")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def layer(filters=12, channels=10, seed=0):
    weight = torch.randn(filters, channels, 3, 3, generator=seeded(seed))
    return weight, torch.randn(filters, generator=seeded(seed + 100))


class TestAgainstTheText:
    @given(layers(), shares, shares, st.booleans(), st.sampled_from(["random", "l1"]))
    def test_way_a_takes_as_many_of_every_filter_and_level(self, given, rate, floor, strict, keep):
        weight, gamma = given
        mask = prune_layer(
            weight, float(rate), "A", gamma=gamma, floor=float(floor), strict_rate=strict,
            survivors=keep, generator=seeded(),
        )  # fmt: skip
        wanted = slow_counts(weight.numpy(), gamma.tolist(), rate, floor, "A", strict=strict)
        assert counts(mask, levels(delta_e(weight)), "A") == wanted

    @given(layers(), shares, shares, st.booleans(), st.sampled_from(["random", "l1"]))
    def test_way_b_takes_as_many_of_every_level(self, given, rate, floor, strict, keep):
        weight, _ = given
        mask = prune_layer(
            weight, float(rate), "B", floor=float(floor), strict_rate=strict,
            survivors=keep, generator=seeded(),
        )  # fmt: skip
        wanted = slow_counts(weight.numpy(), None, rate, floor, "B", strict=strict)
        assert counts(mask, levels(delta_e(weight)), "B") == wanted

    def test_a_layer_by_hand(self):
        # levels 5, 5, 5, 0 / 0, 0, 5, 5; level 5 is held by five kernels, 0 by three
        weight = torch.tensor([[1.0, 1, 1, 0], [0, 0, 1, 1]])[:, :, None, None]
        gamma = torch.tensor([-2.0, 1.0])
        floor = 0.4  # of 1, 2, 3, 5 kernels stay 1, 1, 2, 2
        level = levels(delta_e(weight))
        # A: filter 1 first: one of its 5s, one of its 0s; then one of filter 0's 5s
        mask = prune_layer(weight, 0.9, "A", gamma=gamma, floor=floor, generator=seeded())
        assert counts(mask, level, "A") == {(1, 5): 1, (1, 0): 1, (0, 5): 1}
        # B: three of the five 5s, then one of the three 0s; half of 8 is 4
        mask = prune_layer(weight, 0.5, "B", floor=floor, generator=seeded())
        assert counts(mask, level, "B") == {5: 3, 0: 1}


class TestNumbers:
    @pytest.mark.parametrize(
        ("rate", "kernels", "n"),
        [(0.7, 10, 7), (0.29, 100, 29), (0.57, 100, 57), (0.5, 3, 1), (0.999, 1, 0), (0, 9, 0)],
    )
    def test_n_whatever_binary_fractions_say(self, rate, kernels, n):
        assert number_to_prune(rate, kernels) == n

    @given(layers(), shares, st.sampled_from(["B", "random", "l1", "bn", "matched"]))
    def test_n_is_reached_where_there_is_no_floor(self, given, rate, way):
        weight, gamma = given
        mask = prune_layer(weight, float(rate), way, gamma=gamma, generator=seeded())
        assert int((~mask).sum()) == int(Fraction(rate) * mask.numel())

    @given(layers(), shares, shares, st.sampled_from("AB"))
    def test_every_set_keeps_its_floor(self, given, rate, floor, way):
        weight, gamma = given
        mask = prune_layer(
            weight, float(rate), way, gamma=gamma, floor=float(floor), generator=seeded()
        )
        level = levels(delta_e(weight))
        sizes = counts(torch.zeros_like(mask), level, way)
        for key, pruned in counts(mask, level, way).items():
            assert sizes[key] - pruned >= math.ceil(Fraction(floor) * sizes[key])

    @given(layers(), shares, shares, st.sampled_from("AB"))
    def test_strict_rate_reaches_n(self, given, rate, floor, way):
        weight, gamma = given
        mask = prune_layer(
            weight, float(rate), way, gamma=gamma, floor=float(floor), strict_rate=True
        )
        assert int((~mask).sum()) == int(Fraction(rate) * mask.numel())


class TestChance:
    @pytest.mark.parametrize("way", ["A", "B", "random", "bn", "matched"])
    def test_equal_seeds_equal_masks_and_other_seeds_others(self, way):
        weight, gamma = layer(12, 11)
        masks = [
            prune_layer(weight, 0.55, way, gamma=gamma, floor=0.2, generator=seeded(seed))
            for seed in (1, 1, 2)
        ]
        assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])

    @pytest.mark.parametrize(("way", "survivors"), [("l1", "random"), ("A", "l1"), ("B", "l1")])
    def test_magnitude_leaves_nothing_to_chance(self, way, survivors):
        weight, gamma = layer()
        one, two = (
            prune_layer(weight, 0.5, way, gamma=gamma, survivors=survivors, generator=seeded(s))
            for s in (1, 2)
        )
        assert torch.equal(one, two)

    @pytest.mark.parametrize("way", ["A", "B", "random"])
    def test_every_kernel_of_equal_ones_has_the_same_chance(self, way):
        weight, gamma = torch.ones(1, 8, 3, 3), torch.ones(1)
        gone = sum(
            (~prune_layer(weight, 0.5, way, gamma=gamma, generator=seeded(s))).int()
            for s in range(400)
        )
        # 400 draws of a half: 140 to 260 is six standard deviations
        assert gone.min() > 140 and gone.max() < 260 and gone.sum() == 1600


class TestCriteria:
    @given(layers(), shares)
    def test_l1_keeps_the_largest_of_topk(self, given, rate):
        weight, _ = given
        norm = weight.abs().sum((2, 3)).flatten()
        mask = prune_layer(weight, float(rate), "l1").flatten()
        kept = norm[mask].sort(descending=True).values
        assert torch.equal(kept, norm.topk(int(mask.sum())).values)

    @given(layers(), shares, shares, st.sampled_from("AB"))
    def test_l1_survivors_are_the_largest_of_their_set(self, given, rate, floor, way):
        weight, gamma = given
        mask = prune_layer(
            weight, float(rate), way, gamma=gamma, floor=float(floor), survivors="l1"
        )
        norm, level = weight.abs().sum((2, 3)), levels(delta_e(weight))
        for filters in range(len(weight)) if way == "A" else [slice(None)]:
            for value in level.unique():
                of_set = level[filters] == value
                kept = norm[filters][of_set & mask[filters]]
                pruned = norm[filters][of_set & ~mask[filters]]
                assert not len(kept) or not len(pruned) or kept.min() >= pruned.max()

    def test_bn_takes_the_filters_of_lowest_scale(self):
        weight, _ = layer(5, 4)
        gamma = torch.tensor([0.3, -0.1, 0.5, -0.2, 0.1])
        mask = prune_layer(weight, 0.55, "bn", gamma=gamma, generator=seeded())
        # 11 of 20: filters 1 and 4 (equal, lower index first) whole, then three of filter 3
        assert (~mask).sum(1).tolist() == [0, 4, 0, 3, 4]

    def test_a_negative_scale_counts_by_its_magnitude(self):
        weight, _ = layer(2, 4)
        mask = prune_layer(weight, 0.5, "bn", gamma=torch.tensor([-5.0, 1.0]))
        assert (~mask).sum(1).tolist() == [0, 4]

    def test_matched_takes_as_many_of_every_norm_as_way_b(self):
        weight, _ = layer(12, 12)
        ours = prune_layer(weight, 0.6, "B", floor=0.2, generator=seeded())
        mask = prune_layer(weight, 0.6, "matched", floor=0.2, generator=seeded())
        order = weight.abs().sum((2, 3)).flatten().argsort()
        blocks = [kept.flatten()[order].view(9, 16).sum(1) for kept in (ours, mask)]
        assert torch.equal(*blocks) and not torch.equal(ours, mask)

    def test_matched_draws_evenly_among_kernels_alike(self):
        weight = torch.arange(1.0, 17.0).view(4, 4, 1, 1)  # one neighbourhood
        kept = sum(
            prune_layer(weight, 0.5, "matched", generator=seeded(seed)).double()
            for seed in range(2000)
        )
        # 8 of 16 stay: mean 1000, standard deviation 22
        assert (kept - 1000).abs().max() < 100


class TestPermutation:
    def test_of_filters_permutes_the_counts_of_way_a(self):
        weight, gamma = layer()
        order = torch.randperm(12, generator=seeded(3))
        one = prune_layer(weight, 0.6, "A", gamma=gamma, floor=0.2, generator=seeded())
        two = prune_layer(
            weight[order], 0.6, "A", gamma=gamma[order], floor=0.2, generator=seeded()
        )
        level = levels(delta_e(weight))
        assert counts(two, level[order], "A") == Counter(
            {
                (order.tolist().index(f), value): n
                for (f, value), n in counts(one, level, "A").items()
            }
        )

    @pytest.mark.parametrize("way", "AB")
    def test_of_channels_changes_no_count(self, way):
        weight, gamma = layer()
        order = torch.randperm(10, generator=seeded(3))
        level = levels(delta_e(weight))
        one = prune_layer(weight, 0.6, way, gamma=gamma, floor=0.2, generator=seeded())
        two = prune_layer(weight[:, order], 0.6, way, gamma=gamma, floor=0.2, generator=seeded())
        assert counts(two, level[:, order], way) == counts(one, level, way)


class TestErrors:
    @pytest.mark.parametrize("way", ["A", "bn"])
    def test_a_conv_without_a_norm_is_named(self, net, way):
        with pytest.raises(ValueError, match=r"^3: no BatchNorm takes this conv's output"):
            prune(net, image(8), 0.5, way)
        assert "3" not in prune(net, image(8), {"0": 0.5, "6": 0.5}, way)

    @pytest.mark.parametrize("way", WAYS)
    def test_weights_that_are_not_finite_are_named(self, net, way):
        with torch.no_grad():
            net[6].weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"^6: weights hold NaN"):
            prune(net, image(8), {"6": 0.5}, way)

    @pytest.mark.parametrize("way", ["A", "bn"])
    def test_scales_that_are_not_finite_are_named(self, net, way):
        with torch.no_grad():
            net[1].weight[0] = float("inf")
        with pytest.raises(ValueError, match=r"^0: BatchNorm scales hold NaN"):
            prune(net, image(8), {"0": 0.5}, way)

    def test_an_unknown_way_lists_the_known(self):
        with pytest.raises(ParamError, match="'C' is unknown; known: A, B, random, l1, bn"):
            prune_layer(layer()[0], 0.5, "C")

    @pytest.mark.parametrize("rate", [1, 1.0, 1.2, -0.1, float("nan")])
    def test_a_rate_out_of_range(self, net, rate):
        with pytest.raises(ParamError, match=r"rate: .* for 0; give a number from 0 to below 1"):
            prune(net, image(8), rate)

    def test_a_rate_that_is_no_number(self, net):
        with pytest.raises(ParamError, match=r"rate: '0.5' for 0; give a number"):
            prune(net, image(8), "0.5")

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"survivors": "L1"}, "survivors: 'L1' is unknown; known: random, l1"),
            ({"floor": 2.0}, "floor: 2.0 is out of range; give 0 to 1"),
            ({"floor": -1}, "floor: -1 is out of range; give 0 to 1"),
            ({"groups": 0}, "groups: 0; give a whole number from 1"),
        ],
    )
    def test_an_option_that_cannot_be(self, net, option, message):
        with pytest.raises(ParamError, match=f"^{message}$"):
            prune(net, image(8), 0.5, **option)

    def test_a_rate_for_what_is_no_prunable_conv(self, net):
        for name in ("5", "10", "nothing"):
            with pytest.raises(ParamError, match=f"'{name}' is not a prunable conv"):
                prune(net, image(8), {name: 0.5})

    def test_too_few_rates(self, net):
        with pytest.raises(ParamError, match="2 rates for 3 convs"):
            prune(net, image(8), [0.5, 0.5])


class TestNetworks:
    def test_rates_may_be_a_tuple(self, net):
        one, other = (
            prune(net, image(8), [0.2, 0.5, 0.5]),
            prune(net, image(8), (0.2, 0.5, 0.5)),
        )
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)

    def test_grouped_convs_are_left_out(self, net):
        masks = prune(net, image(8), 0.5)
        assert {name: tuple(mask.shape) for name, mask in masks.items()} == {
            "0": (8, 3),
            "3": (6, 8),
            "6": (8, 6),
        }

    def test_a_mobilenet_keeps_its_depthwise_convs(self):
        model = torchvision.models.get_model("mobilenet_v2", weights=None)
        convs = layer_finding.find_convs(model, image(32))
        masks = prune(model, None, 0.5, "A", convs=convs)
        assert set(masks) == {conv.name for conv in convs if conv.groups == 1}
        assert set(masks) == {conv.name for conv in prunable(convs)} and len(masks) == 35

    def test_the_model_is_not_changed(self, net):
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        prune(net, image(8), 0.5)
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())

    def test_a_mask_does_not_depend_on_the_other_convs(self, net):
        together = prune(net, image(8), 0.5, floor=0.1)
        for name in together:
            alone = prune(net, image(8), {name: 0.5}, floor=0.1)
            assert torch.equal(alone[name], together[name])

    def test_equal_layers_do_not_get_equal_masks(self):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
        for conv in net:
            nn.init.ones_(conv.weight)
        masks = [prune(net, image(4), 0.5, seed=seed) for seed in range(5)]
        assert len({mask.numpy().tobytes() for found in masks for mask in found.values()}) > 8

    def test_the_floor_is_the_published_one(self, net):
        rates = [0.5, 0.1, 0.3]
        by_default = prune(net, image(8), rates)
        given = prune(net, image(8), rates, floor=keep_floor(rates))
        assert all(torch.equal(by_default[name], given[name]) for name in given)

    def test_rate_zero_prunes_nothing(self, net):
        assert all(mask.all() for mask in prune(net, image(8), 0).values())

    def test_the_bias_counts_only_when_asked(self, net):
        with torch.no_grad():
            net[3].weight.copy_(torch.randn(6, 8, 3, 3, generator=seeded()))
            net[3].bias.copy_(torch.linspace(-20, 20, 6))
        with_bias = levels(delta_e(net[3].weight, net[3].bias))
        mask = prune(net, image(8), {"3": 0.5}, bias_in_score=True, floor=0.0)["3"]
        frequent = Counter(with_bias.flatten().tolist())
        order = sorted(frequent, key=lambda value: (-frequent[value], value))
        pruned = counts(mask, with_bias, "B")
        left = 24
        for value in order:
            assert pruned[value] == min(frequent[value], left)
            left -= pruned[value]
        assert not torch.equal(mask, prune(net, image(8), {"3": 0.5}, floor=0.0)["3"])

    @pytest.mark.parametrize("arch", ["vgg_16_bn", "resnet_56", "resnet_110", "googlenet"])
    def test_every_arch_and_way_gives_masks(self, arch):
        torch.manual_seed(0)
        model = models.build(arch)
        convs = layer_finding.find_convs(model, image(32))
        for way in WAYS:
            masks = prune(model, None, 0.3, way, floor=0.0, convs=convs)
            assert list(masks) == [conv.name for conv in convs]
            for conv in convs:
                assert int((~masks[conv.name]).sum()) == number_to_prune(0.3, conv.kernels)

    def test_resnet_50(self):
        torch.manual_seed(0)
        model = models.build("resnet_50")
        masks = prune(model, image(64), 0.01, "B")
        assert len(masks) == 53 and all((~mask).any() for mask in masks.values())


@pytest.fixture(scope="module")
def tables(public):
    rates = models.rates_by_name(
        "resnet_56", [conv.name for conv in public.convs], parse_rates(RATES_71)
    )
    masks = {way: prune(public.model, None, rates, way, convs=public.convs) for way in "AB"}
    return {way: counting.layer_table(public.convs, masks[way], rates) for way in "AB"}


class TestPublicCheckpoint:
    """What the method says of ResNet-56 at the 71.9 % rates."""

    def test_way_a_runs_out_of_candidates(self, tables):
        short = [100 * (row["rate"] - row["pruned"] / row["kernels"]) for row in tables["A"]]
        assert sum(points > 2 for points in short) == 13
        assert round(max(short), 1) == 16.5
        left, dense = (sum(row[key] for row in tables["A"]) for key in ("macs", "macs_dense"))
        assert round(100 * (1 - left / dense), 1) == 69.6

    def test_way_b_meets_its_rates(self, tables):
        assert all(row["pruned"] == row["nominal"] for row in tables["B"])
        left, dense = (sum(row[key] for row in tables["B"]) for key in ("macs", "macs_dense"))
        assert round(100 * (1 - left / dense), 1) == 71.5


def test_redundancy_by_hand():
    scores = {"a": torch.tensor([[4.0, 4.0], [2.0, 0.0]]), "b": torch.ones(2, 3)}
    table = redundancy(scores)
    assert table.layer.tolist() == ["a", "b"] and table.kernels.tolist() == [4, 6]
    assert table.redundant_pct.tolist() == [50, 100] and table.levels.tolist() == [3, 1]
