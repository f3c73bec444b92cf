"""The training loss: cross-entropy of the upsampled masks, averaged over the labelled pixels of all processes.

It makes no logits of pixels (upsample_loss.py), unless Lovász-softmax is added, which is made of all probabilities.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from segmenter.data.datasets import DataError, Dataset
from segmenter.training.recipe import RecipeError
from segmenter.training.upsample_loss import upsample_cross_entropy


class SegmentationLoss:
    """The loss of a batch, so that the mean over processes of its gradients is that of one process with all pixels.

    Args:
        weight: (n_cls,) float32, what a pixel of each class counts; None: all the same, as published.
        lovasz: how much of the Lovász-softmax loss is added, of each process's own batch, or the mean of its parts (it
            has no such mean over pixels).
        patch_size: what masks are upsampled by; 1: they are the pixels' logits. impl: as of the model.
    """

    def __init__(
        self,
        ignore_index: int,
        weight: torch.Tensor | None = None,
        lovasz: float = 0.0,
        patch_size: int = 1,
        impl: str = "auto",
    ):
        self.ignore_index, self.weight, self.lovasz = ignore_index, weight, lovasz
        self.patch_size, self.impl = patch_size, impl
        self._lovasz = _lovasz(ignore_index) if lovasz else None

    def denominator(self, labels: torch.Tensor) -> torch.Tensor:
        """What cross-entropy divides by: the sum of the weights of the pixels that count."""
        valid = labels != self.ignore_index
        return valid.sum() if self.weight is None else self.weight[labels[valid]].sum()

    def __call__(
        self, masks: torch.Tensor, labels: torch.Tensor, denominator: torch.Tensor | float, part: float = 1.0
    ) -> torch.Tensor:
        """Loss in float32.

        Args:
            masks: (b, n_cls, h, w). labels: (b, H, W) int64, of h * patch_size rows at most, the padding cut off.
            denominator: of all processes together, over their number. part: which share of this process's batch it is.
        """
        denominator = max(float(denominator), 1e-12)
        if self._lovasz is None:
            options = (self.patch_size, self.weight, self.ignore_index)
            return upsample_cross_entropy(masks, labels, *options, impl=self.impl).loss / denominator
        size = [n * self.patch_size for n in masks.shape[2:]]
        logits = masks if self.patch_size == 1 else F.interpolate(masks, size, mode="bilinear", align_corners=False)
        logits = logits[..., : labels.shape[1], : labels.shape[2]].float()
        total = F.cross_entropy(logits, labels, self.weight, ignore_index=self.ignore_index, reduction="sum")
        loss = total / denominator
        if bool((labels != self.ignore_index).any()):
            loss = loss + part * self.lovasz * self._lovasz(logits, labels)
        return loss


def class_weights(dataset: Dataset, power: float, progress: bool = False) -> torch.Tensor:
    """(share of the pixels of each class) ** -power over all labels of a data set, with mean 1; absent classes get 0.

    Files that cannot be read are left out here: training stops at them, or counts them.
    """
    counts = np.zeros(dataset.n_cls, np.int64)
    for sample in tqdm(dataset.samples, desc="counting classes", unit="label", leave=False, disable=not progress):
        try:
            labels = dataset.read_labels(sample)
        except DataError:
            continue
        counts += np.bincount(labels[labels != dataset.ignore_index], minlength=dataset.n_cls)[: dataset.n_cls]
    shares = counts / max(counts.sum(), 1)
    weights = np.where(shares > 0, np.where(shares > 0, shares, 1.0) ** -power, 0.0)
    return torch.from_numpy(weights / max(weights.sum(), 1e-12) * (counts > 0).sum()).float()


def _lovasz(ignore_index: int) -> Callable:
    try:
        from segmentation_models_pytorch.losses import LovaszLoss
    except ImportError as error:
        raise RecipeError(
            f"lovasz needs segmentation-models-pytorch: pip install 'segmenter-triton[train]' ({error})"
        ) from error

    return LovaszLoss("multiclass", ignore_index=ignore_index)
