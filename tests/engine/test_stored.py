"""Networks as files with their graph (stored, saving): read without their class, checked."""

import json
import subprocess
import sys
from collections import OrderedDict
from dataclasses import dataclass, field, fields

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten
from torchvision.models import mobilenet_v2, resnet18

import explib
from explib import engine
from explib.engine import checking, graph, stored
from explib.engine.graph import Graph, Op
from explib.engine.views import whole
from explib.files import load_tensors, save_tensors
from explib.pruning.checkpoints import save_masks
from tests.conftest import PUBLIC, ROOT, image, needs_compiler
from tests.engine.damage import SIZE, Everything
from tests.engine.networks import lively
from tests.engine.test_export import Detector, UNet

SIDE = 32


def pruned(build=resnet18) -> nn.Module:
    torch.manual_seed(0)
    model = lively(build(num_classes=10))
    explib.apply(model, explib.prune(model, image(SIDE), rate=0.8, criterion="l1"))
    return model


def error(found, wanted) -> float:
    """The largest difference over the largest value, of all results."""
    pairs = zip(tree_flatten(found)[0], tree_flatten(wanted)[0], strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@needs_compiler
@torch.no_grad()
def test_it_runs_in_a_process_that_has_neither_its_class_nor_torchvision(tmp_path):
    model, x = pruned(), torch.randn(3, 3, SIDE, SIDE)
    classes = [f"class {i}" for i in range(10)]
    more = dict(classes=classes, mean=(0.5,), std=(0.2, 0.3, 0.4), resize=40)
    path = engine.save(tmp_path / "net.safetensors", model, x[:1], dtype=torch.float32, **more)
    save_tensors(tmp_path / "x.safetensors", {"x": x, "y": model(x)}, {})
    code = """
import sys
sys.modules["torchvision"] = None
from explib import engine
from explib.files import load_tensors
fast, (tensors, _) = engine.load("net.safetensors"), load_tensors("x.safetensors")
wanted = tensors["y"]
assert (fast(tensors["x"]) - wanted).abs().max() < 1e-4 * wanted.abs().max()
assert fast.report["engine"] == "native" and fast.shape == (3, 32, 32)
assert fast.about["classes"][9] == "class 9" and fast.about["images"]["resize"] == 40
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert path.is_file()


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize(
    ("build", "size"), [(UNet, (21, 18)), (Detector, (16, 24)), (Everything, (12, 10))]
)
def test_several_results_come_in_the_form_that_the_network_gives_them(tmp_path, build, size):
    torch.manual_seed(0)
    model, x = lively(build()), torch.randn(17, 3, *size)
    path = engine.save(tmp_path / "net.safetensors", model, x, dtype=torch.float32)
    fast = engine.load(path, fallback=False)
    for count in (1, 17):
        found, wanted = fast(x[:count]), model(x[:count])
        assert tree_flatten(found)[1] == tree_flatten(wanted)[1]
        assert error(found, wanted) < 1e-4


class Odd(nn.Module):
    """Two inputs and a number in, an OrderedDict with a constant and None out."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 1)

    def forward(self, image, small, *, plus: float):
        low = self.two(small).mean((2, 3), keepdim=True) + plus
        return OrderedDict(out=[self.one(image) * low], kind=("odd", None, 7), low=low.flatten(1))


@needs_compiler
@torch.no_grad()
def test_inputs_by_name_and_results_that_are_no_tensors(tmp_path):
    torch.manual_seed(0)
    model = Odd().eval()
    example = {"image": torch.randn(2, 3, 9, 7), "small": torch.randn(2, 3, 4, 4), "plus": 0.5}
    path = engine.save(tmp_path / "net.safetensors", model, example, dtype=torch.float32)
    fast, wanted = engine.load(path), model(**example)
    found = fast(**example)
    assert type(found) is OrderedDict and found["kind"] == ("odd", None, 7)
    assert error([*found["out"], found["low"]], [*wanted["out"], wanted["low"]]) < 1e-5
    with pytest.raises(ValueError, match="as the example has"):
        fast(**example | {"plus": 0.6})


def test_only_surviving_kernels_are_stored_and_shared_weights_once(tmp_path):
    torch.manual_seed(0)
    shared = nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), shared, nn.ReLU(), shared).eval()
    keep = torch.rand(8, 8) < 0.25
    with torch.no_grad():
        shared.weight *= keep[:, :, None, None]
    engine.save(tmp_path / "net.safetensors", model, torch.zeros(1, 3, 9, 9))
    tensors, meta = load_tensors(tmp_path / "net.safetensors")
    kernels = [t for t in tensors.values() if t.shape[1:] == (3, 3) and t.ndim == 3]
    assert [len(t) for t in kernels] == [int(keep.sum())] and len(meta["same"]) == 2
    assert all(t.dtype == torch.float16 for t in kernels)
    ops = stored.read(tmp_path / "net.safetensors").graph.ops
    assert ops[1].weight is ops[3].weight
    assert torch.equal(ops[1].weight, shared.weight.half().float())


