"""The five networks, finding convs in any network, and loading weights as found in the wild."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from explib import models, registry
from explib.errors import ParamError
from explib.models import resnet
from explib.pruning import counting
from explib.pruning.checkpoints import load_weights
from explib.pruning.layers import find_convs
from explib.study import published
from tests.conftest import image

# arch: (convs, millions of multiply-adds, parameters)
KNOWN = {
    "vgg_16_bn": (13, 313.46, 14_991_946),
    "resnet_56": (55, 125.49, 853_018),
    "resnet_110": (109, 252.89, 1_727_962),
    "googlenet": (64, 1521.76, None),
    "resnet_50": (53, 4089.18, 25_557_032),
}


@pytest.fixture(scope="module", params=KNOWN)
def arch(request):
    torch.manual_seed(0)
    model = models.build(request.param)
    size = registry.NETWORKS[request.param].image_size
    return request.param, model, find_convs(model, image(size))


class TestArchs:
    def test_all_are_known(self):
        assert set(registry.NETWORKS) == set(KNOWN)

    def test_convs_macs_and_parameters(self, arch):
        name, model, convs = arch
        size = registry.NETWORKS[name].image_size
        count, millions, parameters = KNOWN[name]
        assert len(convs) == count
        assert round(counting.macs(model, image(size))["dense"] / 1e6, 2) == millions
        if parameters:
            assert counting.weights(model)["dense"] == parameters

    def test_every_conv_has_the_norm_of_its_own_output(self, arch):
        _, model, convs = arch
        norms = [conv.norm for conv in convs]
        wanted = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
        assert sorted(norms) == sorted(wanted)
        for conv in convs:
            assert model.get_submodule(conv.norm).num_features == conv.filters

    def test_convs_come_in_forward_order(self, arch):
        name, _, convs = arch
        first = {"vgg_16_bn": "features.conv0", "googlenet": "pre_layers.0"}
        assert convs[0].name == first.get(name, "conv1")

    def test_has_a_rate_for_every_conv_that_is_pruned(self, arch):
        name, _, convs = arch
        needed = 10 if name == "googlenet" else KNOWN[name][0]
        rates = models.rates_by_name(name, [conv.name for conv in convs], [0.1] * needed)
        assert set(rates) <= {conv.name for conv in convs}
        with pytest.raises(ParamError, match=f"{needed + 1} rates for {needed} "):
            models.rates_by_name(name, [conv.name for conv in convs], [0.1] * (needed + 1))

    def test_gives_ten_classes_when_asked(self, arch):
        model = models.build(arch[0], 10).eval()
        size = 64 if arch[0] == "resnet_50" else 32
        with torch.no_grad():
            assert model(torch.zeros(1, 3, size, size)).shape == (1, 10)

    def test_the_seed_fixes_the_weights(self, arch):
        torch.manual_seed(0)
        again = models.build(arch[0])
        for name, tensor in arch[1].state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name]), name


def posits(classes):
    return nn.Linear(1, classes)


def test_an_arch_that_takes_no_number_of_classes_is_told_its_name():
    with pytest.raises(ParamError, match=r"arch: '.*:posits' takes no num_classes; give"):
        models.build("tests.models.test_models:posits")


def test_an_unknown_arch_lists_the_known():
    with pytest.raises(ParamError, match="'resnet_18' is unknown; did you mean 'resnet_110'"):
        models.build("resnet_18")


def test_googlenet_rates_leave_the_reductions_dense():
    model = models.build("googlenet")
    convs = find_convs(model, image(32))
    rates = models.rates_by_name(
        "googlenet", [conv.name for conv in convs], [k / 10 for k in range(10)]
    )
    dense = {conv.name for conv in convs} - set(rates)
    assert len(dense) == 18 and all(models_kernel(model, name) == (1, 1) for name in dense)
    assert sum(rate == 0.9 for rate in rates.values()) == 5
    assert {name for name, rate in rates.items() if rate == 0.9} == {
        f"inception_b5.{branch}"
        for branch in ("branch1.0", "branch2.3", "branch3.3", "branch3.6", "branch4.1")
    }


def models_kernel(model, name):
    return model.get_submodule(name).kernel_size


def test_resnet_50_rates_put_the_shortcut_first_in_its_stage():
    with torch.device("meta"):
        convs = find_convs(models.build("resnet_50"), image(224))
    names = list(models.rates_by_name("resnet_50", [conv.name for conv in convs], [0.1] * 53))
    assert names[:3] == ["conv1", "layer1.0.downsample.0", "layer1.0.conv1"]
    assert names[11:13] == ["layer2.0.downsample.0", "layer2.0.conv1"]
    assert names[-1] == "layer4.2.conv3"


def test_the_shortcut_takes_every_second_pixel_and_pads_the_channels():
    block = resnet.BasicBlock(2, 6, 2).eval()
    with torch.no_grad():
        block.conv2.weight.zero_()
    x = torch.arange(1, 33.0).reshape(1, 2, 4, 4)
    # rows and columns 0 and 2 of each channel, two channels of zeros on either side
    wanted = torch.zeros(1, 6, 2, 2)
    wanted[0, 2] = torch.tensor([[1.0, 3], [9, 11]])
    wanted[0, 3] = torch.tensor([[17.0, 19], [25, 27]])
    assert torch.equal(block(x), wanted)


def test_a_block_by_hand():
    torch.manual_seed(0)
    block = resnet.BasicBlock(4, 4, 1).eval()
    block.bn1.running_mean.fill_(0.1)
    x = torch.randn(2, 4, 5, 5)
    scale = (1 + 1e-5) ** -0.5
    y = F.relu((F.conv2d(x, block.conv1.weight, padding=1) - 0.1) * scale)
    y = F.conv2d(y, block.conv2.weight, padding=1) * scale
    torch.testing.assert_close(block(x), F.relu(x + y))


class TestFindConvs:
    def test_leaves_modes_and_statistics_as_they_were(self, net):
        net.train()
        net[1].eval()
        before = copy.deepcopy(net.state_dict())
        find_convs(net, image(8))
        assert net.training and not net[1].training and net[7].training
        for name, tensor in net.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        assert not any(module._forward_hooks for module in net.modules())
        assert not any(module._forward_pre_hooks for module in net.modules())

    def test_cleans_up_after_a_network_that_fails(self, net):
        net.train()
        net[10] = nn.Linear(5, 10)
        with pytest.raises(ValueError, match=r"Sequential does not take \(1, 3, 8, 8\) \(mat1"):
            find_convs(net, image(8))
        assert net.training and not any(module._forward_hooks for module in net.modules())

    def test_sizes_by_hand(self, net):
        first, second, depthwise, last = find_convs(net, image(8))
        assert (first.name, first.norm, first.filters, first.channels) == ("0", "1", 8, 3)
        assert (first.kernel, first.out_h, first.out_w, first.kernel_macs) == ((3, 3), 8, 8, 576)
        assert (second.norm, second.out_h, second.kernels) == (None, 4, 48)
        assert (depthwise.groups, depthwise.channels, depthwise.kernels) == (6, 1, 6)
        assert (last.norm, last.kernel) == ("7", (1, 1))

    def test_a_norm_behind_an_activation_is_not_the_convs(self):
        net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.BatchNorm2d(4))
        assert find_convs(net, image(4))[0].norm is None

    def test_a_conv_that_is_visited_twice_is_listed_once(self):
        conv = nn.Conv2d(3, 3, 1)
        assert [c.name for c in find_convs(nn.Sequential(conv, nn.ReLU(), conv), image(4))] == ["0"]

    def test_densenet_pairs_only_what_follows_directly(self):
        model = torchvision.models.get_model("densenet121", weights=None)
        norms = {conv.name: conv.norm for conv in find_convs(model, image(32))}
        assert norms["features.conv0"] == "features.norm0"
        layer = "features.denseblock1.denselayer1"
        assert norms[f"{layer}.conv1"] == f"{layer}.norm2"
        assert norms[f"{layer}.conv2"] is None


class TestLoadWeights:
    @pytest.fixture
    def state(self):
        torch.manual_seed(1)
        return resnet.build(depth=8).state_dict()

    @pytest.fixture
    def model(self):
        torch.manual_seed(2)
        return resnet.build(depth=8)

    @pytest.mark.parametrize(
        "change",
        [
            lambda state: state,
            lambda state: {"state_dict": state, "epoch": 3},
            lambda state: {"model": state},
            lambda state: {"net": {"state_dict": state}}["net"],
            lambda state: {f"module.{k}": v for k, v in state.items()},
            lambda state: {k.replace("linear.", "fc."): v for k, v in state.items()},
            lambda state: {
                "state_dict": {f"module.{k.replace('linear', 'fc')}": v for k, v in state.items()}
            },
            lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
        ],
        ids=["plain", "nested", "model", "net", "module", "fc", "all at once", "no counters"],
    )
    def test_spellings_found_in_the_wild(self, model, state, change):
        load_weights(model, change(state), "x")
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name]), name

    def test_a_head_called_fc_takes_one_called_linear(self):
        model = torchvision.models.resnet18(num_classes=10)
        state = {k.replace("fc.", "linear."): v + 1 for k, v in model.state_dict().items()}
        load_weights(model, state, "x")
        assert torch.equal(model.fc.weight, state["linear.weight"])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s.pop("bn1.weight"), "lacks bn1.weight"),
            (lambda s: s.update(extra=torch.ones(1)), "has unknown extra"),
            (
                lambda s: s.update({"linear.bias": torch.ones(9)}),
                r"linear.bias is \(9,\), not \(10,\)",
            ),
            (lambda s: s["conv1.weight"].fill_(float("nan")), "conv1.weight has NaN or infinite"),
            (lambda s: s["bn1.running_var"].fill_(float("inf")), "bn1.running_var has NaN or inf"),
            (lambda s: s.update({"linear.bias": [1]}), "linear.bias is a list, not a tensor"),
        ],
    )
    def test_what_does_not_match_is_listed_and_nothing_changed(self, model, state, change, message):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        change(state)
        with pytest.raises(ValueError, match=rf"^file.th: does not fit the network: .*{message}"):
            load_weights(model, state, "file.th")
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name

    def test_many_problems_are_counted_not_printed(self, model):
        with pytest.raises(ValueError, match=r"and \d+ more$") as caught:
            load_weights(model, {}, "x")
        assert len(str(caught.value)) < 400


class TestAnyInput:
    @pytest.mark.parametrize(("channels", "kind"), [(1, torch.float32), (3, torch.float64)])
    def test_the_blank_image_is_as_the_network_takes_it(self, channels, kind):
        model = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4)).to(kind)
        example = image(8, channels).to(kind)
        (conv,) = find_convs(model, example)
        assert (conv.channels, conv.norm, conv.out_h) == (channels, "1", 6)
        assert counting.macs(model, example)["dense"] == 4 * channels * 9 * 36

    def test_a_synchronized_norm_is_one(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4))
        assert find_convs(model, image(8))[0].norm == "1"

    def test_a_conv_that_is_called_twice_is_listed_once_and_its_work_counted_twice(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 3, 3, padding=1)

            def forward(self, x):
                return self.conv(F.avg_pool2d(self.conv(x), 2))

        assert [conv.positions for conv in find_convs(Twice(), image(8))] == [64 + 16]
        assert counting.macs(Twice(), image(8))["dense"] == 9 * 9 * (64 + 16)

    @pytest.mark.parametrize("look", [find_convs, counting.macs, published.by_ptflops])
    def test_looking_at_it_leaves_every_mode_as_it_was(self, look):
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2)
        )
        model.train()
        model[1].eval()  # a frozen BatchNorm
        look(model, image(8))
        assert model.training and model[0].training and not model[1].training
