"""int8: the codes of values and weights, and networks that compute with them."""

import os
import re
import subprocess
import sys
from itertools import islice

import pytest
import torch
import torchvision
from torch import nn

import explib
from explib import engine
from explib.data import eval_batches, load_data
from explib.engine import quantization
from explib.engine.graph import Op
from explib.engine.quantization import Code, coded
from explib.params import Params
from explib.pruning.checkpoints import load_network
from tests.conftest import ROOT, needs_compiler
from tests.engine.networks import error, lively, masked, skip_its_own


def test_a_code_is_the_nearest_of_256_and_ties_go_to_the_even_one():
    x = torch.tensor([-9.0, -0.26, -0.25, 0.0, 0.24, 0.25, 0.75, 999.0])
    assert coded(x, Code(0.5, 2)).tolist() == [-1.0, -0.5, 0, 0, 0, 0, 1.0, 126.5]
    assert coded(x, Code(0.0, 0)) is x  # what stays float


def test_a_range_is_cut_where_that_leaves_less_error():
    """Of many values to 1 and one of 100 it is cut; of that one alone it is whole."""
    bins = torch.zeros(quantization.BINS)
    bins[0] = bins[-1] = 1.0
    assert quantization._code(bins, 0.0, 100.0) == Code(100 / 255, 0)
    bins[:20] = 1e9
    assert quantization._code(bins, 0.0, 100.0).scale < 0.5 * 100 / 255
    both = torch.ones(quantization.BINS)
    assert quantization._code(both, -1.0, 3.0) == Code(4 / 255, 64)
    assert quantization._code(both, 0.0, 0.0) == Code(1.0, 0)


@needs_compiler
@pytest.mark.filterwarnings("ignore:.*runs? in torch")
def test_what_only_torch_makes_may_be_several_values():
    """And be all that is left when the next op is calibrated."""

    class Unpooling(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            largest, places = nn.functional.max_pool2d(self.conv(x), 2, return_indices=True)
            return nn.functional.max_unpool2d(largest, places, 2)

    torch.manual_seed(0)
    model, images = Unpooling().eval(), torch.randn(16, 3, 8, 8)
    fast = engine.compile(model, images[:1], dtype=torch.int8, calibration=[images])
    assert fast.report["engine"] == "native" and len(fast.report["fallbacks"]) == 2
    wanted, found = model(images), fast(images)
    same = (wanted == 0) == (found == 0)  # between two that are nearly alike int8 may choose
    assert same.float().mean() > 0.95
    assert (wanted - found)[same].abs().max() < 0.05 * wanted.abs().max()


@needs_compiler
@pytest.mark.parametrize("low, high", [(0.0, 6.0), (-0.4, 0.7), (0.3, 0.6), (-2.0, -0.5)])
def test_bounds_of_values_are_bounds_of_their_codes(low, high):
    """Of a 1x1, a 3x3 and a depthwise conv, and of what a residual is added to."""
    torch.manual_seed(0)
    act = nn.Hardtanh(low, high)

    class Bounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.point = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
            self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
            self.last = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x):
            x = act(self.first(3 * x))
            x = act(self.deep(act(3 * self.point(x))))
            return act(3 * self.last(x) + x)

    model, images = Bounded().eval(), torch.randn(40, 3, 12, 12)
    fast = engine.compile(model, images[:1], dtype=torch.int8, calibration=[images])
    assert fast.report["dtype"] == "int8" and not fast.report["fallbacks"]
    for count in (1, 40):
        wanted, found = model(images[:count]), fast(images[:count])
        step = (max(high, 0) - min(low, 0)) / 255
        assert low - step < found.min() and found.max() < high + step
        assert (wanted - found).abs().mean() < 0.02 * (high - low)
        assert (wanted - found).abs().max() < 0.2 * (high - low)


def test_two_neighbouring_weights_never_leave_16_bits():
    """What processors add first, times codes of 255, by hand."""
    rows = torch.tensor([[1.0, 1, 0], [1, -1, 0], [0, 1, 1], [0.5, 0.5, 1]])
    weight = rows[:, None, None, :].expand(4, 1, 3, 3)
    # alike: 2 / 127.5; of two signs, or the second and third of a row: 1 / 127
    wanted = torch.tensor([2 / 127.5, 1 / 127, 1 / 127, 1 / 127])
    torch.testing.assert_close(quantization.weight_steps(weight), wanted)
    point = torch.tensor([[0.0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]])[:, :, None, None]
    alone = quantization.weight_steps(point)
    torch.testing.assert_close(alone, torch.tensor([1 / 127, 2 / 127.5, 1.0]))
    # a group may begin with an odd channel: then any two neighbours are a pair
    assert quantization.weight_steps(point, groups=2)[0] == 2 / 127.5
    torch.manual_seed(0)
    for shape in ((50, 7, 1, 1), (50, 4, 3, 3)):
        weight = torch.randn(shape)
        steps = quantization.weight_steps(weight)[:, None, None, None]
        whole = (weight / steps).round()
        pairs = whole[..., :2].flatten(1, 2) if shape[2] == 3 else whole[:, :6].reshape(50, 3, 2)
        assert whole.abs().max() <= 127
        for part in (pairs.clamp(min=0), (-pairs).clamp(min=0)):
            assert 255 * part.sum(2).max() < 2**15


