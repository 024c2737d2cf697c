"""One run on several GPUs or machines: what torchrun started together works on the same batches.

Each rank computes its share of every batch; gradients are averaged by DistributedDataParallel, so
that all ranks hold the same weights and masks. Rank 0 alone writes files. Without torchrun there is
one rank and nothing here does anything.
"""

import atexit
import os
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def start(device: str) -> None:
    """Join the processes that torchrun started (its environment variables say so); once.

    NCCL on GPUs, one GPU per process; gloo on CPUs.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, world = next(dist.rendezvous("env://"))
    # torchrun keeps its store when it restarts lost workers, and so the addresses of those
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    atexit.register(_stop)


def _stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process among those of the run; 0 writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes work on the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the ranks' tensors, on all of them, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def from_rank_0(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite tensors by those of rank 0; BatchNorm's statistics may differ between ranks."""
    if world() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def as_rank_0(answer: int, device: str) -> int:
    """What rank 0 answers, on all of them."""
    if world() == 1:
        return answer
    agreed = torch.tensor(answer, device=device)
    from_rank_0([agreed])
    return int(agreed)


def wait() -> None:
    """Until all ranks are here."""
    if world() > 1:
        dist.barrier()


class _Forward(nn.Module):
    """A function of images as a module with the model's parameters, for DistributedDataParallel."""

    def __init__(self, model: nn.Module, forward: Callable):
        super().__init__()
        self.model, self.function = model, forward

    def forward(self, images):
        return self.function(images)


def parallel(model: nn.Module, forward: Callable) -> Callable:
    """`forward` of the model, whose backward pass averages gradients over the ranks."""
    if world() == 1:
        return forward
    ids = [torch.cuda.current_device()] if next(model.parameters()).is_cuda else None
    return DistributedDataParallel(_Forward(model, forward), device_ids=ids)


def synchronize_norms(model: nn.Module) -> None:
    """BatchNorm over the whole batch of all GPUs; torch has it for GPUs only, on CPUs each rank
    normalizes by its own share."""
    if world() > 1 and next(model.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
