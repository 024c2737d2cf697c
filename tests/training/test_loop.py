"""Training, evaluation and BatchNorm statistics, compared with the same worked out by hand."""

import contextlib
import copy
import io
import math
import re
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

from explib.data import epoch_plan, train_batch
from explib.errors import ParamError
from explib.params import Params
from explib.pruning import masks as masking
from explib.pruning.criteria import prune
from explib.training import backend, evaluation, loop
from explib.training import step as stepping
from tests.conftest import image

# batches of 16 from 48 images: three steps an epoch
PARAMS = Params(
    epochs=3, batch_size=16, lr=0.05, distill=0.0, device="cpu", precision="fp32", compile="off"
)


@pytest.fixture
def masks(net):
    return prune(net, image(8), 0.5, "B")


def run(net, data, params, masks=None, **options):
    """All (entry, momentum) of a training, momentum copied."""
    found = []
    for entry, state in loop.train(net, data, params, masks, **options):
        momentum = {name: tensor.clone() for name, tensor in state["momentum"].items()}
        found.append((entry, {"epoch": state["epoch"], "momentum": momentum}))
    return found


def noting(shown):
    """train_batch, which writes down the images it was asked for."""

    def noted(data, *inputs):
        shown.append(inputs[0][0].tolist())
        return train_batch(data, *inputs)

    return noted


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class TestLearningRate:
    def at(self, schedule, epochs, **changes):
        params = PARAMS.replace(lr_schedule=schedule, lr=0.4, epochs=10, **changes)
        return [loop.lr_at(params, epoch) for epoch in epochs]

    def test_step_divides_by_ten_at_each_step(self):
        found = self.at("step", [0, 1.99, 2, 4.5, 5, 9], lr_decay_step="2,5")
        assert found == pytest.approx([0.4, 0.4, 0.04, 0.04, 0.004, 0.004])
        assert self.at("step", [0, 9], lr_decay_step="") == [0.4, 0.4]

    def test_cosine_falls_to_zero(self):
        # cos(pi / 3) = 1/2
        found = self.at("cosine", [0, 10 / 3, 5, 10])
        assert found == pytest.approx([0.4, 0.3, 0.2, 0])

    def test_onecycle_rises_for_a_fifth_then_falls_as_a_cosine(self):
        # from a fiftieth of lr in a straight line; halfway down at 0.6 of the run
        found = self.at("onecycle", [0, 1, 2, 6, 10])
        assert found == pytest.approx([0.008, 0.204, 0.4, 0.2, 0])

    def test_is_set_at_every_step(self, net, data):
        seen = []
        params = PARAMS.replace(lr_schedule="cosine", epochs=2, momentum=0.0, nesterov=False)
        original = torch.optim.SGD.step

        def step(self, *args, **kwargs):
            seen.append(self.param_groups[0]["lr"])
            return original(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.SGD, "step", step)
            run(net, data, params)
        wanted = [0.025 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
        assert seen == pytest.approx(wanted)


class TestTrain:
    def test_one_epoch_is_plain_torch(self, make_net, data):
        params = PARAMS.replace(epochs=1, label_smoothing=0.1)
        net, plain = make_net(), make_net()
        ((entry, _),) = run(net, data, params)
        optimizer = torch.optim.SGD(
            plain.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        total = hits = 0
        plain.train()
        for step, plan in enumerate(epoch_plan(data, 16, 0, 0)):
            images, labels = train_batch(data, plan)
            optimizer.param_groups[0]["lr"] = loop.lr_at(params, step / 3)
            optimizer.zero_grad()
            logits = plain(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            total += loss.item() * 16
            hits += int((logits.argmax(1) == labels).sum())
        plain.eval()
        for name, tensor in plain.state_dict().items():
            torch.testing.assert_close(net.state_dict()[name], tensor)
        assert entry["train_loss"] == pytest.approx(total / 48)
        assert entry["train_top1"] == pytest.approx(100 * hits / 48)
        assert entry["top1"] == evaluation.top1(plain, data, data.test)
        assert entry["epoch"] == 1 and entry["seconds"] > 0 and entry["images_per_s"] > 0

    def test_a_part_of_an_epoch_is_its_first_steps(self, make_net, data):
        whole, part = make_net(), make_net()
        steady = PARAMS.replace(lr_schedule="step")
        training = loop.train(whole, data, steady.replace(epochs=1))
        with pytest.MonkeyPatch.context() as patch:  # two of its three steps
            patch.setattr(loop, "batches_per_epoch", lambda *args: 2)
            list(training)
        ((entry, state),) = run(part, data, steady.replace(epochs=2 / 3))
        assert equal(part.state_dict(), whole.state_dict())
        assert (entry["epoch"], state["epoch"]) == (pytest.approx(2 / 3), 1)

    def test_five_thirds_of_an_epoch_are_an_epoch_and_two_steps(self, make_net, data):
        shown = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stepping, "train_batch", noting(shown))
            history = run(make_net(), data, PARAMS.replace(epochs=5 / 3, lr_schedule="cosine"))
        assert [entry["epoch"] for entry, _ in history] == [1, pytest.approx(5 / 3)]
        plans = [*epoch_plan(data, 16, 0, 0), *epoch_plan(data, 16, 0, 1)]
        assert shown == [plan[0].tolist() for plan in plans[:5]]
        # the last of five steps: four fifths of the way down
        assert history[-1][0]["lr"] == pytest.approx(0.025 * (1 + math.cos(0.8 * math.pi)))

    def test_after_other_steps_the_images_go_on(self, make_net, data):
        shown = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stepping, "train_batch", noting(shown))
            run(make_net(), data, PARAMS.replace(epochs=4 / 3), before=2)
        plans = [plan for epoch in range(2) for plan in epoch_plan(data, 16, 0, epoch)]
        assert shown == [plan[0].tolist() for plan in plans[2:]]

    def test_less_than_a_step_is_refused(self, net, data):
        with pytest.raises(ParamError, match=r"^epochs: 0\.1 of .* 3 steps .* at least 0\.33$"):
            run(net, data, PARAMS.replace(epochs=0.1))

    def test_learns_what_can_be_learned(self, make_net, data):
        data.train.images[:] = (25 * data.train.labels)[:, None, None, None].to(torch.uint8)
        history = run(make_net(), data, PARAMS.replace(epochs=40))
        assert history[-1][0]["train_top1"] > history[0][0]["train_top1"] + 30

    @pytest.mark.parametrize("fade", [0, 2])
    def test_two_runs_are_bit_identical(self, make_net, data, fade):
        found = []
        for _ in range(2):
            net = make_net()
            masks = prune(net, image(8), 0.5, "B")
            history = run(net, data, PARAMS.replace(fade_epochs=fade), masks)
            found.append((net.state_dict(), history))
        (weights, one), (again, two) = found
        assert equal(weights, again)
        for (entry, state), (other, same) in zip(one, two, strict=True):
            timed = {"seconds", "images_per_s"}
            assert {k: v for k, v in entry.items() if k not in timed} == {
                k: v for k, v in other.items() if k not in timed
            }
            assert equal(state["momentum"], same["momentum"])

    def test_another_seed_is_another_run(self, make_net, data):
        nets = [make_net(), make_net()]
        for seed, net in enumerate(nets):
            run(net, data, PARAMS.replace(seed=seed, epochs=1))
        assert not torch.equal(nets[0][0].weight, nets[1][0].weight)

    @pytest.mark.parametrize("fade", [0, 2])
    @pytest.mark.parametrize("after", [1, 2])
    def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(
        self, make_net, data, fade, after
    ):
        params = PARAMS.replace(fade_epochs=fade)
        whole, broken = make_net(), make_net()
        masks = prune(whole, image(8), 0.5, "B")
        *_, (last, state) = run(whole, data, params, masks)
        training = loop.train(broken, data, params, masks)
        for _ in range(after):
            _, kept = next(training)
        kept = copy.deepcopy(kept)
        resumed = make_net(seed=5)
        resumed.load_state_dict(copy.deepcopy(broken.state_dict()))
        training.close()
        history = run(resumed, data, params, masks, resume=kept)
        assert len(history) == 3 - after
        entry, again = history[-1]
        assert equal(resumed.state_dict(), whole.state_dict())
        assert equal(again["momentum"], state["momentum"])
        assert (entry["train_loss"], entry["lr"]) == (last["train_loss"], last["lr"])

    def test_a_finished_run_resumed_does_nothing(self, net, data):
        *_, (_, state) = run(net, data, PARAMS)
        before = copy.deepcopy(net.state_dict())
        assert run(net, data, PARAMS, resume=state) == []
        assert equal(net.state_dict(), before)

    def test_masks_hold_after_every_epoch_in_weights_and_momentum(self, net, data, masks):
        for _, state in loop.train(net, data, PARAMS, masks):
            assert masking.held(net, masks)
            for name, mask in masks.items():
                assert not state["momentum"][f"{name}.weight"][~mask].any()
                assert state["momentum"][f"{name}.weight"][mask].any()

    def test_masks_are_released_afterwards(self, net, data, masks):
        run(net, data, PARAMS.replace(epochs=1), masks)
        assert not any(p._post_accumulate_grad_hooks for p in net.parameters())

    @pytest.mark.parametrize("fade", [0, 1])
    def test_runs_without_momentum(self, net, data, masks, fade):
        params = PARAMS.replace(momentum=0.0, nesterov=False, fade_epochs=fade, epochs=2)
        assert len(run(net, data, params, masks)) == 2 and masking.held(net, masks)

    def test_diverged_says_when_and_at_what_rate(self, net, data):
        said = (
            r"^here: loss is nan in epoch 2, step 2 of 3, at learning rate 0\.05; use a smaller lr$"
        )
        original, seen = stepping.train_batch, []

        def poisoned(*args):
            seen.append(1)
            images, labels = original(*args)
            return images * (math.nan if len(seen) == 5 else 1), labels

        with pytest.MonkeyPatch.context() as patch, pytest.raises(loop.Diverged, match=said):
            patch.setattr(stepping, "train_batch", poisoned)
            run(net, data, PARAMS.replace(lr_schedule="step"), label="here")

    def test_a_rate_that_is_too_high_diverges(self, net, data):
        with pytest.raises(loop.Diverged, match=r"training: .* use a smaller lr"):
            run(net, data, PARAMS.replace(lr=100.0, epochs=60, weight_decay=1.0))

    def test_weights_that_only_the_last_step_broke_are_no_result(self, net, data):
        params = PARAMS.replace(epochs=1, batch_size=48)
        net[-1].weight.register_hook(lambda gradient: gradient * math.inf)
        with pytest.raises(loop.Diverged, match="weights are not finite in epoch 1, step 1 of 1"):
            run(net, data, params)


class TestFade:
    def test_shrinks_in_a_straight_line_untrained_and_ends_in_zeros(self, net, data, masks):
        before = {name: net.get_submodule(name).weight.detach().clone() for name in masks}
        shares = []
        for _, state in loop.train(net, data, PARAMS.replace(fade_epochs=2, epochs=4), masks):
            for name, mask in masks.items():
                assert not state["momentum"][f"{name}.weight"][~mask].any()
                now = net.get_submodule(name).weight.detach()[~mask]
                share = (now / before[name][~mask]).mean()
                torch.testing.assert_close(now, before[name][~mask] * share, atol=1e-6, rtol=1e-4)
            shares.append(float(share))
        # 6 steps of fading, 3 an epoch
        assert shares == pytest.approx([0.5, 0, 0, 0], abs=1e-4)
        assert shares[1:] == [0, 0, 0] and masking.held(net, masks)

    def test_a_step_checks_and_copies_no_masks(self, net, data, masks, monkeypatch):
        # on a GPU each such copy, and each question to a tensor, is waited for
        training = loop.train(net, data, PARAMS.replace(fade_epochs=2, epochs=2), masks)
        next(training)
        counted, to = [], torch.Tensor.to

        def noted(tensor, *args, **kwargs):
            counted.append(tensor.dtype)
            return to(tensor, *args, **kwargs)

        monkeypatch.setattr(masking, "check", lambda *_: counted.append("check"))
        monkeypatch.setattr(torch.Tensor, "to", noted)
        next(training)
        assert "check" not in counted and torch.bool not in counted
        monkeypatch.undo()
        training.close()

    def test_the_remaining_kernels_learn_meanwhile(self, net, data, masks):
        before = net[0].weight.detach().clone()
        run(net, data, PARAMS.replace(fade_epochs=2, epochs=2), masks)
        assert (net[0].weight[masks["0"]] != before[masks["0"]]).any(-1).any(-1).all()


class TestDistillation:
    def test_the_loss_by_hand(self):
        logits = torch.tensor([[2.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
        soft = torch.tensor([[4.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
        labels = torch.tensor([0, 0])
        params = PARAMS.replace(distill=0.7)
        found = stepping.loss_of(logits, labels, params, soft)
        sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
        hard = (-math.log(sigmoid(2)) - math.log(sigmoid(-4))) / 2
        # at temperature 4 the odds are of logits' differences over 4
        kl = 0.0
        for own, other in ((0.5, 1.0), (-1.0, 0.0)):
            for p, q in ((sigmoid(other), sigmoid(own)), (sigmoid(-other), sigmoid(-own))):
                kl += p * math.log(p / q) / 2
        assert found.item() == pytest.approx(0.3 * hard + 0.7 * 16 * kl)

    def test_no_teacher_is_plain_cross_entropy(self):
        logits, labels = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
        found = stepping.loss_of(logits, labels, PARAMS.replace(distill=0.7))
        assert found.item() == pytest.approx(-math.log(1 / (1 + math.exp(-2))), rel=1e-6)

    def test_runs_and_leaves_the_teacher_as_it_was(self, make_net, data, masks):
        net, teacher = make_net(), make_net().eval()
        before = copy.deepcopy(teacher.state_dict())
        run(net, data, PARAMS.replace(distill=0.9, epochs=1), masks, teacher=teacher)
        assert equal(teacher.state_dict(), before)
        assert all(parameter.grad is None for parameter in teacher.parameters())
        plain = make_net()
        run(plain, data, PARAMS.replace(epochs=1), masks)
        assert not torch.equal(plain[0].weight, net[0].weight)


class TestFastPath:
    """What `choose` gives by default against the plain network in the plain loop."""

    def trained(self, make_net, data, masks, **changes):
        net, params = make_net(), PARAMS.replace(epochs=2, **changes)
        forward = backend.choose(net, params, "cpu")
        history = [entry for entry, _ in loop.train(net, data, params, masks, forward=forward)]
        assert masking.held(net, masks)
        return net, [entry["train_loss"] for entry in history]

    def test_fp32_is_bit_identical_between_two_runs(self, make_net, data, masks):
        one, _ = self.trained(make_net, data, masks, compile="auto")
        two, _ = self.trained(make_net, data, masks, compile="auto")
        assert equal(one.state_dict(), two.state_dict())

    def test_fp32_is_the_plain_path_up_to_rounding(self, make_net, data, masks):
        fast, losses = self.trained(make_net, data, masks, compile="auto")
        plain, wanted = self.trained(make_net, data, masks, compile="off")
        assert losses == pytest.approx(wanted, rel=1e-4)
        for name, tensor in plain.state_dict().items():
            torch.testing.assert_close(fast.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)

    def test_bf16_has_the_loss_of_fp32_within_noise(self, make_net, data, masks):
        _, losses = self.trained(make_net, data, masks, compile="auto", precision="bf16")
        _, wanted = self.trained(make_net, data, masks, compile="off")
        assert losses == pytest.approx(wanted, rel=0.02)


class TestPieces:
    """A batch that is computed piece by piece, its gradients added up, is the same batch."""

    def test_pieces_change_nothing_but_rounding(self, make_net, data, masks):
        params = PARAMS.replace(freeze_bn=True, epochs=2, lr=0.01)
        whole, parts = make_net(), make_net()
        wanted = run(whole, data, params, masks)
        found = run(parts, data, params.replace(micro_batch=4), masks)
        for (one, _), (other, _) in zip(wanted, found, strict=True):
            assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-6)
        for name, tensor in whole.state_dict().items():
            torch.testing.assert_close(parts.state_dict()[name], tensor)

    @pytest.mark.parametrize(("batch", "each"), [(16, 5), (16, 32), (64, 7)])
    def test_pieces_that_do_not_fill_the_batch_are_refused(self, net, data, batch, each):
        params = PARAMS.replace(batch_size=batch, micro_batch=each)
        message = f"batch_size: {min(batch, 48)} images cannot be divided among 1 processes"
        with pytest.raises(ParamError, match=message):
            run(net, data, params, {})


class TestFrozenNorm:
    def test_its_statistics_stay_and_its_weights_learn(self, net, data, masks):
        before = {k: v.clone() for k, v in net.state_dict().items()}
        run(net, data, PARAMS.replace(freeze_bn=True), masks)
        after = net.state_dict()
        assert torch.equal(before["1.running_mean"], after["1.running_mean"])
        assert torch.equal(before["1.running_var"], after["1.running_var"])
        assert not torch.equal(before["1.weight"], after["1.weight"])


class TestRecordedStep:
    """What surrounds the CUDA graph, with a stand-in for the graph that runs the step again."""

    @pytest.fixture
    def calls(self, monkeypatch):
        """Each (step, inputs, result) that was recorded."""
        calls, step_of = [], loop.step_of

        class Graph:
            def replay(self):
                step, plan, out = calls[-1]
                out.copy_(step(plan))

        def steps(*args):
            step = step_of(*args)

            def noting(plan):
                calls.append((step, plan, step(plan)))
                return calls[-1][2]

            return noting

        for name in ("stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, lambda *_, **how: contextlib.nullcontext())
        for name in ("Stream", "current_stream", "default_stream"):
            monkeypatch.setattr(torch.cuda, name, lambda: Mock())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(loop, "step_of", steps)
        return calls

    @pytest.mark.parametrize("taught", [False, True])
    @pytest.mark.parametrize("resumed", [False, True])
    def test_recording_leaves_no_trace(
        self, make_net, data, masks, monkeypatch, calls, resumed, taught
    ):
        params = PARAMS.replace(epochs=2, distill=0.5)
        plain, teacher = make_net(), make_net(1).eval() if taught else None
        run(plain, data, params, masks, teacher=teacher)
        net, resume = make_net(), None
        if resumed:
            epochs = loop.train(net, data, params, masks, teacher=teacher)
            _, resume = next(epochs)
            epochs.close()
        calls.clear()
        monkeypatch.setattr(loop, "_on_gpu", lambda data: True)
        found = run(net, data, params, masks, teacher=teacher, resume=resume)
        assert len(calls) == 4 and len(found) == (1 if resumed else 2)  # all else is replayed
        for name, tensor in plain.state_dict().items():
            torch.testing.assert_close(net.state_dict()[name], tensor)
        assert masking.held(net, masks)

    @pytest.mark.parametrize("resumed", [False, True])
    def test_where_recording_fails_it_goes_on_step_by_step(
        self, make_net, data, masks, monkeypatch, calls, resumed
    ):
        params = PARAMS.replace(epochs=2)
        plain, net, resume = make_net(), make_net(), None
        wanted = run(plain, data, params, masks)
        if resumed:
            epochs = loop.train(net, data, params, masks)
            _, resume = next(epochs)
            epochs.close()
        calls.clear()

        @contextlib.contextmanager
        def breaks(_, stream, capture_error_mode):
            net[0].weight.grad = torch.full_like(net[0].weight, math.nan)  # as a capture may leave
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
            yield

        monkeypatch.setattr(torch.cuda, "graph", breaks)
        monkeypatch.setattr(loop, "_on_gpu", lambda data: True)
        said = r"cannot be recorded as a CUDA graph \(operation .* capturing\); .* slower"
        with pytest.warns(UserWarning, match=said):
            found = run(net, data, params, masks, resume=resume)
        assert len(calls) == 3 + 3 * len(found)  # warming up, then every step
        for name, tensor in plain.state_dict().items():
            torch.testing.assert_close(net.state_dict()[name], tensor)
        (last, state), (same, other) = found[-1], wanted[-1]
        assert last["train_loss"] == pytest.approx(same["train_loss"], rel=1e-6)
        for name, momentum in other["momentum"].items():
            torch.testing.assert_close(state["momentum"][name], momentum)


@pytest.mark.gpu
class TestOnAGpu:
    """The recorded step against the same steps one by one."""

    def trained(self, make_net, data, masks, device, **changes):
        net, params = make_net().to(device), PARAMS.replace(epochs=3, device=device, **changes)
        return net, run(net, data.to(device), params, masks)

    def test_is_the_run_on_the_cpu_up_to_rounding(self, make_net, data, masks):
        fast, found = self.trained(make_net, data, masks, "cuda")
        plain, wanted = self.trained(make_net, data, masks, "cpu")
        assert masking.held(fast, masks)
        for (one, _), (two, _) in zip(found, wanted, strict=True):
            assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-2)
        for name, tensor in plain.state_dict().items():
            close = {"rtol": 1e-2, "atol": 1e-2}
            torch.testing.assert_close(fast.state_dict()[name].cpu(), tensor, **close)

    def test_resumed_is_uninterrupted(self, make_net, data, masks):
        whole, _ = self.trained(make_net, data, masks, "cuda")
        net, params = make_net().cuda(), PARAMS.replace(epochs=3, device="cuda")
        epochs = loop.train(net, data.to("cuda"), params, masks)
        _, state = next(epochs)
        epochs.close()
        run(net, data.to("cuda"), params, masks, resume=state)
        for name, tensor in whole.state_dict().items():
            torch.testing.assert_close(net.state_dict()[name], tensor, rtol=1e-3, atol=1e-3)

    def test_bf16_learns_with_a_teacher(self, make_net, data, masks):
        teacher, params = make_net(1).cuda().eval(), PARAMS.replace(distill=0.5, precision="bf16")
        net = make_net().cuda()
        forward = backend.choose(net, params, "cuda")
        found = run(net, data.to("cuda"), params, masks, forward=forward, teacher=teacher)
        assert found[-1][0]["train_loss"] < found[0][0]["train_loss"]


def test_a_log_gets_a_line_soon_and_then_few(monkeypatch):
    now, log = [0.0], io.StringIO()
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with loop._Lines(total=100, desc="net", file=log) as bar:
        for _ in range(100):
            now[0] += 1
            bar.update()
    lines = [line.strip() for line in log.getvalue().split("\r")[1:]]
    assert lines[0] == "net: step 5 of 100, 00:05 gone, 01:35 to go"
    assert [re.search(r"step (\d+)", line)[1] for line in lines] == ["5", "35", "65", "95", "100"]
