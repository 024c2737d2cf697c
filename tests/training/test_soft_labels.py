"""Soft labels made ahead against the teacher asked in every step; what is kept, and believed."""

from dataclasses import replace

import pytest
import torch

from explib.data import epoch_plan, train_batch
from explib.params import Params
from explib.pruning.criteria import prune
from explib.training import loop, soft_labels
from tests.conftest import image

PARAMS = Params(
    epochs=2, batch_size=8, lr=0.05, distill=0.7, device="cpu", precision="fp32", compile="off"
)


@pytest.fixture(autouse=True)
def in_three_chunks(monkeypatch):
    monkeypatch.setitem(soft_labels.CHUNK, "cpu", 20)  # two batches of 8, of the six in an epoch


class Teacher:
    """A network that counts the images it was asked about."""

    def __init__(self, net):
        self.net, self.asked = net.eval(), 0

    def __call__(self, images):
        self.asked += len(images)
        return self.net(images)


@pytest.fixture
def teacher(make_net):
    return Teacher(make_net(1))


def test_they_are_those_of_each_batch(data, teacher):
    found = soft_labels.of_epoch(teacher, data, PARAMS, 1)
    assert found.shape == (6, 8, 10) and not found.requires_grad
    for plan, logits in zip(epoch_plan(data, 8, PARAMS.seed, 1), found, strict=True):
        images, _ = train_batch(data, plan)
        torch.testing.assert_close(logits, teacher.net(images))


class TestKept:
    def test_a_second_run_asks_about_the_first_chunk_only(self, data, teacher, tmp_path):
        one = soft_labels.of_epoch(teacher, data, PARAMS, 0, tmp_path)
        assert teacher.asked == 48
        two = soft_labels.of_epoch(teacher, data, PARAMS, 0, tmp_path)
        assert teacher.asked == 48 + 16 and torch.equal(one, two)
        soft_labels.of_epoch(teacher, data, PARAMS, 1, tmp_path)
        assert teacher.asked == 48 + 16 + 48  # other crops in another epoch

    @pytest.mark.parametrize("how", ["another teacher", "damaged", "no logits", "too few"])
    def test_what_is_not_the_teachers_is_made_anew(self, data, teacher, make_net, tmp_path, how):
        wanted = soft_labels.of_epoch(teacher, data, PARAMS, 0)
        (tmp_path / "wrong").mkdir()
        path = tmp_path / "wrong/epoch-001.safetensors"
        if how == "another teacher":
            soft_labels.of_epoch(make_net(2).eval(), data, PARAMS, 0, path.parent)
        elif how == "damaged":
            path.write_bytes(b"damaged")
        else:
            found = {"other": wanted} if how == "no logits" else {"logits": wanted[:4]}
            soft_labels.save_tensors(path, found, {})
        for _ in range(2):
            found = soft_labels.of_epoch(teacher, data, PARAMS, 0, path.parent)
            assert torch.equal(found, wanted)
        assert torch.equal(soft_labels.load_tensors(path)[0]["logits"], wanted)
        assert teacher.asked == 48 + 48 + 16

    def test_other_images_have_another_folder(self, data):
        others = [
            (PARAMS.replace(seed=1), data, "a"),
            (PARAMS.replace(batch_size=16), data, "a"),
            (PARAMS, data, "b"),
            (PARAMS, replace(data, mean=(0.1, 0.2, 0.3)), "a"),
            (PARAMS, replace(data, train=data.train.first(40)), "a"),
        ]
        own = soft_labels.folder(PARAMS, data, "a")
        assert soft_labels.folder(PARAMS.replace(pruning_way="l1", lr=0.1), data, "a") == own
        assert len({own, *(soft_labels.folder(*other) for other in others)}) == 6


@pytest.mark.parametrize("micro_batch", [0, 2])
def test_training_is_as_with_the_teacher_in_every_step(
    data, make_net, teacher, tmp_path, monkeypatch, micro_batch
):
    params, nets, losses = PARAMS.replace(micro_batch=micro_batch), [], []
    for keep in (tmp_path, tmp_path, None):  # made, read, and asked in every step
        net = make_net()
        masks = prune(net, image(8), 0.5, "B")
        if keep is None:
            monkeypatch.setattr(loop, "_ahead", lambda *_: None)
        epochs = loop.train(net, data, params, masks, teacher=teacher, keep=keep)
        losses.append([entry["train_loss"] for entry, _ in epochs])
        nets.append(net.state_dict())
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-5)
    for name, tensor in nets[2].items():
        assert torch.equal(nets[0][name], nets[1][name])
        torch.testing.assert_close(nets[0][name], tensor)
    assert teacher.asked == 2 * (48 + 16 + 48)
