"""The device and the process of a script, set by `set_gpu_mode`. Usually imported as `ptu`."""

import warnings

import torch

use_gpu = False
gpu_id = 0
device: torch.device | None = None

distributed = False
dist_rank = 0
world_size = 1


def set_gpu_mode(mode: bool) -> None:
    """Sets this module's variables: the GPU if `mode`, else the CPU; and which process of how many torchrun made this.

    Without a CUDA device, `mode` warns and takes the CPU. On a GPU cuDNN is let choose its algorithms by timing them.
    """
    global use_gpu, gpu_id, device, distributed, dist_rank, world_size
    from segmenter.cli.shards import Shard

    shard = Shard.of_this_process()
    gpu_id, dist_rank, world_size = shard.local_rank, shard.rank, shard.world
    distributed = world_size > 1
    use_gpu = bool(mode) and torch.cuda.is_available()
    if mode and not use_gpu:
        warnings.warn("set_gpu_mode(True): there is no CUDA device, so the CPU is used", stacklevel=2)
    device = torch.device(f"cuda:{gpu_id}" if use_gpu else "cpu")
    torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark or use_gpu
