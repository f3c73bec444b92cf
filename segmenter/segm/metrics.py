"""Scores, gathered over processes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

import segmenter.segm.utils.torch as ptu
from segmenter.evaluation.metrics import mean_iou, percent
from segmenter.segm.utils.logger import is_dist_avail_and_initialized


@torch.no_grad()
def accuracy(output: torch.Tensor, target: torch.Tensor, topk: Sequence[int] = (1,)) -> list[torch.Tensor]:
    """The share, 0..1, of rows of logits `output` (B, K) with the class `target` (B,) among the best k, for each k."""
    right = output.topk(max(topk), dim=1).indices == target.view(-1, 1)
    return [right[:, :k].any(dim=1).float().mean(dim=0, keepdim=True) for k in topk]


def gather_data(seg_pred: dict[str, Any], tmp_dir: str | None = None) -> dict[str, Any]:
    """The entries of all processes on process 0, and none on the others. `tmp_dir`: nothing is written, so unused."""
    if not is_dist_avail_and_initialized() or dist.get_world_size() == 1:
        return seg_pred
    parts = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(seg_pred, parts)
    return {name: labels for part in parts or () for name, labels in part.items()}


def compute_metrics(
    seg_pred: Mapping[str, Any],
    seg_gt: Mapping[str, Any],
    n_cls: int,
    ignore_index: int | None = None,
    ret_cat_iou: bool = False,
    tmp_dir: str | None = None,
    distributed: bool = False,
) -> dict[str, Any]:
    """pixel_accuracy, mean_accuracy and mean_iou: percentages with two decimals, as float64 tensors.

    Args:
        seg_pred, seg_gt: label maps (H, W) of integers by file name; every prediction needs its labels.
        ignore_index: label of pixels that do not count. ret_cat_iou: also "cat_iou", (n_cls,) fractions, on process 0.
        distributed: process 0, which computes, sends the scores to the others. tmp_dir: unused.
    """
    means, cat_iou = torch.zeros(3, dtype=torch.float64, device=ptu.device), None
    if ptu.dist_rank == 0:
        names = sorted(seg_pred)
        scores = mean_iou([seg_pred[n] for n in names], [seg_gt[n] for n in names], n_cls, ignore_index)
        cat_iou, rounded = scores["IoU"], percent(scores)
        means = torch.tensor([rounded[n] for n in ("aAcc", "mAcc", "mIoU")], dtype=torch.float64, device=ptu.device)
    if distributed:
        dist.broadcast(means, 0)
    result = dict(zip(("pixel_accuracy", "mean_accuracy", "mean_iou"), means, strict=True))
    if ret_cat_iou and cat_iou is not None:
        result["cat_iou"] = cat_iou
    return result
