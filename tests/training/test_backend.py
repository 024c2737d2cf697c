"""What a network is trained by: what is asked for, what is measured, what that leaves behind."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from explib import models
from explib.engine import training
from explib.params import Params
from explib.pruning import masks as masking
from explib.pruning.criteria import prune
from explib.training import backend, timing
from tests.conftest import image, needs_compiler
from tests.training.test_loop import PARAMS, equal

AUTO = Params(arch="resnet_56", device="cpu", threads=1)
GPU = AUTO.replace(device="auto", precision="bf16")
LONG = 10**9


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test's own, and a process that has asked nothing yet."""
    monkeypatch.setattr(timing, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(timing, "_known", {})


@pytest.fixture
def fastest(monkeypatch):
    """Have one way be found the fastest; returns the questions that were asked."""

    def be(name):
        asked = []

        def remembered(question, measure):
            asked.append(question)
            return {way: 2.0 if way == name else 1.0 for way in question.get("ways", [])}

        monkeypatch.setattr(timing, "remembered", remembered)
        return asked

    return be


@pytest.fixture
def gpu_makes(monkeypatch):
    """Have `fuse` make something of a network on a GPU, which need not be there."""

    def be(passes):
        example = SimpleNamespace(to=lambda device: SimpleNamespace(device=device))
        monkeypatch.setattr(backend, "example_of", lambda params: example)

        def fuse(model, like):
            assert like.device == "cuda"  # where the passes are made and compared
            return passes(model)

        monkeypatch.setattr(backend, "fuse", fuse)

    return be


def trained_by(model, compile, device, masks=None):
    """By what a network is trained on a device, of what `compile` allows."""
    return backend.choose(model, GPU.replace(compile=compile), device, LONG, masks).how


def pruned(rate, build=lambda: models.resnet.build(10, depth=8)):
    torch.manual_seed(0)
    model = build().to(memory_format=torch.channels_last)
    masks = prune(model, image(32), rate, "B") if rate else {}
    masking.apply(model, masks)
    return model, masks


def test_cuda_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device: 'cuda' but torch sees no CUDA"):
        backend.device_of(PARAMS.replace(device="cuda"))
    assert backend.device_of(PARAMS.replace(device="auto")) == "cpu"


class TestWhatIsAskedFor:
    def test_is_what_is_computed(self, net):
        x = torch.randn(2, 3, 8, 8)
        seen = []
        net[0].register_forward_hook(lambda m, i, output: seen.append(output.dtype))
        for precision in ("fp32", "bf16"):
            chosen = backend.choose(net, PARAMS.replace(precision=precision), "cpu", LONG)
            assert (chosen.how, chosen.precision) == ("eager", precision)
            assert chosen(x).dtype == torch.float32 and chosen.measured == {}
        assert seen == [torch.float32, torch.bfloat16]

    def test_torch_compile_only_where_it_is_asked_for(self, monkeypatch, gpu_makes):
        compiled = []
        monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(1) or model)
        model, _ = pruned(0)
        assert trained_by(model, "on", "cpu") == "torch.compile"
        assert trained_by(model, "auto", "cpu") in ("fused passes", "eager")
        gpu_makes(lambda model: model)
        assert trained_by(model, "on", "cuda") == "torch.compile"
        assert trained_by(model, "auto", "cuda") == trained_by(model, "off", "cuda") == "eager"
        assert len(compiled) == 2

    def test_a_gpu_has_fused_passes_unless_none_can_be_made_or_are_wanted(self, gpu_makes):
        model, masks = pruned(0.7)
        passes = torch.nn.Sequential(model)
        gpu_makes(lambda model: passes)
        chosen = backend.choose(model, GPU, "cuda", LONG, masks)
        assert (chosen.how, chosen.precision, chosen.network) == ("fused passes", "bf16", passes)
        assert chosen.measured == {}  # nothing to choose
        off = backend.choose(model, GPU.replace(compile="off"), "cuda", LONG, masks)
        assert (off.how, off.network) == ("eager", model)
        gpu_makes(lambda model: model)  # as without Triton
        plain = backend.choose(model, GPU, "cuda", LONG, masks)
        assert (plain.how, plain.network) == ("eager", model)

    def test_a_gpu_cannot_leave_pruned_kernels_out(self, gpu_makes):
        gpu_makes(torch.nn.Sequential)
        model, masks = pruned(0.7)
        with pytest.raises(ValueError, match="compile: 'sparse' needs a CPU"):
            trained_by(model, "sparse", "cuda", masks)
        assert trained_by(model, "sparse", "cuda") == "eager"  # nothing to leave out

    @needs_compiler
    def test_restricts_what_is_tried(self, fastest):
        model, masks = pruned(0.7)
        hows = ("surviving kernels", "fused passes")
        for changes, wanted in (
            ({"precision": "fp32"}, [f"{how}, fp32" for how in hows]),
            ({"precision": "bf16"}, [f"{how}, bf16" for how in hows]),
        ):
            asked = fastest(wanted[1])
            chosen = backend.choose(model, AUTO.replace(**changes), "cpu", LONG, masks)
            assert asked[0]["ways"] == wanted and chosen.name == wanted[1]
        asked = fastest("none")
        for compiler, how in (("off", "eager"), ("sparse", "surviving kernels")):
            params = AUTO.replace(compile=compiler, precision="fp32")
            assert backend.choose(model, params, "cpu", LONG, masks).how == how
        assert asked == []  # nothing to choose

    @needs_compiler
    def test_sparse_that_is_not_possible_is_one_line(self, monkeypatch):
        model, masks = pruned(0.2)
        asked = AUTO.replace(compile="sparse", precision="fp32")
        assert backend.choose(model, asked, "cpu", 0, masks).how == "surviving kernels"
        assert backend.choose(model, asked, "cpu").how == "fused passes"  # nothing to leave out
        monkeypatch.setattr(training, "library", lambda: None)
        with pytest.raises(ValueError, match="compile: 'sparse' needs a CPU"):
            backend.choose(model, asked, "cpu", 0, masks)


