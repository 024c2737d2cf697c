"""Data sets, their splits, and what happens to a batch."""

import itertools
import os
import tarfile

import pytest
import torch
import torchvision
from sklearn.datasets import load_digits

from explib import data as sets
from explib.data import load_data
from explib.data.download import DownloadError
from explib.errors import DataError
from explib.files import project
from explib.params import Params


@pytest.fixture(scope="module")
def digits():
    return load_data(Params())


class TestDigits:
    def test_the_split_is_a_stratified_fifth(self, digits):
        assert (len(digits.train), len(digits.test)) == (1437, 360)
        for label in range(10):
            total = int((digits.train.labels == label).sum() + (digits.test.labels == label).sum())
            assert abs(int((digits.test.labels == label).sum()) - total / 5) <= 1

    def test_every_image_is_in_one_split(self, digits):
        both = torch.cat([digits.train.images, digits.test.images])
        original = load_digits().images
        assert len(both) == len(original)
        assert both.double().sum() == pytest.approx(original.sum() * 255 / 16 * 16 * 3, rel=1e-3)
        train = {image.numpy().tobytes() for image in digits.train.images}
        assert not train & {image.numpy().tobytes() for image in digits.test.images}

    def test_is_the_same_for_every_seed(self, digits):
        again = load_data(Params(seed=5))
        assert again.sha256 == digits.sha256
        assert torch.equal(again.train.images, digits.train.images)
        assert torch.equal(again.test.labels, digits.test.labels)

    def test_shape_type_and_statistics(self, digits):
        assert digits.train.images.shape[1:] == (3, 32, 32)
        assert digits.train.images.dtype == torch.uint8 and not digits.flip
        pixels = digits.train.images.double() / 255
        assert pixels.mean().item() == pytest.approx(digits.mean[0], abs=1e-3)
        assert pixels.std().item() == pytest.approx(digits.std[0], abs=1e-3)


class TestValidation:
    def test_is_disjoint_from_the_rest_and_independent_of_the_seed(self, digits):
        one = load_data(Params(validation=200))
        two = load_data(Params(validation=200, seed=9, mask_seed=3))
        assert (len(one.train), len(one.test)) == (1237, 200)
        assert torch.equal(one.test.images, two.test.images)
        held = {image.numpy().tobytes() for image in one.test.images}
        rest = {image.numpy().tobytes() for image in one.train.images}
        everything = {image.numpy().tobytes() for image in digits.train.images}
        assert not held & rest and held | rest == everything
        assert one.evaluated_on == "validation (200 training images)"
        assert digits.evaluated_on == "test"

    def test_limits_come_after_it(self):
        data = load_data(Params(validation=200, limit_train=30, limit_test=20))
        assert (len(data.train), len(data.test)) == (30, 20)

    def test_more_than_there_is_is_an_error(self):
        with pytest.raises(DataError, match="validation: 1437 of 1437"):
            load_data(Params(validation=1437))


def test_normalize_by_hand(data):
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1)
    out = sets.normalize(images, data).flatten()
    # (0 - 0.5) / 0.2, (0.2 - 0.4) / 0.25, (1 - 0.3) / 0.3
    torch.testing.assert_close(out, torch.tensor([-2.5, -0.8, 7 / 3]))


class TestAnEpoch:
    def gather(self, data, seed=0, epoch=0, batch_size=16):
        plans = sets.epoch_plan(data, batch_size, seed, epoch)
        return [sets.train_batch(data, plan) for plan in plans]

    def test_the_same_for_the_same_seed_and_epoch(self, data):
        for one, two in zip(self.gather(data, 3, 2), self.gather(data, 3, 2), strict=True):
            assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])

    def test_different_for_another_seed_or_epoch(self, data):
        orders = {
            tuple(torch.cat([labels for _, labels in self.gather(data, seed, epoch)]).tolist())
            for seed, epoch in itertools.product(range(3), range(4))
        }
        assert len(orders) == 12

    def test_does_not_touch_the_global_random_state(self, data):
        torch.manual_seed(0)
        wanted = torch.rand(1)
        torch.manual_seed(0)
        self.gather(data)
        assert torch.rand(1) == wanted

    def test_a_label_goes_with_its_image(self, data):
        data.train.images[:] = data.train.labels[:, None, None, None].to(torch.uint8) + 1
        for images, labels in self.gather(data):
            brightest = images[:, 0].flatten(1).max(1).values * 0.2 + 0.5
            torch.testing.assert_close(brightest * 255, labels.float() + 1, atol=1e-3, rtol=0)

    @pytest.mark.parametrize(
        ("batch_size", "sizes"), [(16, [16, 16, 16]), (20, [20, 20]), (48, [48]), (64, [48])]
    )
    def test_a_short_last_batch_is_left_out_unless_it_is_the_only_one(
        self, data, batch_size, sizes
    ):
        batches = self.gather(data, batch_size=batch_size)
        assert [len(labels) for _, labels in batches] == sizes
        assert sets.batches_per_epoch(data, batch_size) == len(sizes)

    def test_an_epoch_shows_every_image_once(self, data):
        labels = torch.cat([labels for _, labels in self.gather(data)])
        assert torch.equal(labels.bincount(), data.train.labels.bincount())


