"""Colours, overlays, legends, label files, attention grids."""

import os

import numpy as np
import pytest
from PIL import Image

import segmenter.visualize as visualize
from segmenter.classes import ClassSet, generic_classes, load_classes

ABC = ClassSet("abc", ("ant", "bee", "cat"), ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
LABELS = np.uint8([[0, 1, 2, 255], [1, 1, 1, 1]])


def test_class_shares_are_sorted_and_sum_to_one():
    shares = visualize.class_shares(LABELS, ABC)
    assert [(s["id"], s["name"], s["pixels"]) for s in shares] == [
        (1, "bee", 5), (0, "ant", 1), (2, "cat", 1), (255, "label 255", 1)
    ]  # fmt: skip
    assert [s["share"] for s in shares] == [0.625, 0.125, 0.125, 0.125]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_colorize(dtype):
    got = visualize.colorize(LABELS.astype(dtype), ABC)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got[0], [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)])


def test_overlay_blends():
    image = np.full((2, 4, 3), 100, np.uint8)
    np.testing.assert_array_equal(visualize.overlay(image, LABELS, ABC, 0.0), image)
    np.testing.assert_array_equal(visualize.overlay(image, LABELS, ABC, 1.0), visualize.colorize(LABELS, ABC))
    quarter = visualize.overlay(image, LABELS, ABC, 0.25)
    np.testing.assert_allclose(quarter[0, :2], [(138.75, 75, 75), (75, 138.75, 75)], atol=1)
    assert quarter.dtype == np.uint8


def test_overlay_refuses_nonsense():
    with pytest.raises(ValueError, match="differ in size"):
        visualize.overlay(np.zeros((2, 3, 3), np.uint8), LABELS, ABC)
    with pytest.raises(ValueError, match="alpha 2 must lie in"):
        visualize.overlay(np.zeros((2, 4, 3), np.uint8), LABELS, ABC, 2)


def color_rows(panel, color):
    """First and last row in which `color` occurs."""
    rows = np.flatnonzero((panel == color).all(2).any(1))
    return rows[0], rows[-1]


def test_legend_has_a_swatch_a_class_in_order_and_text():
    labels = np.repeat(np.repeat(LABELS, 100, 0), 100, 1)
    panel = visualize.legend(labels, ABC)
    assert panel.shape[0] == 200
    spans = [color_rows(panel, color) for color in ((0, 255, 0), (255, 0, 0), (0, 0, 255))]  # by share, then by id
    for above, below in zip(spans, spans[1:], strict=False):
        assert above[1] < below[0], "swatches do not overlap"
    text = panel[:, panel.shape[1] // 3 :]
    inked = (text < 128).all(2).any(1)
    starts, ends = (np.flatnonzero(np.diff(inked.astype(int)) == step) for step in (1, -1))
    assert len(starts) == 4, "four lines of text with gaps between"
    for swatch, start, end in zip(spans, starts, ends, strict=False):
        assert abs(sum(swatch) - start - end) <= 8, "a name is level with its swatch"
    border = np.concatenate([panel[0], panel[-1], panel[:, 0], panel[:, -1]])
    assert (border == 255).all(), "nothing is cut off"


def test_legend_sums_up_what_does_not_fit():
    labels = np.arange(150, dtype=np.uint8).repeat(40).reshape(60, 100)
    panel = visualize.legend(labels, load_classes("ade20k"))
    swatches = {tuple(c) for c in load_classes("ade20k").palette} & {tuple(c) for c in panel.reshape(-1, 3).tolist()}
    assert len(swatches) <= 10
    assert panel.shape[0] < 250


def test_legend_grows_with_the_image_and_cuts_long_names():
    small, large = (visualize.legend(np.ones((side, side), np.uint8), ABC) for side in (300, 1500))
    assert large.shape[1] > 2 * small.shape[1]
    long = ClassSet("long", ("x" * 500,), ((1, 2, 3),))
    assert visualize.legend(np.zeros((300, 300), np.uint8), long).shape[1] < 500


@pytest.mark.parametrize("shape", [(1, 1), (300, 400)])
def test_with_legend_keeps_the_image(shape):
    labels = np.ones(shape, np.uint8)
    image = np.full((*shape, 3), 77, np.uint8)
    got = visualize.with_legend(image, labels, ABC)
    np.testing.assert_array_equal(got[: shape[0], : shape[1]], image)
    assert (got[shape[0] :, : shape[1]] == 255).all()
    assert (got[:, shape[1] :] == (0, 255, 0)).all(2).any()


def test_label_png_is_indexed_with_the_palette(tmp_path):
    path = tmp_path / "labels.png"
    visualize.save_label_png(LABELS, path, ABC)
    with Image.open(path) as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.array(image), LABELS)
        np.testing.assert_array_equal(np.array(image.convert("RGB")), visualize.colorize(LABELS, ABC))


