"""Masks of whole networks by any criterion: what it may return, what is refused."""

from collections import Counter

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from explib import models, registry
from explib.errors import ParamError
from explib.pruning import counting, holding
from explib.pruning import layers as layer_finding
from explib.pruning import masks as masking
from explib.pruning.criteria import prune, score
from explib.pruning.layers import prunable
from explib.pruning.scores import delta_e, levels
from explib.rates import keep_floor, number_to_prune, parse_rates
from tests.conftest import image
from tests.pruning.test_ways import counts, seeded

RATES_71 = "[0.0]+[0.7]*17+[0.4]*2+[0.7]*16+[0.5]*2+[0.8]*17"
WAYS = [name for name, entry in registry.CRITERIA.items() if not entry.whole_network]


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

    def test_an_unknown_criterion_lists_the_known(self, net):
        known = (
            r"^criterion: 'C' is unknown; known: 'A', 'B', 'random', 'l1', 'bn', .*module:function"
        )
        with pytest.raises(ParamError, match=known):
            prune(net, image(8), 0.5, "C")
        with pytest.raises(ParamError, match="did you mean 'matched'"):
            prune(net, image(8), 0.5, "match")

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
            ({"survivors": "L1"}, "survivors: 'L1' is unknown; .*known: 'random', 'l1'"),
            (
                {"floors": 1},
                "floors: is not for criterion 'B'; it takes bias_in_score, binary_floor, floor, .*",
            ),
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
        with pytest.raises(ParamError, match=r"^rate: 2 for 3 prunable convs; give one, or 3$"):
            prune(net, image(8), [0.5, 0.5])

    def test_a_misspelt_conv_is_told_its_name(self):
        model = torchvision.models.get_model("resnet18", weights=None)
        with pytest.raises(ParamError, match=r"did you mean 'layer1\.0\.conv1'\?"):
            prune(model, image(32), {"layer1.0.convv1": 0.5})


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
            floor = 0.0 if way in ("A", "B", "matched") else None
            masks = prune(model, None, 0.3, way, floor=floor, convs=convs)
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


def peak(layer):
    return layer.weight.abs().amax((2, 3))


