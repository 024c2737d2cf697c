"""The data sets, and batches of them: augmented, normalized, on the device."""

import functools
import hashlib
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from explib import registry
from explib.data.download import fetch, unpack
from explib.data.splits import Folders, Split, find
from explib.errors import DataError, ParamError, extra
from explib.files import resolve
from explib.params import Params

MEAN_STD = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "digits": ((0.3054,) * 3, (0.3237,) * 3),
}
"""Per-channel mean and standard deviation of inputs in 0 to 1. digits: of its training split."""


@dataclass(frozen=True)
class Data:
    """A data set ready for use: `train` to learn from, `test` to evaluate on.

    `evaluated_on` says what `test` is: the test set, or a validation split of the training set.
    What a function of a user's returns: train, test and classes are enough.
    """

    name: str
    train: Split | Folders
    test: Split | Folders
    classes: tuple[str, ...]
    mean: tuple[float, ...] = (0.5,)  # of inputs in 0 to 1, of each channel or one for all
    std: tuple[float, ...] = (0.25,)
    flip: bool = False  # whether a mirrored image is still of its class
    sha256: str = ""  # of the images and labels as loaded; of folders, of files' names and sizes
    evaluated_on: str = "test"
    workers: int = 0  # processes that decode images on disk; 0: one per core

    def to(self, device: str) -> "Data":
        """The same data on a device."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def summary(self) -> dict:
        """What a record says of the data."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "train_images": len(self.train),
            "test_images": len(self.test),
            "evaluated_on": self.evaluated_on,
            "mean": list(self.mean),
            "std": list(self.std),
        }


def load_data(params: Params) -> Data:
    """The data set of a configuration. DataError, in one line, if it is not to be had.

    `validation` images are taken from the training set, the same ones for every seed, and stand
    in for the test set; limit_train and limit_test then cut both.
    """
    data = _loaded(params)
    if params.normalization:
        mean, std = MEAN_STD[params.normalization]
        data = replace(data, mean=mean, std=std)
    channels = data.train.images.shape[1] if isinstance(data.train, Split) else 3
    if {len(data.mean), len(data.std)} - {1, channels}:
        raise DataError(
            f"{params.dataset}: mean {data.mean} and std {data.std} for {channels} channels; give "
            "as many of each, or one"
        )
    if params.validation:
        if params.validation >= len(data.train):
            raise DataError(
                f"validation: {params.validation} of {len(data.train)} training images; give fewer"
            )
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(2023))
        held, rest = order[: params.validation], order[params.validation :].sort().values
        data = replace(
            data,
            train=data.train.take(rest),
            test=data.train.take(held),
            evaluated_on=f"validation ({params.validation} training images)",
        )
    return replace(
        data,
        train=data.train.first(params.limit_train),
        test=data.test.first(params.limit_test),
    )


def _loaded(params: Params) -> Data:
    """All of a data set; ParamError where its function returns no Data that can be used."""
    data = registry.load(registry.dataset(params.dataset).function, "dataset")(params)
    if not isinstance(data, Data):
        raise ParamError(
            f"dataset: {params.dataset!r} returned a {type(data).__name__}; give explib.data.Data"
        )
    for name in ("train", "test"):
        _check(f"{params.dataset}: {name}", getattr(data, name), len(data.classes))
    splits = [split for split in (data.train, data.test) if isinstance(split, Split)]
    own = data.sha256 or _digest(*(t for split in splits for t in (split.images, split.labels)))
    return replace(data, name=params.dataset, sha256=own)


def _check(source: str, split: Split | Folders, count: int) -> None:
    """DataError unless a split holds images as `Split` says, and labels of `count` classes."""
    labels = split.labels
    sound = labels.dtype == torch.int64 and labels.ndim == 1 and len(labels) > 0
    if not sound or labels.min() < 0 or labels.max() >= count:
        raise DataError(f"{source}: give labels, int64 (N,), from 0 to {count - 1}")
    if not isinstance(split, Split):
        return
    shape = tuple(split.images.shape)
    if split.images.dtype != torch.uint8 or len(shape) != 4 or shape[0] != len(labels):
        raise DataError(
            f"{source}: images are {split.images.dtype} {shape}; give uint8 (N, C, H, W), as many "
            f"as the {len(labels)} labels"
        )


