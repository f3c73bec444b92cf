"""Optimisers and schedules by name, those of timm (pip install timm) included."""

from typing import Any

import torch

from segmenter.training.schedule import PolynomialLR


def create_scheduler(opt_args: Any, optimizer: torch.optim.Optimizer) -> Any:
    """`opt_args.sched`: "polynomial" (poly_step_size, iter_warmup, iter_max, poly_power, min_lr), or one of timm's."""
    if opt_args.sched == "polynomial":
        sizes = (opt_args.poly_step_size, opt_args.iter_warmup, opt_args.iter_max)
        return PolynomialLR(optimizer, *sizes, opt_args.poly_power, opt_args.min_lr)
    from timm.scheduler import create_scheduler as of_timm

    return of_timm(opt_args, optimizer)[0]


def create_optimizer(opt_args: Any, model: torch.nn.Module) -> torch.optim.Optimizer:
    """`opt_args.opt` as timm names it ("sgd" has Nesterov momentum), with lr, weight_decay, momentum."""
    from timm.optim import create_optimizer as of_timm

    return of_timm(opt_args, model)
