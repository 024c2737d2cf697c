"""Odd sizes and any kernels, for narrower vectors and under a sanitizer, too."""

import os
import platform
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from explib import engine
from explib.engine import build
from tests.conftest import ROOT, needs_compiler
from tests.engine.networks import skip_its_own
from tests.engine.sweep import BATCHES, BOUNDS, SIZES, sweep

pytestmark = [needs_compiler, pytest.mark.filterwarnings("ignore:.*runs? in torch")]


def test_sizes_that_fit_no_tile_at_any_batch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where there is no fp16 or bf16
        assert sweep() == len(SIZES) * len(BOUNDS) * 2 * len(BATCHES)


def run_sweep(flags: str, *batches: int, **variables: str) -> subprocess.CompletedProcess:
    """The sweep in a process of its own, with the kernels built by these flags."""
    command = [sys.executable, "-m", "tests.engine.sweep", *map(str, batches)]
    environment = os.environ | {"EXPLIB_CXXFLAGS": flags, "PYTHONPATH": str(ROOT)} | variables
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are of x86")
@pytest.mark.parametrize("flags", ["-mavx2 -mfma", "-msse4.2"])
def test_the_same_source_serves_narrower_vectors(flags):
    skip_its_own(flags)
    done = run_sweep(flags, 1, 5, 33)
    assert done.returncode == 0 and "compared" in done.stdout, done.stderr[-2000:]


@pytest.mark.skipif(sys.platform != "linux", reason="preloads gcc's sanitizer")
@pytest.mark.parametrize(
    ("target", "batches"),
    [("-mavx2 -mfma", [*range(1, 34, 4), 2, 8, 16, 32]), ("-march=native", [9, 16, 33])],
    ids=["every batch", "16 bits"],
)
def test_nothing_is_read_or_written_out_of_bounds(target, batches):
    if platform.machine() != "x86_64":
        target = "-march=native"
    if len(batches) == 3 and not any(build.computes(build.library(), t) for t in build.TYPES[1:3]):
        pytest.skip("this processor computes in float32 only")
    found = [
        subprocess.run(
            ["c++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True
        ).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    if not all(os.path.isabs(path) for path in found):
        pytest.skip("the compiler has no sanitizers")
    done = run_sweep(
        # calls instead of checks in line: compiling takes a third of the time
        f"{target} -Og -fsanitize=address,bounds,shift,signed-integer-overflow "
        "-fno-sanitize-recover=all --param asan-instrumentation-with-call-threshold=0",
        *batches,
        LD_PRELOAD=":".join(found), ASAN_OPTIONS="detect_leaks=0",
    )  # fmt: skip
    assert done.returncode == 0 and "compared" in done.stdout, done.stderr[-2000:]


@settings(max_examples=25)
@given(
    st.sampled_from([1, 3, 5]), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9),
    st.integers(1, 20), st.integers(1, 20), st.floats(0, 1), st.integers(1, 20), st.booleans(),
)  # fmt: skip
def test_any_conv_with_any_kernels_left(
    kernel, stride, channels, filters, height, width, density, count, bias
):
    conv = nn.Conv2d(channels, filters, kernel, stride, kernel // 2, bias=bias)
    with torch.no_grad():
        conv.weight *= (torch.rand(filters, channels) < density)[:, :, None, None]
    model = nn.Sequential(conv, nn.ReLU())
    images = torch.randn(count, channels, height, width)
    fast = engine.compile(model, images, threads=2, fallback=False)
    with torch.no_grad():
        assert torch.allclose(fast(images), model(images), atol=1e-5)
    assert fast.report["kernels"] == int(conv.weight.any(-1).any(-1).sum())