def digits(params: Params) -> Data:
    """scikit-learn's 1,797 handwritten digits, 8x8 to 3x32x32, a fifth of each class for test."""
    with extra():
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    images = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    images = images.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=digits.target, random_state=0
    )
    mean, std = MEAN_STD["digits"]
    return Data(
        "digits",
        Split(images[train], labels[train]),
        Split(images[test], labels[test]),
        tuple("0123456789"),
        mean,
        std,
        flip=False,
        sha256=_digest(images, labels),
    )


def cifar10(params: Params) -> Data:
    """CIFAR-10 through torchvision, its MD5 sums checked, downloaded on first use."""
    with extra():
        from torchvision.datasets import CIFAR10  # brings the compiler of torch: seconds
        from torchvision.datasets.utils import check_integrity
    root = data_root(params.data_dir)
    folder = root / CIFAR10.base_folder
    wrong = [
        name
        for name, md5 in CIFAR10.train_list + CIFAR10.test_list
        if (folder / name).exists() and not check_integrity(str(folder / name), md5)
    ]
    if wrong:
        raise DataError(f"{folder / wrong[0]}: damaged (its MD5 is wrong); delete it and try again")
    try:
        if not folder.is_dir():
            archive = fetch(
                params.data_url or CIFAR10.url, root / CIFAR10.filename, CIFAR10.tgz_md5
            )
            unpack(archive, CIFAR10.base_folder, root)
        train, test = CIFAR10(root, train=True), CIFAR10(root, train=False)
    except (RuntimeError, OSError, tarfile.TarError) as error:
        why = " ".join(str(error).split())[:200]
        raise DataError(
            f"{root}: no complete CIFAR-10 here and it could not be downloaded ({why}); "
            "put cifar-10-batches-py there, or set data_dir or EXPLIB_DATA to where it is, or "
            "data_url to a mirror"
        ) from None

    def split(part):
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        return Split(images, torch.tensor(part.targets))

    train, test, classes = split(train), split(test), tuple(train.classes)
    mean, std = MEAN_STD["cifar10"]
    digest = _digest(train.images, train.labels, test.images, test.labels)
    return Data("cifar10", train, test, classes, mean, std, flip=True, sha256=digest)


def imagenet(params: Params) -> Data:
    """Class folders: train/CLASS/*.JPEG and val/CLASS/*.JPEG, of ImageNet or of anything else."""
    root = imagenet_dir(params.data_dir)
    _, (_, side, _) = imagenet_size(params)
    train, classes = find(root / "train", side)
    test, _ = find(root / "val", side, classes)
    mean, std = MEAN_STD["imagenet"]
    names = hashlib.sha256()  # the contents, 150 GB, would take too long
    for split in (train, test):
        for file in sorted(split.files):
            names.update(f"{os.path.relpath(file, root)} {os.path.getsize(file)}\n".encode())
    digest = names.hexdigest()
    return Data(
        *("imagenet", train, test, tuple(classes), mean, std),
        flip=True,
        sha256=digest,
        workers=params.workers,
    )


def imagenet_dir(data_dir: str = "") -> Path:
    """Where train/ and val/ are: data_dir, else $EXPLIB_DATA, else data/; or imagenet/ in it."""
    root = data_root(data_dir)
    return root if (root / "train").is_dir() else root / "imagenet"


def imagenet_size(params: Params) -> tuple[int | None, tuple[int, int, int]]:
    """How many classes there are, None where the folders are not there, and (C, H, W)."""
    side = params.image_size or 224
    try:
        entries = os.scandir(imagenet_dir(params.data_dir) / "train")
    except OSError:
        return None, (3, side, side)
    return len([entry for entry in entries if entry.is_dir()]), (3, side, side)


