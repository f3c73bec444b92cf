"""Processes that torchrun started, or one on its own."""

import builtins
from typing import Any

import torch
import torch.distributed as dist

import segmenter.segm.utils.torch as ptu


def init_process(backend: str = "nccl") -> None:
    """Connects the processes as torchrun's environment says, and lets only the first of them print.

    `backend` is for GPUs; on the CPU it is gloo. A process on its own is connected to itself.
    """
    if ptu.use_gpu:
        torch.cuda.set_device(ptu.device)
    alone = {} if ptu.world_size > 1 else {"store": dist.HashStore()}
    dist.init_process_group(backend if ptu.use_gpu else "gloo", rank=ptu.dist_rank, world_size=ptu.world_size, **alone)
    dist.barrier()
    silence_print(ptu.dist_rank == 0)


def silence_print(is_master: bool) -> None:
    """Replaces the built-in `print` for good: prints in the master, elsewhere only `print(..., force=True)`."""
    original = builtins.print

    def print_in_master(*args: Any, force: bool = False, **kwargs: Any) -> None:
        if is_master or force:
            original(*args, **kwargs)

    builtins.print = print_in_master


def sync_model(sync_dir: Any, model: torch.nn.Module) -> torch.nn.Module:
    """Gives all processes the parameters and buffers of the first. `sync_dir`: nothing is written, so unused."""
    if ptu.world_size > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
    return model


def barrier() -> None:
    """Returns once all processes have come here."""
    dist.barrier()


def destroy_process() -> None:
    """Ends the connection."""
    dist.destroy_process_group()
