"""The fused passes against the plain layers: values, gradients, statistics."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from explib import models
from explib.engine import fused


@pytest.fixture(scope="module", autouse=True)
def built():
    if fused.library() is None:
        pytest.skip("no C++ compiler: the fused passes cannot be built")


def same(one, two, factor=1.0):
    for name, tensor in two.items():
        torch.testing.assert_close(one[name], tensor, rtol=1e-4 * factor, atol=1e-5 * factor)


def trained(network, model, x):
    """Output, gradients of the model and of x, and the model's buffers after one step."""
    x = x.clone().requires_grad_()
    out = network(x)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    (out * weights).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), grads | {"x": x.grad}, dict(model.named_buffers())


IMAGES = torch.zeros(1, 3, 32, 32)


class Block(nn.Module):
    """relu(norm(x) + add), or without one or both of them."""

    def __init__(self, channels, add, relu):
        super().__init__()
        self.norm, self.add, self.relu = nn.BatchNorm2d(channels), add, relu
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.uniform_(self.norm.bias, -0.5, 0.5)

    def forward(self, x):
        y = self.norm(x)
        y = y + torch.sin(x) if self.add else y
        return F.relu(y) if self.relu else y


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (3, 5, 7, 3), (1, 33, 1, 2), (70, 1, 3, 3)])
def test_is_the_plain_layers(shape, add, relu):
    torch.manual_seed(0)
    block = Block(shape[1], add, relu)
    plain = copy.deepcopy(block)
    x = (3 * torch.randn(shape) + 5).contiguous(memory_format=torch.channels_last)
    network = fused.fuse(block, x)
    assert any(isinstance(m, fused.NormAct) for m in network.modules())
    for mode in (True, False):
        block.train(mode), plain.train(mode)
        if mode:
            one, two = trained(network, block, x), trained(plain, plain, x)
            # a ReLU whose input is 0 but for rounding may go either way: no such place here
            torch.testing.assert_close(one[0], two[0], rtol=1e-4, atol=1e-5)
            same(one[1], two[1], 10)
            same(one[2], two[2])
        else:
            with torch.no_grad():
                torch.testing.assert_close(network(x), plain(x), rtol=1e-4, atol=1e-5)
            assert network(x).requires_grad  # evaluated with gradients: the plain layers


def test_without_momentum_statistics_are_the_average_over_batches():
    norm, plain = nn.BatchNorm2d(3, momentum=None), nn.BatchNorm2d(3, momentum=None)
    for factor in (1, 2, 5):
        x = factor * torch.randn(4, 3, 5, 5) + factor
        plain(x)
        fused.NormAct(norm, relu=False)(x)
    same(dict(norm.named_buffers()), dict(plain.named_buffers()))


def test_moments_do_not_cancel_far_from_zero():
    x = (torch.randn(64, 8, 16, 16) + 1000).contiguous(memory_format=torch.channels_last)
    mean, var = fused.batch_moments(x)
    torch.testing.assert_close(mean, x.double().mean((0, 2, 3)), rtol=1e-9, atol=0)
    torch.testing.assert_close(var, x.double().var((0, 2, 3), correction=0), rtol=1e-6, atol=0)


def test_bfloat16_rounds_once_to_the_nearest():
    x = torch.randn(4, 16, 5, 5).bfloat16().contiguous(memory_format=torch.channels_last)
    add = torch.randn(4, 16, 5, 5).bfloat16().contiguous(memory_format=torch.channels_last)
    scale, shift = torch.rand(16), torch.randn(16)
    found = fused.affine(x, scale, shift, add)
    exact = x.double() * scale.view(-1, 1, 1) + shift.view(-1, 1, 1) + add.double()
    wanted = exact.bfloat16()
    assert (found != wanted).float().mean() < 0.01  # only where fp32 lies on the other side
    torch.testing.assert_close(found, wanted)


def test_nan_and_infinity_come_through():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0]).view(4, 1, 1, 1)
    x = x.contiguous(memory_format=torch.channels_last)
    for kind in (torch.float32, torch.bfloat16):
        y = fused.affine(x.to(kind), torch.ones(1), torch.zeros(1), relu=True).flatten()
        assert y[0].isnan() and y[1] == float("inf") and y[2] == 0 and y[3] == 1


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 3, 4), "channels-last"),
        (torch.ones(2, 3, 4, 4), "channels-last"),
        (torch.ones(2, 3, 4, 4).double().to(memory_format=torch.channels_last), "torch.float64"),
        (torch.ones(0, 3, 4, 4).to(memory_format=torch.channels_last), "0 values"),
    ],
)
def test_other_tensors_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        fused.batch_moments(x)


