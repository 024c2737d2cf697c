"""The engine against torch: every network, odd sizes, what it refuses and leaves to torch."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

from explib import engine, registry
from explib.data import eval_batches, load_data
from explib.engine import build, compiling, export, fused, graph, plan
from explib.params import Params
from explib.pruning import checkpoints, layers
from explib.pruning.checkpoints import load_network
from tests.conftest import ROOT, needs_compiler
from tests.engine.networks import SIDES, error, lively, masked
from tests.engine.sweep import BOUNDS

SHIPPED = ROOT / "results/checkpoints/cifar10/resnet_56-B-53-l1-e50.safetensors"
pytestmark = [needs_compiler, pytest.mark.filterwarnings("ignore:.*runs? in torch")]


@pytest.mark.parametrize("arch", registry.NETWORKS)
def test_every_network_of_the_study_gives_torch_its_results(arch):
    model, side = masked(arch), SIDES[arch]
    fast = engine.compile(model, torch.zeros(1, 3, side, side), fallback=False)
    assert fast.report["fallbacks"] == []
    for count in (1, 2, 17):  # one image over the lanes, one block and more
        assert error(model, fast, torch.randn(count, 3, side, side)) < 1e-4
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        fast.report["kernels"] -= int(conv.weight.any(-1).any(-1).sum())
    assert fast.report["kernels"] == 0


@pytest.mark.parametrize("threads", [-1, 0, "2", 1.5])
def test_a_number_of_threads_that_cannot_be(threads):
    with pytest.raises(ValueError, match=f"threads: {threads!r}; give 1 or more, or None"):
        engine.compile(nn.Conv2d(3, 4, 1), torch.zeros(1, 3, 8, 8), threads=threads)


@pytest.fixture(scope="module")
def cifar10(cifar10_root):
    return load_data(
        Params(dataset="cifar10", normalization="imagenet", data_dir=str(cifar10_root))
    )


def scores(network, data) -> torch.Tensor:
    """What a network says of every test image (10,000, 10); a batch's activations fit a cache."""
    with torch.no_grad():
        return torch.cat([network(images) for images, _ in eval_batches(data.test, data, 64)])


@pytest.fixture(scope="module")
def of_the_engine(cifar10):
    """The shipped network's scores in fp32."""
    fast = engine.load(SHIPPED, threads=2)
    assert fast.report["dtype"] == "float32"
    return scores(fast, cifar10)


def test_the_shipped_network_has_the_same_top1_on_every_test_image(cifar10, of_the_engine):
    model, _, meta = load_network(SHIPPED)
    wanted, found = scores(model, cifar10), of_the_engine
    assert torch.equal(found.argmax(1), wanted.argmax(1))
    assert ((found - wanted).abs().amax(1) < 1e-4 * wanted.abs().amax(1)).all()
    correct = int((found.argmax(1) == cifar10.test.labels).sum())
    assert len(found) == 10_000 and abs(100 * correct / len(found) - meta["top1"]) <= 0.05


@pytest.mark.parametrize("dtype", build.TYPES[1:3])
def test_16_bits_keep_the_accuracy_of_the_shipped_network(cifar10, of_the_engine, dtype):
    if not build.computes(build.library(), dtype):
        pytest.skip(f"this processor does not compute in {dtype}")
    fast = engine.load(SHIPPED, dtype=dtype)
    assert fast.report["dtype"] == str(dtype).removeprefix("torch.")
    full, short = (
        int((found.argmax(1) == cifar10.test.labels).sum())
        for found in (of_the_engine, scores(fast, cifar10))
    )
    assert abs(short - full) <= 5  # of 10,000


@pytest.mark.parametrize("dtype", build.TYPES[1:3])
def test_undecided_images_get_the_scores_of_float32(net, dtype):
    images = torch.randn(64, 3, 32, 32)
    example = images[:1]
    short, full = (engine.compile(net, example, dtype=t) for t in (dtype, torch.float32))
    if short.report["dtype"] == "float32":
        pytest.skip(f"this processor does not compute in {dtype}")
    wanted, exact = short(images), full(images)
    best = wanted.topk(2, 1).values
    apart = best[:, 0] - best[:, 1]
    margin = float(apart.median())
    fast = engine.compile(net, example, dtype=dtype, recheck=margin)
    near, found = apart < margin, fast(images)
    assert 0 < near.sum() < 64 and fast.report["recheck"] == margin
    assert torch.equal(found[~near], wanted[~near])
    torch.testing.assert_close(found[near], exact[near], rtol=1e-4, atol=1e-5)
    assert not torch.equal(wanted[near], exact[near])


