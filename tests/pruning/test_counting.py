"""Multiply-adds and weights: the published table twice over, masks by hand, ptflops."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from explib import models
from explib.pruning import counting
from explib.pruning import masks as masking
from explib.pruning.criteria import prune
from explib.pruning.layers import find_convs
from explib.rates import parse_rates
from explib.study import published as published_figures
from tests.conftest import image

VGG, R56, R110 = "vgg_16_bn", "resnet_56", "resnet_110"
# arch, rates, published cut %, the convention's count M, MACs left M, true cut %, as in the
# method, section 5, rounded; GoogLeNet's last two from kernels (there from whole filters)
PUBLISHED = [
    (VGG, "[0.1]*2+[0.4]*2+[0.5]*2+[0.6]*2+[0.7]*3+[0.6]*2", 53.1, 147.16, 153.81, 50.93),
    (VGG, "[0.1]*2+[0.5]*2+[0.6]*2+[0.7]*2+[0.8]*3+[0.6]*2", 60.8, 122.88, 128.33, 59.06),
    (VGG, "[0.3]*2+[0.6]*2+[0.7]*2+[0.8]*2+[0.9]*3+[0.6]*2", 70.9, 91.30, 94.95, 69.71),
    (R56, "[0.0]+[0.4]*17+[0.5]*2+[0.6]*16+[0.4]*2+[0.6]*17", 53.5, 58.27, 59.63, 52.48),
    (R56, "[0.0]+[0.5]*17+[0.5]*2+[0.6]*16+[0.5]*2+[0.7]*17", 60.5, 49.50, 51.18, 59.21),
    (R56, "[0.0]+[0.7]*17+[0.4]*2+[0.7]*16+[0.5]*2+[0.8]*17", 71.9, 35.19, 35.79, 71.48),
    (R110, "[0.0]+[0.6]*35+[0.5]*2+[0.60]*34+[0.6]*2+[0.6]*35", 60.1, 101.00, 102.01, 59.66),
    (R110, "[0.1]+[0.7]*35+[0.6]*2+[0.70]*34+[0.7]*2+[0.7]*35", 70.0, 76.02, 76.63, 69.70),
    ("googlenet", "[0.1]+[0.5]+[0.6]+[0.8]*4+[0.7]+[0.8]*2", 62.1, 576.46, 601.72, 60.46),
    ("googlenet", "[0.1]+[0.6]+[0.7]+[0.9]*4+[0.8]+[0.9]*2", 70.4, 450.70, 468.83, 69.19),
    ("resnet_50", "[0.1]+[0.4]*10+[0.6]*13+[0.5]*19+[0.5]*10", 53.05, 1971.1, 2057.0, 49.70),
    ("resnet_50", "[0.4]+[0.7]*14+[0.6]*13+[0.5]*15+[0.5]*10", 60.0, 1677.1, 1747.1, 57.27),
]


@pytest.fixture(scope="module")
def counted():
    keys = ("arch", "compress_rate", "cut_pct")
    return published_figures.published_rows(
        [dict(zip(keys, row[:3], strict=True)) for row in PUBLISHED]
    )


@pytest.mark.parametrize("index", range(12), ids=lambda i: f"{PUBLISHED[i][0]}-{PUBLISHED[i][2]}")
def test_the_twelve_published_configurations(counted, index):
    arch, _, _, convention, left, cut = PUBLISHED[index]
    row = counted.iloc[index]
    digits = 1 if arch == "resnet_50" else 2
    assert round(row["convention M"], digits) == convention
    assert round(row["MACs left M"], digits) == left
    assert round(row["true cut %"], 2) == cut


def test_the_convention_gives_the_published_cuts_but_for_resnet_50(counted):
    for row, (arch, _, published, *_) in zip(counted.iloc, PUBLISHED, strict=True):
        gap = abs(row["convention cut %"] - published)
        assert gap < (1.3 if arch == "resnet_50" else 0.1), arch
    assert round(counted.iloc[10]["convention cut %"], 2) == 51.80
    assert round(counted.iloc[11]["convention cut %"], 2) == 58.99


def test_an_unpruned_network_is_credited_with_the_mixed_units():
    row = published_figures.published_rows(
        [{"arch": R56, "compress_rate": "[0.0]", "cut_pct": 0}]
    ).iloc[0]
    assert row["convention cut %"] == pytest.approx(100 * (1 - 1e6 / 1024**2), abs=1e-2)
    assert row["true cut %"] == 0


@pytest.mark.parametrize(
    ("index", "millions"), [(0, 5.35), (1, 4.40), (2, 3.45), (8, 2.01), (9, 1.51)]
)
def test_the_published_parameters(index, millions):
    arch, rates = PUBLISHED[index][:2]
    with torch.device("meta"):
        model = models.build(arch)
    convs = find_convs(model, image(32))
    by_name = models.rates_by_name(arch, [conv.name for conv in convs], parse_rates(rates))
    assert (
        round(published_figures.published_convention(model, convs, by_name)["weights_m"], 2)
        == millions
    )


def test_masks_by_hand(net):
    convs = find_convs(net, image(8))
    # 8*3*9*64 + 6*8*9*16 + 6*9*16 (by depth) + 8*6*16 + 8*10
    dense = 13824 + 6912 + 864 + 768 + 80
    assert counting.macs(net, image(8)) == {"dense": dense, "left": dense}
    masks = {"0": torch.ones(8, 3, dtype=torch.bool), "6": torch.eye(8, 6, dtype=torch.bool)}
    masks["0"][2:4, 1] = False
    # two kernels of 9*64, and 42 of 16
    left = dense - 2 * 576 - 42 * 16
    assert counting.macs(net, image(8), masks) == {"dense": dense, "left": left}
    # 216 + 16 + 432+6 + 54+6 + 48+8 + 16 + 80+10
    assert counting.weights(net, masks) == {"dense": 892, "left": 892 - 2 * 9 - 42}
    row = counting.layer_table(convs, masks, {"0": 0.1})[0]
    assert (row["kernels"], row["rate"], row["nominal"], row["pruned"]) == (24, 0.1, 2, 2)
    assert (row["macs_dense"], row["macs"]) == (13824, 13824 - 1152)
    assert all(type(row[key]) is int for key in ("kernels", "nominal", "pruned", "macs"))


def test_counts_are_those_of_the_masks_not_of_the_rates():
    torch.manual_seed(0)
    model = models.build(R56)
    convs = find_convs(model, image(32))
    masks = prune(model, None, 0.5, "B", convs=convs, floor=0.0)
    left = counting.macs(model, image(32), masks)["left"]
    by_hand = 640
    for conv in convs:
        by_hand += int(masks[conv.name].sum()) * 9 * conv.out_h * conv.out_w
    assert left == by_hand
    table = published_figures.published_rows(
        [{"arch": R56, "compress_rate": "[0.5]", "cut_pct": 0}]
    )
    assert left / 1e6 == pytest.approx(table["MACs left M"][0])
    assert counting.weights(model, masks)["left"] / 1e6 == pytest.approx(table["weights left M"][0])


class TestMasks:
    def test_by_default_those_that_the_network_has(self, net):
        masks = {"0": torch.ones(8, 3, dtype=torch.bool), "3": torch.eye(6, 8, dtype=torch.bool)}
        masks["0"][1] = False
        masking.apply(net, masks)
        found = counting.macs(net, image(8))
        assert found == counting.macs(net, image(8), masks)
        assert found["dense"] - found["left"] == 3 * 576 + 42 * 144
        assert counting.macs(net, image(8), {})["left"] == found["dense"]
        assert counting.weights(net) == counting.weights(net, masks)
        assert counting.weights(net, {})["left"] == counting.weights(net)["dense"]

    @pytest.mark.parametrize(
        "count", [counting.weights, lambda m, k: counting.macs(m, image(8), k)]
    )
    def test_those_that_do_not_fit_are_refused_as_by_hold(self, net, count):
        wrapped = prune(nn.DataParallel(net), image(8), 0.5)
        with pytest.raises(ValueError, match=r"'module\.0' is no conv .*; here it is '0'"):
            count(net, wrapped)
        with pytest.raises(
            ValueError, match=r"0 has a torch.bool mask \(16, 3\); give bool \(8, 3\)"
        ):
            count(net, {"0": torch.ones(16, 3, dtype=torch.bool)})
        assert count(nn.DataParallel(net), wrapped) == count(net, prune(net, image(8), 0.5))
        assert count(net, {"0": np.ones((8, 3), bool)})["left"] > 0

    def test_a_mask_of_what_does_not_run_is_refused(self):
        model = nn.Module()
        model.used, model.spare = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        model.forward = model.used.forward
        with pytest.raises(ValueError, match="masks: spare does not run with these example inputs"):
            counting.macs(model, image(8), {"spare": torch.ones(4, 3, dtype=torch.bool)})


def test_counting_leaves_the_mode_as_it_was(net):
    net.train()
    counting.macs(net, image(8))
    published_figures.by_ptflops(net, image(8))
    assert net.training and not any(module._forward_hooks for module in net.modules())


def test_a_linear_layer_on_every_place_counts_once_per_place():
    class Places(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 5)

        def forward(self, x):
            return self.linear(x.permute(0, 2, 3, 1))

    assert counting.macs(Places(), image(4)) == {"dense": 240, "left": 240}  # 16 * 3 * 5


@pytest.mark.parametrize("arch", [VGG, R56, "googlenet"])
def test_ptflops_counts_the_same_multiply_adds(arch):
    model = models.build(arch)
    convs = find_convs(model, image(32))
    counted = published_figures.by_ptflops(model, image(32))
    assert counted["macs"] == counting.macs(model, image(32))["dense"]
    assert counted["total"] == counted["macs"] + counted["bias"] + counted["other"]
    bias = 0
    for conv in convs:
        if model.get_submodule(conv.name).bias is not None:
            bias += conv.filters * conv.out_h * conv.out_w
    bias += sum(m.out_features for m in model.modules() if isinstance(m, nn.Linear))
    assert counted["bias"] == bias


def test_a_network_of_torchvision_agrees_with_its_published_count():
    model = torchvision.models.get_model("resnet18", weights=None)
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta
    count = counting.macs(model, image(224))["dense"]
    assert round(count / 1e9, 3) == weights["_ops"]
    assert counting.weights(model)["dense"] == weights["num_params"]
