"""Labels and attention as images: colours, overlay, legend, label files, grids of attention maps."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from segmenter.classes import ClassSet
from segmenter.files import write_atomically

# 16 equally spaced colours of matplotlib's "viridis".
_VIRIDIS = np.array(
    [(68, 1, 84), (72, 26, 108), (71, 47, 125), (65, 68, 135), (57, 86, 140), (49, 104, 142), (42, 120, 142)]
    + [(35, 136, 142), (31, 152, 139), (34, 168, 132), (53, 183, 121), (84, 197, 104), (122, 209, 81)]
    + [(165, 219, 54), (210, 226, 27), (253, 231, 37)]
)
_LONGEST_NAME = 28
_RED = (255, 0, 0)


def class_shares(labels: np.ndarray, classes: ClassSet) -> list[dict[str, Any]]:
    """The classes present, largest first: {"id", "name", "pixels", "share"}; the shares sum to 1."""
    ids, counts = np.unique(np.asarray(labels), return_counts=True)
    rows = []
    for i, pixels in sorted(zip(ids.tolist(), counts.tolist(), strict=True), key=lambda row: (-row[1], row[0])):
        name = classes.names[i] if 0 <= i < len(classes) else f"label {i}"
        rows.append({"id": i, "name": name, "pixels": pixels, "share": pixels / counts.sum().item()})
    return rows


def colorize(labels: np.ndarray, classes: ClassSet) -> np.ndarray:
    """Labels (H, W), any integer type, none negative -> RGB (H, W, 3) uint8; ids beyond the classes are black."""
    labels = np.asarray(labels)
    return classes.palette_array(int(labels.max()) + 1)[labels]


def overlay(image: np.ndarray, labels: np.ndarray, classes: ClassSet, alpha: float = 0.5) -> np.ndarray:
    """RGB bytes (H, W, 3) with the class colours laid over them; alpha 0 is the image, 1 the colours alone."""
    if image.shape[:2] != np.shape(labels):
        raise ValueError(f"image {image.shape[:2]} and labels {np.shape(labels)} differ in size")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha} must lie in 0..1")
    colors = Image.fromarray(colorize(labels, classes))
    return np.array(Image.blend(Image.fromarray(image), colors, alpha))  # in bytes: floats would take 12 a pixel


def legend(labels: np.ndarray, classes: ClassSet) -> np.ndarray:
    """A panel to stand right of the image: colour, name and share of the classes present, largest first.

    Letters grow with the image. What does not fit in its height is summed in a last line.

    Returns:
        RGB (at least H, width of the text, 3) uint8.
    """
    height, width = np.shape(labels)
    size = min(max(min(height, 2 * width) // 28, 12), 96)
    font, line, margin = _font(size), round(1.6 * size), size
    rows = [(classes.palette_array(s["id"] + 1)[-1], s["name"], s["share"]) for s in class_shares(labels, classes)]
    fitting = max((height - 2 * margin) // line, 8)
    if len(rows) > fitting:
        rest = rows[fitting - 1 :]
        rows = [*rows[: fitting - 1], (None, f"{len(rest)} more", sum(share for _, _, share in rest))]
    rows = [(color, _short(name), _percent(share)) for color, name, share in rows]

    name_width = math.ceil(max(font.getlength(name) for _, name, _ in rows))
    share_width = math.ceil(max(font.getlength(share) for _, _, share in rows))
    names_at = margin + round(1.6 * size)
    shares_end = names_at + name_width + size + share_width
    panel = Image.new("RGB", (shares_end + margin, max(height, 2 * margin + len(rows) * line)), "white")
    draw = ImageDraw.Draw(panel)
    for i, (color, name, share) in enumerate(rows):
        middle = margin + i * line + line // 2
        if color is not None:
            top = middle - size // 2
            draw.rectangle((margin, top, margin + size, top + size), tuple(color.tolist()), "black")
        draw.text((names_at, middle), name, "black", font, anchor="lm")
        draw.text((shares_end, middle), share, "black", font, anchor="rm")
    return np.array(panel)


def with_legend(image: np.ndarray, labels: np.ndarray, classes: ClassSet) -> np.ndarray:
    """The RGB image with the `legend` of its labels on its right; a low image gets white below."""
    panel = legend(labels, classes)
    canvas = np.full((panel.shape[0], image.shape[1] + panel.shape[1], 3), 255, np.uint8)
    canvas[: image.shape[0], : image.shape[1]] = image
    canvas[:, image.shape[1] :] = panel
    return canvas


def save_png(image: np.ndarray, path: str | Path) -> None:
    """Writes (H, W, 3) or (H, W) uint8, or (H, W) uint16."""
    _write_png(Image.fromarray(image), path)


def save_label_png(labels: np.ndarray, path: str | Path, classes: ClassSet | None = None) -> None:
    """Writes labels (H, W) as a PNG whose pixel values are the labels.

    With `classes` its colours go in as the palette, so that viewers show them and readers get the labels. Without, or
    with labels above 255, it is a plain grey image of 8 or 16 bits.
    """
    labels = np.asarray(labels)
    wide = labels.max() > 255 or (classes is not None and len(classes) > 256)
    image = Image.fromarray(labels.astype(np.uint16 if wide else np.uint8))
    if classes is not None and not wide:
        image.putpalette(classes.palette_array(256).tobytes())
    _write_png(image, path)


def heat_colors(values: np.ndarray, low: float | None = None, high: float | None = None) -> np.ndarray:
    """Numbers of any shape -> RGB uint8 (..., 3): viridis from `low` (dark blue) to `high` (yellow), by default the
    smallest and the largest of them."""
    values = np.asarray(values, dtype=np.float64)
    low, high = values.min() if low is None else low, values.max() if high is None else high
    position = (values - low) / (high - low if high > low else 1) * (len(_VIRIDIS) - 1)
    anchors = np.arange(len(_VIRIDIS))
    return np.stack([np.interp(position, anchors, channel) for channel in _VIRIDIS.T], -1).round().astype(np.uint8)


def enlarge(grid: np.ndarray, patch_size: int) -> np.ndarray:
    """Each cell of (gh, gw, ...) becomes a square of `patch_size` pixels."""
    return grid.repeat(patch_size, 0).repeat(patch_size, 1)


def heat_map(
    values: np.ndarray, patch_size: int, image: np.ndarray, alpha: float = 0.6, smooth: bool = True
) -> np.ndarray:
    """Numbers of patches (rows, columns) as colours from 0 to the largest, over the RGB image (H, W, 3) they are of.

    Args:
        alpha: strength of the colours; 1 hides the image. smooth: interpolated between the centres of patches, as masks
            are; else each patch has one colour.
    Returns:
        (H, W, 3) uint8; what patches at the borders have beyond the image is cut off.
    """
    size = (values.shape[1] * patch_size, values.shape[0] * patch_size)
    how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    fine = np.array(Image.fromarray(np.asarray(values, np.float32)).resize(size, how))
    fine = fine[: image.shape[0], : image.shape[1]]
    colors = Image.fromarray(heat_colors(fine, 0.0, float(values.max())))
    return np.array(Image.blend(Image.fromarray(image), colors, alpha))


def with_color_bar(image: np.ndarray, high: float, unit: str = "") -> np.ndarray:
    """The RGB image with a bar on its right of the colours of `heat_map`, 0 to `high`, with five numbers.

    `unit`: what stands above the bar. A low or narrow image gets white around it.
    """
    height, width = image.shape[:2]
    size = min(max(min(height, width) // 24, 11), 60)
    font, margin, bar = _font(size), size, round(1.4 * size)
    texts = _bar_numbers(high)
    panel_width = 2 * margin + bar + size // 2 + math.ceil(max(font.getlength(text) for text in (*texts, unit)))
    top = round(2.4 * size) if unit else margin
    length = max(height - top - margin, 8 * size)
    panel = Image.new("RGB", (panel_width, max(height, top + length + margin)), "white")
    colors = heat_colors(np.linspace(1, 0, length), 0.0, 1.0)
    panel.paste(Image.fromarray(np.repeat(colors[:, None], bar, 1)), (margin, top))
    draw = ImageDraw.Draw(panel)
    draw.rectangle((margin - 1, top - 1, margin + bar, top + length), outline="black")
    draw.text((margin, top - size), unit, "black", font, anchor="lm")
    for i, text in enumerate(texts):
        y = top + round(i * (length - 1) / 4)
        draw.line((margin + bar, y, margin + bar + size // 4, y), "black")
        draw.text((margin + bar + size // 2, y), text, "black", font, anchor="lm")
    canvas = np.full((panel.height, width + panel_width, 3), 255, np.uint8)
    canvas[:height, :width] = image
    canvas[:, width:] = panel
    return canvas


def _bar_numbers(high: float) -> list[str]:
    """Five numbers from `high` to 0, of as many digits that a quarter of `high` has two."""
    digits = max(0, 1 - math.floor(math.log10(high / 4))) if high > 0 else 0
    form = f".{digits}f" if digits < 7 else ".1e"
    return [*(format(high * i / 4, form) for i in (4, 3, 2, 1)), "0"]


def frame_patch(image: np.ndarray, row: int, column: int, patch_size: int) -> np.ndarray:
    """A copy of the image with a red and white frame around a patch, which stays visible."""
    framed = Image.fromarray(image)
    draw, line = ImageDraw.Draw(framed), max(2, patch_size // 8)
    left, top = column * patch_size, row * patch_size
    for color, out in (("white", 2 * line), (_RED, line)):
        last = patch_size - 1 + out
        draw.rectangle((left - out, top - out, left + last, top + last), outline=color, width=line)
    return np.array(framed)


def shrunk(image: np.ndarray, most: int) -> np.ndarray:
    """The RGB image, smaller if its longer side has more than `most` pixels."""
    small = Image.fromarray(image)
    small.thumbnail((most, most), Image.Resampling.BOX)
    return np.array(small)


def mark_patch(image: np.ndarray, x: int, y: int, patch_size: int) -> np.ndarray:
    """A copy of the image with the patch in column x, row y painted red."""
    marked = image.copy()
    marked[y * patch_size : (y + 1) * patch_size, x * patch_size : (x + 1) * patch_size] = _RED
    return marked


def attention_grid(tiles: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """Images (h, w, 3) of one size, each with a line of text above it, in a nearly square grid with few gaps."""
    h, w = tiles[0][1].shape[:2]
    side = math.ceil(math.sqrt(len(tiles)))
    columns = min(side, side + 1, key=lambda c: -len(tiles) % c)
    font = _font(min(max(w // 20, 11), 40))
    longest = max(font.getlength(text) for text, _ in tiles)
    gap, header = max(w // 32, 4), math.ceil(font.getbbox("Ag")[3] * 1.4)
    step_x, step_y = max(w, math.ceil(longest + font.size / 2)) + gap, h + header + gap
    canvas = Image.new("RGB", (gap + columns * step_x, gap + math.ceil(len(tiles) / columns) * step_y), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (text, tile) in enumerate(tiles):
        left, top = gap + i % columns * step_x, gap + i // columns * step_y
        draw.text((left, top + header // 2), text, "black", font, anchor="lm")
        canvas.paste(Image.fromarray(tile), (left, top + header))
    return np.array(canvas)


def _write_png(image: Image.Image, path: str | Path) -> None:
    write_atomically(path, lambda file: image.save(file, format="PNG"))


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def _short(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.001 else "< 0.1 %"
