"""More than one training process: what `train` needs of torch.distributed.

Started by `torchrun --nproc-per-node N script.py`, every process calls `train` with
the same arguments. Each reads its own rows of every batch and the gradients are
summed, so a run gives the same result with any number of processes. Without
torchrun every function here is the identity.
"""

import os
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Group(NamedTuple):
    """This process among those of the run."""

    rank: int = 0
    world_size: int = 1

    def sum_(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def gather(self, values: Tensor) -> Tensor:
        """The 1-D `values` of all processes, one after another by rank."""
        if self.world_size == 1:
            return values
        sizes = [
            torch.zeros(1, dtype=torch.int64, device=values.device)
            for _ in range(self.world_size)
        ]
        dist.all_gather(sizes, sizes[0].new_tensor([len(values)]))
        longest = max(int(n) for n in sizes)
        padded = values.new_zeros(longest)
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([p[: int(n)] for p, n in zip(parts, sizes, strict=True)])

    def broadcast_(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by that of rank 0."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()


def current_group(device: str = "cpu", timeout_s: int = 600) -> Group:
    """The group that torchrun made, joined on the first call."""
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    if not dist.is_initialized():
        return Group()
    return Group(dist.get_rank(), dist.get_world_size())
