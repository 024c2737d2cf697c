"""Strided 1x1 convs: what torch does to memory, and that no door to training leads there."""

import copy
import os
import re
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from explib import engine
from explib.engine import fused, strided, training_layers
from explib.params import Params
from explib.training import backend, loop
from tests.conftest import ROOT, needs_compiler

LINES = re.search(r"```python\n(.*?)```", (ROOT / "docs/torch-cpu-memory.md").read_text(), re.S)[1]
GUARDED = "from explib.engine.strided import Guard\nwith Guard():\n" + textwrap.indent(
    LINES, "    "
)
VECTORS = {
    "as they are": {},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "SSE4.1": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}


@pytest.fixture(scope="module")
def checked():
    """Runs Python under glibc's heap checker, which ends a process that wrote beyond a block."""
    checker = {"LD_PRELOAD": "libc_malloc_debug.so.0", "MALLOC_CHECK_": "3"}
    found = subprocess.run(["true"], env=os.environ | checker, capture_output=True, text=True)
    if sys.platform != "linux" or found.stderr:
        pytest.skip("no libc_malloc_debug.so.0 of glibc here")
    environment = os.environ | checker | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def run(*arguments: str, vectors: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment | VECTORS[vectors],
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.parametrize("vectors", VECTORS)
def test_the_lines_that_corrupt_memory_in_torch_do_not_in_the_guard(checked, vectors):
    done = checked("-c", GUARDED, vectors=vectors)
    assert (done.returncode, done.stdout) == (0, "clean\n"), done.stderr[-500:]
    plain = checked("-c", LINES, vectors=vectors)
    library = re.search(r"MKL-DNN (v[\d.]+)", torch.__config__.show())
    versions = f"torch {torch.__version__}, oneDNN {library and library[1]}, vectors {vectors}"
    if plain.returncode == 0:
        pytest.skip(f"{versions}: nothing is corrupted, so that there strided.Guard is not needed")
    assert plain.returncode < 0 and "clean" not in plain.stdout, plain.stderr  # by a signal
    warnings.warn(f"{versions}: still corrupts memory (docs/torch-cpu-memory.md)", stacklevel=1)


@needs_compiler
@pytest.mark.parametrize("vectors", VECTORS)
def test_a_narrowed_network_trains_and_memory_stays_whole(checked, vectors):
    """Eager, in fused passes and in surviving kernels, in fp32 and bf16."""
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
    fused.library(), training_layers.library()  # built here rather than under the checker
    done = checked("-m", "tests.engine.memory", vectors=vectors)
    assert done.returncode == 0, done.stderr[-500:]
    assert re.findall(r"^(.*): loss", done.stdout, re.M) == [
        f"{how}, {precision}"
        for precision in ("fp32", "bf16")
        for how in ("eager", "fused passes", "surviving kernels")
    ]
    if vectors == "AVX2" and checked("-c", LINES, vectors=vectors).returncode:
        unguarded = checked("-m", "tests.engine.memory", "unguarded", vectors=vectors)
        assert unguarded.returncode < 0  # the checker looks where the fault is


@pytest.mark.parametrize("stride", [2, 3, (2, 1), (1, 2)])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1), (2, 5)])
@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("wrap", [strided.Strided, None], ids=["layer", "guard"])
def test_the_conv_and_its_gradients_are_those_of_float64(stride, size, groups, wrap):
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 10, 1, stride, groups=groups)
    plain, x = copy.deepcopy(conv).double(), torch.randn(3, 5, *size)
    x = x.to(memory_format=torch.channels_last)
    exact = x.double().requires_grad_()
    x.requires_grad_()
    if wrap:
        found = wrap(conv)(x)
    else:
        with strided.Guard():
            found = conv(x)
    wanted = plain(exact)
    dy = torch.randn_like(found)
    found.backward(dy)
    wanted.backward(dy.double())
    pairs = [(found, wanted), (x.grad, exact.grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(conv.parameters(), plain.parameters(), strict=True)]
    for one, other in pairs:
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # inference is torch's own
        assert torch.equal(strided.Strided(conv)(x), conv(x))


@pytest.mark.parametrize(
    ("conv", "wanted"),
    [
        (nn.Conv2d(3, 4, 1, 2), True),
        (nn.Conv2d(4, 4, 1, (1, 2), groups=4, padding="valid"), True),
        (nn.Conv2d(3, 4, 1), False),
        (nn.Conv2d(3, 4, 3, 2), False),
        (nn.Conv2d(3, 4, (1, 3), 2), False),
        (nn.Conv2d(3, 4, 1, 2, padding=1), False),
        (nn.Conv1d(3, 4, 1, 2), False),
        (nn.ReLU(), False),
    ],
)
def test_which_layers_are_affected(conv, wanted):
    assert strided.affected(conv) is wanted


class Gradients(TorchDispatchMode):
    """Notes kernel size and stride of every convolution whose gradients torch computes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.seen.append((tuple(args[2].shape[2:]), tuple(args[4])))
        return func(*args, **(kwargs or {}))

    @property
    def strided(self) -> bool:
        return any(size == (1, 1) and stride != (1, 1) for size, stride in self.seen)


class Shortcut(nn.Module):
    """A residual block with a strided 1x1 conv; as `functional`, one that no layer shows."""

    def __init__(self, functional: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 2, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.short = nn.Conv2d(3, 6, 1, 2)
        self.linear = nn.Linear(6, 10)
        self.functional = functional

    def forward(self, x):
        weight, bias = self.short.weight, self.short.bias
        short = F.conv2d(x, weight, bias, stride=2) if self.functional else self.short(x)
        return self.linear(F.relu(self.norm(self.conv(x)) + short).mean((2, 3)))


WAYS = {"off": "eager", "auto": "fused passes", "sparse": "surviving kernels"}


@needs_compiler
@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("way", [*WAYS, None])
@pytest.mark.parametrize("batch_size", [16, 20])  # whole blocks of the engine or not
def test_no_door_to_training_leads_to_torchs(way, functional, batch_size, data):
    torch.manual_seed(0)
    model = Shortcut(functional).to(memory_format=torch.channels_last)
    params = Params(
        epochs=1, batch_size=batch_size, distill=0.0, device="cpu", compile=way or "off"
    )
    chosen = {"conv": torch.rand(6, 3) < 0.5} if way == "sparse" else {}
    forward = backend.choose(model, params, "cpu", 0, chosen) if way else None
    assert way is None or forward.how == WAYS[way]
    with Gradients() as noted:
        list(loop.train(model, data, params, chosen, forward=forward))
    assert noted.seen or way == "sparse"
    assert not noted.strided


@needs_compiler
@pytest.mark.parametrize("functional", [False, True])
def test_networks_made_for_a_loop_of_ones_own_do_not_either(functional):
    model, images = Shortcut(functional), torch.randn(33, 3, 8, 8)  # no whole blocks
    masks = {"conv": torch.rand(6, 3) < 0.5}
    made = [fused.fuse(model, images), engine.sparse(model, masks, images)]
    assert all(network is not None and network is not model for network in made)
    for network in made:
        with Gradients() as noted:
            network(images.to(memory_format=torch.channels_last)).sum().backward()
        assert noted.seen and not noted.strided
    with Gradients() as noted:
        model(images).sum().backward()
    assert noted.strided  # what this test looks for


def test_gradients_are_computed_where_the_rule_holds_and_nowhere_else():
    """A new place has to be thought of: it runs in Guard, or has no strided 1x1 conv."""
    places = {
        "training/step.py": 1,  # in Guard
        "training/taylor.py": 1,  # in Guard
        "training/backend.py": 2,  # to time a conv 3x3, and a Backend, which is in Guard
        "study/bench/training.py": 2,  # the plain loop, laid out as torch does, and a Backend
        "engine/gpu_convs.py": 1,  # on a GPU only
        "engine/gpu_norms.py": 1,
    }
    found = {
        str(path.relative_to(ROOT / "explib")): count
        for path in sorted((ROOT / "explib").rglob("*.py"))
        if (count := len(re.findall(r"\.backward\(\)|autograd\.grad\(", path.read_text())))
    }
    assert found == places
