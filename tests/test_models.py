import pytest
import torch
import torch.nn.functional as F
import torchvision

from explib import models
from explib.flops import macs
from explib.params import ParamError

SIZES = {
    "vgg_16_bn": (13, 313.46),
    "resnet_56": (55, 125.49),
    "resnet_110": (109, 252.89),
    "googlenet": (64, 1521.76),
    "resnet_50": (53, 4089.18),
}


@pytest.mark.parametrize(("arch", "size"), SIZES.items())
def test_convs_and_macs(arch, size):
    with torch.device("meta"):
        model = models.build(arch)
    side = models.ARCHS[arch].image_size
    convs = models.find_convs(model, side)
    assert len(convs) == size[0]
    assert all(conv.norm for conv in convs)
    assert macs(model, convs, image_size=side)["dense"] / 1e6 == pytest.approx(size[1], abs=0.005)


@pytest.mark.parametrize(("arch", "millions"), [("resnet_56", 0.85), ("resnet_110", 1.73)])
def test_parameters(arch, millions):
    count = sum(p.numel() for p in models.build(arch).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.01)


def test_the_shortcut_subsamples_and_pads_half_on_each_side():
    block = models.resnet.BasicBlock(4, 8, 2).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 4, 6, 6)
    y = block(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any() and not y[:, 6:].any()


def test_finding_convs_leaves_the_model_as_it_was():
    model = models.build("resnet_56")
    model.layer1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    models.find_convs(model)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "first", "count", "depthwise"),
    [("resnet18", "conv1", 20, 0), ("mobilenet_v2", "features.0.0", 52, 17),
     ("densenet121", "features.conv0", 120, 0)],
)  # fmt: skip
def test_convs_of_other_peoples_networks(name, first, count, depthwise):
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    convs = models.find_convs(model, 64)
    assert convs[0].name == first and len(convs) == count
    assert sum(conv.groups > 1 for conv in convs) == depthwise
    assert convs[0].norm


def test_the_batchnorm_of_a_conv_is_the_one_that_takes_its_output():
    convs = {conv.name: conv.norm for conv in models.find_convs(models.build("googlenet"))}
    assert convs["inception_a3.branch3.3"] == "inception_a3.branch3.4"


def test_resnet_50_takes_its_rates_shortcut_first():
    with torch.device("meta"):
        convs = models.find_convs(models.build("resnet_50"), 224)
    names = list(models.rates_by_name("resnet_50", convs, [i / 100 for i in range(53)]))
    assert names[:3] == ["conv1", "layer1.0.downsample.0", "layer1.0.conv1"]
    assert names[11] == "layer2.0.downsample.0"


def test_googlenet_takes_a_rate_a_block_but_for_the_reductions():
    convs = models.find_convs(models.build("googlenet"))
    rates = models.rates_by_name("googlenet", convs, [0.1] * 9 + [0.5])
    assert [name for name, rate in rates.items() if rate == 0.5] == [
        f"inception_b5.branch{branch}" for branch in ("1.0", "2.3", "3.3", "3.6", "4.1")
    ]
    with pytest.raises(ParamError, match="9 rates for 10 rates of googlenet"):
        models.rates_by_name("googlenet", convs, [0.1] * 9)


def wild(state):
    return [
        state,
        {"state_dict": state, "best_prec1": 93.4},
        {f"module.{name}": value for name, value in state.items()},
        {name.replace("linear.", "fc."): value for name, value in state.items()},
        {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
    ]


@pytest.mark.parametrize("form", range(5))
def test_checkpoints_found_in_the_wild_load(form):
    source, target = models.build("resnet_56"), models.build("resnet_56")
    models.load_weights(target, wild(source.state_dict())[form], "x.th")
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(source.eval()(x), target.eval()(x))


def broken(state):
    missing = {k: v for k, v in state.items() if k != "bn1.weight"}
    return [
        (missing, "lacks bn1.weight"),
        ({**state, "head": torch.zeros(1)}, "has unknown head"),
        ({**state, "bn1.weight": torch.zeros(3)}, r"bn1.weight is \(3,\), not \(16,\)"),
        ({**state, "bn1.bias": torch.full((16,), float("nan"))}, "bn1.bias has NaN"),
        ({**state, "bn1.bias": "text"}, "bn1.bias is a str"),
        ({}, "lacks conv1.weight.*and .* more"),
    ]


@pytest.mark.parametrize("case", range(6))
def test_what_does_not_fit_is_listed_and_nothing_changed(case):
    model = models.build("resnet_56")
    before = F.cross_entropy(model.eval()(torch.ones(1, 3, 32, 32)), torch.zeros(1).long())
    state, says = broken(models.build("resnet_56").state_dict())[case]
    with pytest.raises(ValueError, match=says) as caught:
        models.load_weights(model, state, "x.th")
    assert str(caught.value).startswith("x.th: ") and "\n" not in str(caught.value)
    after = F.cross_entropy(model(torch.ones(1, 3, 32, 32)), torch.zeros(1).long())
    assert torch.equal(before, after)
