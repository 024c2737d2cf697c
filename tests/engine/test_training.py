"""Training over surviving kernels against torch's convs, BatchNorm and autograd under masks."""

import copy
import os
import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.ops import StochasticDepth

from explib import engine, models
from explib.engine import fused, training, training_layers
from explib.pruning import criteria, holding
from explib.pruning import masks as masking
from tests.conftest import image

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler"
)


@pytest.fixture
def lanes() -> int:
    return training_layers.library().training_lanes()


def half_too(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not training_layers.library().training_halves():
        pytest.skip("this processor does not multiply pairs of bfloat16")


def as_planes(images: torch.Tensor, dtype=torch.float32) -> torch.Tensor:
    lanes = training_layers.library().training_lanes()
    return training_layers.planes(images.to(dtype).unflatten(0, (-1, lanes)).permute(0, 2, 3, 4, 1))


def as_images(x: torch.Tensor, size) -> torch.Tensor:
    return training_layers.FromPlanes(size)(x).float()


def close(found: torch.Tensor, wanted: torch.Tensor, share: float) -> bool:
    """Whether they differ by no more than a share of the largest value."""
    return bool((found - wanted).abs().max() <= share * wanted.abs().max().clamp(min=1e-6))


SIZES = [(1, 1), (2, 2), (3, 5), (4, 4), (5, 1), (7, 7), (8, 8), (9, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_conv_and_its_gradients_are_those_of_torch(dtype, stride, size, layout, kernel, lanes):
    half_too(dtype)
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 6, kernel, stride, padding=kernel // 2).to(memory_format=layout)
    mask = torch.rand(6, 5) < 0.6
    mask[2], mask[0] = False, torch.arange(5) < 3  # a filter of none, one of an odd number
    with torch.no_grad():
        conv.weight.mul_(mask[:, :, None, None])
        if dtype == torch.bfloat16:  # so that both multiply the same numbers
            conv.weight.copy_(conv.weight.bfloat16())
    x = torch.randn(3 * lanes, 5, *size).to(dtype).float()
    own = as_planes(x, dtype).requires_grad_()
    # in float64: torch's own of float32 may write beyond its memory (docs/torch-cpu-memory.md)
    plain, x = copy.deepcopy(conv).double(), x.double().requires_grad_()
    wanted = plain(x)
    dy = torch.randn_like(wanted).to(dtype).float()
    wanted.backward(dy.double())
    out_size = tuple(wanted.shape[2:])
    found = training_layers.Conv(conv, mask, size, out_size)(own)
    found.backward(as_planes(dy, dtype))
    exact = 1e-5 if dtype == torch.float32 else 8e-3  # results are rounded to bfloat16
    assert found.dtype == own.dtype == dtype
    assert close(as_images(found, out_size), wanted, exact)
    assert close(as_images(own.grad, size), x.grad, exact)
    assert conv.weight.grad.stride() == conv.weight.stride()
    assert close(conv.weight.grad, plain.weight.grad * mask[:, :, None, None], 2e-5)
    assert not conv.weight.grad[~mask].any()
    assert close(conv.bias.grad, plain.bias.grad, 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("with_add", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8)])
def test_a_norm_and_what_follows_is_that_of_torch(dtype, relu, with_add, size, lanes):
    half_too(dtype)
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    plain = copy.deepcopy(norm)
    x, add = ((3 + torch.randn(2 * lanes, 4, *size)).to(dtype).float() for _ in range(2))
    own = [as_planes(t, dtype).requires_grad_() for t in (x, add)]
    x.requires_grad_()
    add.requires_grad_()
    wanted = plain(x) + (add if with_add else 0)
    wanted = F.relu(wanted) if relu else wanted
    dy = torch.randn_like(wanted).to(dtype).float()
    wanted.backward(dy)
    module = training_layers.Norm(norm, relu, size)
    found = module(own[0], own[1] if with_add else None)
    found.backward(as_planes(dy, dtype))
    exact = 2e-5 if dtype == torch.float32 else 8e-3
    assert close(as_images(found, size), wanted, exact)
    assert close(as_images(own[0].grad, size), x.grad, exact)
    assert close(norm.weight.grad, plain.weight.grad, exact)
    assert close(norm.bias.grad, plain.bias.grad, exact)
    if with_add:
        assert close(as_images(own[1].grad, size), add.grad, exact)
    for name, value in plain.state_dict().items():
        assert close(norm.state_dict()[name].float(), value.float(), 1e-5), name
    # in evaluation mode, with gradients (frozen) and without
    wanted = plain.eval()(x) + (add if with_add else 0)
    wanted = (F.relu(wanted) if relu else wanted).detach()
    norm.eval()
    frozen = module(own[0], own[1] if with_add else None)
    assert frozen.requires_grad and close(as_images(frozen, size), wanted, exact)
    with torch.no_grad():
        assert close(as_images(module(own[0], own[1] if with_add else None), size), wanted, exact)


def test_a_norm_without_momentum_averages_over_batches(lanes):
    norm, plain = (nn.BatchNorm2d(3, momentum=None) for _ in range(2))
    for _ in range(3):
        x = torch.randn(lanes, 3, 4, 4)
        plain(x)
        training_layers.Norm(norm, False, (4, 4))(as_planes(x))
    assert close(norm.running_mean, plain.running_mean, 1e-5)
    assert close(norm.running_var, plain.running_var, 1e-5)


def pair(arch: str, rate: float = 0.7) -> tuple[nn.Module, nn.Module, dict]:
    """A masked network and a copy in float64 for torch."""
    torch.manual_seed(0)
    model = models.build(arch, 10)
    chosen = criteria.prune(model, image(32), rate, "B")
    masking.apply(model, chosen)
    return model, copy.deepcopy(model).double(), chosen


@pytest.mark.parametrize("arch", ["resnet_56", "vgg_16_bn", "googlenet"])
def test_a_network_trains_as_in_torch(arch, lanes, resnet_8):
    model, plain, chosen = pair(arch)
    network = training.sparse(model, chosen, image(32))
    modules = [type(m) for m in network.network.modules()]
    assert (
        modules.count(training_layers.FromPlanes) == 1
    )  # once on planes it stays there to the end
    count = max(lanes, 16)  # few images make BatchNorm, and with it every gradient, less exact
    x, y = torch.randn(count + 1, 3, 32, 32), torch.randint(0, 10, (count,))
    found, wanted = network(x[:count]), plain(x[:count].double())
    assert close(found, wanted.float(), 1e-4)
    F.cross_entropy(found, y).backward()
    F.cross_entropy(wanted, y).backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        gradient = q.grad.float()
        if (layer := name.removesuffix(".weight")) in chosen:
            gradient = gradient * chosen[layer][:, :, None, None]
        if gradient.abs().max() > 1e-6:  # a bias before a BatchNorm has none
            assert (p.grad - gradient).norm() < 0.03 * gradient.norm(), name
    for name, value in plain.state_dict().items():
        assert close(model.state_dict()[name].float(), value.float(), 1e-3), name
    model.eval(), plain.eval()
    with torch.no_grad():
        wanted = plain(x.double()).float()
        for count in (1, lanes, lanes + 1):
            assert close(network(x[:count]), wanted[:count], 1e-3), count


def test_a_batch_that_fills_no_block_trains_densely(lanes, resnet_8):
    model, plain, chosen = pair("resnet_56")
    network, x = training.sparse(model, chosen, image(32)), torch.randn(lanes + 1, 3, 32, 32)
    assert close(network(x), plain(x.double()).float(), 1e-4)
    for name, value in plain.state_dict().items():
        assert close(model.state_dict()[name].float(), value.float(), 1e-4), name


def test_images_of_another_size_are_computed_densely(lanes, resnet_8):
    model, plain, chosen = pair("resnet_56")
    network, x = training.sparse(model, chosen, image(32)), torch.randn(lanes, 3, 24, 24)
    assert close(network(x), plain(x.double()).float(), 1e-4)


class Odd(nn.Module):
    """Ops between its convs that planes do not know, and some that they do."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.third = nn.Conv2d(8, 4, 3, 2, padding=1)
        self.norm, self.pool = nn.BatchNorm2d(4), nn.AvgPool2d(3, 2, 1)
        self.drop, self.linear = nn.Dropout(0.0), nn.Linear(4, 3)

    def forward(self, x):
        x = torch.cat([self.first(x), -F.relu(self.first(x))], dim=1)  # a layer used twice
        x = self.drop(torch.sigmoid(self.second(x))) + x[:, :, :, :]
        x = self.pool(self.grouped(x))
        return self.linear(self.norm(self.third(x)).amax((2, 3)))


def test_ops_of_any_network_run_on_planes_or_on_images(lanes):
    torch.manual_seed(0)
    model = Odd()
    chosen = {"second": torch.rand(8, 8) < 0.5, "third": torch.rand(4, 8) < 0.5}
    masking.apply(model, chosen)
    plain = copy.deepcopy(model)
    network = training.sparse(model, chosen, image(10))
    x = torch.randn(lanes, 3, 10, 10)
    found, wanted = network(x), plain(x)
    assert close(found, wanted, 1e-5)
    found.square().sum().backward()
    wanted.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        mask = chosen.get(name.removesuffix(".weight"))
        gradient = (
            q[1].grad if mask is None or q[1].ndim < 4 else q[1].grad * mask[:, :, None, None]
        )
        if gradient.abs().max() > 1e-4:
            assert close(p.grad, gradient, 1e-4), name


class Kinks(TorchFunctionMode):
    """Every ReLU has the gradient of a little beside, its outputs being the same.

    shift: how far, in mean sizes of its inputs. Where these are less exact than that, a unit near 0
    may be on or off, and the gradients of both are right.
    """

    def __init__(self, shift: float):
        super().__init__()
        self.shift = shift

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.relu:
            return func(*args, **(kwargs or {}))
        x, fixed = args[0], args[0].detach()
        return F.relu(fixed) + (x - fixed) * (fixed > self.shift * fixed.abs().mean())


def test_a_network_of_ones_own_trains_so_in_its_own_loop():
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    chosen = criteria.prune(model, image(32), 0.7, "B")  # its first conv is 7x7
    plain = copy.deepcopy(model).double()
    for own in (model, plain):
        holding.hold(own, chosen)
    fast = engine.sparse(model, chosen, image(32))
    kinds = [type(m) for m in fast.network.modules()]
    assert kinds.count(training_layers.Conv) == 19 and kinds.count(training_layers.FromPlanes) == 1
    x, y = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))  # whole blocks on any processor

    def gradients(own: nn.Module, network: nn.Module, images: torch.Tensor) -> dict:
        own.zero_grad()
        F.cross_entropy(network(images), y).backward()
        return {name: p.grad.double() for name, p in own.named_parameters()}

    found, wanted = gradients(model, fast, x), gradients(plain, plain, x.double())
    # rounding errors add up as a random walk: 20 layers, sums of up to 512 * 3 * 3 terms
    exact = 2**-24 * (20 * 512 * 3 * 3) ** 0.5
    sides = []
    for shift in (exact, -exact):
        with Kinks(shift):
            sides.append(gradients(plain, plain, x.double()))
    for name, gradient in wanted.items():
        either = (sides[0][name] - sides[1][name]).norm()
        assert (found[name] - gradient).norm() < exact * gradient.norm() + 2 * either, name

    gains = []  # in small steps: in large ones a network so deep is chaotic in any precision
    for own, network, images in ((model, fast, x), (plain, plain, x.double())):
        optimizer, losses = torch.optim.SGD(own.parameters(), 0.001, momentum=0.9), []
        for _ in range(4):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(images), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        gains.append(losses[0] - losses[3])
    assert gains[0] == pytest.approx(gains[1], rel=0.01) and gains[1] > 0.1
    assert masking.held(model, chosen)


def refused(model, masks, why):
    with pytest.warns(UserWarning, match=f"^training multiplies pruned kernels, too: {why}"):
        assert training.sparse(model, masks, image(8)) is None


class Unlike(nn.Module):
    """Not the same network in training; with `branches`, one that depends on values."""

    def __init__(self, branches):
        super().__init__()
        self.conv, self.branches = nn.Conv2d(3, 4, 3, padding=1), branches

    def forward(self, x):
        if self.branches and x.sum() > 0:
            return x
        return F.dropout(self.conv(x), 0.5, self.training)


def test_what_it_cannot_do_says_why(monkeypatch):
    ones = torch.ones(4, 3).bool()
    conv = nn.Conv2d(3, 4, 5, padding=2)
    why = r"no masked conv is 3x3 .*: 0 is 5x5, padded by \(2, 2\), stride \(1, 1\)$"
    refused(nn.Sequential(conv), {"0": ones}, why)
    norm = nn.BatchNorm2d(4, affine=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm)
    refused(model, {"0": ones}, "1 has no scale or no running statistics$")
    refused(Unlike(False), {"conv": ones}, "torch.fx traces another network than the one that runs")
    model[1] = StochasticDepth(0.0, "row")
    refused(model, {"0": ones}, "training mode changes more than its layers do$")
    refused(Unlike(True), {"conv": ones}, "torch.fx cannot trace it ")
    model, mask = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), {"0": ones}
    assert training.sparse(model, mask, image(8)) is not None
    with monkeypatch.context() as patch:
        patch.setattr(training, "outputs_match", lambda *_: False)
        refused(model, mask, "the engine makes something else of it$")
        patch.setattr(training, "outputs_match", lambda *_: 1 / 0)
        refused(model, mask, r"the engine does not run it \(division by zero\)$")
    with monkeypatch.context() as patch:
        patch.setattr(fused, "library", lambda: None)
        refused(model, mask, r"its C\+\+ could not be compiled$")
    monkeypatch.setattr(training, "library", lambda: None)
    refused(model, mask, r"its C\+\+ could not be compiled$")


def test_masks_of_a_conv_that_stays_in_torch(lanes):
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 4, 7, stride=2, padding=3)
    model = nn.Sequential(stem, nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    masks = {"0": torch.rand(4, 3) < 0.5, "2": torch.rand(4, 4) < 0.5}
    refused(model, masks, "the mask of 0, which stays in torch, is not applied; hold or apply")
    masking.apply(model, masks)
    said = "^training multiplies the pruned kernels of 1 convs, too, .*: 0 is 7x7, padded by"
    with pytest.warns(UserWarning, match=said):
        network = training.sparse(model, masks, image(8))
    x = torch.randn(lanes, 3, 8, 8)
    assert close(network(x), model(x), 1e-5)


def test_batches_that_train_in_torch_say_so_once(lanes):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
    mask = {"0": torch.ones(4, 3).bool()}
    network = training.sparse(model, mask, image(8))
    short, large = torch.randn(lanes + 1, 3, 8, 8), torch.randn(lanes, 3, 9, 8)
    for images, why in (
        (
            short,
            f"{lanes + 1} images are no multiple of {lanes}; take a batch size that is, and .*",
        ),
        (large, r"its images are \(9, 8\), not \(8, 8\)"),
    ):
        with pytest.warns(UserWarning, match=f"^this batch trains in torch, over all .*: {why}$"):
            network(images)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert close(network(images), model(images), 1e-5)
    again = training.sparse(model, mask, image(8)).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        again(short), again(large), network(torch.randn(lanes, 3, 8, 8))


def test_planes_that_are_none_are_refused(lanes):
    norm = training_layers.Norm(nn.BatchNorm2d(2), False, (3, 3))
    with pytest.raises(ValueError, match=r"planes \(1, 2, 8, "):
        norm(torch.zeros(1, 2, 8, lanes))
    with pytest.raises(ValueError, match="beside"):
        norm(torch.zeros(1, 2, 9, lanes), torch.zeros(1, 2, 8, lanes))
    with pytest.raises(ValueError, match=r"torch\.float64"):
        norm(torch.zeros(1, 2, 9, lanes, dtype=torch.float64))
    conv = training_layers.Conv(
        nn.Conv2d(2, 2, 3, padding=1).double(), torch.ones(2, 2).bool(), (3, 3), (3, 3)
    )
    with pytest.raises(TypeError, match=r"weight: torch\.float64"):
        conv(torch.zeros(1, 2, 9, lanes))