def test_eval_batches_are_all_images_in_order(data):
    batches = list(sets.eval_batches(data.test, data, 8))
    assert [len(labels) for _, labels in batches] == [8, 8, 4]
    assert torch.equal(torch.cat([labels for _, labels in batches]), data.test.labels)
    images = torch.cat([images for images, _ in batches])
    torch.testing.assert_close(images, sets.normalize(data.test.images, data))


class TestCifar10:
    def params(self, root, **changes):
        return Params(dataset="cifar10", data_dir=str(root), **changes)

    def linked(self, root, folder):
        """A copy of the data set's folder made of links."""
        base = folder / "cifar-10-batches-py"
        base.mkdir()
        for path in (root / base.name).iterdir():
            (base / path.name).symlink_to(path)
        return base

    def test_is_read_whole(self, cifar10_root):
        data = load_data(self.params(cifar10_root))
        assert (len(data.train), len(data.test)) == (50_000, 10_000)
        assert data.train.labels.bincount().tolist() == [5000] * 10
        assert data.classes[0] == "airplane" and data.flip
        # the published statistics; the usual std is a mean over images, not over pixels
        mean = data.train.images[:5000].double().mean((0, 2, 3)) / 255
        assert mean.tolist() == pytest.approx(list(data.mean), abs=0.01)

    def test_agrees_with_torchvision(self, cifar10_root):
        data = load_data(self.params(cifar10_root, normalization="imagenet"))
        theirs = torchvision.datasets.CIFAR10(cifar10_root, train=False)
        transform = torchvision.transforms.Compose(
            [
                torchvision.transforms.ToTensor(),
                torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )
        images, labels = next(sets.eval_batches(data.test, data, 4))
        for ours, label, (image, target) in zip(images, labels, theirs, strict=False):
            torch.testing.assert_close(ours, transform(image))
            assert label == target

    def test_a_damaged_file_is_named(self, cifar10_root, tmp_path):
        base = self.linked(cifar10_root, tmp_path)
        content = bytearray((base / "test_batch").read_bytes())
        content[1_000_000] ^= 1
        (base / "test_batch").unlink()
        (base / "test_batch").write_bytes(content)
        with pytest.raises(DataError, match="test_batch: damaged") as caught:
            load_data(self.params(tmp_path))
        assert "\n" not in str(caught.value)

    def test_an_incomplete_folder_is_one_line(self, cifar10_root, tmp_path):
        (self.linked(cifar10_root, tmp_path) / "data_batch_3").unlink()
        with pytest.raises(DataError, match="no complete CIFAR-10 here") as caught:
            load_data(self.params(tmp_path))
        assert "\n" not in str(caught.value)

    def test_missing_data_without_a_network_is_one_line(self, tmp_path, monkeypatch):
        def offline(*args, **kwargs):
            raise DownloadError("https://somewhere: Name or service not known")

        monkeypatch.setattr(sets, "fetch", offline)
        with pytest.raises(DataError, match=r"could not be downloaded .*EXPLIB_DATA") as caught:
            load_data(self.params(tmp_path / "none"))
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)

    def test_a_mirror_is_used_and_unpacked_once(self, cifar10_root, tmp_path, monkeypatch):
        asked = []

        def mirrored(url, path, md5):
            asked.append((url, md5))
            path.parent.mkdir(parents=True)
            with tarfile.open(path, "w") as tar:
                tar.add(cifar10_root / "cifar-10-batches-py", "cifar-10-batches-py")
            return path

        monkeypatch.setattr(sets, "fetch", mirrored)
        for _ in range(2):
            data = load_data(self.params(tmp_path / "new", data_url="https://mirror.example/x.tar"))
            assert len(data.train) == 50_000
        assert asked == [("https://mirror.example/x.tar", "c58f30108f718f92721af3b95e74349a")]

    def test_the_folder_is_data_dir_else_the_variable_else_data(self, tmp_path, monkeypatch):
        monkeypatch.setenv("EXPLIB_DATA", str(tmp_path))
        assert sets.data_root("/x") == sets.Path("/x")
        assert sets.data_root() == tmp_path
        monkeypatch.delenv("EXPLIB_DATA")
        assert sets.data_root() == project() / "data"
        assert os.path.isabs(sets.data_root("relative"))
