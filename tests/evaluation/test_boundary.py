import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from segmenter.evaluation.boundary import BoundaryCounts, boundary_scores

SQUARE = np.ones((3, 3), bool)


def counts_of_masks(prediction, label, n_cls, ignore, theta, dilation_ratio):
    """The definitions, one binary mask a class: erosions as in the published boundary IoU, and distance transforms.

    Ignored pixels are added to every mask before it is eroded, so that they erode nothing.
    """
    diagonal = np.sqrt(label.shape[0] ** 2 + label.shape[1] ** 2)
    depth = max(1, int(round(dilation_ratio * diagonal)))
    tolerance = theta if theta >= 1 else theta * diagonal
    ignored = label == ignore
    rows = []
    for c in range(n_cls):
        contours, regions = [], []
        for values in (prediction, label):
            mask = (values == c) & ~ignored
            inner = ndimage.binary_erosion(mask | ignored, SQUARE, border_value=1)
            deep = ndimage.binary_erosion(mask | ignored, SQUARE, iterations=depth, border_value=0)
            contours.append(mask & ~inner)
            regions.append(mask & ~deep)
        row = []
        for own, other in (contours, contours[::-1]):
            distance = ndimage.distance_transform_edt(~other) if other.any() else np.full(other.shape, np.inf)
            row += [own.sum(), (own & (distance <= tolerance)).sum()]
        rows.append([*row, (regions[0] & regions[1]).sum(), (regions[0] | regions[1]).sum()])
    return np.array(rows)


def random_blobs(rng, shape, n_cls, cell=4):
    """A label map of ragged regions about `cell` pixels wide."""
    noise = rng.random((n_cls, *shape))
    return np.stack([ndimage.gaussian_filter(layer, cell / 2) for layer in noise]).argmax(0).astype(np.uint8)


def shapes_label():
    """Discs and a slanted bar: outlines that no grid of blocks follows."""
    y, x = np.mgrid[:128, :128]
    label = np.zeros((128, 128), np.uint8)
    label[(y - 40) ** 2 + (x - 45) ** 2 < 30**2] = 1
    label[(y - 85) ** 2 + (x - 90) ** 2 < 27**2] = 2
    label[abs(y + 0.6 * x - 105) < 8] = 3
    return label


def halves(shape, column):
    """Class 0 left of the column, class 1 from it on."""
    label = np.ones(shape, np.uint8)
    label[:, :column] = 0
    return label


