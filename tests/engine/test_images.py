"""Images of files as a network takes them, beside torchvision's transforms; what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from explib.engine import images
from explib.errors import DataError
from tests.conftest import make_folders

ABOUT = {"images": {"mean": [0.0], "std": [1.0], "resize": 0}, "classes": []}


def how(shape=(3, 20, 20), classes=(), **more) -> images.Reading:
    return images.reading({"images": ABOUT["images"] | more, "classes": [*classes]}, shape)


@pytest.fixture
def folder(tmp_path):
    """Eight images below two folders, one grey, one a PNG; and a text."""
    root = make_folders(tmp_path, {"a": 4, "b": 4}) / "train"
    (root / "read.me").write_text("no image")
    return root


def test_folders_give_their_images_by_name_and_files_themselves(folder):
    found = images.found([folder, folder / "read.me"])
    assert [p.name for p in found[:-1]] == [p.name for p in sorted(folder.glob("*/*.*"))]
    assert len(found) == 9 and found[-1] == folder / "read.me"
    (folder / "empty").mkdir()
    for path in (folder / "empty", folder / "not-there.png"):
        with pytest.raises(FileNotFoundError, match=f"^{path}: no "):
            images.found([path])


@pytest.mark.parametrize(("shape", "resize"), [((3, 20, 20), 30), ((3, 24, 30), 31)])
def test_it_is_read_as_by_torchvision(folder, shape, resize):
    steps = v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(shape[1:])])
    for path in images.found([folder]):
        wanted = v2.functional.pil_to_tensor(steps(Image.open(path).convert("RGB")))
        found = images.read(path, how(shape, resize=resize))
        assert found.dtype == torch.uint8 and torch.equal(found, wanted), path


def test_without_a_size_as_little_is_cut_off_as_can_be(tmp_path):
    path = tmp_path / "wide.png"
    pixels = np.zeros((10, 40), np.uint8)
    pixels[:, 10:30] = 200  # the middle half is what is left
    Image.fromarray(pixels).save(path)
    assert (images.read(path, how((1, 5, 10)))[0, :, 1:-1] == 200).all()
    assert images.read(path, how((1, 10, 40)))[0].tolist() == pixels.tolist()
    assert images.read(path, how((3, 10, 40))).shape == (3, 10, 40)


def test_a_file_says_how_and_of_a_compact_one_its_data_set():
    told = how(mean=[0.5], std=[0.1, 0.2, 0.3], classes=["x", "y"])
    assert told.mean == (0.5,) and told.classes == ("x", "y") and told.resize == 0
    about = {"dataset": "cifar10", "normalization": "imagenet"}
    told = images.reading(about, (3, 32, 32))
    assert told.mean == (0.485, 0.456, 0.406) and told.classes[3] == "cat"
    assert images.reading({"dataset": "imagenet"}, (3, 224, 224)).resize == 256
    assert images.reading({"dataset": "digits", "normalization": ""}, (3, 32, 32)).std[0] == 0.3237


@pytest.mark.parametrize(
    ("about", "shape", "message"),
    [
        (ABOUT, (4, 8, 8), r"it takes inputs \(4, 8, 8\)"),
        (ABOUT, (), r"it takes several inputs"),
        ({"dataset": "mine:load"}, (3, 8, 8), "it does not say mean and std"),
        (ABOUT | {"classes": 7}, (3, 8, 8), "classes: 7; give their names"),
        (ABOUT | {"images": []}, (3, 8, 8), "mean: None"),
        (ABOUT | {"images": {"mean": [0.0], "std": [float("inf")]}}, (3, 8, 8), r"std: \[inf\]"),
        (ABOUT | {"images": {"mean": [0], "std": [1], "resize": 5}}, (3, 8, 8), "resize: 5; give"),
    ],
)
def test_what_no_image_can_be_read_by_is_one_line(about, shape, message):
    with pytest.raises(ValueError, match=message):
        images.reading(about, shape)


class Tint(nn.Module):
    """The mean of each channel, in tens: which of three tints an image has."""

    def forward(self, x):
        return 10 * x.mean((2, 3))


def test_every_image_gets_its_classes_and_their_shares(folder):
    files = images.found([folder])
    rows = list(images.classify(Tint(), how(classes=["red", "green"]), files, batch_size=3, top=2))
    assert [row["file"] for row in rows] == [str(path) for path in files]
    for row, path in zip(rows, files, strict=True):
        best, second = row["classes"]
        x = images.read(path, how()) / 255
        shares = Tint()(x[None]).softmax(1)[0].sort(descending=True).values
        assert [best["score"], second["score"]] == pytest.approx(shares[:2].tolist(), abs=1e-5)
        assert row["network_s"] > 0 and row["reading_s"] > 0
    named = {row["classes"][0]["class"] for row in rows if "/b/" in row["file"]}
    assert named == {"green"}  # the second folder is tinted so
    assert {row["classes"][1]["class"] for row in rows} <= {"red", "green", "2"}


def test_what_is_no_image_or_no_score_is_one_line(folder):
    files = [folder / "read.me", folder / "a/1.JPEG", folder / "read.me"]
    for size in (1, 2, 3):  # alone in its batch, too
        rows = list(images.classify(Tint(), how(), files, size))
        assert sorted(row["file"] for row in rows) == sorted(map(str, files))
        bad = [row["error"] for row in rows if "error" in row]
        assert len(bad) == 2 and all(
            "read.me: no readable image (cannot identify" in e for e in bad
        )
        assert [row["file"] for row in rows if "classes" in row] == [str(files[1])]
    broken = folder / "a/0.png"
    broken.write_bytes((folder / "a/1.JPEG").read_bytes()[:300])
    with pytest.raises(DataError, match=r"0\.png: no readable image"):
        images.read(broken, how())
    with pytest.raises(ValueError, match=r"no scores \(N, classes\)"):
        list(images.classify(nn.Identity(), how(), [folder / "a/1.JPEG"]))