def test_parts_that_do_not_fit_are_refused():
    x = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="give 3 of each"):
        fused.affine(x, torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 5\) beside one of \(2, 3, 4, 4\)"):
        fused.affine(x, torch.ones(3), torch.ones(3), torch.ones(2, 3, 4, 5))


class TestSmallConv:
    @pytest.mark.parametrize("shape", [(3, 5, 2, 2), (2, 4, 4, 4), (1, 1, 1, 1), (2, 3, 1, 7)])
    @pytest.mark.parametrize("bias", [True, False])
    def test_is_the_conv(self, shape, bias):
        torch.manual_seed(0)
        conv = nn.Conv2d(shape[1], 6, 3, padding=1, bias=bias)
        plain, x = copy.deepcopy(conv), torch.randn(shape)
        with torch.autocast("cpu", torch.bfloat16):
            one = trained(fused.SmallConv(conv), conv, x)
        two = trained(plain, plain, x)
        assert one[0].dtype == torch.bfloat16
        torch.testing.assert_close(one[0].float(), two[0], rtol=0.03, atol=0.03)
        for name, gradient in two[1].items():
            assert (one[1][name] - gradient).norm() < 0.02 * gradient.norm(), name

    def test_larger_maps_and_fp32_are_the_conv_itself(self):
        conv, x = nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 5, 5)
        assert torch.equal(fused.SmallConv(conv)(x), conv(x))
        assert torch.equal(fused.SmallConv(conv)(x[..., :4, :4]), conv(x[..., :4, :4]))


class TestFuse:
    @pytest.mark.parametrize("arch", ["resnet_56", "vgg_16_bn", "googlenet"])
    def test_every_norm_of_our_networks_is_fused_with_its_relu(self, arch):
        model = models.build(arch, 10)
        parts = [m for m in fused.fuse(model, IMAGES).modules() if isinstance(m, fused.NormAct)]
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(parts) == len(norms) and all(part.relu for part in parts)

    @pytest.mark.parametrize("build", [torchvision.models.resnet18, torchvision.models.densenet121])
    def test_networks_of_torchvision(self, build):
        torch.manual_seed(0)
        model = build(num_classes=10)
        plain, x = copy.deepcopy(model), torch.randn(4, 3, 64, 64)
        network = fused.fuse(model, x)
        assert any(isinstance(m, fused.NormAct) for m in network.modules())
        one, two = trained(network, model, x), trained(plain, plain, x)
        torch.testing.assert_close(one[0], two[0], rtol=1e-3, atol=1e-3)
        same(one[2], two[2], 10)

    def test_shares_weights_and_modes(self, net, data):
        network = fused.fuse(net, torch.zeros(1, 3, 8, 8))
        assert {id(p) for p in network.parameters()} == {id(p) for p in net.parameters()}
        net.eval()
        assert not any(m.training for m in network.modules() if isinstance(m, nn.BatchNorm2d))

    def test_a_network_that_changes_with_its_mode_is_left_alone(self):
        class Moody(nn.Module):
            def forward(self, x):
                return F.dropout(x, training=self.training)

        class Branching(nn.Module):
            def forward(self, x):
                return x if x.sum() > 0 else -x

        for model in (Moody(), Branching()):
            model.train()
            assert fused.fuse(model, IMAGES) is model and model.training

    def test_an_addition_that_broadcasts_is_done_plainly(self):
        class Gate(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm2d(4)

            def forward(self, x):
                return F.relu(self.norm(x) + x.mean((2, 3), keepdim=True))

        torch.manual_seed(0)
        model, x = Gate(), torch.randn(2, 4, 3, 3)
        torch.testing.assert_close(fused.fuse(model, x)(x), copy.deepcopy(model)(x))

    def test_without_a_compiler_it_is_the_model_and_says_so(self, net, monkeypatch, tmp_path):
        monkeypatch.setenv("CXX", "no-such-compiler")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        fused.library.cache_clear()
        try:
            with pytest.warns(UserWarning, match="no C\\+\\+ compiler 'no-such-compiler'"):
                assert fused.fuse(net, IMAGES) is net
        finally:
            fused.library.cache_clear()


def test_kept_memory_costs_no_faults():
    code = """
import resource
import torch
from explib.engine import fused

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        tensors = [torch.ones(10 << 20) for _ in range(8)]  # of 40 MB: glibc gives those back
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
faults(), print(faults(), fused.keep_memory(), faults(), faults())"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    before, kept, _, after = done.stdout.split()
    if kept == "False":
        pytest.skip("this C library has no such settings")
    assert int(before) > 1000 and int(after) < int(before) / 2, done.stdout
