"""The dense network's soft labels, computed once for all runs that show the same images.

An epoch's order and augmentation come from the seed alone. So whatever is pruned from one dense
network learns, with the same seed, from the same soft labels: the first run keeps them.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch

from explib.data import Data, epoch_plan, train_batch
from explib.files import load_tensors, resolve, save_tensors
from explib.params import Params
from explib.registry import file_name

CHUNK = {"cpu": 1024, "cuda": 2048}
"""Images, about, that the dense network is asked about at once: a GPU waits for each call."""


def folder(params: Params, data: Data, checkpoint_sha256: str) -> Path:
    """Where the soft labels of a dense network are kept; other images have another folder."""
    origin = [checkpoint_sha256, data.summary(), params.seed, params.batch_size]
    digest = hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:12]
    name = f"soft-labels-{params.arch}-s{params.seed}-{digest}"
    return resolve(params.results_dir) / "runs" / file_name(params.dataset) / name


@torch.no_grad()
def of_epoch(
    teacher: Callable, data: Data, params: Params, epoch: int, keep: Path | None = None
) -> torch.Tensor:
    """The teacher's logits of an epoch's images, in its order: float32 (batches, batch, classes).

    data: in memory. keep: the folder that they are kept in. What lies there is believed only if the
    teacher, asked anew about the first chunk of images, says exactly the same.
    """
    plans = epoch_plan(data, params.batch_size, params.seed, epoch)
    chunks = plans.split(max(1, CHUNK[plans.device.type] // plans.shape[2]))

    def logits(chunk: torch.Tensor) -> torch.Tensor:
        images, _ = train_batch(data, chunk.transpose(0, 1).flatten(1))
        return teacher(images).view(len(chunk), chunk.shape[2], -1)

    first = logits(chunks[0])
    path = keep and keep / f"epoch-{epoch + 1:03}.safetensors"
    if path and path.is_file():
        try:
            kept = load_tensors(path)[0]["logits"].to(first.device)
            if len(kept) == len(plans) and torch.equal(kept[: len(first)], first):
                return kept
        except (ValueError, KeyError):  # damaged: made anew
            pass
    found = torch.cat([first, *map(logits, chunks[1:])])
    if path:
        save_tensors(path, {"logits": found}, {})
    return found