@needs_compiler
class TestWithoutMeasuring:
    @pytest.mark.parametrize("wins", [False, True])
    def test_a_short_run_goes_by_the_rule(self, monkeypatch, fastest, wins):
        asked = fastest("none")
        monkeypatch.setattr(backend, "bf16_wins", lambda: wins)
        monkeypatch.setattr(backend, "_takes_bf16", lambda: True)
        for rate, how in ((0, "fused passes"), (0.2, "fused passes"), (0.7, "surviving kernels")):
            model, masks = pruned(rate)
            chosen = backend.choose(model, AUTO, "cpu", 1000, masks)
            assert (chosen.how, chosen.precision) == (how, "bf16" if wins else "fp32")
        assert asked == []

    def test_whether_bf16_wins_is_measured_once_a_machine(self, monkeypatch):
        monkeypatch.setattr(backend, "_takes_bf16", lambda: True)
        found = backend.bf16_wins()
        monkeypatch.setattr(timing, "speeds", None)  # a second measurement would need it
        monkeypatch.setattr(timing, "_known", {})
        assert backend.bf16_wins() == found

    def test_bf16_never_wins_where_torch_has_none(self, monkeypatch):
        monkeypatch.setattr(backend, "_takes_bf16", lambda: False)
        monkeypatch.setattr(timing, "speeds", None)
        assert not backend.bf16_wins()
        model, _ = pruned(0)
        assert backend.choose(model, AUTO, "cpu", LONG).precision == "fp32"


