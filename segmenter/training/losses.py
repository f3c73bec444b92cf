"""The training loss: a weighted sum of losses of the upsampled masks, by default cross-entropy as published.

Cross-entropy makes no logits of pixels (upsample_loss.py), alone or in a sum; every other term is made of all
probabilities, for which masks are upsampled once. What computes each:

    cross_entropy   upsample_loss.py: the kernel on a GPU with impl "triton" or "auto", else PyTorch, in chunks
    ohem            here: cross-entropy of the pixels that are hard (Shrivastava et al., CVPR 2016)
    dice, jaccard, tversky, focal, lovasz
                    segmentation_models_pytorch, mode "multiclass", over the whole batch of a process

There, dice is 1 - 2 |p y| / (|p| + |y|) of each class, the mean of those that have pixels (Milletari et al., 3DV 2016),
and jaccard the same of intersection over union. tversky weighs false positives by alpha and false negatives by beta
(Salehi et al., MLMI 2017), and its mean is taken to the power of gamma. Classes without pixels count as 0, and the mean
is over all classes. focal is that of Lin et al. (ICCV 2017), through the sigmoid of each class against the rest.
lovasz is Lovász-softmax (Berman et al., CVPR 2018).
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from segmenter.data.datasets import DataError, Dataset
from segmenter.ops import select
from segmenter.training.loss_terms import CROSS_ENTROPY, LossTerm
from segmenter.training.recipe import RecipeError
from segmenter.training.upsample_loss import upsample_cross_entropy

_OF_LIBRARY = {  # name -> class of segmentation_models_pytorch.losses
    "dice": "DiceLoss",
    "jaccard": "JaccardLoss",
    "tversky": "TverskyLoss",
    "focal": "FocalLoss",
    "lovasz": "LovaszLoss",
}


class SegmentationLoss:
    """The loss of a batch, so that the mean over processes of its gradients is that of one process with all pixels.

    That holds for cross-entropy, whose mean is over pixels. The other terms are no such means: each process takes them
    of its own batch, or the mean of its parts, and those are averaged.

    Args:
        weight: (n_cls,) float32, what a pixel of each class counts in cross-entropy and ohem; None: all the same, as
            published.
        terms: what is added up; see `segmenter.training.loss_terms.parse_loss`.
        patch_size: what masks are upsampled by; 1: they are the pixels' logits. impl: as of the model.
    Raises:
        RecipeError: a term needs segmentation-models-pytorch, which is not installed.
    """

    def __init__(
        self,
        ignore_index: int,
        weight: torch.Tensor | None = None,
        terms: Sequence[LossTerm] = (LossTerm(CROSS_ENTROPY),),
        patch_size: int = 1,
        impl: str = "auto",
    ):
        self.ignore_index, self.weight = ignore_index, weight
        self.patch_size, self.impl = patch_size, impl
        self._cross_entropy = next((term for term in terms if term.name == CROSS_ENTROPY), None)
        if self._cross_entropy is not None:  # numbers, which torch.compile knows, not terms
            self._share, self._smoothing = self._cross_entropy.weight, self._cross_entropy.argument("label_smoothing")
        self._others = [(term, self._made(term)) for term in terms if term.name != CROSS_ENTROPY]

    def denominator(self, labels: torch.Tensor) -> torch.Tensor:
        """What cross-entropy divides by: the sum of the weights of the pixels that count."""
        valid = labels != self.ignore_index
        return valid.sum() if self.weight is None else self.weight[labels[valid]].sum()

    def __call__(
        self, masks: torch.Tensor, labels: torch.Tensor, denominator: torch.Tensor | float, part: float = 1.0
    ) -> torch.Tensor:
        """Loss in float32; 0, and no gradient, where no pixel counts.

        Args:
            masks: (b, n_cls, h, w). labels: (b, H, W) int64, of h * patch_size rows at most, the padding cut off.
            denominator: of all processes together, over their number. part: which share of this process's batch it is.
        """
        denominator = max(float(denominator), 1e-12)
        loss = None
        if self._cross_entropy is not None:
            options = (self.patch_size, self.weight, self.ignore_index, self._smoothing)
            loss = upsample_cross_entropy(masks, labels, *options, impl=self.impl).loss / denominator
            loss = loss if self._share == 1 else self._share * loss
        if self._others:
            added = self._added(masks, labels)
            loss = part * added if loss is None else loss + part * added
        return loss

    def implementations(self, like: torch.Tensor) -> str:
        """Which terms there are and what computes each, in words, for masks on the device of `like`."""
        texts = []
        if self._cross_entropy is not None:
            kernel = select(self.impl).on(like).name == "triton"
            texts.append(f"{self._cross_entropy} by {'the kernel' if kernel else 'PyTorch in chunks'}")
        for term, _ in self._others:
            texts.append(
                f"{term} by {'PyTorch' if term.name == 'ohem' else 'segmentation_models_pytorch'} of all logits"
            )
        return " + ".join(texts)

    def _added(self, masks: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The terms that are made of the logits of all pixels."""
        size = [n * self.patch_size for n in masks.shape[2:]]
        with torch.autocast(masks.device.type, enabled=False):  # sums over millions of pixels, in float32
            logits = masks.float()
            if self.patch_size != 1:
                logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
            logits = logits[..., : labels.shape[1], : labels.shape[2]]
            if not bool((labels != self.ignore_index).any()):  # most have no value then, or divide by 0
                return logits[:0].sum()
            return sum(term.weight * compute(logits, labels) for term, compute in self._others)

    def _made(self, term: LossTerm) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """A function of logits (b, n_cls, H, W) float32 and labels (b, H, W)."""
        if term.name == "ohem":
            return lambda logits, labels: hard_cross_entropy(
                logits, labels, self.weight, self.ignore_index, term.argument("threshold"), term.argument("min_share")
            )
        try:
            from segmentation_models_pytorch import losses
        except ImportError as error:
            raise RecipeError(
                f"{term.name} needs segmentation-models-pytorch: pip install 'segmenter-triton[train]' ({error})"
            ) from error
        return getattr(losses, _OF_LIBRARY[term.name])("multiclass", ignore_index=self.ignore_index, **term.arguments)


def hard_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None = None,
    ignore_index: int = 255,
    threshold: float = 0.7,
    min_share: float = 1 / 16,
) -> torch.Tensor:
    """Online hard example mining: cross-entropy averaged over the pixels that are hard.

    Hard are those whose label has a probability below `threshold`; at least the hardest `min_share` of the pixels that
    count. After Shrivastava et al., CVPR 2016; the threshold on pixels is that of Wu et al., arXiv 1604.04339.

    Args:
        logits: (b, n_cls, H, W) float32. labels: (b, H, W) int64. weight: (n_cls,), of the classes in the mean; they do
            not change which pixels are hard.
    Returns:
        float32 scalar; 0 if no pixel counts.
    """
    counted = labels != ignore_index
    y = labels[counted]
    scores = logits.movedim(1, -1)[counted]  # (pixels, n_cls)
    if len(y) == 0:
        return scores.sum()
    losses = F.cross_entropy(scores, y, reduction="none")
    n_hard = int((losses.detach() > -math.log(max(threshold, 1e-30))).sum())
    losses, hard = losses.topk(max(n_hard, round(min_share * len(y)), 1))
    if weight is None:
        return losses.mean()
    of_pixel = weight[y[hard]]
    return (of_pixel * losses).sum() / of_pixel.sum().clamp_min(1e-12)


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
