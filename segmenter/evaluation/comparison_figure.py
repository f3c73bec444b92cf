"""The figure of `segmenter compare`: columns of the photograph, each model's labels and the truth, enlarged below.

All sizes are pixels of the finished figure, made to be readable when it is shrunk to half its size.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from segmenter.classes import ClassSet
from segmenter.data.label_files import ignore_index
from segmenter.evaluation.compare import Compared, border_pixels, telling_part
from segmenter.visualize import class_shares, enlarge, overlay

COLUMN = 480  # width of a panel; images of CamVid fill it pixel by pixel
MAX_COLUMNS = 5  # photograph, three patch sizes and truth stand in one row
_HIGHEST = 720
_LARGEST_FACTOR = 32  # of images a few pixels wide
_GAP, _MARGIN = 28, 28
_TITLE, _TEXT, _SMALL = 38, 28, 24
_LINE = 38
_ALPHA, _ZOOM_ALPHA = 0.6, 0.7
_MOST_CLASSES = 30
_INK, _GREY, _RED, _WHITE = (20, 20, 20), (105, 105, 105), (200, 0, 0), (255, 255, 255)


Facts = tuple[tuple[str, str], ...]  # what stands left and right below a panel


@dataclass(frozen=True)
class Panel:
    """One column, from top to bottom; image and zoom are (height, width, 3) uint8, at most COLUMN wide."""

    title: str
    image: np.ndarray
    zoom: np.ndarray
    facts: Facts
    warning: str | None = None


@dataclass(frozen=True)
class Part:
    """A rectangle of the image, in its pixels, and how many times as large it is shown."""

    top: int
    left: int
    height: int
    width: int
    factor: int

    def of(self, image: np.ndarray) -> np.ndarray:
        """The part of (H, W, ...), enlarged without smoothing."""
        rows, columns = slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)
        return enlarge(image[rows, columns], self.factor)


def choose_part(predictions: Sequence[np.ndarray], truth: np.ndarray | None, n_cls: int) -> Part:
    """The part to enlarge, a column wide when it is: a quarter of the usual image's width; see `telling_part`."""
    height, width = predictions[0].shape
    factor = min(max(2, round(4 * COLUMN / width)), _LARGEST_FACTOR)
    w = max(1, min(COLUMN // factor, width))
    h = max(1, min(w * 3 // 4, height))
    return Part(*telling_part(predictions, truth, ignore_index(n_cls), (h, w)), h, w, factor)


def comparison_figure(
    pixels: np.ndarray,
    models: Sequence[Compared],
    truth: np.ndarray | None,
    classes: ClassSet,
    part: Part,
    notes: Sequence[str],
) -> np.ndarray:
    """Photograph, models and, if there is one, the truth side by side, with their figures and a legend.

    Below each stands, enlarged without smoothing, the part where the models differ most along boundaries; the lines
    in it are the borders of the truth.

    Args:
        pixels: (H, W, 3) uint8. truth: labels (H, W), those of `ignore_index(len(classes))` are shown dark.
        part: what is enlarged, of `choose_part`. notes: sentences for the foot of the figure.
    Returns:
        RGB (height, width, 3) uint8.
    """
    panels = make_panels(pixels, models, truth, classes, part)
    rows = math.ceil(len(panels) / MAX_COLUMNS)
    columns = math.ceil(len(panels) / rows)
    width = 2 * _MARGIN + columns * COLUMN + (columns - 1) * _GAP
    strips = [_row(panels[i : i + columns], width) for i in range(0, len(panels), columns)]
    maps = [model.labels for model in models] + ([] if truth is None else [truth[truth != ignore_index(len(classes))]])
    strips += [_legend(np.concatenate([labels.ravel() for labels in maps]), classes, width), _foot(notes, width)]
    return np.concatenate(strips)


def make_panels(
    pixels: np.ndarray, models: Sequence[Compared], truth: np.ndarray | None, classes: ClassSet, part: Part
) -> list[Panel]:
    """The columns from left to right; arguments as of `comparison_figure`."""
    height, width = pixels.shape[:2]
    counted = None if truth is None else truth != ignore_index(len(classes))
    borders = None if truth is None else _thick(border_pixels(part.of(truth), part.of(counted)))

    def labelled(title: str, labels: np.ndarray, facts: Facts, warning: str | None = None) -> Panel:
        zoom = part.of(overlay(pixels, labels, classes, _ZOOM_ALPHA))
        if borders is not None:
            zoom[borders] = _WHITE
        return Panel(title, _framed(_fit(overlay(pixels, labels, classes, _ALPHA)), part, height), zoom, facts, warning)

    facts = (("size", f"{width} x {height}"), ("below", f"{part.factor} times as large"))
    panels = [Panel("photograph", _framed(_fit(pixels), part, height), part.of(pixels), facts)]
    panels += [labelled(f"patch {m.patch_size}", m.labels, _facts(m), m.warning) for m in models]
    if truth is not None:
        shown = np.where(counted, truth, len(classes))  # beyond the classes: black
        panels.append(labelled("ground truth", shown, (("not labelled (dark)", f"{100 * np.mean(~counted):.1f} %"),)))
    return panels


def _facts(model: Compared) -> Facts:
    scores = [(label, model.scores[key]) for label, key in (("boundary F", "bF"), ("mIoU", "mIoU")) if model.scores]
    return (
        ("model", model.name),
        ("parameters", f"{model.parameters / 1e6:.1f} M"),
        ("tokens", f"{model.tokens:,}"),
        *((label, "none" if value is None else f"{value:.1f} %") for label, value in scores),
        ("time", f"{model.median:,.0f} ms" if model.median >= 100 else f"{model.median:.3g} ms"),
    )


def _thick(lines: np.ndarray) -> np.ndarray:
    """(H, W) bool: lines of one pixel made two wide."""
    thick = lines.copy()
    thick[:-1] |= lines[1:]
    thick[:, :-1] |= lines[:, 1:]
    return thick


def _fit(image: np.ndarray) -> np.ndarray:
    """An image as wide as a column, or as high as may be; enlarged without smoothing."""
    height, width = image.shape[:2]
    scale = min(COLUMN / width, _HIGHEST / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return np.array(Image.fromarray(image).resize(size, how))


def _framed(image: np.ndarray, part: Part, height: int) -> np.ndarray:
    """With a white frame in black edges around the part of an image that was `height` pixels high."""
    scale = len(image) / height
    top, left, h, w = (round(value * scale) for value in (part.top, part.left, part.height, part.width))
    canvas = Image.fromarray(image)
    draw = ImageDraw.Draw(canvas)
    for inset, color in ((0, "black"), (1, "white"), (2, "white"), (3, "black")):
        corners = left + inset, top + inset, left + w - 1 - inset, top + h - 1 - inset
        if corners[2] >= corners[0] and corners[3] >= corners[1]:
            draw.rectangle(corners, outline=color)
    return np.array(canvas)


def _row(panels: Sequence[Panel], width: int) -> np.ndarray:
    """Panels side by side; images, enlarged parts and facts of all begin at the same heights."""
    images, zooms = (max(len(getattr(panel, name)) for panel in panels) for name in ("image", "zoom"))
    lines = max(len(panel.facts) + (panel.warning is not None) for panel in panels)
    top = _MARGIN + round(1.4 * _TITLE)
    zoom_top = top + images + _GAP
    facts_top = zoom_top + zooms + _GAP
    canvas = Image.new("RGB", (width, facts_top + lines * _LINE), "white")
    draw = ImageDraw.Draw(canvas)
    for i, panel in enumerate(panels):
        left = _MARGIN + i * (COLUMN + _GAP)
        draw.text((left, top - _TITLE // 3), panel.title, _INK, _font(_TITLE), anchor="ls")
        for y, image in ((top, panel.image), (zoom_top, panel.zoom)):
            canvas.paste(Image.fromarray(image), (left, y))
            if panel.warning:
                _draw_banner(draw, left, y + len(image), panel.warning)
        _draw_facts(draw, left, facts_top, panel)
    return np.array(canvas)


def _draw_banner(draw: ImageDraw.ImageDraw, left: int, bottom: int, warning: str) -> None:
    """The first part of the warning in white on red, over the lower end of an image."""
    draw.rectangle((left, bottom - _LINE, left + COLUMN - 1, bottom - 1), _RED)
    middle = left + COLUMN // 2, bottom - _LINE // 2
    draw.text(middle, warning.partition(":")[0].upper(), _WHITE, _font(_TEXT), anchor="mm")


def _draw_facts(draw: ImageDraw.ImageDraw, left: int, top: int, panel: Panel) -> None:
    font, middle = _font(_TEXT), top + _LINE // 2
    for key, value in panel.facts:
        draw.text((left, middle), key, _GREY, font, anchor="lm")
        room = COLUMN - font.getlength(f"{key}  ")
        draw.text((left + COLUMN, middle), _cut(value, font, room), _INK, font, anchor="rm")
        middle += _LINE
    if panel.warning:
        draw.text((left, middle), panel.warning, _RED, font, anchor="lm")


def _legend(labels: np.ndarray, classes: ClassSet, width: int) -> np.ndarray:
    """Colours and names of the classes in `labels` (any shape), in lines across the figure, by id."""
    font, swatch = _font(_TEXT), _TEXT
    shown = class_shares(labels, classes)
    rest = len(shown) - _MOST_CLASSES
    entries = sorted((row["id"], row["name"]) for row in shown[:_MOST_CLASSES])
    palette = classes.palette_array(max(i for i, _ in entries) + 1)
    items = [(tuple(palette[i].tolist()), _cut(name, font, COLUMN)) for i, name in entries]
    items += [(None, f"and {rest} more")] if rest > 0 else []
    places, x, y = [], _MARGIN, _MARGIN
    for _, name in items:
        needed = math.ceil(swatch * 1.4 + font.getlength(name))
        if x > _MARGIN and x + needed > width - _MARGIN:
            x, y = _MARGIN, y + _LINE + 4
        places.append((x, y))
        x += needed + 2 * _GAP
    canvas = Image.new("RGB", (width, y + _LINE), "white")
    draw = ImageDraw.Draw(canvas)
    for (color, name), (x, y) in zip(items, places, strict=True):
        middle = y + _LINE // 2
        if color is not None:
            top = middle - swatch // 2
            draw.rectangle((x, top, x + swatch - 1, top + swatch - 1), color, "black")
        draw.text((x + swatch * 1.4, middle), name, _INK, font, anchor="lm")
    return np.array(canvas)


def _foot(notes: Sequence[str], width: int) -> np.ndarray:
    font = _font(_SMALL)
    text = " ".join(notes)
    letters = int(0.97 * (width - 2 * _MARGIN) * len(text) / font.getlength(text))  # as many as are wide on average
    lines = textwrap.wrap(text, letters)
    canvas = Image.new("RGB", (width, 2 * _MARGIN + len(lines) * _LINE), "white")
    draw = ImageDraw.Draw(canvas)
    for i, line in enumerate(lines):
        draw.text((_MARGIN, _MARGIN + i * _LINE + _LINE // 2), line, _GREY, font, anchor="lm")
    return np.array(canvas)


def _cut(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """The text in one line, its end replaced by dots if it is wider than `room`."""
    text = " ".join(text.split())
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(f"{text}...") > room:
        text = text[:-1]
    return f"{text}..."


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)
