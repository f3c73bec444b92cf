"""How all figures look, and how they are written: panels in rows on a page 170 mm wide, to be read in print and on a
phone. matplotlib is imported when a figure is made."""

import bisect
import dataclasses
import importlib.util
import io
import json
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segmenter.errors import InputError
from segmenter.files import write_atomically
from segmenter.visualize import heat_colors

WIDTH = 170 / 25.4  # inches: the text width of a page
DPI = 300
TITLE, TEXT = 10, 9  # points; a phone shows the page at two fifths of its width
GREY, INK, RED = "#595959", "#141414", "#d00000"
_STYLE = {"pdf.fonttype": 42, "font.family": ["DejaVu Sans"], "text.usetex": False, "axes.linewidth": 0.6}
_GAP, _LINE = 0.09, 1.35 * TEXT / 72  # inches
_HIGHEST = 1.5  # times its width


class FigureError(InputError):
    """A figure cannot be made as asked; the message says why and what to do."""


class MissingInput(FigureError):
    """The model and the images given do not allow this figure; others they may."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture, and the numbers in it.

    Attributes:
        name: of its files. picture: a `matplotlib.figure.Figure`. data: for the JSON file.
    """

    name: str
    picture: Any
    data: dict[str, Any]

    def files(self, facts: dict[str, Any] | None = None) -> dict[str, bytes]:
        """What goes into NAME.pdf, NAME.png and NAME.json, the last after `facts`; the same each time."""
        import matplotlib

        found = {}
        with matplotlib.rc_context(_STYLE):
            for kind, metadata in (("pdf", {"CreationDate": None}), ("png", {})):
                file = io.BytesIO()
                self.picture.savefig(file, format=kind, dpi=DPI, metadata=metadata)
                found[f"{self.name}.{kind}"] = file.getvalue()
        text = json.dumps({"figure": self.name, **(facts or {}), **self.data}, indent=2)
        return found | {f"{self.name}.json": f"{text}\n".encode()}

    def save(self, directory: str | Path, facts: dict[str, Any] | None = None) -> None:
        """Writes NAME.pdf, NAME.png (300 dots an inch, 170 mm wide) and NAME.json into a folder, which is made."""
        directory = Path(directory)
        contents = self.files(facts)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_atomically(directory / name, lambda file, content=content: file.write(content))


@dataclasses.dataclass(frozen=True)
class Panel:
    """A picture on the page.

    Attributes:
        image: (H, W, 3) uint8. title: above it. caption: below it, a line or more.
        draw: called with the axes, in pixels of the image, for what lies over it.
    """

    image: np.ndarray
    title: str = ""
    caption: str = ""
    draw: Callable[[Any], None] | None = None


@dataclasses.dataclass
class Page:
    """Rows of panels, a legend, a colour bar and a note, from top to bottom; `picture` lays them out.

    Attributes:
        warning: in red on top.
    """

    warning: str | None = None
    rows: list[list[Panel]] = dataclasses.field(default_factory=list)
    legend: list[tuple[tuple[int, int, int], str]] = dataclasses.field(default_factory=list)
    bars: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    note: str = ""

    def picture(self) -> Any:
        """A `matplotlib.figure.Figure`, WIDTH wide and as high as it has to be."""
        figure = new_figure()
        blocks = [self._warning(), *map(self._row, self.rows), self._bars(), self._legend(), self._note()]
        blocks = [block for block in blocks if block]
        height = sum(height for height, _ in blocks) + _GAP * (len(blocks) + 1)
        figure.set_size_inches(WIDTH, height)
        top = height - _GAP
        for block_height, draw in blocks:
            draw(figure, top, height)
            top -= block_height + _GAP
        return figure

    # Each of these gives (height in inches, draw(figure, top, height of the figure)).

    def _row(self, panels: Sequence[Panel]) -> tuple:
        columns = max(len(row) for row in self.rows)
        width = (WIDTH - _GAP * (columns + 1)) / columns
        sizes = [_fitted(panel.image, width) for panel in panels]
        images = max(h for h, _ in sizes)
        title = any(panel.title for panel in panels) * 1.5 * TITLE / 72
        lines = max(panel.caption.count("\n") + bool(panel.caption) for panel in panels)

        def draw(figure: Any, top: float, height: float) -> None:
            for i, (panel, (h, w)) in enumerate(zip(panels, sizes, strict=True)):
                left = _GAP + i * (width + _GAP)
                texts = [(panel.title, top, TITLE, INK), (panel.caption, top - title - images - 0.04, TEXT, GREY)]
                for text, y, size, color in texts:
                    cut = "\n".join(shortened(line, width, size) for line in text.split("\n"))
                    write(figure, left, y, height, cut, size, color)
                axes = figure.add_axes(_box(left + (width - w) / 2, top - title, w, h, height))
                show(axes, panel.image, round(w * DPI))
                if panel.draw is not None:
                    panel.draw(axes)

        return title + images + lines * _LINE + (0.04 if lines else 0), draw

    def _legend(self) -> tuple | None:
        if not self.legend:
            return None
        places, x, y, swatch = [], _GAP, 0.0, 0.13
        for color, name in self.legend:
            needed = swatch + 0.06 + text_width(name, TEXT)
            if x > _GAP and x + needed > WIDTH - _GAP:
                x, y = _GAP, y + 1.15 * _LINE
            places.append((color, name, x, y))
            x += needed + 0.17

        def draw(figure: Any, top: float, height: float) -> None:
            for color, name, x, y in places:
                axes = figure.add_axes(_box(x, top - y, swatch, swatch, height))
                axes.set(xticks=[], yticks=[], facecolor=tuple(c / 255 for c in color))
                write(figure, x + swatch + 0.06, top - y, height, shortened(name, WIDTH - 0.5, TEXT), TEXT)

        return y + _LINE, draw

    def _bars(self) -> tuple | None:
        """Colour bars beside each other: what, and what stands at either end."""
        if not self.bars:
            return None

        def draw(figure: Any, top: float, height: float) -> None:
            width = (WIDTH - _GAP) / len(self.bars)
            for i, (what, low, high) in enumerate(self.bars):
                left = _GAP + i * width
                write(figure, left, top, height, shortened(what, width - _GAP, TEXT), TEXT)
                y = top - _LINE - 0.02
                write(figure, left, y, height, low, TEXT)
                at = left + text_width(low, TEXT) + 0.06
                long = max(0.3, min(1.6, width - _GAP - text_width(low + high, TEXT) - 0.25))
                axes = figure.add_axes(_box(at, y, long, 0.13, height))
                show(axes, np.tile(heat_colors(np.linspace(0, 1, 256))[None], (20, 1, 1)), 256, aspect="auto")
                write(figure, at + long + 0.06, y, height, high, TEXT)

        return 2 * _LINE + 0.05, draw

    def _note(self) -> tuple | None:
        if not self.note:
            return None
        letters = max(10, math.floor(0.97 * (WIDTH - 2 * _GAP) * len(self.note) / text_width(self.note, TEXT)))
        lines = textwrap.wrap(self.note, letters)
        text = "\n".join(lines)
        return len(lines) * _LINE, lambda figure, top, height: write(figure, _GAP, top, height, text, TEXT, GREY)

    def _warning(self) -> tuple | None:
        if not self.warning:
            return None
        return _LINE, lambda figure, top, height: write(figure, _GAP, top, height, self.warning, TITLE, RED)