def test_what_cannot_be_rechecked_is_said(net):
    with pytest.raises(ValueError, match="recheck: -1; give 0 or more"):
        engine.compile(net, torch.zeros(1, 3, 32, 32), dtype=torch.bfloat16, recheck=-1)
    features = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match="for a network with scores"):
        engine.compile(features, torch.zeros(1, 3, 8, 8), dtype=torch.bfloat16, recheck=1)
    exact = engine.compile(net, torch.zeros(1, 3, 32, 32), recheck=1)
    assert exact.report["dtype"] == "float32" and "recheck" not in exact.report


def test_scores_in_16_bits_are_not_rounded_to_them(net):
    if not build.computes(build.library(), torch.bfloat16):
        pytest.skip("this processor does not compute in bfloat16")
    scores = engine.compile(net, torch.zeros(1, 3, 32, 32), dtype=torch.bfloat16)(
        torch.randn(32, 3, 32, 32)
    )
    assert (scores != scores.bfloat16().float()).float().mean() > 0.5


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize("where", ["parent", "parent, not run there", "child"])
def test_a_fork_computes_too(where):
    # whose parent's threads it has not: torch itself would wait for them, hence its one thread
    code = f"""
import operator
import os
import signal
import torch
import torch.nn.functional as F
from torch import nn
from explib import engine

def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    return engine.compile(model, torch.zeros(1, 3, 16, 16))

torch.set_num_threads(2)
fast, images = network(), torch.randn(1 << 7, 3, 16, 16)
torch.relu(torch.ones(1 << 20))  # torch's threads are there, whoever computes first
wanted = None if "not run" in {where!r} else fast(images).numpy()
child = os.fork()
if not child:
    signal.alarm(60)
    torch.set_num_threads(1)
    fast = network() if {where!r} == "child" else fast
    found = fast(images).numpy()
    os._exit(int(not (wanted is None or (found == wanted).all())))
print(os.waitpid(child, 0)[1])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "0", done.stderr


class Strange(nn.Module):
    """Two ops without a kernel in the middle, and a BatchNorm that no conv takes in."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = self.conv(x)
        z = torch.exp(-torch.relu(self.norm(torch.relu(y))))
        return self.last(self.depth(z).cumsum(2) + y).flatten(1), y


def test_what_has_no_kernel_runs_in_torch_and_is_named():
    model, images = lively(Strange()), torch.randn(5, 3, 9, 9)
    with pytest.warns(UserWarning, match=r"cumsum \(cumsum\): no kernel for it"):
        fast = engine.compile(model, images)
    assert [why.split(" ")[0] for why in fast.report["fallbacks"]] == ["exp", "cumsum"]
    with torch.no_grad():
        for found, wanted in zip(fast(images), model(images), strict=True):
            assert torch.allclose(found, wanted, atol=1e-5)
    with pytest.raises(NotImplementedError, match=r"exp \(exp\): no kernel for it"):
        engine.compile(model, images, fallback=False)


BRANCHING = {
    "values": (lambda x: x if x.sum() > 0 else -x, r"cannot trace it \(.*data-dependent"),
    "some batches": (
        lambda x: x if x.shape[0] < 3 else -x,
        r"for some sizes of the batch \(.* < 3\)",
    ),
    "one image": (lambda x: x if x.shape[0] > 1 else -x, "the engine makes something else of it"),
    "one batch": (lambda x: x.view(2, -1), r"for some sizes of the batch \(.* == 2\)"),
    "each image": (lambda x: torch.stack([y + 1 for y in x]), "for some sizes of the batch"),
}


