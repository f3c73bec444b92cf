"""The processes of a training run. One process needs nothing of this; several are started by torchrun."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from segmenter.layers import Block

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


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """Splits a model among the processes of a group by FSDP2, a block at a time. Returns the model, changed in place.

    Each process keeps its share of weights, gradients and momenta, and has those of one block whole while it computes.
    Gradients are the mean over the processes, as `Group.parallel`'s. Kernels run as ever: within a block's forward pass
    its weights are ordinary tensors. Call the model or its `masks`, in all processes: encoder and decoder alone have no
    whole weights. To save, every process takes `torch.distributed.checkpoint.state_dict.get_model_state_dict` with
    StateDictOptions(full_state_dict=True, cpu_offload=True); the first loads it into `create_segmenter(model.config)`.

    Args:
        model: a `Segmenter`; wherever its blocks are `segmenter.layers.Block`, each is a group of its own.
        options: of `torch.distributed.fsdp.fully_shard`, such as mesh and mp_policy.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, **options)
    fully_shard(model, **options)
    register_fsdp_forward_method(model, "masks")
    return model
