"""The study's criteria against a slow reading of the method's text, and properties it implies."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from explib import registry
from explib.params import from_yaml
from explib.pruning import counting
from explib.pruning.criteria import Layer, mask_of, options_of, prune
from explib.pruning.layers import conv_at
from explib.pruning.scores import delta_e, levels
from explib.rates import keep_floor, number_to_prune
from tests.conftest import PUBLIC, ROOT


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


def chosen(weight, rate, way, gamma=None, generator=None, **options):
    """The mask of one layer, with those of the options that the way has."""
    function = registry.load(registry.criterion(way).function, "pruning_way")
    options = {name: value for name, value in options.items() if name in options_of(function)}
    layer = Layer("layer", weight, None, gamma, rate, generator)
    return mask_of(layer, function, **options)


class TestAgainstTheText:
    @given(layers(), shares, shares, st.booleans(), st.sampled_from(["random", "l1"]))
    def test_way_a_takes_as_many_of_every_filter_and_level(self, given, rate, floor, strict, keep):
        weight, gamma = given
        mask = chosen(
            weight, float(rate), "A", gamma=gamma, floor=float(floor), strict_rate=strict,
            survivors=keep, generator=seeded(),
        )  # fmt: skip
        wanted = slow_counts(weight.numpy(), gamma.tolist(), rate, floor, "A", strict=strict)
        assert counts(mask, levels(delta_e(weight)), "A") == wanted

    @given(layers(), shares, shares, st.booleans(), st.sampled_from(["random", "l1"]))
    def test_way_b_takes_as_many_of_every_level(self, given, rate, floor, strict, keep):
        weight, _ = given
        mask = chosen(
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
        mask = chosen(weight, 0.9, "A", gamma=gamma, floor=floor, generator=seeded())
        assert counts(mask, level, "A") == {(1, 5): 1, (1, 0): 1, (0, 5): 1}
        # B: three of the five 5s, then one of the three 0s; half of 8 is 4
        mask = chosen(weight, 0.5, "B", floor=floor, generator=seeded())
        assert counts(mask, level, "B") == {5: 3, 0: 1}


class TestBinaryFloor:
    """What the published code keeps of a set where binary fractions are a little too large."""

    @pytest.mark.parametrize(
        ("largest", "exact", "binary"),
        [
            (0.6, 0.3, 0.30000000000000004),
            (0.7, 0.2, 0.20000000000000004),
            (0.8, 0.1, 0.09999999999999995),
        ],
    )
    def test_the_floor_itself(self, largest, exact, binary):
        assert keep_floor([0.4, largest]) == exact
        assert keep_floor([0.4, largest], binary=True) == pytest.approx(binary, abs=1e-17)

    @pytest.mark.parametrize(
        ("size", "stay"), [(9, (3, 3)), (10, (3, 4)), (11, (4, 4)), (20, (6, 7))]
    )
    @pytest.mark.parametrize("way", ["A", "B"])
    def test_of_a_multiple_of_ten_one_more_stays(self, way, size, stay):
        weight, gamma = torch.ones(1, size, 1, 1), torch.ones(1)  # one set
        for binary, wanted in zip((False, True), stay, strict=True):
            floor = keep_floor([0.6], binary)
            mask = chosen(weight, 0.95, way, gamma, seeded(), floor=floor, binary_floor=binary)
            assert int(mask.sum()) == wanted

    @pytest.mark.parametrize(
        ("cut", "way", "others", "true_cuts"),
        [
            ("53", "A", 41, (52.40, 52.29)),
            ("53", "B", 13, (52.48, 52.48)),
            ("60", "A", 54, (59.21, 59.21)),
            ("60", "B", 19, (59.21, 59.21)),
            ("71", "A", 0, (69.64, 69.64)),
            ("71", "B", 0, (71.48, 71.48)),
        ],
    )
    def test_of_resnet_56_so_many_convs_get_other_counts(self, public, cut, way, others, true_cuts):
        params = from_yaml(ROOT / f"params/cifar10/resnet_56-{way}-{cut}.yaml", resume=str(PUBLIC))
        rates = {name: r for name, r in zip(public.rates, params.rates, strict=True)}
        both = [
            prune(
                public.model, None, rates, way, convs=public.convs, binary_floor=binary,
            )
            for binary in (False, True)
        ]  # fmt: skip
        differing = 0
        for name in rates:
            level = levels(delta_e(conv_at(public.model, name).weight))
            found = [counts(masks[name], level, way) for masks in both]
            differing += found[0] != found[1]
        assert differing == others
        for masks, wanted in zip(both, true_cuts, strict=True):
            macs = counting.macs(public.model, torch.zeros(1, 3, 32, 32), masks)
            assert 100 * (1 - macs["left"] / macs["dense"]) == pytest.approx(wanted, abs=0.005)


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
        mask = chosen(weight, float(rate), way, gamma=gamma, generator=seeded())
        assert int((~mask).sum()) == int(Fraction(rate) * mask.numel())

    @given(layers(), shares, shares, st.sampled_from("AB"))
    def test_every_set_keeps_its_floor(self, given, rate, floor, way):
        weight, gamma = given
        mask = chosen(weight, float(rate), way, gamma=gamma, floor=float(floor), generator=seeded())
        level = levels(delta_e(weight))
        sizes = counts(torch.zeros_like(mask), level, way)
        for key, pruned in counts(mask, level, way).items():
            assert sizes[key] - pruned >= math.ceil(Fraction(floor) * sizes[key])

    @given(layers(), shares, shares, st.sampled_from("AB"))
    def test_strict_rate_reaches_n(self, given, rate, floor, way):
        weight, gamma = given
        mask = chosen(weight, float(rate), way, gamma=gamma, floor=float(floor), strict_rate=True)
        assert int((~mask).sum()) == int(Fraction(rate) * mask.numel())


class TestChance:
    @pytest.mark.parametrize("way", ["A", "B", "random", "bn", "matched"])
    def test_equal_seeds_equal_masks_and_other_seeds_others(self, way):
        weight, gamma = layer(12, 11)
        masks = [
            chosen(weight, 0.55, way, gamma=gamma, floor=0.2, generator=seeded(seed))
            for seed in (1, 1, 2)
        ]
        assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])

    @pytest.mark.parametrize(("way", "survivors"), [("l1", "random"), ("A", "l1"), ("B", "l1")])
    def test_magnitude_leaves_nothing_to_chance(self, way, survivors):
        weight, gamma = layer()
        one, two = (
            chosen(weight, 0.5, way, gamma=gamma, survivors=survivors, generator=seeded(s))
            for s in (1, 2)
        )
        assert torch.equal(one, two)

    @pytest.mark.parametrize("way", ["A", "B", "random"])
    def test_every_kernel_of_equal_ones_has_the_same_chance(self, way):
        weight, gamma = torch.ones(1, 8, 3, 3), torch.ones(1)
        gone = sum(
            (~chosen(weight, 0.5, way, gamma=gamma, generator=seeded(s))).int() for s in range(400)
        )
        # 400 draws of a half: 140 to 260 is six standard deviations
        assert gone.min() > 140 and gone.max() < 260 and gone.sum() == 1600


class TestCriteria:
    @given(layers(), shares)
    def test_l1_keeps_the_largest_of_topk(self, given, rate):
        weight, _ = given
        norm = weight.abs().sum((2, 3)).flatten()
        mask = chosen(weight, float(rate), "l1").flatten()
        kept = norm[mask].sort(descending=True).values
        assert torch.equal(kept, norm.topk(int(mask.sum())).values)

    @given(layers(), shares, shares, st.sampled_from("AB"))
    def test_l1_survivors_are_the_largest_of_their_set(self, given, rate, floor, way):
        weight, gamma = given
        mask = chosen(weight, float(rate), way, gamma=gamma, floor=float(floor), survivors="l1")
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
        mask = chosen(weight, 0.55, "bn", gamma=gamma, generator=seeded())
        # 11 of 20: filters 1 and 4 (equal, lower index first) whole, then three of filter 3
        assert (~mask).sum(1).tolist() == [0, 4, 0, 3, 4]

    def test_a_negative_scale_counts_by_its_magnitude(self):
        weight, _ = layer(2, 4)
        mask = chosen(weight, 0.5, "bn", gamma=torch.tensor([-5.0, 1.0]))
        assert (~mask).sum(1).tolist() == [0, 4]

    def test_matched_takes_as_many_of_every_norm_as_way_b(self):
        weight, _ = layer(12, 12)
        ours = chosen(weight, 0.6, "B", floor=0.2, generator=seeded())
        mask = chosen(weight, 0.6, "matched", floor=0.2, generator=seeded())
        order = weight.abs().sum((2, 3)).flatten().argsort()
        blocks = [kept.flatten()[order].view(9, 16).sum(1) for kept in (ours, mask)]
        assert torch.equal(*blocks) and not torch.equal(ours, mask)

    def test_matched_draws_evenly_among_kernels_alike(self):
        weight = torch.arange(1.0, 17.0).view(4, 4, 1, 1)  # one neighbourhood
        kept = sum(
            chosen(weight, 0.5, "matched", generator=seeded(seed)).double() for seed in range(2000)
        )
        # 8 of 16 stay: mean 1000, standard deviation 22
        assert (kept - 1000).abs().max() < 100


class TestPermutation:
    def test_of_filters_permutes_the_counts_of_way_a(self):
        weight, gamma = layer()
        order = torch.randperm(12, generator=seeded(3))
        one = chosen(weight, 0.6, "A", gamma=gamma, floor=0.2, generator=seeded())
        two = chosen(weight[order], 0.6, "A", gamma=gamma[order], floor=0.2, generator=seeded())
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
        one = chosen(weight, 0.6, way, gamma=gamma, floor=0.2, generator=seeded())
        two = chosen(weight[:, order], 0.6, way, gamma=gamma, floor=0.2, generator=seeded())
        assert counts(two, level[:, order], way) == counts(one, level, way)


class TestGlobalL1:
    """Two convs 3x3 and 1x1 on maps of 8x8: a kernel costs 576 and 64 multiply-adds."""

    @pytest.fixture
    def model(self):
        model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 1))
        model[0].weight.data = torch.tensor([0.2, -0.5]).view(2, 1, 1, 1).expand(2, 1, 3, 3).clone()
        model[1].weight.data = torch.tensor([0.1, 0.3, -0.4, 0.6]).view(2, 2, 1, 1)
        return model

    def test_the_smallest_go_wherever_they_are_while_the_cost_allows(self, model):
        # 704 may go: 0.1 (64), 0.2 (576), 0.3 (64); another one would be too many
        masks = prune(model, torch.zeros(1, 1, 8, 8), 0.5, "global_l1")
        assert masks["0"].tolist() == [[False], [True]]
        assert masks["1"].tolist() == [[False, False], [True, True]]

    def test_every_conv_keeps_its_largest_and_those_of_rate_0_all(self, model):
        masks = prune(model, torch.zeros(1, 1, 8, 8), {"0": 0.5, "1": 0.75}, "global_l1")
        assert masks["0"].tolist() == [[False], [True]]  # 768 in all
        assert masks["1"].tolist() == [[False, False], [False, True]]
        model[0].weight.data *= 0.01  # its largest stays, though it is the smallest but one
        masks = prune(model, torch.zeros(1, 1, 8, 8), {"0": 0.9, "1": 0.75}, "global_l1")
        assert masks["0"].tolist() == [[False], [True]]
        masks = prune(model, torch.zeros(1, 1, 8, 8), {"0": 0.0, "1": 0.5}, "global_l1")
        assert masks["0"].all() and masks["1"].tolist() == [[False, False], [True, True]]

    def test_weights_that_are_not_finite_are_named(self, model):
        model[1].weight.data[0] = float("nan")
        with pytest.raises(ValueError, match="1: weights hold NaN"):
            prune(model, torch.zeros(1, 1, 8, 8), 0.5, "global_l1")

    def test_a_conv_of_which_one_kernel_is_left_is_named(self, model):
        with pytest.warns(UserWarning, match="of 2 convs one kernel each is left, 0 first"):
            prune(model, torch.zeros(1, 1, 8, 8), {"0": 0.5, "1": 0.75}, "global_l1")

    @pytest.mark.parametrize("way", ["global_l1", "l1"])
    def test_what_is_zero_already_counts_as_pruned_and_first(self, model, way):
        model[1].weight.data[:, 0] = 0
        with pytest.warns(UserWarning, match="2 kernels of 1 convs are zero already"):
            masks = prune(model, torch.zeros(1, 1, 8, 8), 0.25, way)
        assert masks["1"].tolist() == [[False, True], [False, True]] and masks["0"].all()
