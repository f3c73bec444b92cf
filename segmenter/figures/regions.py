"""Labels as panels, and where in them to look from: connected regions of one class, and the patch deepest inside."""

import dataclasses
from collections import deque
from typing import Any

import numpy as np

from segmenter.classes import ClassSet, fitting_classes, generic_classes
from segmenter.evaluation.compare import border_pixels
from segmenter.figures.page import Panel, haloed
from segmenter.visualize import class_shares, colorize, enlarge, heat_colors, overlay

_LEAST = 4  # patches of an object to look from, where there are such
_NUMBERED = 40  # cells across the larger side of an image, to find regions that are large enough for a number
_MOST_CLASSES = 20
ALPHA = 0.6


@dataclasses.dataclass(frozen=True)
class Region:
    """Connected cells (by their sides) of one label.

    Attributes:
        label: class id. share: of all cells. cells: (rows, columns) bool.
    """

    label: int
    share: float
    cells: np.ndarray

    @property
    def deepest(self) -> tuple[int, int]:
        """(row, column) of the cell that is farthest from the border, by steps to the side; of several, the one that
        is nearest to the middle of them."""
        inside = self.cells
        while inside.any():
            last, padded = inside, np.pad(inside, 1)
            inside = inside & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        places = np.argwhere(last)
        row, column = places[np.square(places - places.mean(0)).sum(1).argmin()]
        return int(row), int(column)


def region_of(labels: np.ndarray, start: tuple[int, int]) -> Region:
    """The connected region that holds the cell (row, column) of labels (rows, columns)."""
    cells, pending = np.zeros(labels.shape, bool), deque([start])
    cells[start] = True
    while pending:
        row, column = pending.popleft()
        for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            inside = 0 <= r < labels.shape[0] and 0 <= c < labels.shape[1]
            if inside and not cells[r, c] and labels[r, c] == labels[start]:
                cells[r, c] = True
                pending.append((r, c))
    return Region(int(labels[start]), float(cells.mean()), cells)


def regions(labels: np.ndarray) -> list[Region]:
    """The connected regions of label cells (rows, columns), the largest first."""
    left, found = np.ones(labels.shape, bool), []
    for start in np.ndindex(labels.shape):
        if left[start]:
            found.append(region_of(labels, start))
            left &= ~found[-1].cells
    return sorted(found, key=lambda region: -region.share)


def large_and_small(labels: np.ndarray) -> list[Region]:
    """The largest region, and if there are several the smallest one of another class of at least four cells."""
    found = regions(labels)
    others = [region for region in found[1:] if region.label != found[0].label] or found[1:]
    enough = [region for region in others if region.cells.sum() >= _LEAST] or others[:1]
    return [found[0], *enough[-1:]]


def patch_labels(labels: np.ndarray, patch_size: int) -> np.ndarray:
    """Labels of pixels (H, W) -> those in the middle of each patch (rows, columns), also of patches cut by a border."""
    rows, columns = (np.minimum(np.arange(0, side, patch_size) + patch_size // 2, side - 1) for side in labels.shape)
    return labels[rows[:, None], columns]


def classes_of(model: Any) -> ClassSet:
    """Names and colours that the model names, or generated ones."""
    return fitting_classes(model.info.classes, model.n_cls) or generic_classes(model.n_cls)


def legend(labels: np.ndarray, classes: ClassSet) -> list[tuple[tuple[int, int, int], str]]:
    """Colour and "id name" of the classes in labels of any shape, by id; the largest if they are many."""
    shown = class_shares(np.ravel(labels)[None], classes)
    ids = sorted(row["id"] for row in shown[:_MOST_CLASSES] if row["id"] < len(classes))
    entries = [(classes.palette[i], f"{i} {' '.join(classes.names[i].split())}") for i in ids]
    rest = len(shown) - _MOST_CLASSES
    return entries + ([((255, 255, 255), f"and {rest} more")] if rest > 0 else [])


def label_panel(
    pixels: np.ndarray, labels: np.ndarray, classes: ClassSet, title: str, caption: str = "", alpha: float = ALPHA
) -> Panel:
    """Class colours over the image, with the ids in regions that are large enough: colours alone do not tell classes
    to everybody. Labels beyond the classes are black."""
    image = overlay(pixels, labels, classes, alpha) if alpha < 1 else colorize(labels, classes)
    return Panel(image, title, caption, lambda axes: number_regions(axes, labels, len(classes)))


def number_regions(axes: Any, labels: np.ndarray, n_cls: int) -> None:
    cell = max(1, -(-max(labels.shape) // _NUMBERED))
    grid = patch_labels(labels, cell)
    for region in regions(grid):
        row, column = region.deepest
        if region.label < n_cls and region.share >= 0.012 and _roomy(region.cells, row, column):
            haloed(axes, (column + 0.5) * cell, (row + 0.5) * cell, str(region.label))


def _roomy(cells: np.ndarray, row: int, column: int) -> bool:
    """Whether the cells above, below and beside are in it too: room for a number."""
    around = np.pad(cells, 1)[row : row + 3, column : column + 3]
    return bool(around[1].all() and around[:, 1].all())


def heat_panel(
    values: np.ndarray, patch_size: int, labels: np.ndarray, high: float | None = None, **panel: Any
) -> Panel:
    """Numbers of patches (rows, columns) in viridis from 0 to the largest, or `high`, one colour a patch; white lines
    are the borders of the labels (H, W)."""
    height, width = labels.shape
    colors = heat_colors(values, 0.0, float(values.max()) if high is None else high)
    image = enlarge(colors, patch_size)[:height, :width].copy()
    lines = border_pixels(labels, np.ones(labels.shape, bool))
    for _ in range(max(labels.shape) // 500):  # else they are lost on the page
        lines = lines | np.pad(lines, 1)[:-2, 1:-1] | np.pad(lines, 1)[1:-1, :-2]
    image[lines] = (0.45 * image[lines] + 0.55 * 255).astype(np.uint8)
    return Panel(image, **panel)
