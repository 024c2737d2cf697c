"""What a GPU computes with, against torch in float64; without a GPU, in Triton's interpreter."""

import copy
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from explib import models
from explib.engine import fused
from explib.models import resnet
from tests.conftest import ROOT

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


class Case(NamedTuple):
    shape: tuple[int, int, int, int]
    dtype: str = "float32"
    add: bool = True
    relu: bool = True
    mean: float = 5.0
    deviation: float = 2.0

    def tolerance(self, name: str) -> float:
        """Of one of `largest_differences`."""
        if name == "num_batches_tracked":
            return 0.0
        if self.mean > 100:
            # float32 rounds a mean of 1000 by up to 3e-5; the gradient of weight has that times the
            # sum of the gradients: torch's layers in float32 are off by as much
            return 1e-3 if name == "gradient of weight" else 1e-4
        rounded = self.dtype == "bfloat16" and name in ACTIVATIONS
        return 1e-2 if rounded else 1e-5


ACTIVATIONS = ("result", "gradient of x", "gradient of what was added")
SHAPES = [
    (3, 5, 7, 7),  # 147 rows in a tile of 256
    (7, 5, 19, 17),  # 2261 rows in tiles of 1024
    (4, 16, 8, 8),  # 256 rows in a tile of 256
    (5, 64, 9, 9),  # 405 rows in tiles of 128
    (2, 200, 3, 3),  # 128 channels and 72
]
CASES = [
    *itertools.starmap(
        Case, itertools.product(SHAPES, ("float32", "bfloat16"), (False, True), (False, True))
    ),
    # without ReLU, whose inputs of 0 but for rounding may go either way
    Case(
        (3, 200, 53, 54), relu=False
    ),  # 135 tiles, two a program; of the last one 10 rows are left
    # squares would cancel
    *(Case(shape, relu=False, mean=1000.0, deviation=1.0) for shape in SHAPES),
]


def largest_differences(case: Case, device: str) -> dict[str, float]:
    """Of all that a norm, an addition and a ReLU make and leave, in parts of each one's largest."""
    from explib.engine import gpu_norms

    generator = torch.Generator().manual_seed(0)

    def noise(*shape, mean=0.0, deviation=1.0):
        return mean + deviation * torch.randn(shape, generator=generator)

    def activations(**moments):
        made = noise(*case.shape, **moments).to(device, getattr(torch, case.dtype))
        return made.contiguous(memory_format=torch.channels_last).requires_grad_()

    channels = case.shape[1]
    norm = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.3)
    norm.weight.data, norm.bias.data = noise(channels, mean=1.0, deviation=0.3), noise(channels)
    norm.running_mean, norm.running_var = noise(channels), noise(channels).exp()
    norm.num_batches_tracked.fill_(41)
    plain, norm = copy.deepcopy(norm).double(), norm.to(device)
    x, dy = activations(mean=case.mean, deviation=case.deviation), activations().detach()
    add = activations() if case.add else None

    found = gpu_norms.norm_act(norm, x, add, case.relu)
    assert found.dtype == x.dtype and found.is_contiguous(memory_format=torch.channels_last)
    found.backward(dy.contiguous())  # laid out otherwise
    x64, add64 = (
        None if t is None else t.detach().cpu().double().requires_grad_() for t in (x, add)
    )
    wanted = plain(x64) if add is None else plain(x64) + add64
    wanted = F.relu(wanted) if case.relu else wanted
    wanted.backward(dy.cpu().double())

    pairs = {"result": (found, wanted), "gradient of x": (x.grad, x64.grad)}
    if add is not None:
        pairs["gradient of what was added"] = add.grad, add64.grad
    pairs |= {f"gradient of {k}": (p.grad, plain.get_parameter(k).grad)
              for k, p in norm.named_parameters()}  # fmt: skip
    pairs |= {k: (buffer, plain.get_buffer(k)) for k, buffer in norm.named_buffers()}
    return {name: _largest(*pair) for name, pair in pairs.items()}


