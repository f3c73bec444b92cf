"""Results as images."""

import numpy as np
import pytest
from PIL import Image

from segmenter.classes import ClassSet, generic_classes
from segmenter.evaluation.charts import comparison, save_class_chart

CLASSES = ClassSet("three", ("long", "absent", "short"), ((200, 30, 30), (30, 200, 30), (30, 30, 200)))


def mask_of(image, color):
    return np.abs(image[..., :3].astype(int) - color).max(-1) <= 2


def pixels_of(image, color):
    return mask_of(image, color).sum()


def test_bars_have_the_colours_and_lengths_of_their_classes(tmp_path):
    pytest.importorskip("matplotlib")
    save_class_chart(tmp_path / "chart.png", CLASSES, np.array([0.8, np.nan, 0.2]), "title")
    image = np.array(Image.open(tmp_path / "chart.png"))
    long, absent, short = (pixels_of(image, color) for color in CLASSES.palette)
    assert absent == 0
    assert short > 100
    assert long / short == pytest.approx(4, rel=0.2)
    rows = [np.nonzero(mask_of(image, CLASSES.palette[i]))[0].mean() for i in (0, 2)]
    assert rows[0] < rows[1], "the best class comes first"


def test_many_classes_stand_in_columns(tmp_path):
    pytest.importorskip("matplotlib")
    for n in (50, 51):
        save_class_chart(tmp_path / f"{n}.png", generic_classes(n), np.linspace(0, 1, n), "title")
    (width, height), (width_of_two, height_of_two) = (Image.open(tmp_path / f"{n}.png").size for n in (50, 51))
    assert width_of_two > width
    assert height_of_two < 0.6 * height, "two columns of 26"


def test_no_class_at_all(tmp_path):
    pytest.importorskip("matplotlib")
    save_class_chart(tmp_path / "chart.png", CLASSES, np.full(3, np.nan), "title")
    assert np.array(Image.open(tmp_path / "chart.png")).min() < 50, "names are there"


def test_image_truth_and_prediction_stand_side_by_side():
    pixels = np.full((60, 80, 3), 100, np.uint8)
    label, prediction = np.zeros((60, 80), np.uint8), np.full((60, 80), 2, np.uint8)
    label[:20] = 255
    label[20:30] = 2
    drawn = comparison(pixels, label, prediction, CLASSES)
    red, blue = ((0.4 * 100 + 0.6 * np.array(CLASSES.palette[i])).round() for i in (0, 2))
    assert pixels_of(drawn, [100, 100, 100]) >= 60 * 80
    assert pixels_of(drawn, red) == 30 * 80
    assert pixels_of(drawn, blue) == 10 * 80 + 60 * 80
    assert pixels_of(drawn, [40, 40, 40]) >= 20 * 80, "ignored pixels are darkened"
    columns = [np.nonzero(mask_of(drawn, color))[1].mean() for color in ([100, 100, 100], red, blue)]
    assert columns == sorted(columns)
    assert pixels_of(drawn, CLASSES.palette[0]) > 50, "the legend names classes of the truth as well"
    assert pixels_of(drawn, CLASSES.palette[1]) == 0
    nothing = comparison(pixels, np.full_like(label, 255), prediction, CLASSES)
    assert pixels_of(nothing, blue) == 60 * 80