@needs_compiler
class TestMeasuring:
    @pytest.mark.parametrize("rate", [0.2, 0.5])  # by the rule all kernels, or the surviving ones
    @pytest.mark.parametrize("how", ["surviving kernels", "fused passes"])
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_the_fastest_is_chosen_and_all_that_was_measured_is_said(
        self, monkeypatch, fastest, how, precision, rate
    ):
        monkeypatch.setattr(backend, "_takes_bf16", lambda: True)
        model, masks = pruned(rate)
        asked = fastest(f"{how}, {precision}")
        chosen = backend.choose(model, AUTO, "cpu", LONG, masks)
        assert (chosen.how, chosen.precision) == (how, precision)
        assert len(asked) == 1 and set(chosen.measured) == set(asked[0]["ways"])
        assert len(chosen.measured) == 4 and chosen.measured[chosen.name] == 2.0

    def test_a_short_run_is_one_that_measuring_would_be_a_25th_of(self, monkeypatch, fastest):
        monkeypatch.setattr(backend, "_takes_bf16", lambda: True)
        asked = fastest("fused passes, fp32")
        monkeypatch.setattr(backend, "bf16_wins", lambda: asked.append({"what": "rule"}))
        model, _ = pruned(0)
        params = AUTO.replace(batch_size=16)
        enough = 25 * 16 * (1 + timing.ROUNDS) * 2  # two ways
        backend.choose(model, params, "cpu", enough - 1)
        assert [question["what"] for question in asked] == ["rule"]
        backend.choose(model, params, "cpu", enough)
        assert asked[-1]["what"] == "training"

    @pytest.mark.parametrize(
        ("batch", "micro", "threads", "wanted"),
        [(128, 0, 1, 64), (128, 0, 6, 96), (24, 0, 4, 24), (100, 0, 1, 68), (128, 8, 1, 8)],
    )
    def test_images_are_as_many_as_keep_threads_busy(
        self, monkeypatch, batch, micro, threads, wanted
    ):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        assert backend._count(AUTO.replace(batch_size=batch, micro_batch=micro)) == wanted

    def test_it_really_runs_and_leaves_no_trace(self, monkeypatch):
        monkeypatch.setattr(backend, "_takes_bf16", lambda: True)
        monkeypatch.setattr(timing, "ROUNDS", 1)

        model, masks = pruned(0.5)
        seen, cross_entropy = [], torch.nn.functional.cross_entropy

        def noting(*given):
            seen.append((model.bn1.training, torch.rand(1)))  # as dropout draws
            return cross_entropy(*given)

        monkeypatch.setattr(torch.nn.functional, "cross_entropy", noting)
        model.layer1.eval()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        modes = [module.training for module in model.modules()]
        random = torch.get_rng_state()
        chosen = backend.choose(model, AUTO, "cpu", LONG, masks)
        assert seen and all(trains for trains, _ in seen)
        assert set(chosen.measured) == {
            f"{how}, {precision}"
            for how in ("surviving kernels", "fused passes")
            for precision in ("fp32", "bf16")
        }
        assert all(speed > 0 for speed in chosen.measured.values())
        assert equal(model.state_dict(), before)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), random)
        again = backend.choose(model, AUTO, "cpu", LONG, masks)
        assert (again.name, again.measured) == (chosen.name, chosen.measured)

    def test_frozen_statistics_are_measured_frozen(self, monkeypatch):
        monkeypatch.setattr(backend, "_takes_bf16", lambda: True)
        model, _ = pruned(0)
        modes = []
        speeds = timing.speeds
        monkeypatch.setattr(
            timing, "speeds", lambda *a: modes.append(model.bn1.training) or speeds(*a)
        )
        for frozen in (True, False):
            backend.choose(model, AUTO.replace(freeze_bn=frozen), "cpu", LONG)
        assert modes == [False, True]

    def test_other_networks_and_masks_are_other_questions(self, fastest):
        asked = fastest("none")
        for rate, depth, batch in ((0.5, 8, 16), (0.7, 8, 16), (0.5, 14, 16), (0.5, 8, 8)):
            model, masks = pruned(rate, lambda depth=depth: models.resnet.build(10, depth=depth))
            params = AUTO.replace(batch_size=batch, precision="fp32")
            for _ in range(2):
                backend.choose(model, params, "cpu", LONG, masks)
        assert all(one == two for one, two in zip(asked[::2], asked[1::2], strict=True))
        assert len({str(question) for question in asked}) == 4


@needs_compiler
class TestKept:
    def test_is_used_whatever_would_be_faster_now(self, monkeypatch, fastest):
        asked = fastest("surviving kernels, fp32")
        model, masks = pruned(0.7)
        params = AUTO.replace(precision="fp32")
        for kept in ("fused passes", "surviving kernels"):
            assert backend.choose(model, params, "cpu", LONG, masks, kept).how == kept
        model, masks = pruned(0.2)  # by the rule all kernels
        kept = backend.choose(model, params, "cpu", LONG, masks, "surviving kernels")
        assert kept.how == "surviving kernels" and asked == []

    def test_where_it_is_not_possible_one_line_says_so(self):
        model, masks = pruned(0.7)
        params = AUTO.replace(precision="fp32")
        with pytest.warns(UserWarning, match="began with eager, .* goes on with surviving kernels"):
            backend.choose(model, params, "cpu", 0, masks, "eager")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            backend.choose(model, params, "cpu", 0, masks)


class TestSeveralProcesses:
    """What rank 0 chose is what all compute, as far as they can."""

    @pytest.mark.parametrize(
        ("first", "wanted"),
        [
            ("fused passes, bf16", "fused passes, bf16"),
            ("surviving kernels, bf16", "fused passes, bf16"),
            ("torch.compile, fp32", "fused passes, fp32"),
        ],
    )
    def test_all_compute_what_rank_0_chose(self, monkeypatch, first, wanted):
        monkeypatch.setattr(backend, "_takes_bf16", lambda: True)
        monkeypatch.setattr(backend, "bf16_wins", lambda: False)
        monkeypatch.setattr(backend.distributed, "as_rank_0", lambda *_: backend.NAMES.index(first))
        model, _ = pruned(0)
        assert backend.choose(model, AUTO, "cpu").name == wanted