def size_of(params: Params) -> tuple[int | None, tuple[int, int, int]]:
    """The number of classes of a configuration's data set, and (C, H, W) of its images.

    None, a network's usual number, where the data are not there to count. What was registered
    without its size is loaded to see, once a process.
    """
    size = registry.dataset(params.dataset).size
    if size is None:
        places = {name: getattr(params, name) for name in ("data_dir", "data_url", "image_size")}
        return _seen(Params(dataset=params.dataset, **places))
    return size if isinstance(size, tuple) else registry.load(size, "dataset")(params)


@functools.lru_cache(maxsize=8)
def _seen(params: Params) -> tuple[int, tuple[int, int, int]]:
    data = _loaded(params)
    if isinstance(data.train, Folders):
        return len(data.classes), (3, data.train.size, data.train.size)
    _, channels, height, width = data.train.images.shape
    return len(data.classes), (channels, height, width)


def example_of(params: Params) -> torch.Tensor:
    """One image of zeros (1, C, H, W), as the networks of a configuration take them."""
    return torch.zeros(1, *size_of(params)[1])


def data_root(data_dir: str = "") -> Path:
    """Where data sets are: data_dir, else $EXPLIB_DATA, else data/ (see `files.project`)."""
    return resolve(data_dir or os.environ.get("EXPLIB_DATA") or "data")


def _digest(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def normalize(images: torch.Tensor, data: Data) -> torch.Tensor:
    """uint8 (N, C, H, W) to float32 with the data set's mean and std, channels last."""
    mean, std = _constants(data.mean, data.std, images.device)
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)


@functools.cache  # a copy to a GPU in every step would stop it, and a CUDA graph allows none
def _constants(mean: tuple, std: tuple, device: torch.device) -> list[torch.Tensor]:
    """Mean and std in units of a pixel's 0 to 255, (1, C, 1, 1) or (1, 1, 1, 1)."""
    return [torch.tensor(v, device=device).view(1, -1, 1, 1) * 255 for v in (mean, std)]


def epoch_plan(data: Data, batch_size: int, seed: int, epoch: int) -> torch.Tensor:
    """An epoch's order and augmentation, from (seed, epoch) alone: int64 (batches, 4, batch_size).

    For each image of a batch: its index, the crop's row and column, and whether it is mirrored; of
    an image on disk its index and the seed of its crop. So an epoch is the same on every device,
    and whether or not the run was interrupted before it. A short last batch is left out (its
    gradient would be noisier), unless it is the only one.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    count, batches = len(data.train), batches_per_epoch(data, batch_size)
    order = torch.randperm(count, generator=generator)
    crops = torch.randint(0, data.train.choices, (2, count), generator=generator)
    mirrored = torch.randint(0, 2 if data.flip else 1, (count,), generator=generator)
    plan = torch.stack([order, *crops, mirrored])[:, : batches * batch_size]
    plan = plan.view(4, batches, -1).transpose(0, 1).contiguous()
    return plan.to(data.train.labels.device)


def train_batch(data: Data, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The augmented, normalized images and the labels of one batch of `data.train.inputs`."""
    images, labels = data.train.augmented(*inputs)
    return normalize(images, data), labels


def batches_per_epoch(data: Data, batch_size: int) -> int:
    """How many batches an epoch has."""
    return max(len(data.train) // batch_size, 1)


def eval_batches(
    split: Split | Folders, data: Data, batch_size: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """All images of a split in order, normalized, not augmented; by default 500 at a time.

    A GPU that has them in memory gets more where they are small: it waits for each call.
    """
    if not batch_size:
        batch_size = 500
        if isinstance(split, Split) and split.images.is_cuda:
            batch_size = max(500, 2_500_000 // split.images[0, 0].numel())
    for images, labels in split.in_order(batch_size, data.workers):
        yield normalize(images, data), labels