class TestOwnCriteria:
    """What a function of the user's may be, and what it sees."""

    def test_the_lowest_scores_go(self, net):
        for name, mask in prune(net, image(8), 0.4, peak).items():
            score = net.get_submodule(name).weight.abs().amax((2, 3))
            assert int((~mask).sum()) == number_to_prune(0.4, mask.numel())
            assert score[~mask].max() <= score[mask].min()

    def test_of_equal_scores_the_lower_index_goes(self, net):
        mask = prune(net, image(8), {"3": 0.25}, lambda layer: torch.zeros(6, 8))["3"]
        assert mask.flatten().tolist() == [False] * 12 + [True] * 36

    def test_scores_may_be_whole_numbers_infinite_or_of_numpy(self, net):
        def scores(layer):
            return np.arange(48).reshape(6, 8)

        def last_row_first(layer):
            return torch.tensor([1.0, 2, 3, 4, float("inf"), float("-inf")])[:, None].expand(6, 8)

        mask = prune(net, image(8), {"3": 0.5}, scores)["3"]
        assert (~mask).sum(1).tolist() == [8, 8, 8, 0, 0, 0]
        mask = prune(net, image(8), {"3": 0.5}, last_row_first)["3"]
        assert (~mask).sum(1).tolist() == [8, 8, 0, 0, 0, 8]

    def test_a_mask_is_taken_as_it_is(self, net):
        masks = prune(net, image(8), 0.5, lambda layer: layer.weight.sum((2, 3)) > 0)
        for name, mask in masks.items():
            assert torch.equal(mask, net.get_submodule(name).weight.sum((2, 3)) > 0)

    def test_at_rate_0_a_conv_stays_whole(self, net):
        masks = prune(net, image(8), [0.5, 0.0, 0.5], lambda layer: layer.weight[:, :, 0, 0] > 0)
        assert masks["3"].all() and not masks["0"].all()

    def test_it_sees_the_layer(self, net):
        seen = {}

        def look(layer):
            seen[layer.name] = layer
            return peak(layer)

        prune(net, image(8), {"0": 0.5, "3": 0.25}, look, seed=3)
        first, other = seen["0"], seen["3"]
        assert torch.equal(first.weight, net[0].weight) and not first.weight.requires_grad
        assert first.bias is None and torch.equal(other.bias, net[3].bias)
        assert torch.equal(first.gamma, net[1].weight) and other.gamma is None
        assert (first.rate, first.to_prune, other.to_prune) == (0.5, 12, 12)
        torch.testing.assert_close(first.scale, net[1].weight.abs())
        draws = [torch.rand(3, generator=layer.generator) for layer in (first, other)]
        prune(net, image(8), {"0": 0.5, "3": 0.25}, look, seed=3)
        assert torch.equal(draws[0], torch.rand(3, generator=seen["0"].generator))
        assert not torch.equal(*draws)

    def test_its_options_are_handed_on_by_name(self, net):
        def power(layer, p=1.0):
            return layer.weight.abs().pow(p).sum((2, 3))

        by_norm = prune(net, image(8), 0.5, "l1")
        assert all(torch.equal(by_norm[k], m) for k, m in prune(net, image(8), 0.5, power).items())
        other = prune(net, image(8), 0.5, power, p=8.0)
        assert not all(torch.equal(by_norm[name], mask) for name, mask in other.items())
        with pytest.raises(ParamError, match=r"^q: is not for criterion 'power'; it takes p$"):
            prune(net, image(8), 0.5, power, q=2)
        with pytest.raises(
            ParamError, match=r"^floor: is not for criterion 'L1 kernels'; .* none$"
        ):
            prune(net, image(8), 0.5, "l1", floor=0.2)

    @pytest.mark.parametrize(
        ("returned", "message"),
        [
            (
                torch.zeros(6),
                r"returned torch.float32 \(6,\); give scores or a boolean mask, \(6, 8\)",
            ),
            (torch.zeros(8, 6), r"returned torch.float32 \(8, 6\)"),
            (torch.zeros(6, 8, dtype=torch.complex64), "returned torch.complex64"),
            (None, "returned a NoneType"),
            (torch.full((6, 8), float("nan")), "scores hold NaN"),
            (torch.zeros(6, 8, dtype=torch.bool), "prunes every kernel; keep at least one"),
        ],
    )
    def test_what_is_no_answer_names_the_layer(self, net, returned, message):
        with pytest.raises(ValueError, match=f"^3: the criterion('s|) {message}"):
            prune(net, image(8), {"3": 0.5}, lambda layer: returned)

    def test_what_is_no_function(self, net):
        with pytest.raises(ParamError, match=r"^criterion: 3; give a function or a name$"):
            prune(net, image(8), 0.5, 3)


class TestScore:
    def test_of_both_ways_is_the_sum_of_a_kernels_elements(self, net):
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        found = score(net, image(8))
        convs = prunable(layer_finding.find_convs(net, image(8)))  # all but the one by depth
        assert list(found) == [conv.name for conv in convs]
        for name, scores in found.items():
            weight = net.get_submodule(name).weight.detach()
            torch.testing.assert_close(scores, weight.double().sum((2, 3)))
        assert all(torch.equal(one, two) for one, two in zip(
            score(net, image(8), "A").values(), found.values(), strict=True
        ))  # fmt: skip
        with_bias = score(net, image(8), "A", bias_in_score=True)["3"]
        assert torch.equal(with_bias, found["3"] + net[3].bias.detach().double()[:, None])
        assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())

    @pytest.mark.parametrize("criterion", ["l1", "bn", peak])
    def test_the_lowest_are_those_that_are_pruned(self, net, criterion):
        rates = {"0": 0.4, "6": 0.7}
        masks = prune(net, image(8), rates, criterion, seed=3)
        convs = [c for c in layer_finding.find_convs(net, image(8)) if c.name in rates]
        if criterion == "bn":  # of a conv without BatchNorm there is none
            with pytest.raises(ValueError, match=r"^3: no BatchNorm takes this conv's output"):
                score(net, image(8), criterion, seed=3)
            return
        found = score(net, None, criterion, seed=3, convs=convs)
        for name, mask in masks.items():
            assert found[name][~mask].max() <= found[name][mask].min()

    def test_chance_is_that_of_prune(self, net):
        masks = prune(net[:2], image(8), 0.5, "bn", seed=3)
        found = score(net[:2], image(8), "bn", seed=3)
        assert found["0"][~masks["0"]].max() < found["0"][masks["0"]].min()

    @pytest.mark.parametrize("criterion", ["random", "matched", "filters"])
    def test_what_has_no_scores_is_one_line(self, net, criterion):
        label = registry.CRITERIA[criterion].label
        with pytest.raises(ParamError, match=f"^criterion: {label!r} chooses masks.*with scores$"):
            score(net, image(8), criterion)

    def test_options_and_inputs_that_cannot_be(self, net):
        with pytest.raises(ParamError, match=r"^survivors: is not for criterion 'B'; it takes bia"):
            score(net, image(8), "B", survivors="l1")
        with pytest.raises(ParamError, match=r"^example_inputs: None"):
            score(net, None)
        with torch.no_grad():
            net[6].weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"^6: weights hold NaN"):
            score(net, image(8), "l1")