def _largest(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, in parts of the largest value."""
    found, wanted = found.detach().cpu().double(), wanted.detach()
    return float((found - wanted).abs().max() / wanted.abs().max())


def where_nan_is_left(device: str) -> list[int]:
    """Places of the result that are NaN where the third of what was added is; ReLU behind it."""
    from explib.engine import gpu_norms

    x = torch.arange(8.0, device=device).view(2, 1, 2, 2)
    add = torch.zeros_like(x)
    add.view(-1)[2] = float("nan")
    y = gpu_norms.norm_act(nn.BatchNorm2d(1).to(device), x, add, True)
    return y.isnan().flatten().nonzero().flatten().tolist()


CONVS = [
    (2, 16, 16, 8, 8),  # 128 pixels: one block
    (3, 32, 16, 7, 5),  # 105
    (1, 16, 64, 3, 3),  # 9
    (50, 16, 32, 11, 11),  # 6050: the last block is not full
    (9, 3, 16, 63, 65),  # 36855: 128 pixels a block; an image's channels
]
"""(N, channels, filters, H, W)."""


def conv_differences(shape: tuple, device: str) -> dict[str, float]:
    """Of all that a conv, its norm, an addition and a ReLU make, in parts of each one's largest.

    In float32 on a CPU: the interpreter's products take bfloat16 for integers. Values are such that
    bfloat16 holds them, so that it is the sums that are compared.
    """
    from explib.engine import gpu_convs

    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        made = torch.randn(shape, generator=generator).bfloat16()
        made = made.float() if device == "cpu" else made.to(device)
        return made.contiguous(memory_format=torch.channels_last).requires_grad_()

    count, channels, filters, height, width = shape
    conv, norm = nn.Conv2d(channels, filters, 3, padding=1), nn.BatchNorm2d(filters, momentum=0.3)
    conv.weight.data = noise(filters, channels, 3, 3).detach().cpu().float()
    plain_conv, plain_norm = copy.deepcopy(conv).double(), copy.deepcopy(norm).double()
    conv, norm = conv.to(device), norm.to(device)
    x, add = noise(count, channels, height, width), noise(count, filters, height, width)
    dy = noise(count, filters, height, width).detach()
    x64, add64 = (t.detach().cpu().double().requires_grad_() for t in (x, add))
    weight = conv.weight.detach().to(x.dtype, memory_format=torch.channels_last)
    found = gpu_convs.conv_norm(conv, norm, x, add, False, weight)
    found.backward(dy.contiguous())  # laid out otherwise
    wanted = plain_norm(plain_conv(x64)) + add64
    wanted.backward(dy.cpu().double())
    pairs = {
        "result": (found, wanted),
        "gradient of x": (x.grad, x64.grad),
        "gradient of what was added": (add.grad, add64.grad),
    }
    for own, plain in ((conv, plain_conv), (norm, plain_norm)):
        pairs |= {f"gradient of {type(own).__name__}.{name}": (p.grad, q.grad) for (name, p), q in
                  zip(own.named_parameters(), plain.parameters(), strict=True)}  # fmt: skip
    assert not conv.bias.grad.any()  # the norm takes away what it adds
    del pairs["gradient of Conv2d.bias"]
    pairs |= {k: (buffer, plain_norm.get_buffer(k)) for k, buffer in norm.named_buffers()}
    return {name: _largest(*pair) for name, pair in pairs.items()}


def all_found(device: str) -> dict:
    """What the tests look at, by the case's place in CASES and CONVS, as JSON has it."""
    norms = {str(number): largest_differences(case, device) for number, case in enumerate(CASES)}
    convs = {str(number): conv_differences(shape, device) for number, shape in enumerate(CONVS)}
    return {"norms": norms, "convs": convs, "nan": where_nan_is_left(device)}


@pytest.fixture(scope="module")
def interpreted() -> dict:
    """All cases, in a process of their own: Triton asks for its interpreter once, at its import."""
    code = f"import json, {__name__} as t; print(json.dumps(t.all_found('cpu')))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(found: dict[str, float], case: Case) -> None:
    for name, difference in found.items():
        assert difference <= case.tolerance(name), (case, name, difference)  # NaN is not


def check_conv(found: dict[str, float], rounded: bool) -> None:
    for name, difference in found.items():
        tolerance = 1e-2 if rounded and name != "num_batches_tracked" else 1e-5
        assert difference <= tolerance, (name, difference)


@needs_triton
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: "-".join(map(str, CASES[n])))
def test_norms_are_the_plain_layers_in_the_interpreter(interpreted, number):
    check(interpreted["norms"][str(number)], CASES[number])


