"""Networks as people write them: in the engine, fused and sparse, or left to torch, never wrong."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from explib import engine
from explib.engine import fused, tracing
from explib.pruning import masks as masking
from tests.conftest import image, needs_compiler

pytestmark = [needs_compiler, pytest.mark.filterwarnings("ignore:.*runs?.* in torch")]
SIDE = 8


class Net(nn.Module):
    """Two convs with a BatchNorm each, and between them whatever a test makes of it."""

    def __init__(self, rest, **parts):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.rest = rest
        for name, part in parts.items():
            setattr(self, name, part)
        for norm in (self.norm, self.norm2):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        return self.rest(self, x)


def body(net, x):
    return F.relu(net.norm(net.one(x)))


def with_buffer(net):
    net.inner = nn.Module()
    net.inner.register_buffer("mean", torch.rand(1, 4, 1, 1))
    net.scale = nn.Parameter(torch.rand(1))
    return net


def narrowed(net, x):
    y = net.one(x)
    first = torch.narrow(y, 1, 0, 2)
    return torch.cat([y, F.relu(first, inplace=True)], 1)


def optional(net, x, scale=2.0):
    return net.two(body(net, x)) * scale


def masked_or_not(net, x, mask=None):
    y = net.two(body(net, x))
    return y + mask if mask is not None else y


def dead_head(net, x):
    features = body(net, x).mean((2, 3))
    net.head(features)
    return features


NETWORKS = {
    "plain": Net(lambda net, x: net.two(body(net, x))),
    "alpha": Net(
        lambda net, x: F.relu(torch.add(net.norm(net.one(x)), net.two(body(net, x)), alpha=0.1))
    ),
    "parameters of its own": with_buffer(
        Net(lambda net, x: net.two(body(net, x) * net.scale - net.inner.mean))
    ),
    "a broadcast over the batch": Net(
        lambda net, x: body(net, x) + body(net, x).mean(0, keepdim=True)
    ),
    "an outer sum": Net(
        lambda net, x: net.two(
            body(net, x).mean(3, keepdim=True) + body(net, x).mean(2, keepdim=True)
        )
    ),
    "context": Net(
        lambda net, x: F.relu(net.norm2(net.two(body(net, x))) + x.mean((1, 2, 3), True))
    ),
    "some of the images": Net(lambda net, x: net.two(body(net, x))[:1, :]),
    "indices": Net(
        lambda net, x: net.pool(net.two(body(net, x)))[0], pool=nn.MaxPool2d(2, return_indices=True)
    ),
    "several results": Net(lambda net, x: (net.two(body(net, x)), body(net, x).mean((2, 3)))),
    "results by name": Net(lambda net, x: {"out": net.two(body(net, x))}),
    "a view that is overwritten": Net(narrowed),
    "an argument with a default": Net(optional),
    "an argument that is None": Net(masked_or_not),
    "a head that nobody reads": Net(dead_head, head=nn.Linear(4, 2)),
    "a scalar": Net(lambda net, x: net.two(body(net, x) + 1)),
    "a sequence": Net(
        lambda net, x: net.over(net.line(body(net, x).flatten(2))),
        line=nn.Linear(64, 4),
        over=nn.BatchNorm1d(4),
    ),
}
for name in ("an argument with a default", "an argument that is None"):
    rest = {"an argument with a default": optional, "an argument that is None": masked_or_not}[name]
    NETWORKS[name].__class__ = type("Net", (Net,), {"forward": rest})


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("network", NETWORKS)
def test_whatever_the_network_its_results_are_those_of_torch(network):
    torch.manual_seed(0)
    model = copy.deepcopy(NETWORKS[network])
    chosen = {"one": torch.rand(4, 3) < 0.7, "two": torch.rand(4, 4) < 0.7}
    for mask in chosen.values():
        mask[0] = True
    masking.apply(model, chosen)
    plain, fixed = copy.deepcopy(model), copy.deepcopy(model).eval()
    fast = engine.compile(model, torch.zeros(1, 3, SIDE, SIDE))
    trained = fused.fuse(model, torch.zeros(1, 3, SIDE, SIDE))
    sparse = engine.sparse(model, chosen, image(SIDE)) or model
    for count in (1, 2, 17, 32):
        x = torch.randn(count, 3, SIDE, SIDE)
        for mode in (False, True):
            model.train(mode), plain.train(mode)
            same(fast(x), fixed(x))
            for built in (trained, sparse):
                plain.load_state_dict(model.state_dict())
                same(built(x), plain(x))
                same(model.state_dict(), plain.state_dict())


def test_hooks_are_not_lost():
    model = copy.deepcopy(NETWORKS["plain"]).eval()
    model.one.register_forward_hook(lambda module, inputs, output: output * 0)
    x = torch.randn(2, 3, SIDE, SIDE)
    with pytest.warns(UserWarning, match="one has hooks, which tracing would lose; .* in torch"):
        same(engine.compile(model, x)(x), model(x))
    assert fused.fuse(model, x) is model
    with pytest.raises(NotImplementedError, match="one has hooks"):
        tracing.trace(model, x)


def test_a_network_pruned_by_torch_says_what_to_remove():
    model = copy.deepcopy(NETWORKS["plain"]).eval()
    prune.l1_unstructured(model.one, "weight", 0.5)
    with pytest.raises((ValueError, NotImplementedError), match=r"prune\.remove|has hooks"):
        engine.compile(model, torch.zeros(1, 3, SIDE, SIDE), fallback=False)
    prune.remove(model.one, "weight")
    x = torch.randn(2, 3, SIDE, SIDE)
    same(engine.compile(model, x, fallback=False)(x), model(x))


def test_autocast_outside_changes_nothing_inside():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 1)).eval()
    x = torch.randn(17, 4, SIDE, SIDE)
    fast = engine.compile(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = fast(x)
    same(inside, model(x))


def test_autocast_outside_changes_nothing_of_what_is_compiled():
    model, x = copy.deepcopy(NETWORKS["plain"]).eval(), torch.randn(2, 3, SIDE, SIDE)
    for around in (torch.autocast("cpu", torch.bfloat16), torch.inference_mode()):
        with around:
            fast = engine.compile(model, x, fallback=False)
        same(fast(x), model(x))


def test_the_networks_of_a_fallback_stay_in_evaluation_mode():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5)).eval()
    model[0].register_forward_hook(lambda *_: None)
    x = torch.randn(2, 3, SIDE, SIDE)
    fast = engine.compile(model, x).train()
    assert torch.equal(fast(x), model(x))


def test_statistics_that_are_not_tracked_stay():
    model = copy.deepcopy(NETWORKS["plain"])
    network, before = fused.fuse(model, torch.zeros(1, 3, SIDE, SIDE)), copy.deepcopy(model)
    model.norm.track_running_stats = False
    network(torch.randn(4, 3, SIDE, SIDE))
    same(model.norm.state_dict(), before.norm.state_dict())


def test_second_derivatives_are_refused_rather_than_wrong():
    model = copy.deepcopy(NETWORKS["plain"])
    network = fused.fuse(model, torch.zeros(1, 3, SIDE, SIDE))
    x = torch.randn(4, 3, SIDE, SIDE, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_one_value_a_channel_is_torchs_error():
    model = nn.Sequential(nn.Conv2d(3, 4, SIDE), nn.BatchNorm2d(4), nn.ReLU())
    network = fused.fuse(model, torch.zeros(1, 3, SIDE, SIDE))
    assert network is not model
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        network(torch.randn(1, 3, SIDE, SIDE))


def test_no_images_are_none_in_training_too():
    model = copy.deepcopy(NETWORKS["plain"]).eval()
    chosen = {"two": torch.rand(4, 4) < 0.7}
    chosen["two"][0] = True
    sparse = engine.sparse(model, chosen, image(SIDE))
    assert isinstance(sparse, nn.Module)
    with torch.no_grad():
        assert sparse(torch.zeros(0, 3, SIDE, SIDE)).shape == (0, 4, SIDE, SIDE)


def test_masks_that_do_not_fit_are_named():
    for name, mask in (("two", torch.ones(5, 4)), ("three", torch.ones(4, 4))):
        with pytest.raises(ValueError, match=name):
            engine.sparse(copy.deepcopy(NETWORKS["plain"]), {name: mask.bool()}, image(SIDE))


def test_a_wrong_network_is_told_from_the_right_one():
    model = copy.deepcopy(NETWORKS["plain"])
    other, x = copy.deepcopy(model), torch.zeros(1, 3, SIDE, SIDE)
    assert tracing.outputs_match(other, model, x)
    with torch.no_grad():
        other.two.bias[0] += 0.5
    assert not tracing.outputs_match(other, model, x)
    assert not tracing.outputs_match(lambda_module(lambda y: (model(y),)), model, x)
    assert not tracing.outputs_match(lambda_module(lambda y: model(y)[:1]), model, x)


def lambda_module(function):
    class Lambda(nn.Module):
        def forward(self, x):
            return function(x)

    return Lambda()
