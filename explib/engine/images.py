"""Images of files as a network takes them, and what a classifier makes of them."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from explib.data import MEAN_STD
from explib.data.splits import eight_bits
from explib.errors import DataError, extra

CLASSES = {
    "cifar10": (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
    "digits": tuple("0123456789"),
}
"""Of the study's data sets, whose compact files have numbers."""
MODES = {1: "L", 3: "RGB"}


class Reading(NamedTuple):
    """How an image is read: brought to `resize` pixels on its shorter side, and cut to `shape`.

    resize: 0 for as little as covers the shape (C, H, W). mean, std: of values in 0 to 1, of each
    channel or one for all.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int
    classes: tuple[str, ...]


def reading(about: dict, shape: tuple[int, ...]) -> Reading:
    """How what a file says of itself wants images read. ValueError, in one line, if it cannot be.

    shape: (C, H, W) of the network's input.
    """
    if not shape:
        raise ValueError("it takes several inputs, or none that is a tensor; give one of images")
    if len(shape) != 3 or shape[0] not in MODES:
        raise ValueError(f"it takes inputs {shape}; images are (1, H, W) or (3, H, W)")
    mean, std, resize, classes = _told(about, shape)
    for name, values in (("mean", mean), ("std", std)):
        sound = isinstance(values, (list, tuple)) and len(values) in (1, shape[0])
        if not sound or not all(type(n) in (int, float) and isfinite(n) for n in values):
            raise ValueError(f"{name}: {values!r:.80}; give a number, or one for each channel")
    if min(std) <= 0:
        raise ValueError(f"std: {std}; give numbers above 0")
    if type(resize) is not int or (resize and not max(shape[1:]) <= resize <= 2**14):
        raise ValueError(f"resize: {resize!r:.80}; give 0, or {max(shape[1:])} or more pixels")
    if not isinstance(classes, (list, tuple)) or not all(isinstance(n, str) for n in classes):
        raise ValueError(f"classes: {classes!r:.80}; give their names")
    return Reading((shape[0], shape[1], shape[2]), tuple(mean), tuple(std), resize, tuple(classes))


def _told(about: dict, shape: tuple[int, ...]) -> tuple[Any, Any, Any, Any]:
    """Mean, std, resize and classes as a file has them; a compact one by its data set."""
    if "images" in about:
        images = about["images"] if isinstance(about["images"], dict) else {}
        return images.get("mean"), images.get("std"), images.get("resize"), about.get("classes")
    dataset = str(about.get("dataset"))
    known = MEAN_STD.get(about.get("normalization") or dataset)
    if known is None:
        raise ValueError(
            "it does not say mean and std of its images; write it with explib.engine.save"
        )
    return *known, shape[1] * 256 // 224 if dataset == "imagenet" else 0, CLASSES.get(dataset, ())


def found(paths: Iterable[str | Path]) -> list[Path]:
    """Files as they are given, and of folders every image in and below them, by name.

    An image is what has an ending that PIL knows. FileNotFoundError where there is none.
    """
    with extra():
        from PIL import Image
    Image.init()
    files = []
    for path in map(Path, paths):
        inside = [path]
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in Image.EXTENSION)
            inside = [p for p in inside if p.is_file()]
        if not inside or not inside[0].exists():
            raise FileNotFoundError(f"{path}: {'no images in it' if path.is_dir() else 'no file'}")
        files += inside
    return files


def read(path: Path, how: Reading) -> torch.Tensor:
    """An image as uint8 (C, H, W), not normalized. DataError, in one line, for what is none."""
    with extra():
        from PIL import Image

    channels, height, width = how.shape
    try:
        with Image.open(path) as opened:
            image = eight_bits(opened).convert(MODES[channels])
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path}: no readable image ({' '.join(str(error).split())[:100]})"
        ) from None
    across, down = image.size
    if how.resize:
        share = how.resize, min(across, down)
    else:
        share = (width, across) if width * down >= height * across else (height, down)
    # as torchvision does it: what is left of a pixel goes
    size = across * share[0] // share[1], down * share[0] // share[1]
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    image = image.crop((left, top, left + width, top + height))
    pixels = np.array(image, np.uint8).reshape(height, width, channels)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def classify(
    network: Callable[[torch.Tensor], Any],
    how: Reading,
    files: Sequence[Path],
    batch_size: int = 64,
    top: int = 1,
) -> Iterator[dict]:
    """What a classifier makes of each file, in order, the best `top` classes first.

    Rows of `file`, `classes`, each a `class` (its name, or its number where it has none) and a
    `score` (by softmax), and the image's share of the time that its batch took, `reading_s` and
    `network_s`; of what is no readable image `file` and `error`, a line, before those of its batch.
    ValueError where the results are no scores.
    """
    mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (how.mean, how.std))
    for first in range(0, len(files), batch_size):
        group, pixels, unreadable = [], [], []
        start = time.perf_counter()
        for path in files[first : first + batch_size]:
            try:
                pixels.append(read(path, how))
                group.append(path)
            except DataError as error:
                unreadable.append({"file": str(path), "error": str(error)})
        if not group:
            yield from unreadable
            continue
        images = (torch.stack(pixels) / 255 - mean) / std
        ready = time.perf_counter()
        scores = network(images)
        done = time.perf_counter()
        yield from unreadable
        share = {
            "reading_s": (ready - start) / len(group),
            "network_s": (done - ready) / len(group),
        }
        if not isinstance(scores, torch.Tensor) or scores.ndim != 2 or scores.shape[1] < 2:
            raise ValueError("its results are no scores (N, classes), from which to name a class")
        names = dict(enumerate(how.classes))
        best = scores.softmax(1).topk(min(top, scores.shape[1]), 1)
        for path, shares, classes in zip(group, *map(torch.Tensor.tolist, best), strict=True):
            rows = zip(classes, shares, strict=True)
            told = [{"class": names.get(i, str(i)), "score": round(p, 6)} for i, p in rows]
            yield {"file": str(path), "classes": told, **share}
