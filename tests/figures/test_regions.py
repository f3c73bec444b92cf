"""Regions of labels, and panels of them."""

import numpy as np
import pytest
from scipy import ndimage

from segmenter.classes import load_classes
from segmenter.figures.regions import (
    classes_of,
    heat_panel,
    label_panel,
    large_and_small,
    legend,
    patch_labels,
    region_of,
    regions,
)
from segmenter.visualize import heat_colors, overlay
from tests.cli.tools import image
from tests.support.tiny import tiny_model

LABELS = np.array(
    [
        [0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 0, 1, 1],
        [2, 0, 0, 0, 0, 0, 0],
    ]
)


def test_regions_are_those_of_scipy():
    labels = np.random.default_rng(0).integers(0, 3, (13, 17))
    found = regions(labels)
    assert np.sum([region.cells for region in found], 0).tolist() == np.ones(labels.shape).tolist()
    assert len(found) == sum(ndimage.label(labels == i)[1] for i in range(3))
    for region in found:
        assert ndimage.label(region.cells)[1] == 1 and set(labels[region.cells]) == {region.label}
        assert region.share == pytest.approx(region.cells.sum() / labels.size)
        place = tuple(np.argwhere(region.cells)[-1])
        np.testing.assert_array_equal(region_of(labels, place).cells, region.cells)
    assert [r.share for r in found] == sorted((r.share for r in found), reverse=True)


def test_the_deepest_cell_is_farthest_from_the_border():
    large, small = large_and_small(LABELS)
    assert (large.label, large.deepest) == (0, (2, 2)), "from the edge of the image too"
    assert (small.label, small.cells.sum()) == (1, 6), "the region of one patch is too small to look from"
    for region in regions(np.random.default_rng(1).integers(0, 2, (9, 30)).repeat(3, 0)):
        depth = ndimage.distance_transform_cdt(np.pad(region.cells, 1), metric="taxicab")[1:-1, 1:-1]
        assert depth[region.deepest] == depth.max()


def test_the_only_region_and_small_ones():
    assert [region.label for region in large_and_small(np.full((3, 4), 7))] == [7]
    assert [region.label for region in large_and_small(np.array([[1, 1, 1, 2]]))] == [1, 2]
    assert [region.label for region in large_and_small(np.array([[1, 1, 1], [2, 2, 2], [1, 1, 1]]))] == [1, 2]


def test_labels_in_the_middle_of_patches():
    labels = np.arange(70 * 91).reshape(70, 91)
    found = patch_labels(labels, 16)
    assert found.shape == (5, 6)
    assert found[0, 0] == labels[8, 8] and found[1, 2] == labels[24, 40]
    assert found[4, 5] == labels[69, 88], "the middle lies below the image: its last row"


def test_classes_of_a_model():
    model = tiny_model(n_cls=11)
    assert classes_of(model).name == "generic" and len(classes_of(model)) == 11
    model.info.classes = "camvid"
    assert classes_of(model).names == load_classes("camvid").names
    model.info.classes = "cityscapes"  # 19
    assert classes_of(model).name == "generic"


def test_legend_names_the_classes_that_are_there():
    classes = load_classes("camvid")
    found = legend(np.array([8, 3, 3, 255, 0]), classes)
    assert found == [(classes.palette[0], "0 Sky"), (classes.palette[3], "3 Road"), (classes.palette[8], "8 Car")]
    many = legend(np.arange(150), load_classes("ade20k"))
    assert len(many) == 21 and many[-1][1] == "and 130 more"


def test_panels():
    pixels, classes = image(60, 80), load_classes("camvid")
    labels = np.zeros((60, 80), np.uint8)
    labels[:, 40:] = 3
    np.testing.assert_array_equal(
        label_panel(pixels, labels, classes, "t").image, overlay(pixels, labels, classes, 0.6)
    )
    plain = label_panel(pixels, labels, classes, "t", alpha=1.0).image
    assert tuple(plain[0, 79]) == classes.palette[3]
    values = np.random.default_rng(0).random((4, 5))
    heat = heat_panel(values, 16, labels).image
    colors = heat_colors(values, 0.0, values.max())
    assert heat.shape == (60, 80, 3)
    np.testing.assert_array_equal(heat[59, 30], colors[3, 1])
    assert not np.array_equal(heat[59, 40], colors[3, 2]), "the border"
    np.testing.assert_array_equal(heat[59, 41], colors[3, 2])
    np.testing.assert_array_equal(heat_panel(values, 16, labels, 2.0).image[0, 0], heat_colors(values, 0.0, 2.0)[0, 0])


def test_numbers_stand_in_large_regions():
    from matplotlib.figure import Figure

    labels = np.zeros((60, 80), np.uint8)
    labels[10:50, 40:] = 3
    labels[0:2, 0:2] = 5
    axes = Figure().add_axes((0, 0, 1, 1))
    label_panel(image(60, 80), labels, load_classes("camvid"), "t").draw(axes)
    assert sorted(text.get_text() for text in axes.texts) == ["0", "3"]
    for text in axes.texts:
        x, y = text.get_position()
        assert labels[int(y), int(x)] == int(text.get_text())