@needs_compiler
def test_blocks_that_answer_otherwise_than_single_images_are_not_used(monkeypatch):
    """Small batches, with which a network is compared, never run in blocks."""
    model, example = nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 8, 8)
    run = compiling.Network.__call__

    def wrong(self, *tensors):
        return [2 * y if len(y) >= 4 else y for y in run(self, *tensors)]

    monkeypatch.setattr(compiling.Network, "__call__", wrong)
    with pytest.warns(UserWarning, match="the engine makes something else of it; this network"):
        fast = engine.compile(model, example)
    assert fast.report["engine"] == "torch"


@pytest.mark.parametrize(("branch", "why"), BRANCHING.values(), ids=BRANCHING)
def test_a_network_that_branches_on_what_it_is_given_runs_in_torch(branch, why, capfd):
    class Branching(nn.Module):
        def forward(self, x):
            return branch(x)

    images = torch.ones(2, 3, 4, 4)
    with pytest.warns(UserWarning, match=f"{why}.*runs dense, in torch"):
        fast = engine.compile(Branching(), images)
    for some in (images, -images, images[:1], torch.cat([images] * 2)):
        assert torch.equal(fast(some), branch(some))
    with pytest.raises(NotImplementedError, match=why):
        engine.compile(Branching(), images, fallback=False)
    assert capfd.readouterr() == ("", "")


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * self.calls


def test_a_network_that_changes_as_it_runs_runs_in_torch():
    with pytest.warns(UserWarning, match="it changes its b_calls when it runs"):
        fast = engine.compile(Counting(), torch.ones(1, 3, 4, 4))
    assert fast.report["engine"] == "torch"


