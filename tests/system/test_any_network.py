"""Networks of torchvision as they come: found, scored, masked, counted, trained, saved."""

import warnings

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import StochasticDepth

import explib
from explib import rates
from explib.params import Params
from explib.pruning import counting, layers
from explib.pruning import masks as masking
from explib.training import backend, loop
from tests.conftest import image

# convs, those of them that are grouped (depthwise or not), those that way A can order
NETWORKS = {
    "resnet18": (20, 0, 20),
    "vgg16_bn": (13, 0, 13),
    "densenet121": (120, 0, 59),  # the norm comes first: only a block's inner conv has one after it
    "mobilenet_v2": (52, 17, 35),
    "efficientnet_b0": (81, 16, 33),  # squeeze and excitation has none
    "regnet_y_400mf": (85, 16, 37),
    "convnext_tiny": (22, 18, 0),  # LayerNorm throughout
}
SIDE = 32


@pytest.fixture(params=NETWORKS, scope="module")
def found(request):
    torch.manual_seed(0)
    model = torchvision.models.get_model(request.param, weights=None, num_classes=10)
    return request.param, model, explib.find_convs(model, image(SIDE))


def test_every_conv_is_found_in_forward_order(found):
    name, model, convs = found
    seen, hooks = [], []
    for key, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            hook = module.register_forward_hook(lambda m, i, o, key=key: seen.append(key))
            hooks.append(hook)
    model.eval()(torch.zeros(1, 3, SIDE, SIDE))
    for hook in hooks:
        hook.remove()
    assert [conv.name for conv in convs] == seen
    total, grouped, ordered = NETWORKS[name]
    assert (len(convs), sum(conv.groups > 1 for conv in convs)) == (total, grouped)
    assert sum(conv.norm is not None for conv in layers.prunable(convs)) == ordered


def test_multiply_adds_are_those_that_torch_counts(found):
    _, model, _ = found
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, SIDE, SIDE))
    assert 2 * counting.macs(model, image(SIDE))["dense"] == counter.get_total_flops()


def test_way_a_prunes_what_has_a_norm_and_names_what_has_not(found):
    name, model, convs = found
    prunable = layers.prunable(convs)
    with_norm = [conv.name for conv in prunable if conv.norm]
    if len(with_norm) < len(prunable):
        first = next(conv.name for conv in prunable if not conv.norm)
        with pytest.raises(ValueError, match=f"{first}: no BatchNorm takes this conv's output"):
            explib.prune(model, None, 0.5, "A", convs=convs)
    chosen = explib.prune(model, None, dict.fromkeys(with_norm, 0.3), "A", convs=convs)
    assert list(chosen) == with_norm and len(with_norm) == NETWORKS[name][2]


def test_way_b_prunes_trains_and_saves_it(found, make_data, tmp_path):
    name, model, convs = found
    data = make_data(train=16, test=4, size=SIDE)
    chosen = explib.prune(model, None, 0.5, "B", survivors="l1", convs=convs)
    assert set(chosen) == {conv.name for conv in convs if conv.groups == 1}
    for conv in layers.prunable(convs):
        wanted = rates.number_to_prune(0.5, conv.kernels)
        assert 0 <= wanted - int((~chosen[conv.name]).sum()) <= 1 + wanted // 4
    left = counting.macs(model, image(SIDE), chosen)
    gone = sum(
        int((~chosen[conv.name]).sum()) * conv.kernel_macs for conv in layers.prunable(convs)
    )
    assert left["dense"] - left["left"] == gone > 0

    params = Params(epochs=1, batch_size=8, lr=0.001, distill=0.0, device="cpu", precision="fp32")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        forward = backend.choose(model, params, "cpu", 16)
        ((entry, _),) = loop.train(model, data, params, chosen, forward=forward)
    drops = any(isinstance(module, StochasticDepth) for module in model.modules())
    slower = "training on this CPU is slower than it could be: training mode changes more than"
    assert [str(w.message).startswith(slower) for w in said] == [True] * drops
    assert masking.held(model, chosen) and entry["images_per_s"] > 0
    assert any(not torch.equal(before[k], v) for k, v in model.named_parameters())

    path = explib.save(tmp_path / name, model, chosen, {"arch": name, "num_classes": 10})
    state, loaded, _ = explib.load(path)
    assert all(torch.equal(loaded[key], chosen[key]) for key in chosen)
    again = torchvision.models.get_model(name, weights=None, num_classes=10)
    again.load_state_dict(state)
    assert masking.held(again, loaded)
