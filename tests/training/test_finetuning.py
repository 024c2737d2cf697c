"""Fine-tuning on batches of one's own, against the same by hand."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import explib
from explib.pruning import masks as masking
from explib.training import finetuning
from explib.training.loop import Diverged
from tests.conftest import image, needs_compiler
from tests.training.test_loop import equal


def make_batches(count=3, size=16, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, side, side, generator=generator),
            torch.randint(0, 10, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def batch_of(images=None, labels=None):
    """One batch of four."""
    images = torch.zeros(4, 3, 8, 8) if images is None else images
    return [(images, torch.zeros(len(images)).long() if labels is None else labels)]


@pytest.fixture
def masks(net):
    return explib.prune(net, image(8), 0.5, "B")


class TestByHand:
    def plain(self, net, masks, batches, epochs, validation=None):
        """The same in torch, multiplied by masks: history of (loss, top-1, lr, top-1 after)."""
        weights = [(net.get_submodule(name).weight, mask) for name, mask in masks.items()]

        def mask_all():
            with torch.no_grad():
                for weight, mask in weights:
                    weight.mul_(mask[:, :, None, None])

        mask_all()
        optimizer = torch.optim.SGD(
            net.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        history, steps = [], epochs * len(batches)
        for epoch in range(epochs):
            net.train()
            losses, correct = 0.0, 0
            for number, (images, labels) in enumerate(batches):
                done = (epoch * len(batches) + number) / steps
                rising = 0.02 + 0.98 * done / 0.2
                falling = 0.5 * (1 + math.cos(math.pi * (done - 0.2) / 0.8))
                optimizer.param_groups[0]["lr"] = 0.05 * (rising if done < 0.2 else falling)
                optimizer.zero_grad()
                scores = net(images)
                loss = F.cross_entropy(scores, labels)
                loss.backward()
                for weight, mask in weights:
                    weight.grad.mul_(mask[:, :, None, None])
                optimizer.step()
                mask_all()
                losses += loss.item() * len(labels)
                correct += int((scores.argmax(1) == labels).sum())
            net.eval()
            lr = optimizer.param_groups[0]["lr"]
            images, labels = validation
            top1 = 100 * (net(images).argmax(1) == labels).double().mean().item()
            history.append((losses, correct, lr, top1))
        return history

    def test_is_that_of_torch(self, make_net):
        net, plain = make_net(), make_net()
        masks = explib.prune(net, image(8), 0.5, "B")
        batches, (validation,) = make_batches(), make_batches(1, 20, seed=1)
        wanted = self.plain(plain, masks, batches, 2, validation)
        found = explib.finetune(net, masks, batches, epochs=2, lr=0.05, validation=[validation])
        for number, (entry, (loss, correct, lr, top1)) in enumerate(
            zip(found, wanted, strict=True)
        ):
            assert entry["epoch"] == number + 1 and entry["lr"] == pytest.approx(lr)
            assert entry["train_loss"] == pytest.approx(loss / 48, rel=1e-4)
            assert entry["train_top1"] == pytest.approx(100 * correct / 48)
            assert entry["top1"] == top1
            assert entry["images_per_s"] == pytest.approx(48 / entry["seconds"])
        for name, tensor in plain.state_dict().items():
            torch.testing.assert_close(net.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
        assert masking.held(net, masks)

    def test_without_masks_it_trains_all(self, net):
        before = copy.deepcopy(net.state_dict())
        explib.finetune(net, {}, make_batches(), epochs=1)
        assert all(not torch.equal(before[name], p) for name, p in net.named_parameters())


class TestOfOnesOwn:
    @needs_compiler
    @pytest.mark.parametrize("batch_size", [16, 10])  # 16 fill a block of the engine
    def test_a_network_of_torchvision_on_a_data_loader(self, batch_size):
        torch.manual_seed(0)
        model = torchvision.models.resnet18(num_classes=10)
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        images, labels = torch.randn(20, 3, 16, 16), torch.arange(20) % 10
        loader = DataLoader(TensorDataset(images, labels), batch_size=batch_size, shuffle=True)
        masks = explib.prune(model, images[:1], 0.6, "B", survivors="l1")
        before = copy.deepcopy(model.state_dict())
        history = explib.finetune(model, masks, loader, epochs=3, validation=loader)
        assert [entry["epoch"] for entry in history] == [1, 2, 3]
        assert history[-1]["train_loss"] < history[0]["train_loss"]
        for name, mask in masks.items():
            weight = model.get_submodule(name).weight
            assert not weight[~mask].any()
            assert not torch.equal(weight[mask], before[f"{name}.weight"][mask])
        assert explib.evaluate(model, loader) == history[-1]["top1"]

    def test_an_optimizer_and_its_scheduler(self, net, masks):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        twin, own = copy.deepcopy(net), []
        found = explib.finetune(
            net, masks, make_batches(), epochs=2, optimizer=optimizer, scheduler=scheduler
        )
        assert [entry["lr"] for entry in found] == [0.01 * 0.5**2, 0.01 * 0.5**5]
        assert masking.held(net, masks)
        assert not optimizer.state[net[0].weight]["exp_avg"][~masks["0"]].any()
        # with a rate that stays it is the optimizer's
        other = torch.optim.AdamW(twin.parameters(), lr=0.003)
        own = explib.finetune(twin, masks, make_batches(), epochs=1, optimizer=other)
        assert own[0]["lr"] == 0.003

    def test_batches_without_a_length_and_other_losses(self, net, masks):
        class Stream:
            def __iter__(self):
                return iter(make_batches())

        optimizer, seen = torch.optim.SGD(net.parameters(), 0.01), []

        def loss(scores, labels):
            seen.append(scores.shape)
            return F.cross_entropy(scores, labels, label_smoothing=0.1)

        shares = [(x, F.one_hot(y, 10).float()) for x, y in make_batches()]
        found = explib.finetune(net, masks, Stream(), epochs=2, optimizer=optimizer, loss=loss)
        found += explib.finetune(net, masks, shares, epochs=1, loss=loss)
        assert len(found) == 3 and len(seen) == 9

    def test_inputs_by_name(self, net, masks):
        twin = copy.deepcopy(net)
        named = [({"input": images}, labels) for images, labels in make_batches()]
        explib.finetune(net, masks, named, epochs=1)
        explib.finetune(twin, masks, make_batches(), epochs=1)
        for name, tensor in twin.state_dict().items():
            torch.testing.assert_close(net.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)

    def test_what_was_there_before_stays(self, net, masks):
        """Modes, masks that are held, and no gradients."""
        explib.hold(net, masks)
        net.train()
        net[1].eval()
        explib.finetune(net, masks, make_batches(), epochs=1)
        assert net.training and not net[1].training
        assert all(parameter.grad is None for parameter in net.parameters())
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        ((images, labels),) = make_batches(1)
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
        assert masking.held(net, masks)

    def test_the_engine_computes_where_it_can(self, net, masks, monkeypatch):
        asked = []
        found = finetuning.backend.networks

        def noting(*given):
            asked.append(found(*given))
            return asked[-1]

        monkeypatch.setattr(finetuning.backend, "networks", noting)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            explib.finetune(net, masks, make_batches(), epochs=2)
            explib.finetune(
                net.double(), masks, [(x.double(), y) for x, y in make_batches()], epochs=1
            )
        assert len(asked) == 1

    def test_a_network_that_has_no_length(self, net, masks):
        """As what torch.compile returns."""

        class Wrapped(nn.Sequential):
            def __len__(self):
                raise TypeError("Wrapped does not support len()")

        net.__class__ = Wrapped
        net.double()  # which trains in torch, by the network itself
        batches = [(images.double(), labels) for images, labels in make_batches()]
        (entry,) = explib.finetune(net, masks, batches, epochs=1, validation=batches)
        assert entry["top1"] == explib.evaluate(net, batches)

    def test_labels_of_a_shorter_type_are_those_numbers(self, net):
        twin = copy.deepcopy(net)
        explib.finetune(net, {}, make_batches(), epochs=1)
        explib.finetune(twin, {}, [(x, y.to(torch.int16)) for x, y in make_batches()], epochs=1)
        assert equal(net.state_dict(), twin.state_dict())

    def test_a_look_at_the_first_batch_moves_no_random_numbers(self, net):
        images, labels = torch.randn(32, 3, 8, 8), torch.arange(32) % 10
        loader = DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=True)
        torch.manual_seed(3)
        list(loader)
        wanted = torch.rand(1)
        torch.manual_seed(3)
        explib.finetune(net, {}, loader, epochs=1)
        assert torch.equal(torch.rand(1), wanted)


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"epochs": 0}, "epochs: 0; give a whole number of at least 1"),
            ({"epochs": 0.5}, "epochs: 0.5; give a whole number of at least 1"),
            ({"lr": 0.0}, "lr: 0.0; give a number above 0"),
            ({"optimizer": "sgd"}, "optimizer: a str; give one of torch.optim, made of the model"),
            ({"scheduler": object()}, None),
            ({"epochs": -1}, "epochs: -1; give a whole number of at least 1"),
            ({"epochs": True}, "epochs: True; give a whole number of at least 1"),
            ({"lr": math.nan}, "lr: nan; give a number above 0"),
            ({"lr": "0.1"}, "lr: '0.1'; give a number above 0"),
            ({"weight_decay": -1.0}, "weight_decay: -1.0; give a number of at least 0"),
            ({"batches": []}, "batches: empty; give batches of (images, labels)"),
            ({"batches": 5}, "batches: a int; give a DataLoader or a list"),
            (
                {"batches": TensorDataset(torch.zeros(4, 3, 8, 8), torch.zeros(4).long())},
                "batches: a TensorDataset, which gives one image at a time; wrap it in a torch",
            ),
            ({"batches": [{"images": 1, "labels": 2}]}, "batches: a batch is {images=int, labels="),
            ({"batches": [torch.zeros(2)]}, "batches: a batch is (2,); give a pair"),
            (
                {"batches": batch_of(torch.zeros(4, 1, 8, 8))},
                "batches: the model does not take images (4, 1, 8, 8) (Given groups=1",
            ),
            (
                {"batches": batch_of(torch.zeros(4, 8, 8, 3))},
                "batches: the model does not take images (4, 8, 8, 3) (Given groups=1",
            ),
            (
                {"batches": batch_of(torch.zeros(4, 192))},
                "batches: the model does not take images (4, 192) (",
            ),
            (
                {"batches": batch_of(torch.zeros(4, 3, 8, 8).byte())},
                "batches: the model does not take images (4, 3, 8, 8) (",
            ),
            (
                {"batches": batch_of(labels=torch.zeros(4))},
                "batches: labels are float32 (4,); give whole numbers (N,), int64, or shares",
            ),
            (
                {"batches": batch_of(labels=torch.zeros(4, 1).long())},
                "batches: labels are int64 (4, 1); give whole numbers (N,), int64",
            ),
            (
                {"batches": batch_of(labels=torch.zeros(4).bool())},
                "batches: labels are bool (4,); give whole numbers (N,), int64",
            ),
            (
                {"batches": batch_of(labels=torch.tensor([0, 1, 2, 10]))},
                "batches: a label is 10; the model has 10 classes, 0 to 9",
            ),
            (
                {"batches": batch_of(labels=torch.tensor([0, 1, 2, -1]))},
                "batches: a label is -1; the model has 10 classes, 0 to 9",
            ),
            (
                {"batches": batch_of(labels=torch.rand(4, 7))},
                "batches: labels are shares (4, 7), the model's scores (4, 10); give a share for",
            ),
            (
                {"batches": batch_of(labels=torch.zeros(3).long())},
                "model: returns (4, 10) for 3 labels; give a classifier that returns scores",
            ),
            (
                {"validation": batch_of(labels=torch.tensor([0, 1, 2, 10]))},
                "validation: a label is 10; the model has 10 classes, 0 to 9",
            ),
            (
                {"validation": batch_of(torch.zeros(4, 1, 8, 8))},
                "validation: the model does not take images (4, 1, 8, 8)",
            ),
            ({"validation": [torch.zeros(2)]}, "validation: a batch is (2,); give a pair"),
            (
                {"validation": iter(make_batches()), "epochs": 2},
                "validation: a list_iterator, which ends with the first epoch of 2; give a list",
            ),
            ({"masks": None}, "masks: a NoneType; give {name: bool (F, C)}, {} for none"),
            ({"batches": iter(())}, "batches: have no len()"),
            ({"batches": [torch.zeros(1, 3, 8, 8)]}, "batches: a batch is (1, 3, 8, 8)"),
            ({"validation": []}, "validation: empty; give batches"),
            (
                {"masks": {"layer9.conv": torch.ones(8, 3).bool()}},
                "masks: 'layer9.conv' is no",
            ),
            ({"masks": {"0": torch.ones(8, 4).bool()}}, "masks: 0 has a torch.bool mask (8, 4)"),
        ],
    )
    def test_in_one_line_and_the_weights_are_as_they_were(self, net, masks, changes, message):
        before = copy.deepcopy(net.state_dict())
        given = {"masks": {}, "batches": make_batches(), "epochs": 1, **changes}
        chosen, batches = given.pop("masks"), given.pop("batches")
        message = message or "scheduler: is for another optimizer; give that one"
        with pytest.raises((ValueError, Diverged)) as error:
            explib.finetune(net, chosen, batches, **given)
        assert str(error.value).startswith(message) and "\n" not in str(error.value)
        assert equal(net.state_dict(), before) and net.training

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"batches": batch_of(torch.full((4, 3, 8, 8), math.nan))},
                "fine-tuning: loss is nan in epoch 1, step 1 of 1, before any training; look for",
            ),
            (
                {"loss": nn.MarginRankingLoss()},
                "loss: does not take scores (16, 10) and labels (16,) (",
            ),
            ({"loss": lambda scores, labels: 1.0}, "loss: returns float for scores (16, 10) and"),
            (
                {"loss": nn.CrossEntropyLoss(reduction="none")},
                "loss: returns (16,) for scores (16, 10) and labels (16,); give their mean",
            ),
        ],
    )
    def test_by_the_first_step_before_it_changes_a_weight(self, net, changes, message):
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        given = {"batches": make_batches(), "epochs": 1, **changes}
        with pytest.raises((ValueError, Diverged)) as error:
            explib.finetune(net, {}, given.pop("batches"), **given)
        assert str(error.value).startswith(message) and "\n" not in str(error.value)
        assert equal(dict(net.named_parameters()), before) and net.training

    def test_an_iterator_that_ends(self, net):
        optimizer = torch.optim.SGD(net.parameters(), 0.01)
        with pytest.raises(ValueError, match=r"^batches: a list_iterator, which ends with the fir"):
            explib.finetune(net, {}, iter(make_batches()), epochs=2, optimizer=optimizer)
        twin = copy.deepcopy(net)
        other = torch.optim.SGD(twin.parameters(), 0.01)
        explib.finetune(net, {}, iter(make_batches()), epochs=1, optimizer=optimizer)
        explib.finetune(twin, {}, make_batches(), epochs=1, optimizer=other)
        assert equal(net.state_dict(), twin.state_dict())  # the first batch, too, once

    def test_batches_that_end_unseen(self, net):
        class Ending(list):
            begun = 0

            def __iter__(self):
                self.begun += 1
                return super().__iter__() if self.begun < 3 else iter(())  # looked at, trained on

        with pytest.raises(ValueError, match=r"^batches: empty in epoch 2; give .* once an epoch"):
            explib.finetune(net, {}, Ending(make_batches()), epochs=2)

    def test_a_last_batch_of_one_image(self):
        net = nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8)),
            *(nn.Flatten(), nn.Linear(8, 10)),
        )
        batches = [*make_batches(2), *make_batches(1, size=1)]
        said = (
            r"^batches: batch 3 of epoch 1, images \(1, 3, 8, 8\), cannot be trained on \(Expected "
            r"more than 1 value .*, as by drop_last=True$"
        )
        with pytest.raises(ValueError, match=said):
            explib.finetune(net, {}, batches, epochs=1)

    def test_a_later_label_out_of_range(self, net):
        batches = make_batches()
        batches[2][1][3] = 12
        with pytest.raises(ValueError, match=r"^batches: a label is 12; the model has 10 classes"):
            explib.finetune(net, {}, batches, epochs=1)

    def test_what_is_no_network(self):
        with pytest.raises(ValueError, match=r"^model: a list; give an nn.Module, then its batch"):
            explib.finetune([], {}, make_batches(), epochs=1)

    def test_nothing_to_train(self, net):
        with pytest.raises(ValueError, match=r"^model: no parameter requires a gradient"):
            explib.finetune(net.requires_grad_(False), {}, make_batches(), epochs=1)

    def test_another_models_optimizer(self, make_net, net, masks):
        optimizer = torch.optim.SGD(make_net().parameters(), 0.01)
        with pytest.raises(ValueError, match=r"^optimizer: has no parameter of this model"):
            explib.finetune(net, masks, make_batches(), epochs=1, optimizer=optimizer)
        with pytest.raises(ValueError, match=r"^optimizer: has no parameter of this model"):
            explib.finetune(net, {}, make_batches(), epochs=1, optimizer=optimizer)

    def test_diverged_says_when(self, net):
        batches = make_batches()
        batches[1][0][0, 0, 0, 0] = math.nan
        said = r"^fine-tuning: loss is nan in epoch 1, step 2 of 3, at learning rate 0\.\d+; use"
        with pytest.raises(Diverged, match=said):
            explib.finetune(net, {}, batches, epochs=1)
