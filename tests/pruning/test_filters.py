"""Filter pruning as masks: whole rows and columns, as many MACs, and the smaller network itself."""

import copy

import pytest
import torch
from torch import nn

from explib import models
from explib.errors import ParamError
from explib.params import Params
from explib.pruning import counting, layers
from explib.pruning import masks as masking
from explib.pruning.criteria import prune
from explib.study.networks import Dense, choose_masks

pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
from explib.pruning import filters
from tests.conftest import image


@pytest.mark.parametrize("arch", ["resnet_56", "vgg_16_bn", "googlenet"])
def test_filters_go_whole_and_leave_as_many_macs(arch):
    torch.manual_seed(0)
    model = models.build(arch, 10)
    convs = layers.find_convs(model, image(32))
    wanted = counting.macs(model, image(32), prune(model, None, 0.5, "random", convs=convs))["left"]
    found = filters.filter_masks(model, image(32), wanted, convs)
    left = counting.macs(model, image(32), found)["left"]
    assert 0.99 * wanted < left <= wanted
    assert model.training  # as it was
    for mask in found.values():  # rows times columns
        assert torch.equal(mask, mask.any(1)[:, None] & mask.any(0)[None])


def test_it_is_the_smaller_dense_network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3)
    )
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flat", nn.Flatten())
    model.add_module("head", nn.Linear(5, 10))
    convs = layers.find_convs(model, image(8))
    half = counting.macs(model, image(8))["dense"] // 2
    found = filters.filter_masks(model, image(8), half, convs)
    rows, columns = found["0"].any(1), found["3"].any(0)
    assert torch.equal(rows, columns) and 0 < int(rows.sum()) < 8
    masked, small = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    masking.apply(masked, found)
    # the last conv's filters feed the linear layer only: they stay in place here
    small[0].weight.data, small[0].bias.data = small[0].weight[rows], small[0].bias[rows]
    for name in ("weight", "bias", "running_mean", "running_var"):
        setattr(small[1], name, nn.Parameter(getattr(model[1], name)[rows], requires_grad=False)
                if name in ("weight", "bias") else getattr(model[1], name)[rows])  # fmt: skip
    kept = found["3"].any(1)
    weight = model[3].weight[:, columns].clone()
    weight[~kept] = 0
    small[3].weight.data = weight.detach()
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(masked(x), small(x))


@pytest.mark.parametrize("arch", ["resnet_56", "vgg_16_bn"])
def test_narrowed_it_computes_what_the_masked_network_does(arch):
    torch.manual_seed(0)
    model = models.build(arch, 10)
    for module in model.modules():  # biases, so that an empty filter is not nothing
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, -1, 1)
    convs = layers.find_convs(model, image(32))
    wanted = counting.macs(model, image(32))["dense"] // 2
    found = filters.filter_masks(model, image(32), wanted, convs)
    masking.apply(model, found)
    small = filters.narrowed(model, found, image(32))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(small(x), model.eval()(x), rtol=1e-4, atol=1e-4)
    left = counting.macs(small, image(32))["dense"]
    assert left <= wanted if arch == "resnet_56" else left < 1.02 * wanted
    assert counting.macs(model, image(32))["dense"] == 2 * wanted  # a copy


def test_whole_filters_are_told_from_kernels():
    model = models.build("resnet_56", 10)
    convs = layers.find_convs(model, image(32))
    kernels = prune(model, None, 0.5, "random", convs=convs)
    whole = filters.filter_masks(
        model, image(32), counting.macs(model, image(32))["dense"] // 2, convs
    )
    assert filters.whole_filters(whole)
    assert not filters.whole_filters(kernels) and not filters.whole_filters({})


def test_the_weakest_filters_go():
    torch.manual_seed(0)
    model = models.build("vgg_16_bn", 10)
    convs = layers.find_convs(model, image(32))
    with torch.no_grad():  # filter 7 of the first conv and all that read it are nearly nothing
        model.features.conv0.weight[7] = 1e-6
        model.features.norm0.weight[7] = model.features.norm0.bias[7] = 1e-6
        model.features.conv1.weight[:, 7] = 1e-6
    dense = counting.macs(model, image(32))["dense"]
    found = filters.filter_masks(model, image(32), int(0.9 * dense), convs)
    assert not found["features.conv0"][7].any() and not found["features.conv1"][:, 7].any()


def test_more_than_the_inner_filters_is_an_error():
    model = models.build("resnet_56", 10)
    with pytest.raises(ValueError, match="filters: 1000 MACs are to be left, but"):
        filters.filter_masks(model, image(32), 1000, layers.find_convs(model, image(32)))


def test_a_configuration_gets_the_macs_of_its_rates():
    params = Params(pruning_way="filters", compress_rate="[0.6]", dataset="cifar10")
    torch.manual_seed(0)
    model = models.build("resnet_56", 10)
    convs = layers.find_convs(model, image(32))
    dense = Dense(model, convs, {conv.name: 0.6 for conv in convs})
    wanted = counting.macs(model, image(32), prune(model, None, 0.6, "B", convs=convs))["left"]
    left = counting.macs(model, image(32), choose_masks(params, dense))["left"]
    assert 0.99 * wanted < left <= wanted


def test_layerwise_filters_are_refused():
    with pytest.raises(ParamError, match="schedule: 'layerwise' is not for filters"):
        Params(pruning_way="filters", schedule="layerwise")