class Several(nn.Module):
    """Two tensors and a number in, tensors by name and other things out."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(5, 4)

    def forward(self, x, context, scale=2):
        y = self.conv(x).mean((2, 3)) + self.linear(context)
        return {"scores": torch.relu(y), "more": [scale, None, x.shape[0], (y * scale,)]}


def test_several_inputs_and_results():
    model = Several().eval()
    x, context = torch.randn(3, 3, 8, 8), torch.randn(3, 5)
    one_by_one = (x, context)
    for example in (one_by_one, {"context": context, "x": x, "scale": 3}):
        fast = engine.compile(model, example)
        assert fast.report["engine"] == "native"
        fewer = tree_map(lambda v: v[:1] if torch.is_tensor(v) else v, example)
        for some in (fewer, example):
            found, wanted = (layers.call(net, some) for net in (fast, model))
            torch.testing.assert_close(found, wanted)
    assert torch.equal(fast(x=x, scale=3, context=context)["scores"], found["scores"])
    with pytest.raises(ValueError, match="input: int; give 3, as the example has"):
        fast(x=x, scale=2, context=context)
    assert torch.equal(fast({"scale": 3, "x": x, "context": context})["scores"], found["scores"])
    with pytest.raises(TypeError, match=r"input: .*; give what the example has, as the network"):
        fast(x, context)
    with pytest.raises(TypeError, match=r"input: \[.*\] and \{scale=int\}; give what"):
        fast(x, scale=3)
    with pytest.raises(ValueError, match="recheck: only of networks that take one tensor"):
        engine.compile(model, one_by_one, recheck=1)


def test_without_a_compiler_the_network_runs_dense(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    model, images = masked("resnet_56"), torch.randn(2, 3, 32, 32)
    with pytest.warns(UserWarning, match="no C.. compiler 'no-such-compiler'; install g"):
        fast = engine.compile(model, images)
    assert fast.report["engine"] == "torch" and error(model, fast, images) == 0
    with pytest.raises(engine.NoCompiler):
        engine.compile(model, images, fallback=False)


def test_a_compiler_that_refuses_is_reported_in_one_line(monkeypatch):
    monkeypatch.setenv("EXPLIB_CXXFLAGS", "-include no-such-header.h")
    with pytest.raises(engine.NoCompiler, match=r"kernels.cpp does not compile: .*no-such") as e:
        build.library()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_without_its_16_bits_it_is_float32_and_says_why(monkeypatch, net, name):
    monkeypatch.setattr(build, "computes", lambda library, dtype: dtype == torch.float32)
    images = torch.randn(2, 3, 8, 8)
    with pytest.warns(UserWarning, match=f"does not compute in {name}; using float32"):
        fast = engine.compile(lively(net), images, dtype=getattr(torch, name))
    assert fast.report["dtype"] == "float32" and error(net, fast, images) < 1e-5


def test_folding_leaves_the_model_as_it_was():
    model = masked("resnet_56").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine.compile(model, torch.zeros(1, 3, 32, 32))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_later_changes_of_the_model_have_no_effect():
    model, images = masked("resnet_56"), torch.randn(1, 3, 32, 32)
    fast = engine.compile(model, images)
    wanted = fast(images)
    nn.init.zeros_(model.linear.weight)
    assert torch.equal(fast(images), wanted)


@pytest.fixture(scope="module")
def small():
    conv = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    return engine.compile(conv, torch.zeros(1, 3, 6, 5))


@pytest.mark.parametrize(
    ("images", "kind", "message"),
    [
        (torch.zeros(1, 3, 5, 6), ValueError, r"shape \(1, 3, 5, 6\); give \(N, 3, 6, 5\)"),
        (torch.zeros(3, 6, 5), ValueError, r"shape \(3, 6, 5\); give \(N, 3, 6, 5\)"),
        (torch.zeros(1, 3, 6, 5).half(), TypeError, "torch.float16; give a torch.float32"),
        (torch.zeros(1, 3, 6, 5, device="meta"), TypeError, "on meta; give a tensor on the CPU"),
        ([1.0], TypeError, "list; give a torch.float32"),
    ],
    ids=["size", "rank", "dtype", "device", "no tensor"],
)
def test_a_wrong_input_is_a_clear_error(small, images, kind, message):
    with pytest.raises(kind, match=f"input: .*{message}"):
        small(images)


def test_inputs_of_any_strides_and_no_images_at_all(small):
    images = torch.randn(4, 3, 5, 6).transpose(2, 3)
    assert torch.equal(small(images), small(images.contiguous()))
    assert small(torch.zeros(0, 3, 6, 5)).shape == (0, 4, 6, 5)


def test_a_truncated_or_foreign_file_is_a_clear_error(tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(SHIPPED.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut.safetensors: not a readable safetensors file"):
        engine.load(cut)
    checkpoints.save(tmp_path / "own.safetensors", nn.Conv2d(3, 3, 3), {}, {"arch": "own"})
    with pytest.raises(ValueError, match="its arch is 'own'; known: vgg_16_bn"):
        engine.load(tmp_path / "own.safetensors")


def test_fusing_makes_one_op_of_a_conv_its_norm_its_residual_and_its_relu():
    traced, _ = export.trace(masked("resnet_56"), torch.zeros(1, 3, 32, 32))
    kinds = [op.kind for op in graph.fuse(traced.ops, set(), traced.shapes, plan.native)]
    # 55 convs, two shortcuts of option A, the mean and the linear layer; no add, no relu
    assert len(kinds) == 59 and kinds.count("conv") == 55 and kinds.count("pad") == 2
    assert set(kinds) == {"conv", "pad", "adaptive_avg", "linear"}


def test_a_slot_serves_one_value_at_a_time():
    traced, _ = export.trace(masked("googlenet"), torch.zeros(1, 3, 32, 32))
    made = graph.fuse(traced.ops, set(), traced.shapes, plan.native)
    found, slots, listed = plan.places(made, {"x": (3, 32, 32)}, [made[-1].name])
    parts_of = {op.name: set(op.inputs) for op in made if op.kind == "cat"}

    def channels(name):
        place = found[name]
        assert place.first + place.shape[0] <= slots[place.slot][0]
        return {(place.slot, place.first + c) for c in range(place.shape[0])}

    lies = dict.fromkeys(channels("x"), "x")  # the value that lies there, as the ops run
    for op in listed:
        for name in op.inputs:
            assert {lies[at] for at in channels(name)} == parts_of.get(name, {name})
        lies |= dict.fromkeys(channels(op.name), op.name)
    assert len(slots) < len(listed) and all(op.kind != "copy" for op in listed)


def test_what_a_conv_reads_may_be_a_part_of_what_is_added_to_it():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
            self.out = nn.Conv2d(4, 8, 3, padding=1)

        def forward(self, x):
            a = self.one(x)
            return torch.relu(self.out(a) + torch.cat([a, self.two(x)], 1))

    torch.manual_seed(0)
    model = Net().eval()
    fast = engine.compile(model, torch.zeros(1, 3, 8, 8), fallback=False)
    for count in (1, 17):
        assert error(model, fast, torch.randn(count, 3, 8, 8)) < 1e-5


IN_PLACE = {
    "F.relu(y, inplace=True)": lambda net, y: F.relu(y, inplace=True),
    "F.relu(y, True)": lambda net, y: F.relu(y, True),
    "torch.relu_": lambda net, y: torch.relu_(y),
    "y.relu_()": lambda net, y: y.relu_(),
    "nn.ReLU": lambda net, y: net.relu(y),
    "one after the other": lambda net, y: y.relu_().add_(y),
}


@pytest.mark.parametrize("write", IN_PLACE.values(), ids=IN_PLACE)
def test_what_is_overwritten_in_place_is_read_as_it_is_then(write):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            y = self.one(x)
            return self.two(write(self, y)) + y

    torch.manual_seed(0)
    model, images = Net().eval(), torch.randn(17, 3, 8, 8)
    fast = engine.compile(model, torch.zeros(1, 3, 8, 8), fallback=False)
    assert error(model, fast, images) < 1e-5
    trained = fused.fuse(model, images)  # the same for training
    assert trained is not model and error(model, trained, images) < 1e-5


def test_what_is_added_in_place_is_read_as_it_is_then():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            y = z = self.conv(x)
            y += 1  # to torch.fx, with which training is traced: y = y + 1
            return torch.relu(y) + z

    model, images = Net().eval(), torch.randn(2, 3, 8, 8)
    fast = engine.compile(model, torch.zeros(1, 3, 8, 8))
    assert error(model, fast, images) < 1e-5 and fast.report["engine"] == "native"
    assert fused.fuse(model, images) is model


def test_a_view_of_what_is_overwritten_is_overwritten_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            y = self.conv(x)
            view = y[:, :, ::2, ::2]
            y.relu_()
            return view

    torch.manual_seed(0)
    model, images = Net().eval(), torch.randn(2, 3, 8, 8)
    fast = engine.compile(model, torch.zeros(1, 3, 8, 8), fallback=False)
    assert error(model, fast, images) < 1e-5


def test_what_outgrows_float16_is_computed_in_float32():
    if not build.computes(build.library(), torch.float16):
        pytest.skip("this processor does not compute in torch.float16")
    model, images = nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), torch.randn(17, 3, 8, 8)
    model[0].weight.data *= 1e5
    with pytest.warns(UserWarning, match="in float16 the engine makes something else of it; using"):
        fast = engine.compile(model, images, dtype=torch.float16)
    assert (fast.report["engine"], fast.report["dtype"]) == ("native", "float32")
    assert error(model, fast, images) < 1e-5
    with pytest.raises(NotImplementedError, match="in float16 the engine makes something else"):
        engine.compile(model, images, dtype=torch.float16, fallback=False)


@pytest.mark.parametrize("count", [1, 16])
def test_pooling_keeps_nan_wherever_it_is(count):
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.MaxPool2d(2)).eval()
    fast = engine.compile(model, torch.zeros(1, 1, 8, 8), fallback=False)
    for place in range(4):
        images = torch.rand(count, 1, 8, 8)
        images[:, :, 2 + place // 2, 4 + place % 2] = float("nan")
        assert torch.equal(fast(images).isnan(), model(images).isnan())
        assert fast(images).isnan().sum() == count


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("arch", registry.NETWORKS)
def test_every_network_in_16_bits_is_as_near_as_these_allow(arch, dtype):
    if not build.computes(build.library(), dtype):
        pytest.skip(f"this processor does not compute in {dtype}")
    model, side = masked(arch), SIDES[arch]
    fast = engine.compile(model, torch.zeros(1, 3, side, side), dtype=dtype, fallback=False)
    assert error(model, fast, torch.randn(17, 3, side, side)) < BOUNDS[dtype]
