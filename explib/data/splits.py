"""Images to learn from or to evaluate on: in memory, or in class folders on disk.

Both kinds give batches in the same way. A plan, made from a seed, says for each image of a batch
which one it is and how it is augmented; `inputs` turns plans into what `augmented` takes, and that
is the part which reads files.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from explib.errors import DataError, extra

PAD = 4
"""Pixels of black around an image in memory before it is cropped."""


@dataclass(frozen=True)
class Split:
    """Images in memory or on a GPU, uint8 (N, C, H, W), and their labels, int64 (N,)."""

    images: torch.Tensor
    labels: torch.Tensor
    choices = 2 * PAD + 1  # of each of the two numbers that place a crop

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, which: slice | torch.Tensor) -> "Split":
        """The images of some indices."""
        return Split(self.images[which], self.labels[which])

    def first(self, count: int) -> "Split":
        """The first `count` images; 0 is all."""
        return self.take(slice(count)) if count else self

    def to(self, device: str) -> "Split":
        """The same on a device."""
        return Split(self.images.to(device), self.labels.to(device))

    def inputs(self, plans: torch.Tensor, workers: int = 0) -> Iterable[tuple]:
        """What `augmented` takes, for each plan of (batches, 4, N): the plan itself."""
        return ((plan,) for plan in plans)

    def augmented(self, plan: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 images (N, 3, H, W), padded, cropped and mirrored, and labels, of a plan (4, N)."""
        chosen, rows, columns, mirrored = plan
        return augment(self.images[chosen], rows, columns, mirrored.bool()), self.labels[chosen]

    def in_order(self, batch_size: int, workers: int = 0) -> Iterator[tuple]:
        """All images in order, not augmented: batches of (images, labels)."""
        for start in range(0, len(self), batch_size):
            part = slice(start, start + batch_size)
            yield self.images[part], self.labels[part]


