"""Figures of attention: of chosen patches by layer, of a large beside a small object, and of class tokens."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from segmenter.analysis.maps import attention
from segmenter.analysis.statistics import attention_statistics
from segmenter.analysis.subject import Point, Subject, pairs, subject
from segmenter.classes import ClassSet
from segmenter.decoder import DecoderLinear
from segmenter.evaluation.compare import MEANINGLESS
from segmenter.figures.page import Figure, FigureError, MissingInput, Page, Panel, frame, ring
from segmenter.figures.regions import (
    Region,
    classes_of,
    heat_panel,
    label_panel,
    large_and_small,
    legend,
    patch_labels,
    region_of,
)
from segmenter.inference.segment import segment_image
from segmenter.model import Segmenter
from segmenter.visualize import class_shares

_LINES = "White lines: borders of the prediction."


@dataclasses.dataclass(frozen=True)
class Scene:
    """A model and an image, and what the model makes of it.

    Attributes:
        of: both, with the image as the model sees it. labels: (H, W). classes: their names and colours.
    """

    model: Segmenter
    of: Subject
    labels: np.ndarray
    classes: ClassSet
    dtype: str | torch.dtype | None

    @property
    def patch_size(self) -> int:
        return self.of.patch_size

    def centre(self, patch: tuple[int, int]) -> Point:
        """(x, y) of the middle of a patch (row, column), in pixels of what the model sees; at borders of what is left
        of it."""
        height, width = self.labels.shape
        row, column = (place * self.patch_size for place in patch)
        return (column + min(column + self.patch_size, width)) / 2, (row + min(row + self.patch_size, height)) / 2

    def objects(self) -> list[Region]:
        """A large and a small one, or the only one."""
        return large_and_small(patch_labels(self.labels, self.patch_size))

    def name(self, label: int) -> str:
        return self.classes.names[label]

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        height, width = self.labels.shape
        return {
            "weights": self.model.info.weights,
            "image_size": {"height": height, "width": width, "unit": "pixels"},
            "patch_size": {"value": self.patch_size, "unit": "pixels"},
            "grid": {"rows": self.of.grid[0], "columns": self.of.grid[1], "unit": "patches"},
        }


def scene(
    model: Segmenter,
    image: Any,
    size: int | None = None,
    dtype: str | torch.dtype | None = None,
    classes: ClassSet | None = None,
) -> Scene:
    """Labels the image; of a `Scene` nothing is done again. Raises what `subject` raises, and FigureError for a model
    of another kind, or a scene of another model."""
    if isinstance(image, Scene):
        if image.model is not model:
            raise FigureError("the scene was made by another model")
        return image
    if not isinstance(model, Segmenter):
        raise FigureError(f"{type(model).__name__} is no Segmenter; segmenter.load_any(model) makes one of many ViTs")
    of = subject(model, image, "encoder", size, dtype)
    labels = segment_image(model, of.pixels, dtype=dtype).numpy()
    return Scene(model, of, labels, classes or classes_of(model), dtype)


def attention_by_layer(
    model: Segmenter,
    image: Any,
    *,
    points: Sequence[Point] | None = None,
    layers: Sequence[int] | None = None,
    size: int | None = None,
    dtype: str | torch.dtype | None = None,
    classes: ClassSet | None = None,
) -> Figure:
    """What chosen patches attend to in the encoder, the mean over heads, layer by layer, under the image, the
    prediction and the segmentation map.

    Args:
        model: a `Segmenter` in evaluation mode. image: anything that `read_image` takes; or what `scene` makes of it,
            to be labelled once for several figures, with its own size, compute type and classes.
        points: (x, y) in pixels of the image, at most four; by default deep inside a large and a small object of the
            prediction. layers: their numbers, negative ones from the end; by default the first, middle and last.
        size: pixels that the short side of the image is brought to first. dtype: compute type.
        classes: names and colours; by default the model's.
    Raises:
        FigureError, AnalysisError, ImageError: what is asked for does not exist, or cannot be read.
    """
    of = scene(model, image, size, dtype, classes)
    patches = [of.of.patch_at(point) for point in pairs(points)] or [region.deepest for region in of.objects()]
    if len(patches) > 4:
        raise FigureError(f"{len(patches)} points are too many for one page; give at most 4")
    depth = len(of.of.layers)
    layers = of.of.chosen(layers if layers is not None else (0, depth // 2, depth - 1))
    if len(layers) > 6:
        raise FigureError(f"{len(layers)} layers are too many for one page; give at most 6")
    maps = attention(model, of.of.pixels, points=[of.centre(p) for p in patches], layers=layers, dtype=of.dtype)
    P, letters = of.patch_size, "abcd"

    def marks(axes: Any) -> None:
        for letter, patch in zip(letters, patches, strict=False):
            frame(axes, patch, P, letter)

    page = Page(MEANINGLESS.get(model.info.weights), legend=legend(of.labels, of.classes))
    page.rows.append(
        [
            Panel(of.of.pixels, "image", draw=marks),
            label_panel(of.of.pixels, of.labels, of.classes, "prediction"),
            label_panel(of.of.pixels, of.labels, of.classes, "segmentation map", alpha=1.0),
        ]
    )
    looks = []
    for query, (letter, patch) in enumerate(zip(letters, patches, strict=False)):
        row, label = [], int(patch_labels(of.labels, P)[patch])
        for i, layer in enumerate(layers):
            values = maps.mean[i, query].numpy()
            most = float(values.max())
            draw = lambda axes, patch=patch: frame(axes, patch, P)  # noqa: E731
            title, caption = f"{letter}: layer {layer}", f"largest {100 * most:.2g} %"
            row.append(heat_panel(values, P, of.labels, title=title, caption=caption, draw=draw))
            looks.append(
                {
                    "patch": _patch(patch),
                    "class": of.name(label),
                    "layer": layer,
                    "largest": most,
                    "map": _rounded(values),
                }
            )
        page.rows.append(row)
    page.bars.append(("attention on a patch, mean over heads", "0 %", "largest of each map"))
    page.note = f"Framed: the patch that looks. {_LINES} Numbers: classes."
    data = {**of.facts(), "layers_of_encoder": depth, "unit": "share of the attention of a patch", "looks": looks}
    return Figure("attention-by-layer", page.picture(), data)


def field_of_view(
    model: Segmenter,
    image: Any,
    *,
    large: Point | None = None,
    small: Point | None = None,
    layer: int = -1,
    size: int | None = None,
    dtype: str | torch.dtype | None = None,
    classes: ClassSet | None = None,
) -> Figure:
    """What a patch of a large and one of a small object attend to in one layer of the encoder, with the mean distance.

    Args:
        large, small: (x, y) in pixels of the image; by default deep inside the largest region of the prediction, and
            inside the smallest one of another class that has four patches. layer: its number.
        Others as of `attention_by_layer`.
    Raises:
        MissingInput: all of the image has one label, and a point is not given. Others as `attention_by_layer`.
    """
    of = scene(model, image, size, dtype, classes)
    found = of.objects()
    if len(found) < 2 and (large is None or small is None):
        raise MissingInput("the prediction has one region alone; give a point on a large and one on a small object")
    (number,) = of.of.chosen(layer)
    P, grid = of.patch_size, patch_labels(of.labels, of.patch_size)
    patches = [
        region.deepest if point is None else of.of.patch_at(point)
        for point, region in zip((large, small), (found * 2)[:2], strict=True)
    ]
    centres = [of.centre(patch) for patch in patches]
    maps = attention(model, of.of.pixels, points=centres, layers=number, dtype=of.dtype)
    statistics = attention_statistics(model, of.of.pixels, layers=number, dtype=of.dtype)
    distances = statistics.of_patches(statistics.distance)[0] * P  # (heads, rows, columns), pixels
    page, looks = Page(MEANINGLESS.get(model.info.weights), rows=[[], []]), []
    for query, (kind, patch, centre) in enumerate(zip(("large", "small"), patches, centres, strict=True)):
        values, label = maps.mean[0, query].numpy(), int(grid[patch])
        heads = distances[:, patch[0], patch[1]]
        mean, share = float(heads.mean()), region_of(grid, patch).share
        framed = lambda axes, patch=patch: frame(axes, patch, P)  # noqa: E731
        title = f"{kind}: {of.name(label)}, {100 * share:.2g} % of the image"
        page.rows[0].append(Panel(of.of.pixels, title, draw=framed))

        def marks(axes: Any, patch: tuple = patch, centre: Point = centre, mean: float = mean) -> None:
            ring(axes, centre, mean)
            frame(axes, patch, P)

        caption = f"mean distance {mean:.0f} pixels\nlargest share {100 * values.max():.2g} %"
        page.rows[1].append(heat_panel(values, P, of.labels, caption=caption, draw=marks))
        looks.append(
            {
                "object": kind, "patch": _patch(patch), "class": of.name(label), "share_of_region": share,
                "mean_distance": mean, "mean_distance_by_head": heads.tolist(), "map": _rounded(values),
            }
        )  # fmt: skip
    page.bars.append((f"attention on a patch in layer {number}, mean over heads", "0 %", "largest of each map"))
    even = even_distances(of.of.grid) * P
    for look, patch in zip(looks, patches, strict=True):
        look["mean_distance_if_even"] = float(even[patch])
    texts = " and ".join(f"{look['mean_distance_if_even']:.0f}" for look in looks)
    page.note = (
        "Framed: the patch that looks. Ring: its mean attention distance, the mean over heads; if attention were even, "
        f"it would be {texts} pixels. {_LINES}"
    )
    units = {"mean_distance": "pixels, weighted by attention on patches", "map": "share of the attention of a patch"}
    units["share_of_region"] = "of the patches of the image"
    data = {**of.facts(), "layer": number, "layers_of_encoder": len(of.of.layers), "units": units, "looks": looks}
    return Figure("field-of-view", page.picture(), data)


def class_embeddings(
    model: Segmenter,
    image: Any,
    *,
    chosen: Sequence[int | str] | None = None,
    layer: int = -1,
    size: int | None = None,
    dtype: str | torch.dtype | None = None,
    classes: ClassSet | None = None,
) -> Figure:
    """What the class tokens of the mask transformer attend to, above the masks of these classes.

    Args:
        chosen: ids or names, at most four; by default the three of most pixels. layer: of the decoder.
        Others as of `attention_by_layer`.
    Raises:
        MissingInput: a linear decoder. Others as `attention_by_layer`.
    """
    if isinstance(getattr(model, "decoder", None), DecoderLinear):
        raise MissingInput("a linear decoder has no class tokens; give a model with a mask transformer")
    of = scene(model, image, size, dtype, classes)
    decoder = subject(model, of.of.pixels, "decoder", dtype=of.dtype)
    ids = decoder.class_ids(chosen) or [row["id"] for row in class_shares(of.labels, of.classes)[:3]]
    if len(ids) > 4:
        raise FigureError(f"{len(ids)} classes are too many for one page; give at most 4")
    (number,) = decoder.chosen(layer)
    maps = attention(model, of.of.pixels, part="decoder", classes=ids, layers=number, dtype=of.dtype)
    with torch.inference_mode():
        masks = decoder.run()[0].float().softmax(0)[ids].cpu().numpy()
    P, looks = of.patch_size, []
    page = Page(MEANINGLESS.get(model.info.weights), legend=legend(of.labels, of.classes))
    page.rows = [
        [Panel(of.of.pixels, "image")],
        [label_panel(of.of.pixels, of.labels, of.classes, "prediction")],
    ]
    for query, (i, mask) in enumerate(zip(ids, masks, strict=True)):
        values, name = maps.mean[0, query].numpy(), of.name(i)
        inside = patch_labels(of.labels, P) == i
        caption = f"largest {100 * values.max():.2g} %"
        page.rows[0].append(heat_panel(values, P, of.labels, title=f"{i} {name}", caption=caption))
        page.rows[1].append(heat_panel(mask, P, of.labels, high=1.0, title="its mask"))
        on_class = float(values[inside].sum() / values.sum())
        looks.append(
            {
                "id": i, "class": name, "share_of_patches": float(inside.mean()), "attention_on_its_patches": on_class,
                "map": _rounded(values), "mask": _rounded(mask),
            }
        )  # fmt: skip
    page.bars += [("above: attention on a patch", "0 %", "largest of each"), ("below: probability", "0 %", "100 %")]
    each = ", ".join(f"{look['class']} {100 * look['attention_on_its_patches']:.0f} %" for look in looks)
    beside = ", ".join(f"{100 * look['share_of_patches']:.0f} %" for look in looks)
    page.note = (
        f"Of the attention on patches, mean over heads of layer {number}, this falls on patches that are predicted as "
        f"the class: {each}; these are {beside} of the patches. {_LINES}"
    )
    units = {"map": "share of the attention of the class token", "mask": "probability, softmax over all classes"}
    data = {**of.facts(), "layer": number, "layers_of_decoder": len(decoder.layers), "units": units, "looks": looks}
    return Figure("class-embeddings", page.picture(), data)


def even_distances(grid: tuple[int, int]) -> np.ndarray:
    """(rows, columns): the mean distance of each patch to all patches, in patches; what even attention would have."""
    rows, columns = grid
    away = np.hypot(np.arange(rows)[:, None], np.arange(columns))  # by steps down and to the side
    found = np.empty(grid)
    for row in range(rows):
        down = np.abs(np.arange(rows) - row)
        along = away[down].sum(0)  # (columns,): of all rows, by steps to the side
        for column in range(columns):
            found[row, column] = along[np.abs(np.arange(columns) - column)].sum()
    return found / (rows * columns)


def _patch(patch: tuple[int, int]) -> dict[str, int]:
    return {"row": patch[0], "column": patch[1]}


def _rounded(values: np.ndarray) -> list[list[float]]:
    """Seven digits, which is what float32 holds, row by row."""
    return [[float(f"{value:.7g}") for value in row] for row in values.tolist()]
