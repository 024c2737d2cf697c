"""Evaluation and BatchNorm statistics."""

import copy

import pytest
import torch
import torch.nn.functional as F

from explib.data import Split, eval_batches, normalize
from explib.training import evaluation, inference
from tests.training.test_loop import equal


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
        del net[5]  # a conv by depth, which the engine leaves to torch
        wanted = evaluation.evaluate(net, data, data.test)
        fastest, made = inference._fastest, []
        monkeypatch.setattr(inference, "ENGINE_FROM", len(data.test))
        monkeypatch.setattr(
            inference, "_fastest", lambda *a, **k: made.append(fastest(*a, **k)) or made[0]
        )
        # whichever is faster here, the engine is what is tested
        monkeypatch.setattr(inference.timing, "remembered", lambda *_: {"engine, fp32": 1.0})
        assert evaluation.evaluate(net.train(), data, data.test) == wanted
        compiled = inference._library() is not None
        assert made[0].how == ("engine" if compiled else "eager")
        monkeypatch.setattr(inference, "_library", lambda: None)  # as without a compiler
        assert evaluation.evaluate(net.train(), data, data.test) == wanted

    def test_exact_is_without_tf32_and_leaves_it_as_it_was(self, net, data):
        switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
        before = [switch.allow_tf32 for switch in switches]
        seen = []
        net.register_forward_hook(lambda *_: seen.append([s.allow_tf32 for s in switches]))
        evaluation.evaluate(net, data, data.test)
        assert seen and all(allowed == [False, False] for allowed in seen)
        assert [switch.allow_tf32 for switch in switches] == before
        seen.clear()
        evaluation.evaluate(net, data, data.test, net)  # in whatever way it is given
        assert seen == [before]

        def broken(*_):
            raise RuntimeError("out of memory")

        net.register_forward_hook(broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            evaluation.evaluate(net, data, data.test)
        assert [switch.allow_tf32 for switch in switches] == before

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