def test_what_passes_values_on_shares_their_range():
    ops = [
        Op("maxpool", "a", ("x",), (2, 2, 2), kernel=(2, 2), stride=(2, 2)),
        Op("act", "b", ("a",), (2, 2, 2), act="relu"),
        Op("cat", "c", ("a", "b"), (4, 2, 2)),
    ]
    found = quantization.quantized(ops, {"x": (2, 4, 4)}, {"c"}, [{"x": torch.randn(9, 2, 4, 4)}])
    assert {(op.scales, op.zeros) for op in found[::2]} == {
        (found[0].scales, found[0].zeros), (found[2].scales, found[2].zeros)
    }  # fmt: skip
    assert len({*found[0].scales, *found[1].scales, *found[2].scales}) == 1


def test_the_mean_of_every_filter_stays_where_it_was():
    """Rounding shifts the means of outputs; biases take that back, on the calibration images."""
    torch.manual_seed(0)
    conv = Op("conv", "y", ("x",), (6, 8, 8), weight=torch.randn(6, 5, 3, 3), kernel=(3, 3),
              pad=(1, 1), act="relu")  # fmt: skip
    images = {"x": torch.rand(32, 5, 8, 8)}
    (made,) = quantization.quantized([conv], {"x": (5, 8, 8)}, {"y"}, [images])
    assert made.steps is not None and made.weight is not None and made.bias is not None
    stored = coded(images["x"], Code(made.scales[0], made.zeros[0]))
    exact = nn.functional.conv2d(images["x"], conv.weight, padding=1).mean((0, 2, 3))
    plain = nn.functional.conv2d(stored, made.weight, padding=1).mean((0, 2, 3))
    assert (plain - exact).abs().max() > 1e-3
    torch.testing.assert_close(plain + made.bias, exact, atol=1e-5, rtol=0)
    whole = made.weight / made.steps[:, None, None, None]
    torch.testing.assert_close(whole, whole.round(), atol=1e-4, rtol=0)


