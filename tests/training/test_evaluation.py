"""Evaluation, BatchNorm statistics, and the choice of device and precision."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from explib.data import Split, eval_batches, normalize
from explib.training import backend, evaluation
from tests.training.test_loop import PARAMS, equal


class TestEvaluate:
    def test_is_total_correct_over_total_images_with_a_short_last_batch(self, net, data):
        # 503 images are a batch of 500 and one of 3: a mean over batches would differ
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (503, 3, 8, 8), generator=generator).to(torch.uint8)
        with torch.no_grad():
            answers = net.eval()(normalize(images, data)).argmax(1)
        labels = answers.clone()
        labels[:100] += 1
        labels[502] += 1
        split = Split(images, labels)
        assert len(list(eval_batches(split, data))) == 2
        assert evaluation.evaluate(net, data, split) == 100 * 402 / 503

    def test_many_images_go_through_the_engine_to_the_same_result(self, net, data, monkeypatch):
        wanted = evaluation.evaluate(net, data, data.test)
        planned = []
        engine = backend._engine
        monkeypatch.setattr(backend, "ENGINE_FROM", len(data.test))
        monkeypatch.setattr(
            backend, "_engine", lambda *given: planned.append(engine(*given)) or planned[0]
        )
        assert evaluation.evaluate(net.train(), data, data.test) == wanted
        assert planned[0] is None or planned[0].report["engine"] == "native"
        monkeypatch.setattr(backend, "_engine", lambda *_: None)  # as without a compiler
        assert evaluation.evaluate(net.train(), data, data.test) == wanted

    def test_uses_the_running_statistics_and_changes_none(self, net, data):
        net.train()
        before = copy.deepcopy(net.state_dict())
        evaluation.evaluate(net, data, data.test)
        assert equal(net.state_dict(), before) and not net.training


class TestReestimateBN:
    def test_one_batch_by_hand(self, net, data):
        with torch.no_grad():
            net[1].running_mean.fill_(9)
        evaluation.reestimate_bn(net, data, 32)
        x = F.conv2d(normalize(data.train.images[:32], data), net[0].weight, padding=1)
        torch.testing.assert_close(net[1].running_mean, x.mean((0, 2, 3)))
        torch.testing.assert_close(net[1].running_var, x.transpose(0, 1).flatten(1).var(1))
        assert net[1].momentum == 0.1 and not net.training

    def test_several_batches_are_averaged(self, net, data):
        evaluation.reestimate_bn(net, data, 48, batch_size=16)
        x = F.conv2d(normalize(data.train.images, data), net[0].weight, padding=1)
        parts = x.split(16)
        wanted = torch.stack([part.mean((0, 2, 3)) for part in parts]).mean(0)
        torch.testing.assert_close(net[1].running_mean, wanted)
        wanted = torch.stack([part.transpose(0, 1).flatten(1).var(1) for part in parts]).mean(0)
        torch.testing.assert_close(net[1].running_var, wanted)

    def test_every_image_asked_for_counts(self, net, data):
        evaluation.reestimate_bn(net, data, 40, batch_size=16)
        x = F.conv2d(normalize(data.train.images[:40], data), net[0].weight, padding=1)
        assert (net[1].running_mean - x.mean((0, 2, 3))).abs().max() < 0.05
        few = net[1].running_mean.clone()
        evaluation.reestimate_bn(net, data, 32, batch_size=16)
        assert not torch.equal(few, net[1].running_mean)

    def test_more_images_than_there_are_is_all_of_them(self, net, data):
        other = copy.deepcopy(net)
        evaluation.reestimate_bn(net, data, 10_000)
        evaluation.reestimate_bn(other, data, 48)
        assert equal(net.state_dict(), other.state_dict())

    def test_zero_images_change_nothing(self, net, data):
        before = copy.deepcopy(net.state_dict())
        evaluation.reestimate_bn(net, data, 0)
        assert equal(net.state_dict(), before)

    def test_weights_stay(self, net, data):
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        evaluation.reestimate_bn(net, data, 48)
        assert equal(dict(net.named_parameters()), before)


class TestMachine:
    def test_cuda_that_is_not_there_is_one_line(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ValueError, match="device: 'cuda' but torch sees no CUDA"):
            backend.device_of(PARAMS.replace(device="cuda"))
        assert backend.device_of(PARAMS.replace(device="auto")) == "cpu"

    def test_what_is_asked_for_is_what_is_computed(self, net):
        x = torch.randn(2, 3, 8, 8)
        seen = []
        net[0].register_forward_hook(lambda m, i, output: seen.append(output.dtype))
        for precision in ("fp32", "bf16"):
            params = dataclasses.replace(PARAMS, precision=precision)
            assert backend.precision_of(params, "cpu") == precision
            assert backend.forward_of(net, params, "cpu", 0)(x).dtype == torch.float32
        assert seen == [torch.float32, torch.bfloat16]

    def test_auto_compiles_long_runs_on_a_gpu_only(self, net, monkeypatch):
        compiled = []
        monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(1) or model)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        for wanted, device, images in (
            ("auto", "cpu", 10**9),
            ("on", "cpu", 1),
            ("auto", "cuda", 1000),
            ("auto", "cuda", 10**9),
            ("off", "cuda", 10**9),
        ):
            params = PARAMS.replace(compile=wanted, precision="auto")
            backend.forward_of(nn.Identity(), params, device, images)
            compiled.append((wanted, device))
        assert compiled == [
            *(("auto", "cpu"), 1, ("on", "cpu")),
            *(("auto", "cuda"), 1, ("auto", "cuda"), ("off", "cuda")),
        ]

    def test_precision_is_measured_once(self, monkeypatch):
        backend._bf16_wins.cache_clear()
        found = backend.precision_of(PARAMS.replace(precision="auto"), "cpu")
        monkeypatch.setattr(F, "conv2d", None)  # a second measurement would need it
        assert backend.precision_of(PARAMS.replace(precision="auto"), "cpu") == found
