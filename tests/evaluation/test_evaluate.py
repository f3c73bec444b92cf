"""The published test pipeline, and counts that are summed over images."""

import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.published import published_inference
from segmenter.data import datasets as datasets_module
from segmenter.data.datasets import DataError, open_dataset
from segmenter.evaluation import evaluate as evaluate_module
from segmenter.evaluation.boundary import BoundaryCounts
from segmenter.evaluation.evaluate import (
    MULTISCALE,
    Counts,
    Protocol,
    _resize_bytes,
    evaluate,
    outcomes,
    predict_labels,
)
from segmenter.evaluation.metrics import ConfusionMatrix
from segmenter.inference.images import normalize
from segmenter.inference.merge import inference
from tests.cli.tools import image
from tests.support.data_sets import make_data_set, rectangles, save
from tests.support.tiny import tiny_model


def bilinear(pixels, shape):
    """Resized without antialiasing, in float64, from the definition: half-pixel centres, edges repeated."""
    out = pixels.astype(np.float64)
    for axis, n in enumerate(shape):
        m = out.shape[axis]
        source = np.clip((np.arange(n) + 0.5) * m / n - 0.5, 0, m - 1)
        low = np.floor(source).astype(int)
        weight = (source - low).reshape([-1 if a == axis else 1 for a in range(3)])
        out = out.take(low, axis) * (1 - weight) + out.take(np.minimum(low + 1, m - 1), axis) * weight
    return out


def published_views(pixels, protocol, stats="vit"):
    """The images of mmsegmentation's MultiScaleFlipAug, as its source describes it, and whether each is mirrored."""
    h, w = pixels.shape[:2]
    ims, flips = [], []
    for ratio in protocol.scales:
        long, short = int(protocol.max_ratio * protocol.im_size * ratio), int(protocol.im_size * ratio)
        scale = min(long / max(h, w), short / min(h, w))
        im = _resize_bytes(pixels, (int(h * scale + 0.5), int(w * scale + 0.5)))
        im = normalize(im, stats, rounded=True)[None]
        for flip in (False, True) if protocol.flip else (False,):
            ims.append(im.flip(3) if flip else im)
            flips.append(flip)
    return ims, flips


@pytest.mark.parametrize(
    ("protocol", "size", "scale", "expected"),
    [
        (Protocol(512, 4), (375, 500), 1.0, (512, 683)),
        (Protocol(512, 4), (500, 375), 1.0, (683, 512)),
        (Protocol(512, 4), (300, 2400), 1.0, (256, 2048)),  # the long side is at its limit
        (Protocol(1024, 2), (1024, 2048), 0.75, (768, 1536)),
        (Protocol(130, 8), (100, 100), 0.75, (97, 97)),  # 97.5: limits are cut to whole pixels
        (Protocol(8, 1), (1, 1000), 1.0, (1, 8)),
    ],
)
def test_sizes_are_the_published_ones(protocol, size, scale, expected):
    assert protocol.resized(*size, scale) == expected


@pytest.mark.parametrize("size", [(35, 45), (64, 83), (123, 91), (1, 200), (70, 91)])
def test_images_are_resized_as_bytes_without_antialiasing(size):
    pixels = np.random.default_rng(0).integers(0, 256, (70, 91, 3), dtype=np.uint8)
    got, want = _resize_bytes(pixels, size), bilinear(pixels, size)
    assert (got.dtype, got.shape) == (np.uint8, (*size, 3))
    tie = np.abs(want % 1 - 0.5) < 1e-3  # float32 may round it either way
    np.testing.assert_array_equal(got[~tie], np.round(want[~tie]))
    assert np.abs(got - want).max() <= 0.501


@pytest.mark.parametrize(
    "protocol",
    [
        Protocol(64, window_stride=40),
        Protocol(50, max_ratio=1.2, flip=True),
        Protocol(90, window_size=48, window_stride=32, scales=(0.5, 1.0, 1.75), flip=True, batch_size=3),
    ],
)
@pytest.mark.parametrize("size", [(70, 91), (64, 64), (130, 60)])
def test_labels_are_the_argmax_of_the_published_inference(protocol, size):
    model = tiny_model(normalization="deit")
    pixels = image(*size)
    got = predict_labels(model, pixels, protocol)
    assert (got.dtype, got.shape) == (np.uint8, size)
    assert len(np.unique(got)) >= 3
    ims, flips = published_views(pixels, protocol, "deit")
    windows = protocol.of_model(model)
    options = size, windows.window_size, windows.window_stride, 2
    np.testing.assert_array_equal(got, published_inference(model, ims, flips, *options).argmax(0))
    metas = [{"flip": flip} for flip in flips]
    np.testing.assert_array_equal(got, inference(model, ims, metas, *options).argmax(0))