@needs_triton
@pytest.mark.parametrize("number", range(len(CONVS)), ids=lambda n: str(CONVS[n]))
def test_convs_are_the_plain_ones_in_the_interpreter(interpreted, number):
    check_conv(interpreted["convs"][str(number)], rounded=False)


@needs_triton
def test_nan_comes_through_a_relu_in_the_interpreter(interpreted):
    assert interpreted["nan"] == [2]


@pytest.mark.gpu
@needs_triton
def test_all_are_the_plain_layers_on_a_gpu():
    found = all_found("cuda")
    assert found["nan"] == [2]
    for number, case in enumerate(CASES):
        check(found["norms"][str(number)], case)
    for differences in found["convs"].values():
        check_conv(differences, rounded=True)


class TestWhereThePassesAreUsed:
    """By `fused.NormAct`, on tensors that are of a GPU but hold nothing."""

    @pytest.fixture
    def used(self, monkeypatch):
        """What computes relu(norm(x) + add): `passes` or `layers`."""

        def of(norm, dtype=torch.bfloat16, device="cuda", add=None):
            calls = []
            passes = SimpleNamespace(norm_act=lambda norm, x, *_: calls.append("passes") or x)
            monkeypatch.setattr(fused, "on_gpu", lambda: (passes, None))
            norm.forward = lambda x: calls.append("layers") or x
            with FakeTensorMode():
                x = torch.empty(4, 3, 5, 5, dtype=dtype, device=device)
                add = None if add is None else torch.empty(add, dtype=dtype, device=device)
                fused.NormAct(norm, relu=True)(x, add)
            return calls

        return of

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("add", [None, (4, 3, 5, 5)])
    def test_in_training(self, used, dtype, add):
        assert used(nn.BatchNorm2d(3), dtype, add=add) == ["passes"]

    def test_never_for_what_they_do_not_compute(self, used):
        norm = nn.BatchNorm2d(3)
        assert used(nn.BatchNorm2d(3, momentum=None)) == ["layers"]  # the average over batches
        assert used(nn.BatchNorm2d(3, affine=False)) == ["layers"]
        assert used(nn.BatchNorm2d(3, track_running_stats=False)) == ["layers"]
        assert used(norm, torch.float16) == used(norm, torch.float64) == ["layers"]
        assert used(norm, add=(4, 3, 1, 1)) == ["layers"]
        with torch.no_grad():  # evaluation
            assert used(norm.eval()) == ["layers"]
        assert used(norm.eval()) == ["layers"]  # frozen


class Named(nn.Module):
    """Whose layers are called by their arguments' names: the conv stays apart from its norm."""

    def __init__(self):
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.flat = nn.Flatten()

    def forward(self, x):
        x = self.first_norm(self.first(x))
        return self.flat(input=self.norm(self.conv(input=x)))


@needs_triton
@pytest.mark.parametrize(
    "build", [lambda: resnet.build(depth=8), lambda: models.build("vgg_16_bn"), lambda: Named()]
)
def test_convs_and_norms_of_a_network_become_one_and_small_ones_share_their_weights(
    monkeypatch, build
):
    """As on a GPU, in torch's layers: the graph is what a CPU can look at."""
    from explib.engine import gpu_convs, gpu_norms

    monkeypatch.setattr(fused, "on_gpu", lambda: (gpu_norms, gpu_convs))
    torch.manual_seed(0)
    model, images = build(), torch.randn(2, 3, 32, 32)
    graph, modules = fused._traced(model, images), dict(model.named_modules())
    made = fx.GraphModule(model, graph)
    for node in list(graph.nodes):
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if type(layer) is nn.BatchNorm2d:
            fused._fuse_norm(made, node, layer, modules)
    fused._fuse_convs(made, modules)
    graph.eliminate_dead_code()
    made.recompile()
    left = [modules.get(str(node.target)) for node in graph.nodes if node.op == "call_module"]
    apart = [layer for layer in left if isinstance(layer, nn.Conv2d | nn.BatchNorm2d)]
    assert apart == ([model.conv] if isinstance(model, Named) else [])
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert made.fused_weights.convs and set(made.fused_weights.convs) <= set(convs)
    for training in (True, False):
        found, wanted = made.train(training)(images), model.train(training)(images)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