def new_figure() -> Any:
    """An empty `matplotlib.figure.Figure`, WIDTH wide. Raises FigureError without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise FigureError("figures are drawn by matplotlib, which is not installed: pip install matplotlib")
    import matplotlib
    from matplotlib.figure import Figure as Picture

    with matplotlib.rc_context(_STYLE):
        return Picture(figsize=(WIDTH, WIDTH), facecolor="white")


def write(figure: Any, x: float, y: float, height: float, text: str, size: float, color: str = INK) -> None:
    """Text whose upper left corner is x inches from the left and y from the bottom of a figure of this height."""
    figure.text(x / WIDTH, y / height, text, fontsize=size, color=color, va="top", parse_math=False)


def show(axes: Any, image: np.ndarray, most: int, aspect: str = "equal") -> None:
    """An image in axes of its pixels; what is stored is no wider than `most` pixels."""
    h, w = image.shape[:2]
    stored = image if w <= most else np.array(Image.fromarray(image).resize((most, max(1, round(h * most / w)))))
    how = "nearest" if w < most else "antialiased"
    axes.imshow(stored, extent=(0, w, h, 0), interpolation=how, aspect=aspect)
    axes.set(xlim=(0, w), ylim=(h, 0), xticks=[], yticks=[])


def text_width(text: str, size: float) -> float:
    """Inches."""
    from matplotlib.textpath import TextPath

    if not text.strip():
        return 0.0
    return float(TextPath((0, 0), text.replace("$", "S"), size=size).get_extents().x1) / 72


def shortened(text: str, room: float, size: float) -> str:
    """The text, its end replaced by dots if it is wider than `room` inches."""
    if text_width(text, size) <= room:
        return text
    fitting = bisect.bisect_right(range(1, len(text)), room, key=lambda n: text_width(f"{text[:n]}...", size))
    return f"{text[:fitting]}..."


def frame(axes: Any, patch: tuple[int, int], patch_size: int, letter: str = "") -> None:
    """A red and white frame around the patch (row, column), and a letter beside it."""
    from matplotlib.patches import Rectangle

    y, x = (place * patch_size for place in patch)
    for color, line in (("white", 3.0), (RED, 1.5)):
        axes.add_patch(Rectangle((x, y), patch_size, patch_size, fill=False, edgecolor=color, linewidth=line))
    if letter:
        left = x + patch_size < 0.9 * axes.get_xlim()[1]
        at = (x + 1.3 * patch_size, y + patch_size / 2) if left else (x - 0.3 * patch_size, y + patch_size / 2)
        haloed(axes, *at, letter, ha="left" if left else "right")


def haloed(axes: Any, x: float, y: float, text: str, ha: str = "center") -> None:
    """Bold text in white with a dark rim, to be read on any colour."""
    from matplotlib.patheffects import withStroke

    rim = [withStroke(linewidth=2, foreground="black")]
    axes.text(x, y, text, color="white", fontsize=TEXT, weight="bold", ha=ha, va="center", path_effects=rim)


def ring(axes: Any, centre: tuple[float, float], radius: float) -> None:
    """A circle around (x, y), white on black."""
    from matplotlib.patches import Circle

    for color, line in (("black", 2.4), ("white", 1.2)):
        axes.add_patch(Circle(centre, radius, fill=False, edgecolor=color, linewidth=line))


def _fitted(image: np.ndarray, width: float) -> tuple[float, float]:
    """(height, width) in inches of an image in a column."""
    h, w = image.shape[:2]
    height = min(width * h / w, _HIGHEST * width)
    return max(height, 0.04), max(min(width, height * w / h), 0.04)


def _box(left: float, top: float, width: float, height: float, figure_height: float) -> tuple:
    """A rectangle in inches, `top` from the bottom, as matplotlib wants it."""
    return left / WIDTH, (top - height) / figure_height, width / WIDTH, height / figure_height