@pytest.mark.parametrize(
    ("options", "key", "expected"),
    [
        ({"im_size": 1024, "max_ratio": 2}, None, (96, 64)),  # the model's classes are of cityscapes
        ({}, None, (96, 80)),  # as `segment`
        ({}, "cityscapes", (96, 64)),
        ({"im_size": 512}, "ade20k", (96, 64)),
        ({"window_size": 128}, "pascal_context", (128, 96)),
        ({"window_size": 128, "window_stride": 50}, "pascal_context_59", (128, 50)),
        ({"im_size": 512}, "camvid", (96, 80)),
        ({"im_size": 512, "window_size": 48}, "folder", (48, 40)),
        ({"window_size": 32}, "ade20k", (32, 27)),  # nothing would be left
    ],
)
def test_windows_overlap_as_published_on_the_data_sets_that_have_been(options, key, expected):
    """In eval/miou.py by 32 pixels: Cityscapes 768 and 736, where the checkpoint's variant.yml says 512."""
    model = tiny_model()
    model.info.classes, model.info.window_size, model.info.window_stride = "cityscapes", 96, 80
    protocol = Protocol(**options).of_model(model, key)
    assert (protocol.window_size, protocol.window_stride) == expected
    assert protocol.of_model(model, "cityscapes") == protocol


def test_scores_of_a_published_data_set_are_of_its_windows(tmp_path):
    dataset = open_dataset(make_data_set(tmp_path, "cityscapes", n=2, size=(70, 150)), "val")
    model = tiny_model(n_cls=19)
    scores = [
        evaluate(model, dataset, Protocol(window_stride=stride), boundary=False)["IoU"] for stride in (None, 32, 64)
    ]
    np.testing.assert_array_equal(scores[0], scores[1])
    assert not np.array_equal(scores[0], scores[2], equal_nan=True)


@pytest.mark.parametrize("place", ["read_image", "enqueue_labels", "Counts"])
def test_an_interrupt_is_one_wherever_it_comes(monkeypatch, tmp_path, place):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    dataset = open_dataset(make_data_set(tmp_path), "val")
    model = tiny_model(n_cls=5)
    stream = outcomes(model, dataset, Protocol(), workers=2)
    monkeypatch.setattr(datasets_module if place == "read_image" else evaluate_module, place, interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("segmenter-reader")]
    assert left == []


def test_without_im_size_labels_are_those_of_segment(model):
    pixels = image(70, 91)
    for options in ({}, {"scales": (0.75, 1.5), "flip": True, "window_size": 48, "window_stride": 30}):
        want = model.segment(pixels, **options).numpy()
        np.testing.assert_array_equal(predict_labels(model, pixels, Protocol(**options)), want)
        assert len(np.unique(want)) >= 3
    assert not np.array_equal(want, model.segment(pixels).numpy())


@pytest.mark.parametrize("im_size", [None, 80])
def test_half_precision(model, im_size):
    pixels, protocol = image(70, 91), Protocol(im_size, flip=True)
    want = predict_labels(model, pixels, protocol)
    automatic = predict_labels(model, pixels, replace(protocol, dtype="bfloat16"))
    converted = predict_labels(model.bfloat16(), pixels, protocol)
    for got in (automatic, converted):
        assert np.mean(got == want) > 0.9
    with pytest.raises(ValueError, match="cannot run in torch.float16"):
        predict_labels(model, pixels, replace(protocol, dtype="float16"))


def test_what_makes_no_sense_is_refused(model):
    for wrong in ({"im_size": 0}, {"im_size": 9, "max_ratio": 0.5}, {"scales": ()}, {"scales": (1.0, 0.0)}):
        with pytest.raises(ValueError, match="at least"):
            Protocol(**wrong)
    with pytest.raises(ValueError, match="would leave pixels out"):
        predict_labels(model, image(), Protocol(window_size=32, window_stride=33))
    for im_size in (None, 64):
        with pytest.raises(RuntimeError, match="training mode"):
            predict_labels(model.train(), image(), Protocol(im_size))