@needs_compiler
@torch.no_grad()
def test_in_16_bits_the_answers_are_those_of_the_rounded_weights(tmp_path):
    model, x = pruned(mobilenet_v2), torch.randn(4, 3, SIDE, SIDE)
    path = engine.save(tmp_path / "net.safetensors", model, x)
    fast = engine.load(path)
    assert 1e-6 < error(fast(x), model(x)) < 0.02
    again = engine.load(path, dtype=torch.bfloat16, recheck=0.1)
    assert error(again(x), model(x)) < 0.1


@needs_compiler
def test_a_compact_file_of_the_study_opens_as_before():
    fast = engine.load(PUBLIC)
    assert fast.about["arch"] == "resnet_56" and fast.report["engine"] == "native"


@torch.no_grad()
def test_without_a_compiler_it_runs_in_torch_and_says_so(tmp_path, monkeypatch):
    model, x = pruned(), torch.randn(2, 3, SIDE, SIDE)
    path = engine.save(tmp_path / "net.safetensors", model, x, dtype=torch.float32)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler"):
        slow = engine.load(path)
    assert slow.report["engine"] == "torch" and error(slow(x), model(x)) < 1e-5
    with pytest.raises(engine.NoCompiler):
        engine.load(path, fallback=False)


@needs_compiler
def test_a_machine_that_computes_something_else_says_so(tmp_path, monkeypatch):
    path = engine.save(tmp_path / "net.safetensors", pruned(), image(SIDE))
    right, wrong = stored.holds, []

    def holds(network, file, tolerance):  # false of the engine, as on a machine where it errs
        wrong.append(isinstance(network, engine.Compiled))
        return not wrong[-1] and right(network, file, tolerance)

    monkeypatch.setattr(stored, "holds", holds)
    with pytest.warns(UserWarning, match="the engine makes something else of it"):
        assert engine.load(path).report["engine"] == "torch"
    with pytest.raises(NotImplementedError, match="something else"):
        engine.load(path, fallback=False)
    monkeypatch.setattr(stored, "holds", lambda *_: False)
    with (
        pytest.warns(UserWarning, match="something else"),
        pytest.raises(ValueError, match=f"{path}: torch does not give the answers"),
    ):
        engine.load(path)


