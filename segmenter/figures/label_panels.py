"""Figures of labels: several patch sizes on one image, and rows beside another model's label files and the truth."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segmenter.classes import ClassSet
from segmenter.data.label_files import Ids, ignore_index, read_ids
from segmenter.evaluation.compare import MEANINGLESS, image_scores, telling_part
from segmenter.figures.page import Figure, FigureError, MissingInput, Page, Panel
from segmenter.figures.regions import ALPHA, classes_of, label_panel, legend
from segmenter.inference.images import read_image
from segmenter.inference.segment import segment_image
from segmenter.model import Segmenter
from segmenter.visualize import overlay

ENDINGS = ("", "_labels", "_labels_raw")  # NAME, and what `segmenter predict` makes of it
KINDS = (".png", ".tif", ".tiff", ".bmp", ".gif")
_SCORES = (("boundary F", "bF"), ("mIoU", "mIoU"))


def patch_size(
    models: Mapping[str, Segmenter],
    image: Any,
    *,
    truth: np.ndarray | None = None,
    dtype: str | torch.dtype | None = None,
    classes: ClassSet | None = None,
) -> Figure:
    """What models of several patch sizes make of one image, and below the part where they differ most along borders.

    Args:
        models: by name, at least two `Segmenter`s in evaluation mode with the same number of classes.
        image: anything that `read_image` takes. truth: labels (H, W), those of `ignore_index(n_cls)` do not count.
        dtype: compute type. classes: names and colours; by default the first model's.
    Raises:
        MissingInput: fewer than two models. FigureError: more than four; classes or sizes that differ.
        ImageError: the image cannot be read.
    """
    if len(models) < 2:
        raise MissingInput("one model alone: give models of other patch sizes too")
    if len(models) > 4 - (truth is not None):
        raise FigureError(f"{len(models)} models are too many for one page; give at most {4 - (truth is not None)}")
    counts = {name: model.n_cls for name, model in models.items()}
    if len(set(counts.values())) > 1:
        each = ", ".join(f"{name} {n}" for name, n in counts.items())
        raise FigureError(f"numbers of classes differ: {each}")
    first, pixels = next(iter(models.values())), read_image(image)
    classes, ignored = classes or classes_of(first), ignore_index(first.n_cls)
    _check_size(pixels, truth, "the truth")
    ordered = sorted(models.items(), key=lambda item: -item[1].patch_size)
    labels = [segment_image(model, pixels, dtype=dtype).numpy() for _, model in ordered]
    height, width = pixels.shape[:2]
    h, w = max(1, min(3 * width // 16, height)), max(1, width // 4)
    top, left = telling_part(labels, truth, ignored, (h, w))

    shown = [(f"patch {model.patch_size}", found) for (_, model), found in zip(ordered, labels, strict=True)]
    scores = [{} if truth is None else image_scores(found, truth, first.n_cls) for found in labels]
    captions = ["\n".join(_score(score, *what) for what in _SCORES if score) for score in scores]
    if truth is not None:
        shown.append(("ground truth", _black_where_ignored(truth, ignored, len(classes))))
        captions.append("")
    page = Page(_warning(models.values()), legend=_legend(labels, truth, ignored, classes))
    page.rows = [[Panel(pixels, "image", draw=lambda axes: _box(axes, left, top, w, h))], []]
    page.rows[1].append(Panel(pixels[top : top + h, left : left + w]))
    for (title, found), caption in zip(shown, captions, strict=True):
        page.rows[0].append(label_panel(pixels, found, classes, title))
        zoom = overlay(pixels, found, classes, ALPHA)[top : top + h, left : left + w]
        page.rows[1].append(Panel(zoom, caption=caption))
    page.note = f"Below: the part in the frame, where the predictions differ most along borders. {_note(truth)}"
    data = {
        "image_size": {"height": height, "width": width, "unit": "pixels"},
        "enlarged": {"top": top, "left": left, "height": h, "width": w, "unit": "pixels"},
        "unit_of_scores": "percent, of this image alone",
        "looks": [
            {"model": name, "patch_size": model.patch_size, "weights": model.info.weights}
            | {"pixels_by_class": _pixels(found, classes), **score}
            for (name, model), found, score in zip(ordered, labels, scores, strict=True)
        ],
    }
    return Figure("patch-size", page.picture(), data)


def qualitative(
    model: Segmenter,
    images: Sequence[str | Path],
    *,
    others: Mapping[str, str | Path] | None = None,
    truth: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    classes: ClassSet | None = None,
) -> Figure:
    """A row an image: the image, what other models make of it, what this one does, and the truth.

    Args:
        model: a `Segmenter` in evaluation mode. images: files, at most four.
        others: name -> folder of label files of another model, at most two. truth: folder of true ones. Of street.jpg
            the label file is street.png, or street_labels.png (also TIFF, BMP, GIF): values are class ids, 255 (65535
            beyond 255 classes) does not count.
        dtype: compute type. classes: names and colours; by default the model's.
    Raises:
        MissingInput: neither others nor truth. FigureError: label files that are missing or of another size.
        DataError, ImageError: files that cannot be read, or ids that are no class.
    """
    others = dict(others or {})
    if "ours" in others:
        raise FigureError("another model cannot be called 'ours', as this one is; give it another name")
    if not others and truth is None:
        raise MissingInput("nothing to show beside the prediction: give label files of another model, or the truth")
    if not 1 <= len(images) <= 4 or len(others) > 2:
        raise FigureError(f"a page holds 1 to 4 images and up to 2 other models; got {len(images)} and {len(others)}")
    classes, ignored = classes or classes_of(model), ignore_index(model.n_cls)
    read = []
    for path in map(Path, images):  # all before the first is run: nothing is waited for in vain
        pixels = read_image(path)
        folders = [*others.values(), *([] if truth is None else [truth])]
        read.append((path, pixels, [_labels_beside(path, pixels, Path(folder), model.n_cls) for folder in folders]))
    page, every, looks = Page(_warning([model])), [], []
    for path, pixels, labels in read:
        true = None if truth is None else labels[-1]
        by = {**dict(zip(others, labels, strict=False)), "ours": segment_image(model, pixels, dtype=dtype).numpy()}
        row = [Panel(pixels, "" if page.rows else "image")]
        for name, found in by.items():
            score = {} if true is None else image_scores(found, true, model.n_cls)
            shown = _black_where_ignored(found, ignored, len(classes))
            title, caption = "" if page.rows else name, _score(score, *_SCORES[1]) if score else ""
            row.append(label_panel(pixels, shown, classes, title, caption))
            looks.append(
                {"image": str(path), "by": name, "pixels_by_class": _pixels(found[found != ignored], classes), **score}
            )
        if true is not None:
            shown = _black_where_ignored(true, ignored, len(classes))
            row.append(label_panel(pixels, shown, classes, "" if page.rows else "ground truth"))
        page.rows.append(row)
        every += [found[found != ignored] for found in (*by.values(), *([] if true is None else [true]))]
    page.legend = legend(np.concatenate(every), classes)
    page.note = _note(truth)
    data = {
        "weights": model.info.weights,
        "others": {name: str(folder) for name, folder in others.items()},
        "truth": None if truth is None else str(truth),
        "unit_of_scores": "percent, of each image alone",
        "looks": looks,
    }
    return Figure("qualitative", page.picture(), data)


def labels_beside(image: str | Path, folder: str | Path, n_cls: int) -> np.ndarray:
    """The labels (H, W) of an image from a folder of label files, see `qualitative`.

    Raises:
        FigureError: there is no such file. DataError: it cannot be read, or holds ids that are no class.
    """
    stem, folder = Path(image).stem, Path(folder)
    if not folder.is_dir():
        raise FigureError(f"{folder}: no such folder")
    names = [f"{stem}{ending}{kind}" for ending in ENDINGS for kind in KINDS]
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise FigureError(f"{folder}: no label file of {image}; wanted {stem}.png or {stem}_labels.png")
    return Ids(ignored=(ignore_index(n_cls),)).to_labels(read_ids(found[0]), n_cls, found[0])


def _labels_beside(image: Path, pixels: np.ndarray, folder: Path, n_cls: int) -> np.ndarray:
    labels = labels_beside(image, folder, n_cls)
    _check_size(pixels, labels, f"the label file of {image} in {folder}")
    return labels


def _check_size(pixels: np.ndarray, labels: np.ndarray | None, name: str) -> None:
    if labels is not None and labels.shape != pixels.shape[:2]:
        (height, width), (h, w) = pixels.shape[:2], labels.shape
        raise FigureError(f"{name} has {w} x {h} pixels, the image {width} x {height}; they must be the same")


def _black_where_ignored(labels: np.ndarray, ignored: int, n_cls: int) -> np.ndarray:
    """Beyond the classes: black."""
    return np.where(labels == ignored, n_cls, labels)


def _legend(labels: Sequence[np.ndarray], truth: np.ndarray | None, ignored: int, classes: ClassSet) -> list:
    true = [] if truth is None else [truth[truth != ignored]]
    return legend(np.concatenate([found.ravel() for found in [*labels, *true]]), classes)


def _note(truth: Any) -> str:
    return "Numbers: classes." if truth is None else "Numbers: classes. Black: not labelled."


def _warning(models: Any) -> str | None:
    return next((MEANINGLESS[m.info.weights] for m in models if m.info.weights in MEANINGLESS), None)


def _score(scores: dict[str, float | None], label: str, key: str) -> str:
    return f"{label} none" if scores[key] is None else f"{label} {scores[key]:.1f} %"


def _pixels(labels: np.ndarray, classes: ClassSet) -> dict[str, int]:
    ids, counts = np.unique(labels, return_counts=True)
    names = [classes.names[i] if i < len(classes) else f"label {i}" for i in ids.tolist()]
    return dict(zip(names, counts.tolist(), strict=True))


def _box(axes: Any, left: int, top: int, width: int, height: int) -> None:
    from matplotlib.patches import Rectangle

    for color, line in (("black", 2.6), ("white", 1.3)):
        axes.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor=color, linewidth=line))
