"""One epoch of training, and an evaluation, of loaders that give batches as the published ones do.

`segmenter train` is this project's own training: it resumes bit for bit and needs no loader from elsewhere.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

import segmenter.segm.utils.torch as ptu
from segmenter.segm.data.utils import IGNORE_LABEL
from segmenter.segm.eval.miou import process_batch
from segmenter.segm.metrics import compute_metrics, gather_data
from segmenter.segm.utils.logger import MetricLogger


def train_one_epoch(
    model: torch.nn.Module,
    data_loader: Any,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: Any,
    epoch: int,
    amp_autocast: Callable = contextlib.nullcontext,
    loss_scaler: Callable | None = None,
) -> MetricLogger:
    """Steps through all batches {"im": (B, 3, H, W) normalised, "segmentation": (B, H, W) labels}.

    Args:
        data_loader: has a length; `set_epoch(epoch)` is called if there is one. lr_scheduler: has
            `step_update(num_updates=...)`. amp_autocast: makes a context for the forward pass.
        loss_scaler: called with (loss, optimizer, parameters=...) in place of backward and step.
    Returns:
        meters of loss and learning_rate.
    """
    criterion = torch.nn.CrossEntropyLoss(ignore_index=IGNORE_LABEL)
    logger = MetricLogger(delimiter="  ")
    model.train()
    if hasattr(data_loader, "set_epoch"):
        data_loader.set_epoch(epoch)
    batches = logger.log_every(data_loader, 100, f"Epoch: [{epoch}]")
    for num_updates, batch in enumerate(batches, epoch * len(data_loader) + 1):
        im, labels = batch["im"].to(ptu.device), batch["segmentation"].long().to(ptu.device)
        with amp_autocast():
            loss = criterion(model(im), labels)
        value = loss.item()
        if not math.isfinite(value):
            warnings.warn(f"the loss is {value} in epoch {epoch}; training goes on, as published", stacklevel=2)
        optimizer.zero_grad()
        if loss_scaler is None:
            loss.backward()
            optimizer.step()
        else:
            loss_scaler(loss, optimizer, parameters=model.parameters())
        lr_scheduler.step_update(num_updates=num_updates)
        logger.update(loss=value, learning_rate=optimizer.param_groups[0]["lr"])
    return logger


def evaluate(
    model: torch.nn.Module,
    data_loader: Any,
    val_seg_gt: Mapping[str, Any],
    window_size: int,
    window_stride: int,
    amp_autocast: Callable = contextlib.nullcontext,
) -> MetricLogger:
    """Meters of pixel_accuracy, mean_accuracy and mean_iou, in percent, over batches as of `process_batch`.

    Args:
        data_loader: has a length and `unwrapped.n_cls`. val_seg_gt: labels (H, W) by file name.
    """
    logger, predictions = MetricLogger(delimiter="  "), {}
    model.eval()
    for batch in logger.log_every(data_loader, 50, "Eval:"):
        with amp_autocast():
            name, _, labels = process_batch(model, batch, window_size, window_stride, 1)
        predictions[name] = labels.numpy()
    scores = compute_metrics(
        gather_data(predictions),
        val_seg_gt,
        data_loader.unwrapped.n_cls,
        ignore_index=IGNORE_LABEL,
        distributed=ptu.distributed,
    )
    logger.update(**scores)
    return logger
