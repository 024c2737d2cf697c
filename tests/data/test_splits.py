"""Batches of images in memory and of JPEG files in class folders."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from explib import data as sets
from explib.data import splits
from explib.errors import DataError, ParamError
from explib.params import Params
from tests.conftest import make_folders


def crops(image, flip):
    """Every crop of the zero-padded image, mirrored too where that is allowed, as bytes."""
    padded = np.zeros((3, 16, 16), np.uint8)
    padded[:, 4:12, 4:12] = image
    for top, left in itertools.product(range(9), range(9)):
        crop = padded[:, top : top + 8, left : left + 8]
        yield np.ascontiguousarray(crop).tobytes(), (top, left, False)
        if flip:
            yield np.ascontiguousarray(crop[:, :, ::-1]).tobytes(), (top, left, True)


@pytest.mark.parametrize("flip", [True, False])
def test_augment_crops_the_padded_image_and_mirrors_where_allowed(make_data, flip):
    data = make_data(train=400, flip=flip)
    data.train.images[:, 0] += data.train.images[:, 0] == 0  # so that a crop tells its place
    plan = sets.epoch_plan(data, 400, 0, 0)[0]
    order, rows, columns, marks = plan
    out = splits.augment(data.train.images[order], rows, columns, marks.bool())
    chosen = []
    for before, after in zip(data.train.images[order].numpy(), out.numpy(), strict=True):
        chosen.append(dict(crops(before, flip))[np.ascontiguousarray(after).tobytes()])
    tops, lefts, mirrored = zip(*chosen, strict=True)
    assert [tops, lefts, mirrored] == [tuple(row.tolist()) for row in (rows, columns, marks)]
    assert set(tops) == set(lefts) == set(range(9))
    # 400 fair coins: outside of 150 to 250 once in two million
    assert (150 < sum(mirrored) < 250) if flip else not any(mirrored)
    assert len(set(zip(tops, lefts, strict=True))) > 70


CLASSES = {"ants": 9, "bees": 7, "cats": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("imagenet"), CLASSES)


@pytest.fixture
def params(folders):
    return Params(dataset="imagenet", data_dir=str(folders), image_size=32, workers=1)


@pytest.fixture
def images(params):
    return sets.load_data(params)


def plain(path):
    """An image as torchvision reads it."""
    return Image.open(path).convert("RGB")


class TestFolders:
    def test_every_file_has_the_label_of_its_folder(self, images):
        assert images.classes == tuple(CLASSES) and len(images.train) == sum(CLASSES.values())
        assert len(images.test) == 4 + 3 + 4
        for file, label in zip(images.train.files, images.train.labels, strict=True):
            assert f"/train/{images.classes[label]}/" in file
        assert len(set(images.train.files)) == len(images.train)

    def test_grey_images_of_16_bits_are_scaled(self, tmp_path):
        grey = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64  # up to 65,472
        for part, name in itertools.product(("train", "val"), ("ants", "bees")):
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(grey).save(tmp_path / part / name / "0.png")
        params = Params(dataset="imagenet", data_dir=str(tmp_path), image_size=224, workers=1)
        ((found, _),) = sets.load_data(params).test.first(1).in_order(1)
        usual = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])
        wanted = pil_to_tensor(usual(Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")))
        assert torch.equal(found[0], wanted) and found.max() < 255 and found.float().std() > 50

    def test_the_first_images_are_of_several_classes(self, images):
        assert len(images.train.first(8).labels.unique()) > 1

    def test_evaluation_is_torchvisions_resize_and_center_crop(self, images):
        usual = v2.Compose([v2.Resize(36, antialias=True), v2.CenterCrop(32)])
        batches = list(images.test.in_order(4))
        assert [len(labels) for _, labels in batches] == [4, 4, 3]
        found = torch.cat([batch for batch, _ in batches])
        assert found.dtype == torch.uint8 and found.shape == (11, 3, 32, 32)
        for file, image in zip(images.test.files, found, strict=True):
            assert torch.equal(image, pil_to_tensor(usual(plain(file))))
        labels = torch.cat([labels for _, labels in batches])
        assert torch.equal(labels, images.test.labels)

    def test_training_is_torchvisions_random_crop_and_mirroring_by_the_plans_seed(self, images):
        usual = v2.Compose([v2.RandomResizedCrop(32, antialias=True), v2.RandomHorizontalFlip()])
        plans = sets.epoch_plan(images, 8, 0, 0)
        for plan, (found, labels) in zip(plans, images.train.inputs(plans), strict=True):
            assert torch.equal(labels, images.train.labels[plan[0]])
            for (index, seed), image in zip(plan[:2].T.tolist(), found, strict=True):
                torch.manual_seed(seed)
                assert torch.equal(image, pil_to_tensor(usual(plain(images.train.files[index]))))

    def test_workers_change_nothing(self, images):
        plans = sets.epoch_plan(images, 4, 3, 1)
        one, two = (list(images.train.inputs(plans, workers)) for workers in (1, 2))
        assert len(one) == 6
        for (x, labels), (y, same) in zip(one, two, strict=True):
            assert torch.equal(x, y) and torch.equal(labels, same)

    def test_an_epoch_differs_from_the_next(self, images):
        first, second = (sets.epoch_plan(images, 24, 0, epoch) for epoch in (0, 1))
        assert not torch.equal(first[:, 0], second[:, 0])
        assert not torch.equal(first[:, 1], second[:, 1])

    def test_the_global_random_state_stays(self, images):
        torch.manual_seed(0)
        wanted = torch.rand(1)
        torch.manual_seed(0)
        list(images.train.inputs(sets.epoch_plan(images, 8, 0, 0)))
        assert torch.rand(1) == wanted

    def test_batches_are_normalized(self, images):
        found, labels = next(sets.eval_batches(images.test, images, 4))
        usual = v2.Compose(
            [
                *(v2.Resize(36, antialias=True), v2.CenterCrop(32)),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(images.mean, images.std),
            ]
        )
        torch.testing.assert_close(found[0], usual(plain(images.test.files[0])))
        assert images.mean == (0.485, 0.456, 0.406) and len(labels) == 4

    def test_validation_and_limits(self, params):
        held = sets.load_data(params.replace(validation=6, limit_train=10, limit_test=5))
        assert len(held.train) == 10 and len(held.test) == 5
        assert not set(held.train.files) & set(held.test.files)
        assert all("/train/" in file for file in held.test.files)
        assert held.train.labels.tolist() == [
            held.classes.index(file.split("/")[-2]) for file in held.train.files
        ]

    def test_a_folder_imagenet_in_the_data_folder_is_found(self, folders, tmp_path):
        (tmp_path / "imagenet").symlink_to(folders)
        assert len(sets.load_data(Params(dataset="imagenet", data_dir=str(tmp_path))).train) == 24

    def test_the_digest_follows_names_and_sizes(self, params, images, folders):
        assert sets.load_data(params).sha256 == images.sha256
        extra = folders / "train/ants/more.JPEG"
        Image.new("RGB", (50, 50)).save(extra)
        try:
            assert sets.load_data(params).sha256 != images.sha256
        finally:
            extra.unlink()

    def test_the_side_is_224_unless_said(self, folders):
        params = Params(dataset="imagenet", data_dir=str(folders), limit_train=2)
        batch = next(sets.load_data(params).train.in_order(2))[0]
        assert batch.shape == (2, 3, 224, 224)
        with pytest.raises(ParamError, match="image_size: 64, but images of 'digits' have 32"):
            Params(image_size=64)


class TestBadFolders:
    @pytest.fixture
    def bad(self, folders, tmp_path):
        for part in ("train", "val"):
            for name in CLASSES:
                (tmp_path / part / name).mkdir(parents=True)
                source = next((folders / part / name).iterdir())
                (tmp_path / part / name / source.name).symlink_to(source)
        return tmp_path

    def load(self, root):
        return sets.load_data(Params(dataset="imagenet", data_dir=str(root), image_size=32))

    def test_that_are_not_there(self, tmp_path):
        with pytest.raises(DataError, match=r"train: cannot be read .*give a data_dir with train/"):
            self.load(tmp_path)

    def test_a_class_without_images(self, bad):
        for file in (bad / "train/bees").iterdir():
            file.unlink()
        with pytest.raises(DataError, match=r"train/bees: has no \.jpeg, \.jpg or \.png images"):
            self.load(bad)

    def test_other_classes_to_evaluate_on(self, bad):
        (bad / "val/cats").rename(bad / "val/dogs")
        with pytest.raises(DataError, match="val: class 'cats' is in only one of train and val"):
            self.load(bad)

    def test_a_flat_folder(self, bad):
        for name in CLASSES:
            for file in (bad / "val" / name).iterdir():
                file.rename(bad / "val" / f"{name}{file.suffix}")
            (bad / "val" / name).rmdir()
        with pytest.raises(DataError, match="val: has no class folders"):
            self.load(bad)

    @pytest.mark.parametrize("workers", [1, 2])
    @pytest.mark.parametrize("content", [b"", b"no image", "half"])
    def test_an_unreadable_image_is_one_line_that_names_it(self, bad, content, workers):
        path = next((bad / "train/bees").iterdir())
        whole = path.read_bytes()
        path.unlink()
        path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
        data = self.load(bad)
        with pytest.raises(DataError) as caught:
            list(data.train.in_order(1, workers))
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"{path}: no readable image (")
