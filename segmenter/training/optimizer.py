"""Which parameters learn how fast, and the average of their values."""

import re

import torch
import torch.nn as nn

from segmenter.model import Segmenter
from segmenter.training.recipe import Recipe, RecipeError
from segmenter.training.schedule import PolynomialLR

_BLOCK = re.compile(r"encoder\.blocks\.(\d+)\.")


def parameter_groups(model: Segmenter, recipe: Recipe) -> list[dict]:
    """The trained parameters by learning rate and weight decay, in an order that depends on the model alone.

    The decoder has the recipe's rate, the encoder's last norm and last block `backbone_rate` times that, each block
    before it `layer_decay` times that of the next, and the patch embedding, positions and class token that of a block
    before the first (layer-wise decay: ELECTRA, BEiT).
    Biases, norms and what `model.no_weight_decay()` names are not decayed.
    """
    n_layers, not_decayed = len(model.encoder.blocks), model.no_weight_decay()
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = recipe.learning_rate
        if name.startswith("encoder."):
            match = _BLOCK.match(name)
            block = int(match[1]) if match else n_layers - 1 if name.startswith("encoder.norm.") else -1
            rate *= recipe.backbone_rate * recipe.layer_decay ** (n_layers - 1 - block)
        decay = 0.0 if parameter.ndim < 2 or name in not_decayed else recipe.weight_decay
        groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})["params"].append(parameter)
    return list(groups.values())


def make_optimizer(model: Segmenter, recipe: Recipe, total_steps: int) -> tuple[torch.optim.Optimizer, PolynomialLR]:
    """The optimiser and its schedule, one step of which belongs to every step of training.

    Raises:
        RecipeError: min_lr is above a learning rate, which would then rise; a warm-up as long as the run; or nothing
            is left to train.
    """
    groups = parameter_groups(model, recipe)
    if not groups:
        raise RecipeError("nothing is left to train")
    smallest = min(group["lr"] for group in groups)
    if recipe.min_lr > smallest:
        raise RecipeError(
            f"min_lr {recipe.min_lr:g} is above the smallest learning rate, {smallest:.2g}: lower it "
            "(0 with layer_decay), or raise learning_rate"
        )
    warmup = recipe.warmup_steps
    if warmup >= total_steps:
        raise RecipeError(f"warmup_steps {warmup} must be fewer than the {total_steps} steps of the run")
    if recipe.optimizer == "sgd":
        nesterov = recipe.momentum > 0  # torch refuses it without momentum, where it means nothing
        optimizer = torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum, nesterov=nesterov)
    else:
        optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate)
    schedule = PolynomialLR(optimizer, 1, warmup, total_steps, recipe.power, recipe.min_lr)
    if warmup:  # the schedule leaves the very first step at the full rate; it gets that of the second
        for group, lr in zip(optimizer.param_groups, schedule.base_lrs, strict=True):
            factor = (1 - warmup / total_steps) ** recipe.power / warmup
            group["lr"] = (lr - recipe.min_lr) * factor + recipe.min_lr
    return optimizer, schedule


def averaged(model: nn.Module, decay: float) -> torch.optim.swa_utils.AveragedModel:
    """An exponential moving average of the weights; step t has the decay min(decay, (1 + t) / (10 + t)).

    Update it after every step with `update_parameters(model)`; `.module` is the model.
    """

    def update(means: list[torch.Tensor], values: list[torch.Tensor], updates: torch.Tensor | int) -> None:
        t = int(updates)
        torch._foreach_lerp_(means, values, 1 - min(decay, (1 + t) / (10 + t)))

    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.no_grad()(update))


def gradient_norm(parameters: list[nn.Parameter], clip: float | None) -> torch.Tensor:
    """The norm of all gradients together, a number, before they are scaled down to at most `clip`."""
    if clip is None:
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return nn.utils.clip_grad_norm_(parameters, clip)