class Left(nn.Module):
    """What torch alone computes, in the middle."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).cumsum(1).erfinv()


def test_what_a_file_cannot_hold_is_said_before_anything_is_written(tmp_path):
    path, x = tmp_path / "net.safetensors", image(8)
    with pytest.raises(NotImplementedError, match=r"\(cumsum\), .*\(erfinv\): no op of the engine"):
        engine.save(path, Left(), x)
    with pytest.raises(ValueError, match=r"dtype: torch\.int8; give torch\.float16"):
        engine.save(path, nn.Conv2d(3, 4, 1), x, dtype=torch.int8)
    for more, message in (
        ({"classes": [1, 2]}, "classes: .1, 2.; give their names"),
        ({"mean": (0.5, 0.5)}, "mean: .0.5, 0.5.; give a number, or one for each channel"),
        ({"std": (0.0,)}, "std: .0.0.; give numbers above 0"),
        ({"std": 0}, "std: .0.; give numbers above 0"),
        (
            {"mean": 0.5, "classes": ["a", "b"]},
            r"classes: 2 names; the network returns \(4, 8, 8\)",
        ),
        ({"resize": 7}, "resize: 7; give 0, or 8 or more pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.save(path, nn.Conv2d(3, 4, 1), x, **more)
    large = nn.Conv2d(3, 4, 1)
    nn.init.constant_(large.weight, 1e6)
    with pytest.raises(ValueError, match="weight has NaN or infinite values"):
        engine.save(path, large, x)
    with pytest.raises(ValueError, match=r"takes a tensor of torch.int64"):
        engine.save(path, Indexed(), (x, torch.zeros(1, dtype=torch.int64)))
    assert not path.exists()
    engine.save(path, large, x, dtype=torch.float32)


class Indexed(nn.Module):
    def forward(self, x, unused):
        return x * 2


def test_other_files_are_refused_by_name(tmp_path):
    path = save_masks(tmp_path / "masks.safetensors", explib.masks_of(pruned()))
    with pytest.raises(ValueError, match=f"{path}: holds no network"):
        engine.load(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        engine.load(tmp_path / "not-there.safetensors")
    with pytest.raises(FileNotFoundError, match="is a folder; give a file"):
        engine.load(tmp_path)
    path = engine.save(tmp_path / "net.safetensors", nn.Conv2d(3, 4, 1), image(8))
    with pytest.raises(ValueError, match=r"it is of engine\.save: engine\.load reads it"):
        explib.load(path)
    tensors, meta = load_tensors(path)
    save_tensors(path, tensors, meta | {"version": 3})
    with pytest.raises(ValueError, match=r"version 3; this explib reads 2"):
        engine.load(path)


@needs_compiler
def test_a_damaged_or_hostile_file_is_one_line_and_never_a_crash(tmp_path):
    """Bits flipped, files cut; then fields changed and the checksum with them."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.damage", str(tmp_path), "200"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["bytes refused"] == seen["cut refused"] == 200
    assert seen["fields refused"] > 120


X = {"x": (3, 8, 8)}
PLAIN = dict(weight=torch.ones(4, 3, 3, 3), kernel=(3, 3), pad=(1, 1))
WRONG = {
    "there is no such kind": Op("eval", "y", ("x",), (3, 8, 8)),
    "there is no activation 'swish'": Op("act", "y", ("x",), (3, 8, 8), act="swish"),
    "it takes no activation": Op("gather", "y", ("x",), (1, 8, 8), index=(0,), act="relu"),
    "nothing before it makes \\['z'\\]": Op("add", "y", ("x", "z"), (3, 8, 8)),
    "its name is taken": Op("act", "x", ("x",), (3, 8, 8), act="relu"),
    "it has no input": Op("cat", "y", (), (3, 8, 8)),
    "has shape \\(0, 8, 8\\)": Op("slice", "y", ("x",), (0, 8, 8)),
    "has shape \\(8192, 8192, 8192\\)": Op("pad", "y", ("x",), (8192, 8192, 8192)),
    "kernel is \\(0, 3\\)": Op("maxpool", "y", ("x",), (3, 8, 8), kernel=(0, 3)),
    "stride is \\(4096, 1\\)": Op("slice", "y", ("x",), (3, 1, 8), stride=(4096, 1)),
    "its windows reach over": Op("maxpool", "y", ("x",), (3, 4096, 4096), stride=(3, 3)),
    "pad is": Op("slice", "y", ("x",), (3, 8, 8), pad=(0, 2**20)),
    "groups is 2": Op("conv", "y", ("x",), (4, 8, 8), groups=2, **PLAIN),
    "lacks its weight": Op("conv", "y", ("x",), (4, 8, 8)),
    "weight is \\(4, 3, 3, 3\\), not \\(5, 3, 3, 3\\)": Op("conv", "y", ("x",), (5, 8, 8), **PLAIN),
    "weight is \\(4,\\)": Op("affine", "y", ("x",), (3, 8, 8), *[torch.ones(4)] * 2),
    "lacks its slope": Op("act", "y", ("x",), (3, 8, 8), act="prelu"),
    "lacks its bias": Op("layernorm", "y", ("x",), (3, 8, 8), torch.ones(3)),
    "bias is of torch.int64": Op(
        "conv", "y", ("x",), (4, 8, 8), bias=torch.ones(4).long(), **PLAIN
    ),
    "takes no \\['weight'\\]": Op("act", "y", ("x",), (3, 8, 8), torch.ones(3), act="relu"),
    "index is beyond": Op("gather", "y", ("x",), (2, 8, 8), index=(0, 3)),
    "index has 1 channels": Op("gather", "y", ("x",), (2, 8, 8), index=(0,)),
    "stretches": Op("stretch", "y", ("x",), (3, 16, 16), stride=(2, 2)),
    "by 1e-40 makes": Op("upsample_nearest", "y", ("x",), (3, 8, 8), alpha=1e-40, beta=1.0),
    "alpha or beta is no number": Op("scalar", "y", ("x",), (3, 8, 8), alpha=float("nan")),
    "torch does not run it": Op("add", "y", ("x", "x", "x"), (3, 8, 8)),
    "makes \\(3, 8, 8\\), not": Op("act", "y", ("x",), (3, 8, 9), act="relu"),
    "Padding size should be less": Op("pad_reflect", "y", ("x",), (3, 16, 8), pad=(8, 0)),
    "divisible by num_groups": Op(
        "groupnorm", "y", ("x",), (3, 8, 8), *[torch.ones(3)] * 2, groups=2
    ),
    "makes \\(192,\\), not": Op("flatten", "y", ("x",), (191,)),
}


