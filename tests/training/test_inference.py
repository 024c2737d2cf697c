"""The dense network that teaches, and evaluation: in the engine or in torch."""

import pytest
import torch

from explib import models
from explib.engine import build
from explib.params import Params
from explib.training import backend, inference, timing
from tests.conftest import needs_compiler

LONG = 10**9
PARAMS = Params(arch="resnet_56", device="cpu", precision="fp32")
pytestmark = needs_compiler


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test's own, and a process that has asked nothing yet."""
    monkeypatch.setattr(timing, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(timing, "_known", {})


@pytest.fixture
def model():
    torch.manual_seed(0)
    return models.resnet.build(10, depth=8).eval()


def answers(way, x):
    with torch.no_grad():
        return way(x)


def close(one, two, share):
    return (one - two).abs().max() <= share * two.abs().max()


class TestTeacher:
    def test_runs_in_the_engine_where_nothing_is_measured(self, model):
        teacher = inference.teacher_of(model, PARAMS, "cpu", 0)
        assert teacher.name == "engine, fp32" and teacher.network.report["engine"] == "native"
        x = torch.randn(20, 3, 32, 32)
        assert close(answers(teacher, x), answers(model, x), 1e-4)

    def test_one_that_need_not_be_exact_is_in_float16(self, model):
        half = build.computes(build.library(), torch.float16)
        x = torch.randn(20, 3, 32, 32)
        teacher = inference.teacher_of(model, PARAMS, "cpu", 0, exact=False)
        assert teacher.precision == ("fp16" if half else "fp32")
        assert close(answers(teacher, x), answers(model, x), 0.02)
        assert inference.teacher_of(model, PARAMS, "cpu", 0).precision == "fp32"
        model.linear.weight.data *= 1e6  # beyond float16
        teacher = inference.teacher_of(model, PARAMS, "cpu", 0, exact=False)
        assert teacher.name == "engine, fp32"

    @pytest.mark.parametrize("wanted", ["engine, fp32", "fused passes, fp32"])
    def test_the_faster_one_is_chosen_and_kept(self, model, monkeypatch, wanted):
        monkeypatch.setattr(
            timing,
            "remembered",
            lambda question, _: {way: 2.0 if way == wanted else 1.0 for way in question["ways"]},
        )
        x = torch.randn(20, 3, 32, 32)
        teacher = inference.teacher_of(model, PARAMS, "cpu", LONG)
        assert teacher.name == wanted and set(teacher.measured) == {
            "engine, fp32",
            "fused passes, fp32",
        }
        assert close(answers(teacher, x), answers(model, x), 1e-4)
        for kept in teacher.measured:
            assert inference.teacher_of(model, PARAMS, "cpu", LONG, kept=kept).name == kept

    def test_it_is_really_measured_and_the_model_left_as_it_was(self, model):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        teacher = inference.teacher_of(model, PARAMS, "cpu", LONG, exact=False)
        assert {"engine, fp32", "fused passes, fp32"} <= set(teacher.measured)
        assert teacher.name == timing.ranking(teacher.measured)[0]
        assert not model.training
        assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
        again = inference.teacher_of(model, PARAMS, "cpu", LONG, exact=False)
        assert again.measured == teacher.measured and again.name == teacher.name

    def test_asked_for_in_torch_it_runs_there(self, model):
        for compiler in ("off", "on"):
            params = PARAMS.replace(compile=compiler)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "compile", lambda given, **_: given)
                how = inference.teacher_of(model, params, "cpu", LONG).how
            assert how == ("eager" if compiler == "off" else "torch.compile")

    def test_without_a_compiler_it_runs_in_torch(self, model, monkeypatch):
        monkeypatch.setattr(inference, "_library", lambda: None)
        for images in (0, LONG):
            teacher = inference.teacher_of(model, PARAMS, "cpu", images)
            assert (teacher.how, teacher.precision) == ("fused passes", "fp32")


class TestEvaluation:
    def in_fp32(self, model, make_data, monkeypatch, found):
        data = make_data(size=32)
        asked = []
        monkeypatch.setattr(inference, "ENGINE_FROM", 20)
        monkeypatch.setattr(timing, "remembered", lambda q, m: asked.append(q) or found)
        return inference.in_fp32(model, data.test, data), asked

    def test_by_whichever_was_faster(self, model, make_data, monkeypatch):
        found = {"engine, fp32": 1.0, "eager, fp32": 2.0}
        way, asked = self.in_fp32(model, make_data, monkeypatch, found)
        assert way is model and len(asked) == 1 and asked[0]["ways"] == list(found)
        way, _ = self.in_fp32(model, make_data, monkeypatch, {**found, "engine, fp32": 3.0})
        assert way.report["engine"] == "native"

    def test_few_images_are_not_worth_it(self, model, make_data):
        data = make_data(size=32)
        assert inference.in_fp32(model, data.test, data) is model


def test_a_backend_names_itself():
    made = backend.Backend(torch.nn.Identity(), "engine", "bf16")
    assert made.name == "engine, bf16"
    assert made(torch.ones(1, dtype=torch.float16)).dtype == torch.float32
