"""The processes of a training run. One process needs nothing of this; several are started by torchrun."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn

TIMEOUT = timedelta(minutes=30)  # of a process waiting for another, which may be saving or evaluating


@dataclass(frozen=True)
class Group:
    """This process among those that train together.

    Attributes:
        rank, world: this one and how many. device: where it computes.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.rank == 0

    def join(self) -> None:
        """Connects the processes, as the environment set by torchrun says: NCCL between GPUs, else gloo."""
        if self.world > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, rank=self.rank, world_size=self.world, timeout=TIMEOUT)

    def leave(self) -> None:
        if self.world > 1 and dist.is_initialized():
            # PyTorch 2.6 waits there for gloo's threads with the interpreter's lock held, and they may yet need it
            time.sleep(0.1)
            dist.destroy_process_group()

    def wait(self) -> None:
        """Returns once all processes have come here."""
        if self.world > 1:
            dist.barrier()

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each number summed over all processes."""
        if self.world == 1:
            return [float(value) for value in values]
        return self.sum_(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over all processes, in place and in its own type."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model such that its gradients are the mean over all processes."""
        if self.world == 1:
            return model
        return nn.parallel.DistributedDataParallel(model)

    def exchanging(self, model: nn.Module, exchange: bool) -> AbstractContextManager:
        """Within it, a backward pass through what `parallel` gave exchanges gradients, or adds to this process's."""
        return nullcontext() if self.world == 1 or exchange else model.no_sync()