def augment(
    images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, mirrored: torch.Tensor, pad=PAD
) -> torch.Tensor:
    """Each image zero-padded, cropped to its size at its own place, mirrored where it says so.

    images: uint8 (N, 3, H, W), also the result; rows, columns: int64 (N,), 0 to 2 * pad; mirrored:
    bool (N,). The padding is black, as in torchvision's RandomCrop.
    """
    count, _, height, width = images.shape
    device = images.device
    rows = rows[:, None] + torch.arange(height, device=device)
    columns = columns[:, None] + torch.arange(width, device=device)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = F.pad(images, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    which = torch.arange(count, device=device)[:, None, None]
    return padded[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Folders:
    """JPEG or PNG files, their labels, int64 (N,), and the size of the square they are brought to.

    Decoded by worker processes with torchvision's transforms: for training RandomResizedCrop and
    RandomHorizontalFlip, for evaluation Resize (256 / 224 of the size) and CenterCrop. What an
    image becomes depends on its plan alone, not on the worker or the order.
    """

    files: list[str]
    labels: torch.Tensor
    size: int
    choices = 2**31 - 1  # seeds of an image's crop and mirroring

    def __len__(self) -> int:
        return len(self.files)

    def take(self, which: slice | torch.Tensor) -> "Folders":
        """The images of some indices."""
        indices = range(len(self))[which] if isinstance(which, slice) else which.tolist()
        return Folders([self.files[i] for i in indices], self.labels[which], self.size)

    def first(self, count: int) -> "Folders":
        """The first `count` images; 0 is all."""
        return self.take(slice(count)) if count else self

    def to(self, device: str) -> "Folders":
        """The same, whose batches come on a device."""
        return Folders(self.files, self.labels.to(device), self.size)

    def inputs(self, plans: torch.Tensor, workers: int = 0) -> Iterator[tuple]:
        """For each plan of (batches, 4, N), its augmented uint8 images (N, 3, S, S) and labels."""
        batches = [list(zip(*plan[:2].tolist(), strict=True)) for plan in plans.cpu()]
        for images, (chosen, *_) in zip(self._decoded(batches, workers), plans, strict=True):
            yield images, self.labels[chosen.to(self.labels.device)]

    def augmented(self, images, labels) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch of `inputs`, which is augmented already."""
        return images, labels

    def in_order(self, batch_size: int, workers: int = 0) -> Iterator[tuple]:
        """All images in order, not augmented: batches of (images, labels)."""
        starts = range(0, len(self), batch_size)
        batches = [
            [(i, None) for i in range(len(self))[start : start + batch_size]] for start in starts
        ]
        for start, images in zip(starts, self._decoded(batches, workers), strict=True):
            yield images, self.labels[start : start + batch_size]

    def _decoded(self, batches: list[list[tuple]], workers: int) -> Iterator[torch.Tensor]:
        """uint8 (N, 3, S, S) on the device for each batch of (index, seed or None)."""
        workers = min(workers or os.cpu_count() or 1, len(batches))
        on_gpu = self.labels.is_cuda
        loader = DataLoader(
            _Files(self.files, self.size),
            batch_sampler=batches,
            num_workers=workers if workers > 1 else 0,  # one would only add the way between two
            pin_memory=on_gpu,
            prefetch_factor=4 if workers > 1 else None,
            generator=torch.Generator(),  # the global one stays as it is
        )
        try:
            for images in loader:
                yield images.to(self.labels.device, non_blocking=True)
        except DataError as error:  # a worker's error comes with the worker's traceback
            raise DataError(str(error).strip().splitlines()[-1].split("DataError: ")[-1]) from None


class _Files(Dataset):
    """One decoded image for (index, seed): augmented by that seed, or as for evaluation if None."""

    def __init__(self, files: list[str], size: int):
        with extra():
            from torchvision.transforms import v2  # brings the compiler of torch: seconds
        self.files = files
        cropped = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
        whole = [v2.Resize(size * 256 // 224, antialias=True), v2.CenterCrop(size)]
        self.train = v2.Compose([*cropped, v2.PILToTensor()])
        self.eval = v2.Compose([*whole, v2.PILToTensor()])

    def __getitem__(self, item: tuple[int, int | None]) -> torch.Tensor:
        from PIL import Image

        index, seed = item
        path = self.files[index]
        try:
            image = eight_bits(Image.open(path)).convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            why = " ".join(str(error).split())[:100]
            raise DataError(f"{path}: no readable image ({why}); restore it or remove it") from None
        if seed is None:
            return self.eval(image)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.train(image)


def eight_bits(image):
    """A grey image of 16 bits as one of 8, its upper ones, as PIL takes them of colour images."""
    if image.mode.startswith("I"):
        from PIL import Image

        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image


SUFFIXES = (".jpeg", ".jpg", ".png")


def find(folder: Path, size: int, classes: list[str] | None = None) -> tuple[Folders, list[str]]:
    """The images below folder/CLASS/ and the names of the classes, in the order of their labels.

    classes: those there have to be, no more and no fewer. The images come in a fixed random order,
    so that the first ones are of all classes. DataError for a class without images, or of another
    set of classes.
    """
    try:
        found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be read ({error.strerror}); give a data_dir with train/CLASS/*.JPEG "
            "and val/CLASS/*.JPEG in it"
        ) from None
    if not found:
        raise DataError(f"{folder}: has no class folders; put its images in one folder per class")
    if classes is not None and found != classes:
        odd = sorted(set(found) ^ set(classes))[0]
        raise DataError(
            f"{folder}: class {odd!r} is in only one of train and val; both need the same classes"
        )
    files, labels = [], []
    for label, name in enumerate(found):
        own = sorted(
            entry.path
            for entry in os.scandir(folder / name)
            if entry.name.lower().endswith(SUFFIXES) and entry.is_file()
        )
        if not own:
            raise DataError(
                f"{folder / name}: has no .jpeg, .jpg or .png images; remove or fill it"
            )
        files += own
        labels += [label] * len(own)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(2023)).tolist()
    shuffled = Folders([files[i] for i in order], torch.tensor(labels)[order], size)
    return shuffled, found
