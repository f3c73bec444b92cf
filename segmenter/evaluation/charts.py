"""Results on a data set as figures: a bar for each class; an image beside truth and prediction."""

import importlib.util
import math
from pathlib import Path

import numpy as np

from segmenter.classes import ClassSet
from segmenter.files import write_atomically
from segmenter.visualize import attention_grid, legend, overlay

_ROWS = 50  # bars one above the other; more classes make more columns
_LONGEST_NAME = 22
_BEHIND_TEXT = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.9}  # the line of the mean


def can_draw() -> bool:
    """Whether matplotlib, which draws the chart, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def save_class_chart(path: str | Path, classes: ClassSet, iou: np.ndarray, title: str) -> None:
    """Writes a PNG with one bar a class in its colour, best class first, and the mean as a line.

    Args:
        iou: (n_cls,) fractions; NaN: the class does not occur, such classes come last.
        title: one line above the bars.
    Raises:
        ImportError: no matplotlib (`pip install segmenter-triton[train]`).
    """
    from matplotlib.figure import Figure

    order = sorted(range(len(iou)), key=lambda i: (np.isnan(iou[i]), -np.nan_to_num(iou[i]), i))
    columns = math.ceil(len(order) / _ROWS)
    rows = math.ceil(len(order) / columns)
    figure = Figure(figsize=(max(6.5, 4.2 * columns), 1.1 + 0.26 * rows), layout="constrained")
    figure.suptitle(title, fontsize=11)
    mean = 100 * np.nanmean(iou) if np.isfinite(iou).any() else None
    for column, axes in enumerate(np.ravel(figure.subplots(1, columns))):
        _draw_bars(axes, order[column * rows : (column + 1) * rows], classes, 100 * iou, mean)
        axes.set_ylim(rows - 0.4, -0.6)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def _draw_bars(axes, ids: list[int], classes: ClassSet, percent: np.ndarray, mean: float | None) -> None:
    for row, i in enumerate(ids):
        color = tuple(channel / 255 for channel in classes.palette[i])
        known = not np.isnan(percent[i])
        if known:
            axes.barh(row, percent[i], 0.76, color=color, edgecolor="#444444", linewidth=0.6, zorder=2)
        text = f"{percent[i]:.1f}" if known else "does not occur"
        axes.text((percent[i] if known else 0) + 1, row, text, va="center", fontsize=8, zorder=4, bbox=_BEHIND_TEXT)
    if mean is not None:
        axes.axvline(mean, color="#222222", linewidth=1, linestyle="--", zorder=3)
    axes.set_yticks(range(len(ids)), [_short(classes.names[i]) for i in ids], fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 110)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("IoU in % (dashed: mean)", fontsize=9)
    axes.grid(axis="x", color="#dddddd", zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def comparison(
    pixels: np.ndarray, label: np.ndarray, prediction: np.ndarray, classes: ClassSet, ignore_index: int = 255
) -> np.ndarray:
    """Image, truth and prediction side by side, and a legend of the classes in either.

    Args:
        pixels: (H, W, 3) uint8. label, prediction: (H, W); pixels that are ignored are darkened in the truth.
    Returns:
        RGB (height, width, 3) uint8.
    """
    counted = label != ignore_index
    right = f", {100 * np.mean(label[counted] == prediction[counted]):.1f} % right" if counted.any() else ""
    panels = attention_grid(
        [
            ("image", pixels),
            ("truth", overlay(pixels, np.where(counted, label, len(classes)), classes, 0.6)),
            (f"prediction{right}", overlay(pixels, prediction, classes, 0.6)),
        ]
    )
    names = legend(np.concatenate([np.where(counted, label, prediction), prediction], axis=1), classes)
    canvas = np.full((max(len(panels), len(names)), panels.shape[1] + names.shape[1], 3), 255, np.uint8)
    canvas[: len(panels), : panels.shape[1]] = panels
    canvas[: len(names), panels.shape[1] :] = names
    return canvas


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."
