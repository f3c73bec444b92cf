"""Mean intersection over union, as mmsegmentation's `mean_iou` computes it, from one streamed confusion matrix."""

from typing import Any

import numpy as np
import torch


class ConfusionMatrix:
    """Counts of (label, prediction) pairs over any number of images, in int64.

    Args:
        n_cls: classes. ignore_index: pixels with this label do not count.

    A prediction outside 0..n_cls-1 makes its pixel count for the label's area and for no prediction's, and a label
    outside that range (other than ignore_index) the other way round, as with mmsegmentation's histograms.
    """

    def __init__(self, n_cls: int, ignore_index: int = 255):
        self.n_cls = n_cls
        self.ignore_index = ignore_index
        self._counts = np.zeros((n_cls + 1, n_cls + 1), dtype=np.int64)  # the last row and column: out of range

    def update(self, prediction: Any, label: Any) -> None:
        """Adds one image or batch: integer arrays or tensors of equal shape.

        Raises:
            ValueError: the shapes differ. TypeError: values that are not integers.
        """
        prediction, label = integer_pair(prediction, label)
        valid = label != self.ignore_index
        prediction, label = self._clip(prediction[valid]), self._clip(label[valid])
        size = self.n_cls + 1
        self._counts += np.bincount(label * size + prediction, minlength=size * size).reshape(size, size)

    def _clip(self, values: np.ndarray) -> np.ndarray:
        return np.where((values >= 0) & (values < self.n_cls), values, self.n_cls)

    @property
    def counts(self) -> np.ndarray:
        """(n_cls, n_cls) int64, rows are labels; pixels with an out-of-range value are left out."""
        return self._counts[:-1, :-1].copy()

    def merge(self, other: "ConfusionMatrix") -> None:
        """Adds the counts of another matrix, of another process for instance."""
        if (self.n_cls, self.ignore_index) != (other.n_cls, other.ignore_index):
            raise ValueError("cannot merge confusion matrices of different n_cls or ignore_index")
        self._counts += other._counts

    def add_counts(self, counts: Any) -> None:
        """Adds `counts` of another matrix, stored before for instance.

        Raises:
            ValueError: another shape. TypeError: values that are not integers.
        """
        self._counts[:-1, :-1] += integer_counts(counts, (self.n_cls, self.n_cls))

    def scores(self) -> dict[str, Any]:
        """aAcc, mAcc, mIoU as fractions, and per class Acc and IoU (NaN where 0/0; means skip those classes)."""
        intersect = np.diag(self._counts)[:-1].astype(np.float64)
        labels = self._counts.sum(1)[:-1].astype(np.float64)
        predictions = self._counts.sum(0)[:-1].astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            acc = intersect / labels
            iou = intersect / (labels + predictions - intersect)
            overall = intersect.sum() / labels.sum()
        return {"aAcc": float(overall), "mAcc": nanmean(acc), "mIoU": nanmean(iou), "Acc": acc, "IoU": iou}


def mean_iou(predictions: Any, labels: Any, n_cls: int, ignore_index: int = 255) -> dict[str, Any]:
    """`ConfusionMatrix.scores` of lists of images."""
    if len(predictions) != len(labels):
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels")
    matrix = ConfusionMatrix(n_cls, ignore_index)
    for prediction, label in zip(predictions, labels, strict=True):
        matrix.update(prediction, label)
    return matrix.scores()


def percent(scores: dict[str, Any]) -> dict[str, Any]:
    """Scores as published: percentages rounded to two decimals."""
    return {name: np.round(np.multiply(value, 100), 2) for name, value in scores.items()}


def nanmean(values: np.ndarray) -> float:
    """Mean of the values that are not NaN; NaN if there are none."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def integer_pair(prediction: Any, label: Any) -> tuple[np.ndarray, np.ndarray]:
    """Two integer arrays or tensors of equal shape, as int64 arrays.

    Raises:
        ValueError: the shapes differ. TypeError: values that are not integers.
    """
    prediction, label = _integers("prediction", prediction), _integers("label", label)
    if prediction.shape != label.shape:
        raise ValueError(f"prediction {prediction.shape} and label {label.shape} must have the same shape")
    return prediction, label


def integer_counts(counts: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Stored counts as an int64 array.

    Raises:
        ValueError: another shape. TypeError: values that are not integers.
    """
    counts = _integers("counts", counts)
    if counts.shape != shape:
        raise ValueError(f"counts must have shape {shape}, got {counts.shape}: were they of another n_cls?")
    return counts


def _integers(name: str, values: Any) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, found {array.dtype}")
    return array.astype(np.int64)