class TestKernelsThatAreZeroAlready:
    @pytest.fixture
    def pruned(self, net):
        """Half of each conv's kernels are zero."""
        masks = prune(net, image(8), 0.5, "random", seed=3)
        masking.apply(net, masks)
        return net, masks

    @pytest.mark.parametrize("criterion", ["A", "B", "l1", "random", "matched"])
    def test_go_first(self, pruned, criterion):
        net, before = pruned
        rates, options = {"0": 0.5, "6": 0.8}, {}
        if criterion in "AB":
            options = {"floor": 0.0}
        with pytest.warns(UserWarning, match=r"^prune: 36 kernels of 2 convs are zero already"):
            masks = prune(net, image(8), rates, criterion, **options)
        assert torch.equal(masks["0"], before["0"])  # what was pruned is all that was asked for
        assert int((~masks["6"]).sum()) == number_to_prune(0.8, 48)
        assert not (masks["6"] & ~before["6"]).any()

    @pytest.mark.filterwarnings("ignore:prune")
    def test_more_than_the_rate_asks_for_stay_pruned(self, pruned):
        net, before = pruned
        for rate in (0.0, 0.2):
            masks = prune(net, image(8), rate, "l1")
            assert all(torch.equal(masks[name], mask) for name, mask in before.items())

    @pytest.mark.filterwarnings("ignore:prune")
    def test_a_cell_that_runs_twice_says_what_is_zero(self, net):
        for _ in range(2):
            masks = prune(net, image(8), 0.5, "B", seed=1)
            holding.hold(net, masks)
        zero = {name: ~net.get_submodule(name).weight.flatten(2).any(2) for name in masks}
        assert all(torch.equal(~mask, zero[name]) for name, mask in masks.items())
        assert masking.sparsity(masks) <= 0.5

    def test_a_layer_of_zeros_only_has_none(self, net, recwarn):
        nn.init.zeros_(net[6].weight)
        masks = prune(net, image(8), 0.5, "random")
        assert int((~masks["6"]).sum()) == 24 and not recwarn.list


@pytest.mark.parametrize("kind", [np.array, torch.tensor, np.float32, tuple])
def test_rates_as_arrays_simply_work(net, kind):
    rate = 0.5 if kind is np.float32 else [0.5, 0.5, 0.5]
    found = prune(net, image(8), kind(rate))
    assert all(torch.equal(found[n], mask) for n, mask in prune(net, image(8), 0.5).items())


def test_a_norm_without_a_scale_is_named(net):
    net[1] = nn.BatchNorm2d(8, affine=False)
    for criterion in ("A", "bn"):
        with pytest.raises(ValueError, match=r"^0: its BatchNorm 1 has no scale \(affine=False\)"):
            prune(net, image(8), {"0": 0.5}, criterion)


def test_a_criterion_that_computes_in_place_leaves_the_network_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def centred(layer):
        layer.bias.zero_()
        kernels = layer.weight
        kernels -= kernels.mean((2, 3), keepdim=True)
        return kernels.abs_().sum((2, 3))

    prune(model, torch.randn(2, 3, 9, 9), rate=0.5, criterion=centred)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: prune(x, m), "model: a Tensor; give an nn.Module, then what it is"),
        (lambda m, x: prune(type(m), x), r"the class Sequential; give a network, Sequ"),
        (lambda m, x: masking.apply(m, ["0"]), r"masks: a \[str\]; give \{name: bool"),
        (lambda m, x: masking.sparsity(m), r"masks: a Sequential; give \{name: bool"),
        (lambda m, x: counting.macs(m, {}, x), r"masks: a \(2, 3, 9, 9\); give \{name: bool"),
    ],
)
def test_arguments_in_another_order_are_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 9, 9))
