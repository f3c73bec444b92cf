"""Boundary F-score and boundary IoU of label maps, from streamed counts of pixels.

Both are defined for one class's mask. Here they are counted for all classes at once, on the label maps: a pixel lies
near the border of its own class's mask exactly when a pixel of another class is near.
"""

import math
from typing import Any

import numpy as np

from segmenter.evaluation.metrics import integer_counts, integer_pair, nanmean

THETA = 0.0075  # of the diagonal, as published: 4.5 pixels at 360 x 480
DILATION_RATIO = 0.02  # of the diagonal, as published: 12 pixels at 360 x 480

# Stands for pixels without a class. The lowest int32: it never wins a maximum, and minus it is itself.
_NO_CLASS = np.iinfo(np.int32).min


class BoundaryCounts:
    """What boundary F-score and boundary IoU need, counted per class over any number of images, in int64.

    *Boundary IoU* (Cheng et al., "Boundary IoU", CVPR 2021): of each mask the pixels at most d from its border are
    kept, and their intersection over union is taken. As in the authors' code d is `dilation_ratio` x diagonal, rounded,
    at least 1; distances are the chessboard's (their d erosions by 3 x 3); and the edge of the image is a border.

    *Boundary F-score* (Csurka et al., "What is a good evaluation measure for semantic segmentation?", BMVC 2013;
    Perazzi et al., CVPR 2016, do the same for one object): precision is the share of the prediction's contour pixels
    with a contour pixel of the same class in the label at a Euclidean distance of at most theta; recall the other way
    round; F = 2PR / (P + R). The contour of a class is its pixels with one of another class among their 8 neighbours.
    The edge of the image is no contour: it would match itself in every prediction.

    *Aggregation.* Counts are summed over the images, ratios are taken per class at the end and classes averaged, as
    mIoU does. So the scores are exactly the same in any order and for any number of processes. The papers average F
    over the classes of an image and then over images, and IoU over objects: there a class weighs the same in every
    image it is in, here by the length of its contour. `boundary_scores` gives the figures of one image.

    *Ignored pixels* belong to no class in both maps: what is predicted there does not matter, they are in no boundary
    and no contour, and they make none. A class that meets only ignored pixels has no border there, and two classes
    that an ignored band keeps apart have no contour between them (a boundary region they have, where the band is
    narrower than d). So data with a band around every object (Pascal VOC) cannot be measured by F.

    Values outside 0..n_cls-1 (other than the label's ignore_index) are one more class, which has no score.

    Args:
        n_cls: classes. ignore_index: pixels with this label do not count.
        theta: tolerance of F: below 1 a share of the image's diagonal, from 1 on in pixels.
        dilation_ratio: width of the boundary region of the IoU, a share of the image's diagonal.
    Raises:
        ValueError: theta is negative or not finite, dilation_ratio is not in 0..1.
    """

    COLUMNS = ("predicted", "predicted_matched", "labelled", "labelled_matched", "intersection", "union")

    def __init__(
        self, n_cls: int, ignore_index: int = 255, theta: float = THETA, dilation_ratio: float = DILATION_RATIO
    ):
        if not 0 <= theta < math.inf:
            raise ValueError(f"theta is a share of the diagonal below 1, or pixels from 1 on; got {theta}")
        if not 0 <= dilation_ratio <= 1:
            raise ValueError(f"dilation_ratio is a share of the diagonal, 0..1; got {dilation_ratio}")
        self.n_cls = n_cls
        self.ignore_index = ignore_index
        self.theta = theta
        self.dilation_ratio = dilation_ratio
        self._counts = np.zeros((n_cls, len(self.COLUMNS)), dtype=np.int64)

    def update(self, prediction: Any, label: Any) -> None:
        """Adds one image: integer arrays or tensors (H, W).

        Raises:
            ValueError: the shapes differ or are not (H, W). TypeError: values that are not integers.
        """
        prediction, label = integer_pair(prediction, label)
        if label.ndim != 2:
            raise ValueError(f"boundaries are those of one image (H, W), got shape {label.shape}")
        counted = label != self.ignore_index
        predicted, labelled = self._classes(prediction, counted), self._classes(label, counted)
        diagonal = math.sqrt(label.shape[0] ** 2 + label.shape[1] ** 2)
        theta = self.theta if self.theta >= 1 else self.theta * diagonal
        depth = max(1, round(self.dilation_ratio * diagonal))

        lines = [_near_another(classes, 1, _NO_CLASS) for classes in (predicted, labelled)]
        missed = [_unmatched(*lines, theta), _unmatched(*lines[::-1], theta)]
        line_counts = [self._per_class(line) for line in lines]
        matched = [total - self._per_class(classes) for total, classes in zip(line_counts, missed, strict=True)]

        regions = [_near_another(classes, depth, self.n_cls + 1) for classes in (predicted, labelled)]
        intersection = self._per_class(regions[0][regions[0] == regions[1]])
        union = self._per_class(regions[0]) + self._per_class(regions[1]) - intersection

        columns = (line_counts[0], matched[0], line_counts[1], matched[1], intersection, union)
        self._counts += np.stack(columns, axis=1)

    def _classes(self, values: np.ndarray, counted: np.ndarray) -> np.ndarray:
        """(H, W) int32: 0..n_cls-1, n_cls for values out of range, _NO_CLASS where nothing counts."""
        in_range = (values >= 0) & (values < self.n_cls)
        return np.where(counted, np.where(in_range, values, self.n_cls), _NO_CLASS).astype(np.int32)

    def _per_class(self, classes: np.ndarray) -> np.ndarray:
        return np.bincount(classes[classes != _NO_CLASS], minlength=self.n_cls)[: self.n_cls]

    @property
    def counts(self) -> np.ndarray:
        """(n_cls, 6) int64, columns as in COLUMNS: contour pixels predicted, those matched, the same of the labels,
        and intersection and union of the boundary regions."""
        return self._counts.copy()

    def add_counts(self, counts: Any) -> None:
        """Adds `counts` of another object with the same settings, stored before for instance.

        Raises:
            ValueError: another shape. TypeError: values that are not integers.
        """
        self._counts += integer_counts(counts, self._counts.shape)

    def merge(self, other: "BoundaryCounts") -> None:
        """Adds the counts of another object, of another process for instance."""
        settings = [(c.n_cls, c.ignore_index, c.theta, c.dilation_ratio) for c in (self, other)]
        if settings[0] != settings[1]:
            raise ValueError("cannot merge boundary counts of different n_cls, ignore_index, theta or dilation_ratio")
        self._counts += other._counts

    def scores(self) -> dict[str, Any]:
        """bF and bIoU as fractions, means over classes, and (n_cls,) arrays: bF_per_class, bIoU_per_class,
        bPrecision_per_class, bRecall_per_class.

        A class with contours on one side only has F = 0. NaN where 0/0: without any contour (a class that does not
        occur, or fills all images) for F, without any boundary region for IoU. The means skip NaN.
        """
        predicted, predicted_matched, labelled, labelled_matched, intersection, union = self._counts.T.astype(float)
        with np.errstate(invalid="ignore"):
            precision, recall, iou = predicted_matched / predicted, labelled_matched / labelled, intersection / union
        f = np.where(predicted + labelled > 0, 0.0, np.nan)
        hit = (predicted_matched > 0) & (labelled_matched > 0)
        f[hit] = 2 * precision[hit] * recall[hit] / (precision[hit] + recall[hit])
        return {
            "bF": nanmean(f), "bIoU": nanmean(iou), "bF_per_class": f, "bIoU_per_class": iou,
            "bPrecision_per_class": precision, "bRecall_per_class": recall,
        }  # fmt: skip


