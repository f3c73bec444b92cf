import numpy as np
import pytest
import torch

from segmenter.evaluation.metrics import ConfusionMatrix, mean_iou, percent


def histogram_scores(predictions, labels, n_cls, ignore):
    """mmsegmentation's own recipe, written with histograms over lists of images."""
    intersect, pred_area, label_area = np.zeros(n_cls), np.zeros(n_cls), np.zeros(n_cls)
    for prediction, label in zip(predictions, labels, strict=True):
        keep = label != ignore
        prediction, label = prediction[keep], label[keep]
        for area, values in (
            (intersect, prediction[prediction == label]), (pred_area, prediction), (label_area, label),
        ):  # fmt: skip
            area += np.histogram(values, bins=np.arange(n_cls + 1) - 0.5)[0]
    with np.errstate(invalid="ignore"):
        acc, iou = intersect / label_area, intersect / (pred_area + label_area - intersect)
    return {
        "aAcc": intersect.sum() / label_area.sum(), "mAcc": np.nanmean(acc), "mIoU": np.nanmean(iou),
        "Acc": acc, "IoU": iou,
    }  # fmt: skip


@pytest.mark.parametrize("out_of_range", [False, True])
def test_equals_the_histogram_definition(out_of_range):
    rng = np.random.default_rng(0)
    high = 9 if out_of_range else 6  # classes 6 and 7 of 8 occur only out of range of n_cls=6
    labels = [rng.integers(0, high, (7 + i, 11), dtype=np.uint8) for i in range(4)]
    predictions = [
        np.where(rng.random(t.shape) < 0.6, t, rng.integers(0, high, t.shape)).astype(np.uint8) for t in labels
    ]
    for label in labels:
        label[rng.random(label.shape) < 0.2] = 255
    got, want = mean_iou(predictions, labels, 6), histogram_scores(predictions, labels, 6, 255)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-12, err_msg=name)


def test_equals_an_independent_library():
    """segmentation_models_pytorch counts true and false positives and negatives a class."""
    metrics = pytest.importorskip("segmentation_models_pytorch.metrics")
    rng = np.random.default_rng(4)
    label = rng.integers(0, 6, (3, 19, 23))
    prediction = np.where(rng.random(label.shape) < 0.5, label, rng.integers(0, 6, label.shape))
    label[rng.random(label.shape) < 0.2] = 255
    matrix = ConfusionMatrix(7)  # one class does not occur
    for pair in zip(prediction, label, strict=True):
        matrix.update(*pair)
    stats = metrics.get_stats(
        torch.from_numpy(prediction), torch.from_numpy(label), mode="multiclass", ignore_index=255, num_classes=7
    )
    stats = [stat.sum(0)[None] for stat in stats]
    scores = matrix.scores()
    nothing = {"zero_division": float("nan")}
    np.testing.assert_allclose(scores["IoU"], metrics.iou_score(*stats, **nothing)[0], rtol=1e-6)
    np.testing.assert_allclose(scores["Acc"], metrics.recall(*stats, **nothing)[0], rtol=1e-6)
    tp, fp, fn, _ = (stat[0].numpy() for stat in stats)
    np.testing.assert_array_equal(np.diag(matrix.counts), tp)
    np.testing.assert_array_equal(matrix.counts.sum(0) - tp, fp)
    np.testing.assert_array_equal(matrix.counts.sum(1) - tp, fn)
    assert tp[:6].min() > 50 and scores["mIoU"] == pytest.approx(np.mean((tp / (tp + fp + fn + (tp == 0)))[:6]))


