"""Evaluation and BatchNorm statistics."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

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
        assert evaluation.top1(net, data, split) == 100 * 402 / 503

    def test_many_images_go_through_the_engine_to_the_same_result(self, net, data, monkeypatch):
        del net[5]  # a conv by depth, which the engine leaves to torch
        wanted = evaluation.top1(net, data, data.test)
        fastest, made = inference._fastest, []
        monkeypatch.setattr(inference, "ENGINE_FROM", len(data.test))
        monkeypatch.setattr(
            inference, "_fastest", lambda *a, **k: made.append(fastest(*a, **k)) or made[0]
        )
        # whichever is faster here, the engine is what is tested
        monkeypatch.setattr(inference.timing, "remembered", lambda *_: {"engine, fp32": 1.0})
        assert evaluation.top1(net.train(), data, data.test) == wanted
        compiled = inference._library() is not None
        assert made[0].how == ("engine" if compiled else "eager")
        monkeypatch.setattr(inference, "_library", lambda: None)  # as without a compiler
        assert evaluation.top1(net.train(), data, data.test) == wanted

    def test_exact_is_without_tf32_and_leaves_it_as_it_was(self, net, data):
        switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
        before = [switch.allow_tf32 for switch in switches]
        seen = []
        net.register_forward_hook(lambda *_: seen.append([s.allow_tf32 for s in switches]))
        evaluation.top1(net, data, data.test)
        assert seen and all(allowed == [False, False] for allowed in seen)
        assert [switch.allow_tf32 for switch in switches] == before
        seen.clear()
        evaluation.top1(net, data, data.test, net)  # in whatever way it is given
        assert seen == [before]

        def broken(*_):
            raise RuntimeError("out of memory")

        net.register_forward_hook(broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            evaluation.top1(net, data, data.test)
        assert [switch.allow_tf32 for switch in switches] == before

    def test_uses_the_running_statistics_and_changes_none(self, net, data):
        net.train()
        before = copy.deepcopy(net.state_dict())
        evaluation.top1(net, data, data.test)
        assert equal(net.state_dict(), before) and not net.training


class TestOfOnesOwn:
    """Accuracy on batches as a DataLoader gives them."""

    def test_is_total_correct_over_total_images(self, net):
        torch.manual_seed(0)
        images = torch.randn(20, 3, 8, 8)
        with torch.no_grad():
            labels = net.eval()(images).argmax(1)
        labels[:3] = (labels[:3] + 1) % 10
        loader = DataLoader(TensorDataset(images, labels), batch_size=8)  # 8, 8 and 4
        net.train()
        assert evaluation.evaluate(net, loader) == 100 * 17 / 20
        assert net.training and net[1].num_batches_tracked == 0  # as it was
        shares = F.one_hot(labels, 10).float()
        assert evaluation.evaluate(net, [(images, shares)]) == 100 * 17 / 20

    def test_other_inputs_than_one_tensor(self, net):
        images, labels = torch.randn(4, 3, 8, 8), torch.zeros(4).long()
        wanted = evaluation.evaluate(net, [(images, labels)])
        assert evaluation.evaluate(net, [((images,), labels)]) == wanted
        assert evaluation.evaluate(net, [({"input": images}, labels)]) == wanted

    @pytest.mark.parametrize(
        ("batches", "message"),
        [
            ([], r"^batches: empty; give batches of \(images, labels\)"),
            ([torch.zeros(2, 3, 8, 8)], r"^batches: a batch is \(2, 3, 8, 8\); give a pair"),
            (
                [(torch.zeros(2, 3, 8, 8), [1, 2])],
                r"^batches: labels are \[int, int\]; give",
            ),
            (
                [(torch.zeros(2, 3, 8, 8), torch.zeros(3).long())],
                r"^model: returns \(2, 10\) for 3 lab",
            ),
            (
                [(torch.zeros(2, 3, 8, 8), torch.zeros(2))],
                r"^batches: labels are float32 \(2,\); give whole numbers",
            ),
            (  # of a single column the highest share would be that of class 0 each time
                [(torch.zeros(2, 3, 8, 8), torch.ones(2, 1).long())],
                r"^batches: labels are int64 \(2, 1\); give whole numbers",
            ),
            (
                [(torch.zeros(2, 3, 8, 8), torch.tensor([1, 10]))],
                r"^batches: a label is 10; the model has 10 classes, 0 to 9",
            ),
            (
                [(torch.zeros(2, 1, 8, 8), torch.zeros(2).long())],
                r"^batches: the model does not take images \(2, 1, 8, 8\) \(Given groups=1",
            ),
            (7, r"^batches: a int; give a DataLoader or a list"),
        ],
    )
    def test_what_is_no_batch_is_one_line(self, net, batches, message):
        with pytest.raises(ValueError, match=message) as error:
            evaluation.evaluate(net, batches)
        assert "\n" not in str(error.value)

    def test_what_is_no_classifier_is_one_line(self, net):
        batches = [(torch.zeros(2, 3, 8, 8), torch.zeros(2).long())]
        with pytest.raises(ValueError, match=r"^model: returns \(2, 8, 8, 8\) for 2 labels; give"):
            evaluation.evaluate(net[:2], batches)


class TestRecalibrateBN:
    def statistics(self, net, parts):
        """The first BatchNorm's, by hand: means over images of each part's mean and variance."""
        maps = [F.conv2d(part, net[0].weight, padding=1) for part in parts]
        share = torch.tensor([len(part) for part in parts]) / sum(map(len, parts))
        mean = sum(s * x.mean((0, 2, 3)) for s, x in zip(share, maps, strict=True))
        var = sum(s * x.transpose(0, 1).flatten(1).var(1) for s, x in zip(share, maps, strict=True))
        return mean, var

    def check(self, net, parts):
        mean, var = self.statistics(net, parts)
        torch.testing.assert_close(net[1].running_mean, mean)
        torch.testing.assert_close(net[1].running_var, var)

    def test_one_tensor_by_hand(self, net):
        images = torch.randn(32, 3, 8, 8)
        with torch.no_grad():
            net[1].running_mean.fill_(9)
        net.eval()
        evaluation.recalibrate_bn(net, images)
        self.check(net, [images])
        assert net[1].momentum == 0.1 and not net.training

    def test_a_large_tensor_goes_in_parts_of_nearly_equal_size(self, net):
        images = torch.randn(600, 3, 8, 8)
        evaluation.recalibrate_bn(net, images)
        self.check(net, images.split(200))
        assert net[1].num_batches_tracked == 3 and net.training

    def test_of_batches_of_other_sizes_every_image_counts_alike(self, net):
        images = torch.randn(40, 3, 8, 8)
        loader = DataLoader(TensorDataset(images, torch.zeros(40)), batch_size=16)
        evaluation.recalibrate_bn(net, loader)
        self.check(net, images.split(16))
        evaluation.recalibrate_bn(net, [{"input": part} for part in images.split(10)])
        self.check(net, images.split(10))

    def test_the_images_of_the_study_are_the_first_ones(self, net, data):
        evaluation.recalibrate_bn(net, evaluation.bn_batches(data, 40, 16))
        images = normalize(data.train.images, data)
        self.check(net, images[:40].split(14))
        few = net[1].running_mean.clone()
        evaluation.recalibrate_bn(net, evaluation.bn_batches(data, 10_000))
        self.check(net, [images])  # more than there are is all of them
        assert not torch.equal(few, net[1].running_mean)

    @pytest.mark.parametrize("batches", [[], torch.zeros(0, 3, 8, 8)])
    def test_no_images_are_one_line_and_change_nothing(self, net, batches):
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(ValueError, match=r"^batches: empty; give training images"):
            evaluation.recalibrate_bn(net, batches)
        assert equal(net.state_dict(), before) and net[1].momentum == 0.1

    @pytest.mark.parametrize(
        ("later", "message"),
        [
            (
                torch.zeros(4, 1, 8, 8),
                r"^batches: the model does not take images \(4, 1, 8, 8\) \(",
            ),
            (torch.zeros(3, 8, 8), r"^batches: the model does not take images \(3, 8, 8\) \("),
            ({"x": torch.zeros(4, 3, 8, 8)}, r"^batches: the model does not take images {x=\(4, 3"),
            (torch.full((4, 3, 8, 8), torch.nan), r"^batches: BatchNorm's statistics are not fini"),
        ],
    )
    @pytest.mark.parametrize("first", [True, False])
    def test_what_the_model_does_not_take_is_one_line_and_changes_nothing(
        self, net, later, message, first
    ):
        before = copy.deepcopy(net.state_dict())
        batches = [later] if first else [torch.randn(4, 3, 8, 8), later]
        with pytest.raises(ValueError, match=message) as error:
            evaluation.recalibrate_bn(net, batches)
        assert "\n" not in str(error.value)
        assert equal(net.state_dict(), before) and net[1].momentum == 0.1 and net.training

    @pytest.mark.parametrize("given", [5, None])
    def test_what_is_no_batches_or_no_network_is_one_line(self, net, given):
        with pytest.raises(ValueError, match=r"^batches: a \w+; give a DataLoader or a list"):
            evaluation.recalibrate_bn(net, given)
        with pytest.raises(ValueError, match=r"^model: a \w+; give an nn.Module, then its batches"):
            evaluation.recalibrate_bn(given, torch.zeros(4, 3, 8, 8))

    def test_weights_stay(self, net):
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        evaluation.recalibrate_bn(net, torch.randn(48, 3, 8, 8))
        assert equal(dict(net.named_parameters()), before)
