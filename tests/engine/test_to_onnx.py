"""Networks as ONNX, compared in ONNX Runtime with torch and with the engine; from files, too."""

import importlib.util
import sys

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten
from torchvision.models import mobilenet_v2, resnet18

import explib
from explib import engine
from explib.engine import plan, reference, to_onnx
from explib.engine.graph import Graph
from explib.engine.views import whole
from tests.conftest import PUBLIC, image, needs_compiler
from tests.engine.cases import PLANES, cases
from tests.engine.damage import SIZE, Everything
from tests.engine.networks import lively
from tests.engine.test_export import BODIES, IN_TORCH, Detector, UNet
from tests.engine.test_stored import pruned

needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))),
    reason="onnx and onnxruntime are not installed; pip install '.[peers]'",
)


def onnxruntime(path, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """What ONNX Runtime makes of inputs in their order."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    given = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(found) for found in session.run(None, given)]


def error(found, wanted) -> float:
    pairs = zip(found, tree_flatten(wanted)[0], strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in pairs)


@needs_onnx
@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("build", [resnet18, mobilenet_v2])
def test_a_pruned_network_is_the_same_in_onnx_runtime_in_the_engine_and_in_torch(tmp_path, build):
    model = pruned(build)
    path = engine.save(tmp_path / "net.safetensors", model, image(32), dtype=torch.float32)
    onnx = engine.save_onnx(tmp_path / "net.onnx", path)
    for count in (1, 5):
        x = torch.randn(count, 3, 32, 32)
        found = onnxruntime(onnx, x)
        assert error(found, engine.load(path)(x)) < 1e-4 and error(found, model(x)) < 1e-4


@needs_onnx
@torch.no_grad()
@pytest.mark.parametrize(
    ("build", "size"), [(UNet, (3, 21, 18)), (Detector, (3, 16, 24)), (Everything, SIZE)]
)
def test_several_results_are_outputs_in_their_order(tmp_path, build, size):
    torch.manual_seed(0)
    model, x = lively(build()), torch.randn(3, *size)
    path = engine.save_onnx(tmp_path / "net.onnx", model, x[:1])
    assert error(onnxruntime(path, x), model(x)) < 1e-4


@needs_onnx
@torch.no_grad()
@pytest.mark.parametrize("body", sorted({*BODIES} - {*IN_TORCH}))
def test_whatever_the_engine_has_ops_for_is_the_same(tmp_path, body):
    torch.manual_seed(0)
    model, x = lively(BODIES[body]), torch.randn(3, 3, 9, 10)
    path = engine.save_onnx(tmp_path / "net.onnx", model, x[:1])
    assert error(onnxruntime(path, x), model(x)) < 1e-4


@needs_onnx
@torch.no_grad()
@pytest.mark.parametrize("plane", PLANES)
def test_every_op_is_the_same(tmp_path, plane):
    """All cases of a plane in one file, each with inputs of its own."""
    ops, shapes, random = [], {}, torch.Generator().manual_seed(1)
    for number, (_, op, sources) in enumerate(cases(plane)):
        own = dict(zip(dict.fromkeys(op.inputs), sources, strict=True))
        shapes |= {f"{name}{number}": shape for name, shape in own.items()}
        inputs = tuple(f"{name}{number}" for name in op.inputs)
        ops.append(type(op)(**vars(op) | {"name": f"y{number}", "inputs": inputs}))
    results = [whole(op.name, op.shape) for op in ops]
    made = Graph(ops, [*shapes], shapes, results, None)
    values = {n: torch.randn(3, *s, generator=random) for n, s in shapes.items()}
    for op in ops:
        if op.kind == "div":
            by = values[op.inputs[1]]
            values[op.inputs[1]] = by.sign() * (by.abs() + 0.5)
    given = [*values.values()]
    found = onnxruntime(to_onnx.write(tmp_path / "ops.onnx", made), *given)
    for op, result in zip(ops, found, strict=True):
        assert plan.native(op, [shapes[name] for name in op.inputs])
        wanted = reference.run(op, values, 3)
        assert error([result], wanted) < 1e-5, op


@needs_onnx
def test_pruned_kernels_are_zeros_and_the_file_says_its_names(tmp_path):
    import onnx

    model = pruned()
    path = engine.save_onnx(
        tmp_path / "net.onnx", model, image(32), inputs=["images"], outputs=["scores"]
    )
    written = onnx.load(path).graph
    assert [v.name for v in (*written.input, *written.output)] == ["images", "scores"]
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in written.initializer}
    convs = [weights[node.input[1]] for node in written.node if node.op_type == "Conv"]
    zero = sum(int((~w.any((2, 3))).sum()) for w in convs)
    assert zero == sum(int((~mask).sum()) for mask in explib.masks_of(model).values())
    assert not {"BatchNormalization"} & {node.op_type for node in written.node}


@needs_onnx
def test_a_compact_file_of_the_study_is_written_too(tmp_path):
    path = engine.save_onnx(tmp_path / "net.onnx", PUBLIC)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert error(onnxruntime(path, x), explib.load_network(PUBLIC)[0](x)) < 1e-4


def test_what_is_lacking_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError, match=r'onnx is not installed; pip install "explib\[p'):
        engine.save_onnx(tmp_path / "net.onnx", nn.Conv2d(3, 4, 1), image(8))
    with pytest.raises(ValueError, match="example_inputs: give those of the network"):
        engine.save_onnx(tmp_path / "net.onnx", nn.Conv2d(3, 4, 1))


@needs_onnx
def test_ops_that_only_torch_runs_are_named(tmp_path):
    class Left(nn.Module):
        def forward(self, x):
            return x.cumsum(1)

    with pytest.raises(NotImplementedError, match=r"\(cumsum\): no op of the engine"):
        engine.save_onnx(tmp_path / "net.onnx", Left(), image(8))