def boundary_scores(
    prediction: Any,
    label: Any,
    n_cls: int,
    ignore_index: int = 255,
    theta: float = THETA,
    dilation_ratio: float = DILATION_RATIO,
) -> dict[str, Any]:
    """`BoundaryCounts.scores` of one image (H, W); its bF is the per-image score of Csurka et al."""
    counts = BoundaryCounts(n_cls, ignore_index, theta, dilation_ratio)
    counts.update(prediction, label)
    return counts.scores()


def _near_another(classes: np.ndarray, radius: int, outside: int) -> np.ndarray:
    """The classes of those pixels that have another class at a chessboard distance of at most `radius`.

    Args:
        classes: (H, W) int32, _NO_CLASS for pixels that neither count nor make others count.
        outside: the class of all pixels beyond the edge, or _NO_CLASS.
    Returns:
        (H, W) int32, _NO_CLASS at all other pixels.
    """
    padded = np.pad(classes, radius, constant_values=outside)
    highest, lowest = _window_max(padded, 2 * radius + 1), -_window_max(-padded, 2 * radius + 1)
    return np.where(highest != lowest, classes, _NO_CLASS)


def _window_max(values: np.ndarray, size: int) -> np.ndarray:
    """Maximum of every size x size window: (H, W) -> (H - size + 1, W - size + 1), in log2(size) steps an axis."""
    for _ in range(2):
        done = 1
        while done < size:
            step = min(done, size - done)
            values = np.maximum(values[:-step], values[step:])
            done += step
        values = values.T
    return values


def _unmatched(lines: np.ndarray, others: np.ndarray, theta: float) -> np.ndarray:
    """Contour pixels without one of the same class in the other map, at most theta away.

    Args:
        lines, others: (H, W) int32, the class of contour pixels, _NO_CLASS elsewhere. theta: pixels.
    Returns:
        (n,) int32: the class of each.
    """
    radius = int(theta)
    others = np.pad(others, radius, constant_values=_NO_CLASS)
    rows, columns = np.nonzero(lines != _NO_CLASS)
    wanted, at = lines[rows, columns], (rows + radius) * others.shape[1] + columns + radius
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].reshape(2, -1)
    squares = y * y + x * x
    offsets = (y * others.shape[1] + x)[np.argsort(squares)][: np.count_nonzero(squares <= theta * theta)]
    others = others.ravel()
    for offset in offsets:  # nearest first: most pixels of a good prediction are out after a few
        missed = others[at + offset] != wanted
        wanted, at = wanted[missed], at[missed]
    return wanted