@pytest.mark.parametrize(
    ("labels", "classes", "dtype"),
    [
        (LABELS, None, np.uint8),
        (np.int16([[0, 299]]), None, np.uint16),
        (np.int16([[0, 7]]), generic_classes(300), np.uint16),
        (np.int32([[1, 65_534]]), None, np.uint16),
    ],
)
def test_label_png_without_palette(tmp_path, labels, classes, dtype):
    visualize.save_label_png(labels, tmp_path / "labels.png", classes)
    with Image.open(tmp_path / "labels.png") as image:
        assert image.mode in ("L", "I;16", "I")
        np.testing.assert_array_equal(np.array(image), labels)
        assert np.array(image).dtype.itemsize >= np.dtype(dtype).itemsize


def test_heat_colors_run_from_dark_blue_to_yellow():
    ramp = visualize.heat_colors(np.linspace(3, 4, 256))
    np.testing.assert_array_equal(ramp[[0, 255]], [(68, 1, 84), (253, 231, 37)])
    np.testing.assert_array_equal(visualize.heat_colors(np.float32([0, 0.2, 1]))[1], (65, 68, 135))
    brightness = ramp @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(brightness) >= -1).all(), "brighter means more"
    assert len(np.unique(ramp, axis=0)) > 200
    np.testing.assert_array_equal(visualize.heat_colors(np.full((2, 2), 0.5)), np.full((2, 2, 3), (68, 1, 84)))


def test_enlarge_and_mark_patch():
    grid = np.arange(12).reshape(2, 2, 3).astype(np.uint8)
    big = visualize.enlarge(grid, 5)
    assert big.shape == (10, 10, 3)
    np.testing.assert_array_equal(big[4, 5], grid[0, 1])
    np.testing.assert_array_equal(big[5, 4], grid[1, 0])
    marked = visualize.mark_patch(big, 1, 0, 5)
    assert (marked[:5, 5:] == (255, 0, 0)).all()
    marked[:5, 5:] = big[:5, 5:]
    np.testing.assert_array_equal(marked, big)


@pytest.mark.parametrize("n", [1, 4, 7, 13])
def test_attention_grid_shows_every_tile_once(n):
    tiles = [(f"head {i}", np.full((60, 80, 3), color, np.uint8)) for i, color in enumerate(generic_classes(n).palette)]
    grid = visualize.attention_grid(tiles)
    for _, tile in tiles:
        rows, columns = np.nonzero((grid == tile[0, 0]).all(2))
        assert len(rows) == 60 * 80
        assert (np.ptp(rows), np.ptp(columns)) == (59, 79)
    assert grid.shape[0] * grid.shape[1] < 2.5 * n * 60 * 80 + 8000, "few gaps"


def test_attention_grid_keeps_long_text_apart():
    tiles = [("a very long caption that is wider than its tile", np.zeros((16, 16, 3), np.uint8))] * 2
    grid = visualize.attention_grid(tiles)
    dark_columns = (grid < 128).all(2)[:16].any(0)
    gaps = np.flatnonzero(~dark_columns)
    assert np.diff(gaps).max() < grid.shape[1] // 2
    assert (grid[:, -2:] == 255).all()


