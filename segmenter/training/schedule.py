"""The learning-rate schedule of the published training."""

import math

import torch


class PolynomialLR(torch.optim.lr_scheduler.LRScheduler):
    """(lr0 - min_lr) * (1 - t / iter_max) ** power + min_lr after t updates, with a linear warm-up.

    During warm-up the factor is t / iter_warmup * (1 - iter_warmup / iter_max) ** power. The rate changes only at
    multiples of `step_size`, never at t = 0, and stays where it is once t exceeds `iter_max`. Call `step` after every
    update. torch's own PolynomialLR has neither the floor nor the warm-up.

    Args:
        optimizer: its parameter groups give lr0. step_size, iter_warmup, iter_max: in updates; as published, the last
            two are truncated to integers.
        power: exponent, 0.9 in the paper. min_lr: the floor, 1e-5 in the paper. last_epoch: t - 1 to resume after.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        step_size: int,
        iter_warmup: float,
        iter_max: float,
        power: float,
        min_lr: float = 0.0,
        last_epoch: int = -1,
    ):
        if not (step_size >= 1 and 0 <= iter_warmup <= iter_max and 1 <= iter_max < math.inf):
            raise ValueError(
                "need step_size >= 1 and 0 <= iter_warmup <= iter_max, of at least one update, "
                f"got {step_size}, {iter_warmup}, {iter_max}"
            )
        self.step_size = step_size
        self.iter_warmup = int(iter_warmup)
        self.iter_max = int(iter_max)
        self.power = power
        self.min_lr = min_lr
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        t = self.last_epoch
        if t == 0 or t % self.step_size or t > self.iter_max:
            return [group["lr"] for group in self.optimizer.param_groups]
        return [self.polynomial_decay(lr0) for lr0 in self.base_lrs]

    def polynomial_decay(self, lr: float) -> float:
        """The rate at the moment for the initial rate `lr`, whatever `step_size` is."""
        t = self.last_epoch
        if t < self.iter_warmup:
            factor = t / self.iter_warmup * (1 - self.iter_warmup / self.iter_max) ** self.power
        else:
            factor = (1 - t / self.iter_max) ** self.power
        return (lr - self.min_lr) * factor + self.min_lr

    def step_update(self, num_updates: int) -> None:
        """The name by which the published training loop calls `step`."""
        self.step()
