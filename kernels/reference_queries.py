"""Eager PyTorch definition of labels from queries: see `reference`. No (classes, H, W) scores are ever whole.

Networks such as MaskFormer and EoMT give for each of Q queries a mask and a class, one of which is "no object". The
score of class c at a pixel is

    sum over queries q of  softmax(classes[q])[c] * sigmoid(masks[q] at the pixel),  "no object" left out after softmax,

with masks upsampled to the window first. Windows are averaged, the result is resized to the image, and the label is
the class with the highest score: what transformers' `post_process_semantic_segmentation` of EoMT computes. Rows of the
image do not depend on each other, so they are computed a few at a time, of at most BLOCK scores. Types narrower than
float32 are widened first.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from segmenter.kernels.canvas_axis import CanvasAxis, canvas_axis
from segmenter.kernels.reference import label_dtype
from segmenter.kernels.upsample_tiles import rounds_product

BLOCK = 2**21  # scores at a time: 8 MB, about what stays in a processor's cache


def check_queries(masks: torch.Tensor, classes: torch.Tensor, tops: Sequence[int], lefts: Sequence[int]) -> None:
    """Raises ValueError unless these are masks and classes of queries in windows; see `queries_scores`."""
    n = len(tops) * len(lefts)
    if masks.ndim != 5 or masks.shape[1] != n or 0 in masks.shape[3:]:
        raise ValueError(f"masks must be (B, {n}, Q, gh, gw), one for each window, got {tuple(masks.shape)}")
    if classes.ndim != 4 or classes.shape[:3] != masks.shape[:3] or classes.shape[3] < 2:
        raise ValueError(
            f"classes must be (B, {n}, Q, C + 1), C at least 1, for masks {tuple(masks.shape)}, "
            f"got {tuple(classes.shape)}"
        )


def class_probabilities(classes: torch.Tensor) -> torch.Tensor:
    """Of logits (..., Q, C + 1), the last of "no object": (..., C, Q), float32 or wider, contiguous."""
    wide = classes.to(torch.promote_types(classes.dtype, torch.float32))
    return wide.softmax(-1)[..., :-1].transpose(-1, -2).contiguous()


def axes_of(
    tops: Sequence[int],
    lefts: Sequence[int],
    grid: Sequence[int],
    window: Sequence[int],
    canvas: Sequence[int],
    shape: Sequence[int],
    device: str,
) -> tuple[CanvasAxis, CanvasAxis]:
    """The rows and the columns. `grid`: mask cells of a window; `device`: the type of device that computes."""
    rounded = rounds_product(device)
    sizes = zip((tops, lefts), window, grid, canvas, shape, strict=True)
    return tuple(canvas_axis(tuple(anchors), *rest, rounded) for anchors, *rest in sizes)


def queries_scores(
    masks: torch.Tensor,
    classes: torch.Tensor,
    tops: Sequence[int],
    lefts: Sequence[int],
    window: Sequence[int],
    canvas: Sequence[int],
    shape: Sequence[int],
) -> torch.Tensor:
    """Scores (B, C, H, W) of the formula above, which are large: float32, or float64 of float64.

    Args:
        masks: (B, len(tops) * len(lefts), Q, gh, gw) logits, windows row by row. classes: (B, windows, Q, C + 1)
            logits, the last of "no object".
        tops, lefts: first row of each row of windows, first column of each column, ascending, in pixels of the canvas.
        window: (h, w) that masks are upsampled to; what hangs over the canvas's end does not count.
        canvas: (H', W') that windows are averaged on. shape: (H, W) of the images. All interpolation is bilinear
            (align_corners=False).
    """
    check_queries(masks, classes, tops, lefts)
    axes = axes_of(tops, lefts, masks.shape[3:], window, canvas, shape, masks.device.type)
    if len(masks) == 0:
        return class_probabilities(classes).new_zeros(0, classes.shape[3] - 1, *shape)
    pairs = zip(masks, classes, strict=True)
    return torch.stack([torch.cat([scores for _, scores in _row_blocks(*pair, axes)], 1) for pair in pairs])


def queries_argmax(
    masks: torch.Tensor,
    classes: torch.Tensor,
    tops: Sequence[int],
    lefts: Sequence[int],
    window: Sequence[int],
    canvas: Sequence[int],
    shape: Sequence[int],
) -> torch.Tensor:
    """Labels (B, H, W) of `label_dtype(C)`: the class with the highest of `queries_scores`, the lowest among equals."""
    check_queries(masks, classes, tops, lefts)
    axes = axes_of(tops, lefts, masks.shape[3:], window, canvas, shape, masks.device.type)
    labels = torch.empty(len(masks), *shape, dtype=label_dtype(classes.shape[3] - 1), device=masks.device)
    for of_image, *queries in zip(labels, masks, classes, strict=True):
        for rows, scores in _row_blocks(*queries, axes):
            of_image[rows] = scores.argmax(0)
    return labels


def _row_blocks(
    masks: torch.Tensor, classes: torch.Tensor, axes: tuple[CanvasAxis, CanvasAxis]
) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows of the image, their scores (C, rows, W)) of masks (windows, Q, gh, gw) and classes (windows, Q, C + 1)."""
    rows, cols = axes
    masks = masks.to(torch.promote_types(masks.dtype, torch.float32))
    probabilities = class_probabilities(classes).to(masks.dtype)
    across, left, right = _needed(cols, slice(None))
    width = max(len(across), len(cols.low))
    step = max(1, BLOCK // (max(probabilities.shape[1:]) * width))
    for top in range(0, len(rows.low), step):
        block = slice(top, top + step)
        down, low, high = _needed(rows, block)
        scores = _canvas_scores(masks, probabilities, axes, down, across)
        scores = _between(scores, 2, left, right, cols.weight)
        yield block, _between(scores, 1, low, high, rows.weight[block])


def _needed(axis: CanvasAxis, pixels: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The canvas pixels that these image pixels lie between, ascending; and where among them `low` and `high` are."""
    low, high = axis.low[pixels], axis.high[pixels]
    needed, places = np.unique(np.concatenate([low, high]), return_inverse=True)
    return needed, places[: len(low)], places[len(low) :]


def _canvas_scores(
    masks: torch.Tensor,
    probabilities: torch.Tensor,
    axes: tuple[CanvasAxis, CanvasAxis],
    down: np.ndarray,
    across: np.ndarray,
) -> torch.Tensor:
    """Scores (C, len(down), len(across)) of these rows and columns of the canvas: the average of windows."""
    rows, cols = axes
    total = masks.new_zeros(probabilities.shape[1], len(down), len(across))
    for i, top in enumerate(rows.anchors):
        y = down[(down >= top) & (down < top + rows.window)] - top
        for j, left in enumerate(cols.anchors):
            x = across[(across >= left) & (across < left + cols.window)] - left
            if len(y) and len(x):
                k = i * len(cols.anchors) + j
                low, high = rows.cell_low[y], rows.cell_high[y]
                cells = masks[k][:, low[0] : high[-1] + 1]
                upsampled = _between(cells, 2, cols.cell_low[x], cols.cell_high[x], cols.cell_weight[x])
                upsampled = _between(upsampled, 1, low - low[0], high - low[0], rows.cell_weight[y])
                of_window = probabilities[k] @ upsampled.sigmoid().flatten(1)  # (C, Q) @ (Q, pixels)
                y_0, x_0 = np.searchsorted(down, y[0] + top), np.searchsorted(across, x[0] + left)
                total[:, y_0 : y_0 + len(y), x_0 : x_0 + len(x)] += of_window.unflatten(1, (len(y), len(x)))
    covering = torch.from_numpy(rows.covering[down][:, None] * cols.covering[across]).to(total.device)
    return total / covering


def _between(x: torch.Tensor, dim: int, low: np.ndarray, high: np.ndarray, weight: np.ndarray) -> torch.Tensor:
    """Linear interpolation along one dimension, between the places `low` and `high`, the latter with these weights."""
    first = x.index_select(dim, torch.from_numpy(low).to(x.device))
    if np.array_equal(low, high):
        return first
    second = x.index_select(dim, torch.from_numpy(high).to(x.device))
    weight = torch.from_numpy(weight).to(x.device, x.dtype).view(-1, *[1] * (x.ndim - 1 - dim))
    return first * (1 - weight) + second * weight