def small() -> nn.Module:
    """Strided, pointwise and 3x3 convs, half of their kernels pruned."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(),
        nn.Conv2d(16, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 10),
    )  # fmt: skip
    explib.apply(model, explib.prune(model, torch.zeros(1, 3, 32, 32), 0.5, "l1"))
    return model.eval()


@needs_compiler
class TestNetworks:
    @pytest.mark.parametrize("threads", [1, 3])
    def test_a_network_of_the_study_is_as_near_as_its_codes(self, threads):
        model, images = masked("resnet_56"), torch.randn(48, 3, 32, 32)
        fast = engine.compile(
            model, images[:1], dtype=torch.int8, calibration=images, threads=threads, fallback=False
        )
        assert fast.report["dtype"] == "int8" and fast.report["fallbacks"] == []
        assert 1e-4 < error(model, fast, images) < 0.25
        assert torch.equal(fast(images)[:32], fast(images[:32]))  # sums are exact
        for count in (1, 2, 7, 20):  # what fills no block goes image by image, in the same codes
            torch.testing.assert_close(fast(images[:count]), fast(images)[:count])

    @pytest.mark.parametrize(
        "name", ["mobilenet_v2", "googlenet", "densenet121", "resnext50_32x4d"]
    )
    def test_a_network_of_torchvision_too(self, name):
        torch.manual_seed(0)
        model = lively(torchvision.models.get_model(name, weights=None))
        images = torch.randn(17, 3, 64, 64)
        calibration = [images[:8], images[8:]]
        fast = engine.compile(model, images[:1], dtype=torch.int8, calibration=calibration)
        assert fast.report["dtype"] == "int8" and fast.report["fallbacks"] == []
        assert error(model, fast, images) < 0.25

    def test_the_shipped_network_keeps_its_accuracy(self, cifar10_root):
        model, _, meta = load_network(
            ROOT / "results/checkpoints/cifar10/resnet_56-B-71-l1-e100.safetensors"
        )
        params = Params(
            dataset="cifar10", normalization=meta["normalization"], data_dir=str(cifar10_root)
        )
        data = load_data(params)
        given = [images for images, _ in islice(eval_batches(data.train, data, 64), 4)]
        fast = engine.compile(model, given[0][:1], dtype=torch.int8, calibration=given)
        right = sum(
            int((fast(images).argmax(1) == labels).sum())
            for images, labels in eval_batches(data.test, data, 500)
        )
        assert right / 100 == pytest.approx(meta["top1"], abs=0.2)

    def test_a_file_in_int8_computes_so_wherever_it_is_opened(self, tmp_path):
        model, images = small(), torch.randn(33, 3, 32, 32)
        fast = engine.compile(model, images[:1], dtype=torch.int8, calibration=images)
        path = engine.save(
            tmp_path / "net.safetensors", model, images[:1], calibration=images,
            dtype=torch.float32,
        )  # fmt: skip
        loaded = engine.load(path)
        assert loaded.report["dtype"] == "int8"
        torch.testing.assert_close(loaded(images), fast(images), rtol=0, atol=1e-4)
        exact = engine.load(path, dtype=torch.float32)
        assert exact.report["dtype"] == "float32"
        assert error(model, exact, images) < error(model, loaded, images)
        plain = engine.save(tmp_path / "plain.safetensors", model, images[:1])
        assert engine.load(plain).report["dtype"] == "float32"
        again = engine.load(plain, dtype=torch.int8, calibration=images)
        assert again.report["dtype"] == "int8"

    @pytest.mark.parametrize(
        ("calibration", "message"),
        [
            (None, "calibration: none; give normalized training images, as the example"),
            ([], "calibration: none"),
            (torch.zeros(4, 3, 16, 16), "calibration: .*; give float32 (N, 3, 32, 32)"),
            ((torch.zeros(4, 3, 32, 32),) * 2, "give images as the example, or a list of such"),
            (iter([]), "calibration: list_iterator; give images as the example, or a list"),
            (torch.full((4, 3, 32, 32), torch.nan), "calibration: images without two finite"),
            (torch.zeros(4, 3, 32, 32), "calibration: images without two finite values"),
        ],
    )
    def test_what_calibrates_nothing_is_said(self, calibration, message):
        model = small()
        with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
            engine.compile(
                model, torch.zeros(1, 3, 32, 32), dtype=torch.int8, calibration=calibration
            )

    def test_calibration_is_for_nothing_else(self):
        with pytest.raises(ValueError, match=r"calibration: is for dtype=torch\.int8, which is"):
            engine.compile(small(), torch.zeros(1, 3, 32, 32), calibration=torch.ones(1))

    def test_a_network_of_images_from_0_to_1_is_loaded_in_int8(self, tmp_path):
        """Whose layers make of other values what their codes do not reach."""
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(60):
            labels = torch.randint(0, 4, (64,))
            images = 0.3 * torch.rand(64, 3, 16, 16)
            images[torch.arange(64), labels % 3] += 0.5 * (labels < 3)[:, None, None]
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        path = tmp_path / "net.safetensors"
        engine.save(path, model, images[:1], calibration=images)
        loaded = engine.load(path, fallback=False)
        assert loaded.report["dtype"] == "int8"
        assert (loaded(images).argmax(1) == model(images).argmax(1)).float().mean() > 0.95

    def test_a_file_without_codes_needs_calibration(self, tmp_path):
        path = engine.save(tmp_path / "plain.safetensors", small(), torch.zeros(1, 3, 32, 32))
        with pytest.raises(ValueError, match="holds no codes of 8 bits; give calibration"):
            engine.load(path, dtype=torch.int8)

    def test_undecided_images_get_the_scores_of_float32(self):
        model, images = small(), torch.randn(40, 3, 32, 32)
        exact = engine.compile(model, images[:1])
        fast = engine.compile(model, images[:1], dtype=torch.int8, calibration=images, recheck=1e9)
        assert torch.equal(fast(images), exact(images))

    @pytest.mark.parametrize("flags", ["-mavx2 -mfma", "-msse4.2"])
    def test_a_file_gives_the_same_answers_on_other_processors(self, tmp_path, flags):
        """Sums are whole numbers, and what follows them the same steps."""
        skip_its_own(flags)
        model = small()
        images = torch.randn(48, 3, 32, 32)
        path = engine.save(tmp_path / "net.safetensors", model, images[:1], calibration=images)
        torch.save(images, tmp_path / "images.pt")
        wanted = engine.load(path)(images)
        code = (
            "import sys, torch; from explib import engine; "
            "images = torch.load(sys.argv[2], weights_only=True); "
            "made = engine.load(sys.argv[1]); print(made.report['instructions']); "
            "torch.save(made(images), sys.argv[3])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, path, tmp_path / "images.pt", tmp_path / "found.pt"],
            env=dict(os.environ, EXPLIB_CXXFLAGS=flags, PYTHONPATH=str(ROOT)),
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0 and re.match(r"\d+-bit vectors", done.stdout), done.stderr
        found = torch.load(tmp_path / "found.pt", weights_only=True)
        # a float that is rounded another way may become the code beside it
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 0.02