@pytest.fixture
def streets(tmp_path, model):
    """6 samples of two sizes and 5 classes, which the tiny model gets about half right."""
    root = make_data_set(tmp_path / "data", n=6, size=(70, 91))
    for i, sample in enumerate(open_dataset(root, "val").samples):
        size = (70, 91) if i % 2 else (64, 50)
        pixels, noise = image(*size, seed=i), rectangles(size, [*range(5), 255], i)
        half = np.arange(size[1]) < size[1] // 2
        save(sample.image, pixels)
        save(sample.label, np.where(half, model.segment(pixels).numpy(), noise))
    return open_dataset(root, "val")


def test_scores_are_those_of_matrix_and_boundaries_over_all_images(model, streets):
    protocol = Protocol(80, flip=True)
    matrix, boundary = ConfusionMatrix(5), BoundaryCounts(5)
    for sample in streets.samples:
        pixels, label = streets.read(sample)
        for part in (matrix, boundary):
            part.update(predict_labels(model, pixels, protocol), label)
    got = evaluate(model, streets, protocol, workers=2)
    assert got.pop("pictures") == 6
    want = matrix.scores() | boundary.scores()
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    assert 0.1 < got["mIoU"] < 0.9
    assert 0.02 < got["bF"] < 0.95
    without = evaluate(model, streets, protocol, boundary=False)
    assert without.keys() == {*matrix.scores(), "pictures"}
    assert without["mIoU"] == got["mIoU"]


def test_a_model_that_is_right_scores_one(model, streets):
    for sample in streets.samples:
        save(sample.label, model.segment(sample.image).numpy())
    got = evaluate(model, streets)
    assert [got[name] for name in ("aAcc", "mAcc", "mIoU", "bF", "bIoU")] == [1.0] * 5


def test_outcomes_come_in_order_while_the_next_images_are_read(model, streets):
    taken = []
    samples = (taken.append(sample) or sample for sample in streets.samples)
    stream = outcomes(model, streets, Protocol(), samples, workers=1)
    assert taken == []
    first = next(stream)
    assert len(taken) == 4, "one is given out, one counted, two are read ahead"
    rest = list(stream)
    assert [outcome.sample for outcome in (first, *rest)] == list(streets.samples)
    for outcome in (first, *rest):
        pixels, label = streets.read(outcome.sample)
        np.testing.assert_array_equal(outcome.pixels, pixels)
        np.testing.assert_array_equal(outcome.label, label)
        np.testing.assert_array_equal(outcome.prediction, model.segment(pixels).numpy())
        assert outcome.counts.matrix.counts.sum() == (label != 255).sum()


def test_a_bad_sample_is_an_outcome_and_stops_evaluate(model, streets):
    bad = streets.samples[2]
    bad.label.write_bytes(b"no image")
    errors = [outcome.error for outcome in outcomes(model, streets, Protocol())]
    assert [error is None for error in errors] == [True, True, False, True, True, True]
    assert isinstance(errors[2], DataError)
    with pytest.raises(DataError, match=bad.label.name):
        evaluate(model, streets)


def test_the_image_is_named_when_the_model_fails(model, streets):
    with torch.no_grad():
        model.decoder.mask_norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match=f"{streets.samples[0].image.name}: the network gave NaN"):
        evaluate(model, streets)


def test_classes_must_be_as_many(streets):
    with pytest.raises(ValueError, match="the model has 4 classes and the data set folder 5"):
        evaluate(tiny_model(n_cls=4), streets)


def test_counts_go_through_json_and_add_up():
    rng = np.random.default_rng(0)
    pairs = [rng.integers(0, 3, (2, 20, 30)) for _ in range(3)]
    whole, restored = Counts(3), Counts(3)
    for pair in pairs:
        one = Counts(3)
        one.update(*pair)
        whole.merge(one)
        restored.add_json(json.loads(json.dumps(one.to_json())))
    assert restored.images == whole.images == 3
    assert whole.matrix.counts.sum() == 3 * 600
    np.testing.assert_array_equal(restored.matrix.counts, whole.matrix.counts)
    np.testing.assert_array_equal(restored.boundary.counts, whole.boundary.counts)
    assert whole.boundary.counts.min(0).max() > 0
    for wrong in ({}, {"pictures": 1}, {"pictures": 1, "confusion": [[9], [1]], "boundary": [[], []]}):
        with pytest.raises((KeyError, IndexError)):
            Counts(3).add_json(wrong)


def test_the_published_scales():
    assert MULTISCALE == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