@pytest.mark.parametrize("shape", [(1, 1), (1, 17), (13, 1), (2, 2), (6, 41), (37, 53)])
@pytest.mark.parametrize(
    "theta, dilation_ratio", [(0.0, 0.0), (0.0075, 0.02), (0.05, 0.04), (1, 0.02), (2.9, 0.05), (5, 1.0)]
)
def test_equals_the_definition_on_masks(shape, theta, dilation_ratio):
    """Also with values out of range (5 and 9 of 0..3) and pixels ignored singly and in areas."""
    rng = np.random.default_rng(math.prod(shape))
    seen = np.zeros((4, 6), int)
    for trial in range(6):
        label = random_blobs(rng, shape, 4, cell=4 + trial)
        prediction = np.where(rng.random(shape) < 0.9, np.roll(label, trial, 0), random_blobs(rng, shape, 4))
        if trial % 2:
            label[rng.random(shape) < 0.1] = 255
            label[: shape[0] // 3, shape[1] // 2 :] = 255
            prediction[rng.random(shape) < 0.05] = 9
            label[rng.random(shape) < 0.05] = 5
        counts = BoundaryCounts(4, 255, theta, dilation_ratio)
        counts.update(prediction, label)
        np.testing.assert_array_equal(
            counts.counts, counts_of_masks(prediction, label, 4, 255, theta, dilation_ratio), str(trial)
        )
        seen += counts.counts
    if shape == (37, 53):
        assert (seen > 0).all()  # the comparison was not one of zeros


def test_scores_are_the_ratios_of_the_counts():
    counts = BoundaryCounts(3)
    counts.add_counts([[10, 5, 20, 16, 3, 4], [4, 0, 0, 0, 0, 9], [0, 0, 0, 0, 0, 0]])
    scores = counts.scores()
    f = 2 * 0.5 * 0.8 / 1.3
    np.testing.assert_array_equal(scores["bPrecision_per_class"], [0.5, 0.0, np.nan])
    np.testing.assert_array_equal(scores["bRecall_per_class"], [0.8, np.nan, np.nan])
    np.testing.assert_allclose(scores["bF_per_class"], [f, 0.0, np.nan], rtol=1e-15)
    np.testing.assert_array_equal(scores["bIoU_per_class"], [0.75, 0.0, np.nan])
    assert scores["bF"] == pytest.approx(f / 2, rel=1e-15)
    assert scores["bIoU"] == 0.375


@pytest.mark.parametrize("shift", [0, 1, 4, 5, 9])
def test_shifted_border_at_the_published_settings(shift):
    """360 x 480: theta is 4.5 pixels, the boundary region 12 wide. Class 0 is w wide in the label, w + shift in the
    prediction; what is deeper than 12 in a rectangle is a rectangle 24 smaller."""
    height, width, w, d = 360, 480, 200, 12
    scores = boundary_scores(halves((height, width), w + shift), halves((height, width), w), 2)
    assert scores["bF"] == (shift <= 4)
    assert set(scores["bPrecision_per_class"]) == set(scores["bRecall_per_class"]) == {float(shift <= 4)}

    def ring(columns):
        return height * columns - (height - 2 * d) * (columns - 2 * d)

    def both(columns):  # columns of the smaller rectangle; the shift brings `shift` columns of its border in deep
        return height * columns - (height - 2 * d) * (columns - 2 * d + shift)

    expected = [
        both(columns) / (ring(columns) + ring(columns + shift) - both(columns)) for columns in (w, width - w - shift)
    ]
    np.testing.assert_allclose(scores["bIoU_per_class"], expected, rtol=1e-14)


def test_theta_in_pixels_is_included():
    label, shifted = halves((9, 30), 10), halves((9, 30), 13)
    assert boundary_scores(shifted, label, 2, theta=3)["bF"] == 1.0
    assert boundary_scores(shifted, label, 2, theta=2.99)["bF"] == 0.0
    assert boundary_scores(shifted, label, 2, theta=0.0)["bF"] == 0.0
    assert boundary_scores(label, label, 2, theta=0.0)["bF"] == 1.0


def test_a_contour_is_matched_by_its_own_class_only():
    """Same outline, another class inside: only the background's contour is right."""
    label = np.zeros((20, 20), int)
    label[5:15, 5:15] = 1
    scores = boundary_scores(label * 2, label, 3)
    np.testing.assert_array_equal(scores["bF_per_class"], [1.0, 0.0, 0.0])
    np.testing.assert_array_equal(scores["bIoU_per_class"], [1.0, 0.0, 0.0])


def test_precision_and_recall_are_not_swapped():
    """A false object besides the true one: all true contours are found, some predicted ones are wrong."""
    label = np.zeros((40, 40), int)
    label[4:10, 4:10] = 1
    prediction = label.copy()
    prediction[25:35, 25:35] = 1
    scores = boundary_scores(prediction, label, 2)
    assert scores["bRecall_per_class"][1] == 1.0
    assert scores["bPrecision_per_class"][1] == 20 / (20 + 36)  # outlines of a 6 x 6 and a 10 x 10 square


def test_perfect_prediction_whatever_lies_under_ignored_pixels():
    rng = np.random.default_rng(3)
    label = random_blobs(rng, (50, 70), 5)
    label[10:20, 15:40] = 255
    for hidden in (0, 4, 200):
        prediction = np.where(label == 255, hidden, label)
        scores = boundary_scores(prediction, label, 5)
        assert set(scores["bF_per_class"]) == set(scores["bIoU_per_class"]) == {1.0}
        assert scores["bF"] == scores["bIoU"] == 1.0


def test_ignored_pixels_make_no_border():
    """0 | ignored | 1: no contour; boundary regions see across the band where it is narrower than they are wide."""
    label = halves((40, 40), 20)
    label[:, 18:22] = 255
    counts = BoundaryCounts(2, dilation_ratio=6 / math.hypot(40, 40))
    counts.update(label, label)
    assert counts.counts[:, :4].sum() == 0
    region = 40 * 18 - (40 - 12) * (18 - 6 - 2)  # 6 from three edges of the image; 2 next to the band: 6 less its 4
    np.testing.assert_array_equal(counts.counts[:, 4:], [[region, region]] * 2)
    other = BoundaryCounts(2, ignore_index=7)
    other.update(np.where(label == 255, 0, label), np.where(label == 255, 7, label))
    assert other.counts[:, :4].sum() == 0  # the ignore index is an argument


def test_one_class_and_absent_classes():
    """The edge of the image is no contour, but it is a border of the boundary IoU, as in its published code."""
    scores = boundary_scores(np.zeros((30, 40), int), np.zeros((30, 40), int), 3)
    assert np.isnan([scores["bF"], *scores["bF_per_class"]]).all()
    np.testing.assert_array_equal(scores["bIoU_per_class"], [1.0, np.nan, np.nan])
    assert scores["bIoU"] == 1.0
    nothing = boundary_scores(np.zeros((4, 4), int), np.full((4, 4), 255), 3)
    assert np.isnan([nothing["bF"], nothing["bIoU"]]).all()


def test_any_order_and_any_division_gives_the_same_counts():
    rng = np.random.default_rng(5)
    pairs = [(random_blobs(rng, (20 + i, 31), 3), random_blobs(rng, (20 + i, 31), 3)) for i in range(6)]
    whole, backwards, stored = BoundaryCounts(3), BoundaryCounts(3), BoundaryCounts(3)
    parts = [BoundaryCounts(3) for _ in range(3)]
    for i, pair in enumerate(pairs):
        whole.update(*pair)
        backwards.update(*pairs[-1 - i])
        parts[i % 3].update(*pair)
        one = BoundaryCounts(3)
        one.update(*pair)
        stored.add_counts(one.counts.tolist())
    parts[2].merge(parts[0])
    parts[2].merge(parts[1])
    assert (whole.counts > 0).all()
    for other in (backwards, parts[2], stored):
        np.testing.assert_array_equal(other.counts, whole.counts)
    assert whole.counts.dtype == np.int64
    assert all(np.array_equal(value, stored.scores()[name]) for name, value in whole.scores().items())
    whole.counts[:] = 0
    np.testing.assert_array_equal(whole.counts, stored.counts)  # what `counts` gave was a copy


def test_smaller_blocks_have_better_boundaries():
    """What the paper's figures show of patch sizes 32, 16 and 8: the same shapes in finer blocks score higher."""
    label = shapes_label()
    scores = []
    for block in (32, 16, 8, 1):
        coarse = label[block // 2 :: block, block // 2 :: block]
        scores.append(boundary_scores(coarse.repeat(block, 0).repeat(block, 1), label, 4, theta=2))
    for name in ("bF", "bIoU"):
        values = [score[name] for score in scores]
        assert all(worse < better - 0.05 for worse, better in zip(values, values[1:], strict=False)), (name, values)
        assert values[-1] == 1.0


def test_tensors_and_types_of_any_integers():
    label, prediction = shapes_label(), np.roll(shapes_label(), 3, 1)
    want = BoundaryCounts(4)
    want.update(prediction, label)
    got = BoundaryCounts(4)
    got.update(torch.from_numpy(prediction).long(), label.astype(np.uint16))
    np.testing.assert_array_equal(got.counts, want.counts)
    assert (want.counts[:, 1] > 0).all()


def test_bad_input():
    counts = BoundaryCounts(3)
    with pytest.raises(ValueError, match=r"prediction \(3, 2\) and label \(2, 3\) must have the same shape"):
        counts.update(np.zeros((3, 2), int), np.zeros((2, 3), int))
    with pytest.raises(ValueError, match=r"those of one image \(H, W\), got shape \(2, 3, 3\)"):
        counts.update(np.zeros((2, 3, 3), int), np.zeros((2, 3, 3), int))
    with pytest.raises(TypeError, match="label must hold integers, found float64"):
        counts.update(np.zeros((2, 2), int), np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"counts must have shape \(3, 6\), got \(2, 6\)"):
        counts.add_counts(np.zeros((2, 6), int))
    for other in (BoundaryCounts(4), BoundaryCounts(3, 0), BoundaryCounts(3, theta=2), BoundaryCounts(3, 255, 0, 0.1)):
        with pytest.raises(ValueError, match="different n_cls, ignore_index, theta or dilation_ratio"):
            counts.merge(other)
    for theta in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="theta is a share of the diagonal below 1, or pixels from 1 on; got"):
            BoundaryCounts(3, theta=theta)
    with pytest.raises(ValueError, match="dilation_ratio is a share of the diagonal, 0..1; got 2"):
        BoundaryCounts(3, dilation_ratio=2)
    assert counts.counts.sum() == 0