@pytest.mark.parametrize("message", WRONG)
def test_an_op_that_cannot_be_is_named_and_refused(message):
    made = Graph([WRONG[message]], ["x"], X, [whole("x", (3, 8, 8))], None)
    with pytest.raises(ValueError, match=f"op 0, '{WRONG[message].kind}' '[xy]': .*{message}"):
        checking.check(made)


def test_every_field_of_an_op_comes_back(tmp_path):
    """And those that are added later are fields of types that a file knows."""
    torch.manual_seed(0)
    model, x = Everything().eval(), torch.zeros(1, *SIZE)
    path = engine.save(tmp_path / "net.safetensors", model, x, dtype=torch.float32)
    again, made = stored.read(path).graph, engine.export.trace(model, x)[0]
    assert again.ops == made.ops and again.shapes == made.shapes and again.results == made.results
    for one, other in zip(again.ops, made.ops, strict=True):
        for name in (f.name for f in fields(Op)):
            a, b = getattr(one, name), getattr(other, name)
            assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b
    assert graph.names(again.results) == graph.names(made.results)


def test_fields_that_come_later_are_stored_too(tmp_path, monkeypatch):
    """A number a channel as a tensor, numbers and offsets of all values."""

    @dataclass(frozen=True)
    class Later(Op):
        widths: torch.Tensor | None = field(default=None, compare=False)
        factors: tuple[float, ...] = ()
        offsets: tuple[int, ...] = ()

    for module in (stored, checking):
        monkeypatch.setattr(module, "Op", Later)
    weight = torch.randn(4, 3, 3, 3)
    own = dict(
        weight=weight, kernel=(3, 3), widths=torch.rand(4), factors=(0.5, 0.25), offsets=(3, 0)
    )

    def write(**more):
        op = Later("conv", "y", ("x",), (4, 6, 6), **own | more)
        made = Graph([op], ["x"], X, [whole("y", op.shape)], tree_flatten(0)[1])
        conv = nn.Conv2d(3, 4, 3, bias=False)
        conv.weight.data = weight
        x = torch.zeros(1, 3, 8, 8)
        return stored.write(tmp_path / "a.safetensors", made, x, {}, torch.float32, (conv, 0.01))

    (again,) = stored.read(write()).graph.ops
    assert torch.equal(again.widths, own["widths"]) and again.factors == (0.5, 0.25)
    assert again.offsets == (3, 0)
    for more in ({"widths": torch.rand(3)}, {"factors": (0.5,)}, {"offsets": (2**40, 0)}):
        with pytest.raises(ValueError, match=f"{next(iter(more))} is "):
            write(**more)
    path = write()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has a field 'factors', which this explib lacks"):
        stored.read(path)
