"""A training step with weights split by FSDP2 against the plain one: as one process, or by torchrun as several.

torchrun --nproc-per-node 2 -m tests.support.sharded_step triton 1
"""

import os
import sys
from collections.abc import Callable
from typing import Any

from tests import conftest  # noqa: F401  # sets up the interpreter  # isort: skip
import torch
import torch.distributed as dist

from segmenter.layers import Block
from segmenter.model import Segmenter, create_segmenter
from segmenter.training.distributed import shard
from segmenter.training.losses import SegmentationLoss
from tests.support.tiny import tiny_model

BATCH, SIZE = 2, 32


def make(impl: str, level: int, **changes: Any) -> Segmenter:
    """A tiny model without dropout, the same each time. changes: of its configuration."""
    base = tiny_model(**changes)
    model = create_segmenter(base.config, impl)
    model.load_state_dict(base.state_dict())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train().recompute(level)


def data(n_cls: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)
    return images, torch.randint(0, n_cls, (BATCH, SIZE, SIZE), generator=generator)


def mean_loss_of(model: Segmenter, impl: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(images, labels) -> the loss, which is made before: torch.compile would have to trace that too."""
    loss = SegmentationLoss(255, patch_size=model.patch_size, impl=impl)
    return lambda images, labels: loss(model.masks(images), labels, float(labels.numel()))


def distance(ours: Segmenter, plain: Segmenter) -> float:
    """How far gradients are apart, the largest of all parameters, relative to its norm."""
    worst = 0.0
    for (name, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            gradient = q.grad.full_tensor() if hasattr(q.grad, "full_tensor") else q.grad
            worst = max(worst, ((gradient - p.grad).norm() / (p.grad.norm() + 1e-6)).item())
    return worst


def sharded_distance(impl: str, level: int, **changes: Any) -> float:
    """Of the gradients of a step by the processes of the default group from those of the plain step."""
    plain, ours = make(impl, level, **changes), make(impl, level, **changes)
    images, labels = data(plain.n_cls)
    mean_loss_of(plain, impl)(images, labels).backward()
    shard(ours, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))
    weights = next(m for m in ours.modules() if isinstance(m, Block)).mlp.fc1.weight
    assert type(weights).__name__ == "DTensor" and weights.to_local().numel() * dist.get_world_size() == weights.numel()
    mine = [t.chunk(dist.get_world_size())[dist.get_rank()] for t in (images, labels)]
    mean_loss_of(ours, impl)(*mine).backward()
    return distance(ours, plain)


def main(impl: str, level: str) -> None:
    dist.init_process_group("gloo")
    print(f"distance {sharded_distance(impl, int(level)):.3e} of {os.environ['RANK']}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