def test_classes_that_do_not_occur_are_nan_and_left_out():
    got = mean_iou([np.array([[0, 1, 1, 3]])], [np.array([[0, 1, 0, 1]])], 5)
    np.testing.assert_array_equal(got["Acc"], [0.5, 0.5, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(got["IoU"], [0.5, 1 / 3, np.nan, 0.0, np.nan])  # 3 was predicted, so it has a union
    assert got["mAcc"] == 0.5
    assert got["mIoU"] == pytest.approx((0.5 + 1 / 3 + 0) / 3)


def test_predictions_under_ignored_pixels_do_not_count():
    got = mean_iou([np.array([0, 4, 1])], [np.array([0, 255, 1])], 5)
    assert np.isnan(got["IoU"][4])
    assert got["mIoU"] == got["aAcc"] == 1.0


def test_only_the_ignore_index_is_ignored():
    matrix = ConfusionMatrix(2, ignore_index=11)
    matrix.update(np.array([0, 1, 1, 0, 1]), np.array([0, 1, 1, 11, 255]))
    np.testing.assert_array_equal(matrix.counts, np.diag([1, 2]))
    # the 0 under label 11 is left out; the 1 under 255 adds to the area predicted as 1
    np.testing.assert_array_equal(matrix.scores()["IoU"], [1.0, 2 / 3])


def test_negative_values_are_out_of_range():
    """-1 must not wrap round into the row of another class."""
    matrix = ConfusionMatrix(3)
    matrix.update(np.array([0, 1, -1, 2, -1]), np.array([0, 1, 1, -1, -1]))
    np.testing.assert_array_equal(matrix.counts, np.diag([1, 1, 0]))
    np.testing.assert_array_equal(matrix.scores()["Acc"], [1.0, 0.5, np.nan])
    np.testing.assert_array_equal(matrix.scores()["IoU"], [1.0, 0.5, 0.0])


def test_merge_equals_one_stream_and_counts_are_exact():
    rng = np.random.default_rng(1)
    pairs = [(rng.integers(0, 3, 50), rng.integers(0, 3, 50)) for _ in range(4)]
    whole, a, b = ConfusionMatrix(3), ConfusionMatrix(3), ConfusionMatrix(3)
    for i, pair in enumerate(pairs):
        whole.update(*pair)
        (a if i % 2 else b).update(*pair)
    a.merge(b)
    np.testing.assert_array_equal(a.counts, whole.counts)
    stored = ConfusionMatrix(3)
    stored.add_counts(a.counts.tolist())
    stored.add_counts(a.counts)
    np.testing.assert_array_equal(stored.counts, 2 * whole.counts)
    assert whole.counts.sum() == 200
    assert whole.counts[1, 2] == sum(((label == 1) & (prediction == 2)).sum() for prediction, label in pairs)


def test_percent_rounds_to_two_decimals():
    scores = percent(mean_iou([torch.tensor([0, 1, 1])], [torch.tensor([0, 0, 1])], 2))
    assert scores["aAcc"] == 66.67
    np.testing.assert_array_equal(scores["IoU"], [50.0, 50.0])


def test_empty_is_nan():
    assert np.isnan(mean_iou([np.array([0])], [np.array([255])], 2)["mIoU"])


def test_bad_input():
    with pytest.raises(ValueError, match="must have the same shape"):
        mean_iou([np.zeros((2, 2), int)], [np.zeros((2, 3), int)], 2)
    with pytest.raises(TypeError, match="prediction must hold integers, found float64"):
        mean_iou([np.zeros((2, 2))], [np.zeros((2, 2), int)], 2)
    with pytest.raises(ValueError, match="2 predictions for 1 labels"):
        mean_iou([1, 2], [1], 2)
    with pytest.raises(ValueError, match="different n_cls"):
        ConfusionMatrix(2).merge(ConfusionMatrix(3))
    with pytest.raises(ValueError, match=r"counts must have shape \(2, 2\), got \(3, 3\): were they of another n_cls"):
        ConfusionMatrix(2).add_counts(np.zeros((3, 3), int))
    with pytest.raises(TypeError, match="counts must hold integers, found float64"):
        ConfusionMatrix(2).add_counts(np.zeros((2, 2)))
