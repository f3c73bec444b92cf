"""Pages of panels, and the files of a figure."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from segmenter.figures.page import WIDTH, Figure, FigureError, Page, Panel, shortened, text_width
from tests.cli.tools import files, image

pytest.importorskip("matplotlib")


def page(pixels, **options):
    return Page(rows=[[Panel(pixels, "a title", "a caption\nof two lines"), Panel(pixels)], [Panel(pixels)]], **options)


def test_files_of_a_figure(tmp_path):
    figure = Figure("some-name", page(image()).picture(), {"numbers": [1.5]})
    figure.save(tmp_path / "new" / "folder", {"command": "x"})
    folder = tmp_path / "new" / "folder"
    assert files(folder) == ["some-name.json", "some-name.pdf", "some-name.png"]
    assert json.loads((folder / "some-name.json").read_text()) == {
        "figure": "some-name",
        "command": "x",
        "numbers": [1.5],
    }
    with Image.open(folder / "some-name.png") as png:
        assert abs(png.width - 170 / 25.4 * 300) <= 1
        assert round(png.info["dpi"][0]) == 300
    pdf = (folder / "some-name.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert float(re.search(rb"MediaBox \[ *0 0 ([\d.]+)", pdf)[1]) == pytest.approx(170 / 25.4 * 72, abs=0.1)
    assert figure.files({"command": "x"})["some-name.pdf"] == pdf, "the same bytes each time"


@pytest.mark.parametrize("shape", [(1, 400), (400, 1), (3, 3), (30, 2500)])
def test_images_of_any_shape_stay_on_the_page(shape):
    picture = page(
        image(*shape), legend=[((9, 9, 9), "x" * 200)] * 3, bars=[("what", "0", "1")], note="n " * 90
    ).picture()
    for axes in picture.axes:
        box = axes.get_position()
        assert -0.001 <= box.x0 < box.x1 <= 1.001 and -0.001 <= box.y0 < box.y1 <= 1.001
    assert picture.get_figwidth() == pytest.approx(WIDTH) and picture.get_figheight() < 2.5 * WIDTH


def test_texts_stay_on_the_page_and_are_no_formulas(tmp_path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    names = ["100 $ or 200 $ _ ^", "a class with quite a long name, longer than the page is wide, " * 2]
    legend = [((9, 9, 9), name) for name in names * 4]
    picture = page(image(), legend=legend, bars=[("what " * 9, "0", "largest")] * 2, note="word " * 60).picture()
    canvas = FigureCanvasAgg(picture)
    canvas.draw()
    width, height = picture.bbox.width, picture.bbox.height
    for text in picture.texts:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height, text.get_text()
        assert text.get_fontsize() >= 9, "smaller cannot be read on a phone"
    assert names[0] in [text.get_text() for text in picture.texts]


def test_rows_do_not_overlap():
    picture = page(image()).picture()
    boxes = [axes.get_position() for axes in picture.axes]
    assert boxes[0].y0 > boxes[2].y1 and boxes[0].x1 < boxes[1].x0


def test_panels_are_drawn_in_pixels_of_their_image():
    seen = []
    Page(rows=[[Panel(image(70, 91), draw=lambda axes: seen.append((axes.get_xlim(), axes.get_ylim())))]]).picture()
    assert seen == [((0, 91), (70, 0))]


def test_large_images_are_stored_as_fine_as_they_are_printed():
    picture = Page(rows=[[Panel(np.zeros((3000, 4000, 3), np.uint8))]]).picture()
    stored = picture.axes[0].images[0].get_array()
    assert stored.shape[1] <= 2007 and stored.shape[0] / stored.shape[1] == pytest.approx(0.75, abs=0.01)


def test_shortened():
    assert shortened("short", 1, 9) == "short"
    cut = shortened("a much longer text than half an inch holds", 0.5, 9)
    assert cut.endswith("...") and text_width(cut, 9) <= 0.5


def test_without_matplotlib(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FigureError, match="pip install matplotlib"):
        page(image()).picture()