def test_texts_of_small_tiles_do_not_touch():
    dark = (visualize.attention_grid([("M" * 9, np.zeros((90, 1, 3), np.uint8))] * 2)[:16] < 128).all(2).any(0)
    columns = np.flatnonzero(dark)
    assert np.sort(np.diff(columns))[-2:].tolist()[1] >= 8


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    visualize.write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the new")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        visualize.write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    os.link(path, tmp_path / "link")
    visualize.write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert (tmp_path / "link").read_bytes() == b"old", "the old file is replaced, never written into"
    (tmp_path / "link").unlink()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_heat_maps_go_from_0_to_the_largest_over_the_image():
    image = np.full((14, 27, 3), 100, np.uint8)
    values = np.float32([[0.1, 0.2, 0.4], [0.0, 0.1, 0.3]])
    plain = visualize.heat_map(values, 9, image, alpha=1.0, smooth=False)
    assert plain.shape == (14, 27, 3)
    np.testing.assert_array_equal(plain, visualize.enlarge(visualize.heat_colors(values, 0.0, 0.4), 9)[:14])
    assert plain[0, -1].tolist() == [253, 231, 37] and plain[-1, 0].tolist() == [68, 1, 84]
    np.testing.assert_array_equal(visualize.heat_map(values, 9, image, alpha=0.0), image)
    smooth = visualize.heat_map(values, 9, image, alpha=1.0)
    np.testing.assert_array_equal(smooth[4, 4::9], plain[4, 4::9])  # in the middle of patches
    assert len(np.unique(smooth.reshape(-1, 3), axis=0)) > 20
    half = visualize.heat_map(values, 9, image, alpha=0.5, smooth=False)
    assert np.abs(half.astype(int) - (plain.astype(int) + 100) // 2).max() <= 1
    assert visualize.heat_map(np.zeros((1, 1)), 9, image[:9, :9], 1.0)[0, 0].tolist() == [68, 1, 84]


@pytest.mark.parametrize(("h", "w"), [(300, 400), (40, 20), (2000, 90)])
def test_color_bar_stands_right_of_the_image(h, w):
    image = np.full((h, w, 3), 77, np.uint8)
    got = visualize.with_color_bar(image, 0.25, "share")
    assert got.shape[0] >= h and got.shape[1] > w
    np.testing.assert_array_equal(got[:h, :w], image)
    bar = got[:, w:].reshape(-1, 3)
    for color in ([253, 231, 37], [68, 1, 84], [0, 0, 0], [255, 255, 255]):
        assert (bar == color).all(-1).any()
    rows = (got[:, w:] == [253, 231, 37]).all(-1).any(1).nonzero()[0]
    assert rows[0] < (got[:, w:] == [68, 1, 84]).all(-1).any(1).nonzero()[0][0], "the largest is at the top"


@pytest.mark.parametrize(
    ("high", "numbers"),
    [
        (0.04, ["0.040", "0.030", "0.020", "0.010", "0"]),
        (1.0, ["1.00", "0.75", "0.50", "0.25", "0"]),
        (2e-9, ["2.0e-09", "1.5e-09", "1.0e-09", "5.0e-10", "0"]),
        (0.0, ["0", "0", "0", "0", "0"]),
        (float("nan"), ["nan", "nan", "nan", "nan", "0"]),
    ],
)
def test_numbers_of_the_color_bar_are_those_of_its_quarters(high, numbers):
    assert visualize._bar_numbers(high) == numbers


def test_frames_leave_the_patch_visible():
    image = np.arange(48 * 64 * 3).reshape(48, 64, 3).astype(np.uint8)
    framed = visualize.frame_patch(image, 1, 2, 16)
    np.testing.assert_array_equal(framed[16:32, 32:48], image[16:32, 32:48])
    assert (framed[15, 32:48] == (255, 0, 0)).all() and (framed[16:32, 48] == (255, 0, 0)).all()
    assert (framed[13, 32:48] == (255, 255, 255)).all()
    assert (framed != image).any(-1).sum() == 24 * 24 - 16 * 16
    np.testing.assert_array_equal(visualize.shrunk(image, 64), image)
    assert visualize.shrunk(image, 32).shape == (24, 32, 3)
