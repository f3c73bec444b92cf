"""From masks and classes of queries to labels in one pass: upsampling, sigmoid, sum over queries, windows, argmax.

    masks (B, windows, Q, gh, gw), classes (B, windows, Q, C + 1)  ->  labels (B, H, W), uint8 or int16

The score of class c at a pixel is the sum over queries of softmax(classes)[c] times the sigmoid of the upsampled mask
("no object", the last class, is left out after the softmax); windows are averaged on a canvas, which is resized to the
image. Resizing, averaging and the sum over queries are linear, so they can change places:

    scores (pixels, C) = sum over windows of  s^T (pixels, Q) @ softmax(classes) (Q, C),
    s = sum over the four canvas pixels around an image pixel of  weight / windows there * sigmoid(upsampled mask).

One program does that for a tile of pixels: s is made in registers, from 4 mask cells for each of the four canvas pixels
(of one where the image has the canvas's size), and the products go to the tensor cores. Neither the upsampled masks nor
the scores exist in memory: 105 MB and 157 MB an image at 512x512, 100 queries and 150 classes in float32, written and
read again by eager PyTorch, against 6.6 MB of masks and 0.26 MB of labels.

All is computed in float32. The products are as `torch.set_float32_matmul_precision` says for masks in float32, and of
TF32 for half types, whose eager products are rounded more: operands of half types would lose the small scores of pixels
that no query claims. Equals go to the lowest class. Masks and classes must be finite: else labels are some class.

Classes are held in one or two blocks of accumulators, both powers of two (150 as 128 and 32); beyond MAX_HELD of them s
is made again. Limits: 32,767 classes; masks of one window below 2^31 elements. Reference:
`reference_queries.queries_argmax`. Test: tests/kernels/test_queries_argmax.py.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from segmenter.kernels import configs_queries, launch, reference, reference_queries
from segmenter.kernels.blocks import LOG2E
from segmenter.kernels.canvas_axis import CanvasAxis
from segmenter.kernels.device_tables import kept
from segmenter.kernels.operators import define, forbid_forward_mode

MAX_HELD = 256  # classes that a program accumulates at a time


@triton.jit
def _taps(Ints, Floats, pixels, inside, anchor, length, window, tap):
    """Of pixels along one axis: their two mask cells in the window at `anchor`, the second's weight, and what counts.

    tap: 0 for the first of the two canvas pixels that a pixel lies between, 1 for the second. What counts of it is its
    weight divided by the number of windows over it, and 0 where the window does not cover it.
    """
    place = tl.load(Ints + tap * length + pixels, mask=inside, other=-1) - anchor
    covered = (place >= 0) & (place < window) & inside
    counts = tl.load(Floats + tap * length + pixels, mask=covered, other=0.0)
    place = tl.where(covered, place, 0)
    low = tl.load(Ints + 2 * length + place)
    high = tl.load(Ints + 2 * length + window + place)
    return low, high, tl.load(Floats + 2 * length + place), counts


@triton.jit
def _claimed(Queries, in_queries, row, col, grid_w):
    """How far queries (rows) claim canvas pixels (columns): sigmoid of the mask there, times what counts of both axes.

    Queries: pointers to the masks, (queries, 1). row, col: of each pixel as `_taps` has them.
    """
    top, bottom, h, counts_y = row
    left, right, w, counts_x = col
    v00 = tl.load(Queries + (top * grid_w + left)[None, :], mask=in_queries, other=0.0).to(tl.float32)
    v01 = tl.load(Queries + (top * grid_w + right)[None, :], mask=in_queries, other=0.0).to(tl.float32)
    v10 = tl.load(Queries + (bottom * grid_w + left)[None, :], mask=in_queries, other=0.0).to(tl.float32)
    v11 = tl.load(Queries + (bottom * grid_w + right)[None, :], mask=in_queries, other=0.0).to(tl.float32)
    h = h[None, :]
    w = w[None, :]
    mask = (1.0 - h) * ((1.0 - w) * v00 + w * v01) + h * ((1.0 - w) * v10 + w * v11)
    return (counts_y * counts_x)[None, :] / (1.0 + tl.exp2(-mask * LOG2E))


@triton.jit
def _best(acc, c_0, n_classes, best, label, BLOCK_C: tl.constexpr):
    """The best class so far of each pixel, with the scores (pixels, BLOCK_C) of classes c_0 and on."""
    c = c_0 + tl.arange(0, BLOCK_C)
    acc = tl.where(c[None, :] < n_classes, acc, float("-inf"))
    value, index = tl.max(acc, 1, return_indices=True, return_indices_tie_break_left=True)
    better = value > best
    return tl.where(better, value, best), tl.where(better, c_0 + index, label)


@triton.jit
def _queries_argmax_kernel(
    Masks, Classes, Labels,  # (B, windows, Q, gh, gw), (B, windows, rows, columns) float32, (B, H, W)
    RowInts, RowFloats, ColInts, ColFloats,  # of CanvasAxis.table
    n_rows, n_cols, n_queries, n_classes, class_rows, class_cols,  # of windows; queries; classes, also with padding
    grid_h, grid_w, window_h, window_w, height, width,
    n_taps,  # canvas pixels around an image pixel along one axis
    BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr,  # classes that are accumulated together; none in the second, if 0
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    n_tiles_x = tl.cdiv(width, BLOCK_X)
    n_tiles_y = tl.cdiv(height, BLOCK_Y)
    image = (pid // (n_tiles_x * n_tiles_y)).to(tl.int64)
    tile_y = pid // n_tiles_x % n_tiles_y
    tile_x = pid % n_tiles_x
    offs_p = tl.arange(0, BLOCK_Y * BLOCK_X)
    y = tile_y * BLOCK_Y + offs_p // BLOCK_X
    x = tile_x * BLOCK_X + offs_p % BLOCK_X
    in_y = y < height
    in_x = x < width
    offs_q = tl.arange(0, BLOCK_Q)

    RowAnchors = RowInts + 2 * (height + window_h)
    ColAnchors = ColInts + 2 * (width + window_w)
    first_y = tl.load(RowAnchors + n_rows + 2 * tile_y)
    first_x = tl.load(ColAnchors + n_cols + 2 * tile_x)
    n_y = tl.load(RowAnchors + n_rows + 2 * tile_y + 1) - first_y
    n_x = tl.load(ColAnchors + n_cols + 2 * tile_x + 1) - first_x

    best = tl.full([BLOCK_Y * BLOCK_X], float("-inf"), tl.float32)
    label = tl.zeros([BLOCK_Y * BLOCK_X], tl.int32)
    for c_0 in range(0, n_classes, BLOCK_1 + BLOCK_2):
        c_1 = c_0 + tl.arange(0, BLOCK_1)[None, :]
        acc_1 = tl.zeros([BLOCK_Y * BLOCK_X, BLOCK_1], tl.float32)
        if BLOCK_2 > 0:
            c_2 = c_0 + BLOCK_1 + tl.arange(0, BLOCK_2)[None, :]
            acc_2 = tl.zeros([BLOCK_Y * BLOCK_X, BLOCK_2], tl.float32)
        for s in range(0, n_y * n_x):
            window_y = first_y + s // n_x
            window_x = first_x + s % n_x
            top = tl.load(RowAnchors + window_y)
            left = tl.load(ColAnchors + window_x)
            window = image * (n_rows * n_cols) + window_y * n_cols + window_x
            OfWindow = Masks + window * n_queries * grid_h * grid_w
            OfClasses = Classes + window * class_rows * class_cols
            for q_0 in range(0, n_queries, BLOCK_Q):
                q = q_0 + offs_q
                Queries = OfWindow + (q * (grid_h * grid_w))[:, None]
                in_queries = (q < n_queries)[:, None]
                claimed = tl.zeros([BLOCK_Q, BLOCK_Y * BLOCK_X], tl.float32)
                for tap in range(0, n_taps * n_taps):
                    row = _taps(RowInts, RowFloats, y, in_y, top, height, window_h, tap // n_taps)
                    col = _taps(ColInts, ColFloats, x, in_x, left, width, window_w, tap % n_taps)
                    claimed += _claimed(Queries, in_queries, row, col, grid_w)
                claimed = claimed.T  # made as it is read, side by side; pixels are rows of the product
                p = tl.load(OfClasses + c_1 * class_cols + q[:, None])
                acc_1 = tl.dot(claimed, p, acc_1, input_precision=PRECISION)
                if BLOCK_2 > 0:
                    p = tl.load(OfClasses + c_2 * class_cols + q[:, None])
                    acc_2 = tl.dot(claimed, p, acc_2, input_precision=PRECISION)
        best, label = _best(acc_1, c_0, n_classes, best, label, BLOCK_1)
        if BLOCK_2 > 0:
            best, label = _best(acc_2, c_0 + BLOCK_1, n_classes, best, label, BLOCK_2)

    pixels = image * height * width + y * width + x
    tl.store(Labels + pixels, label.to(Labels.dtype.element_ty), mask=in_y & in_x)


# ---------------------------------------------------------------------------------------------------------------------
# Launching


def class_blocks(n_classes: int) -> tuple[int, int]:
    """Two powers of two that hold the classes with little to spare, the second 0 if one will do; at most MAX_HELD."""
    whole = max(16, triton.next_power_of_2(n_classes))
    half = whole // 2
    if n_classes > MAX_HELD:
        return MAX_HELD // 2, MAX_HELD // 2
    if half < 16 or n_classes <= half:
        return whole, 0
    return half, max(16, triton.next_power_of_2(n_classes - half))


def padded_probabilities(classes: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """`reference_queries.class_probabilities` with zeros up to multiples of so many rows and columns.

    So they are loaded without masks, several at a time, which spares registers.
    """
    found = reference_queries.class_probabilities(classes)
    return F.pad(found, (0, -found.shape[-1] % cols, 0, -found.shape[-2] % rows))


def _tables(axes: tuple[CanvasAxis, CanvasAxis], blocks: tuple[int, int], device: torch.device) -> tuple:
    """(row integers, row floats, column integers, column floats) on the device."""
    return tuple(t.to(device) for axis, block in zip(axes, blocks, strict=True) for t in axis.table(block))


def _run(
    masks: torch.Tensor,
    classes: torch.Tensor,
    geometry: tuple,
    config: configs_queries.QueriesArgmaxConfig | None = None,
) -> torch.Tensor:
    """geometry: (tops, lefts, window, canvas, shape). config: instead of the table's choice."""
    B, _, Q, *grid = masks.shape
    n_classes = classes.shape[3] - 1
    tops, lefts, window, canvas, shape = geometry
    axes = reference_queries.axes_of(tops, lefts, grid, window, canvas, shape, masks.device.type)
    labels = launch.empty((B, *shape), reference.label_dtype(n_classes), masks.device)
    if B == 0:
        return labels
    precision = launch.dot_precision(torch.float32) if masks.dtype == torch.float32 else "tf32"
    c = config or configs_queries.queries_argmax(launch.architecture(masks), precision, n_classes)
    blocks = (c.block_y, c.block_x)
    key = ("queries_argmax", geometry, tuple(grid), blocks, masks.device)
    tables = launch.call(kept, key, _tables, axes, blocks, masks.device)
    held = class_blocks(n_classes)
    probabilities = launch.call(padded_probabilities, classes, sum(held), c.block_q)
    scalars = (
        len(tops), len(lefts), Q, n_classes, *probabilities.shape[2:], *grid, *window, *shape,
        2 if axes[0].resized or axes[1].resized else 1, *held, *blocks, c.block_q, precision,
    )  # fmt: skip
    options = {"num_warps": c.num_warps, "num_stages": c.num_stages}
    n_tiles = triton.cdiv(shape[0], c.block_y) * triton.cdiv(shape[1], c.block_x)
    plan = launch.Plan(_queries_argmax_kernel, B * n_tiles, (None,) * 7, scalars, options)
    plan.run(masks, probabilities, labels, *tables)
    return labels


# ---------------------------------------------------------------------------------------------------------------------
# Operator


def _queries_argmax_kernel_call(masks, classes, tops, lefts, window, canvas, shape):
    launch.check_device(masks, classes)
    launch.check_floats("masks", masks)
    launch.check_floats("classes", classes)
    reference_queries.check_queries(masks, classes, tops, lefts)
    if math.prod(masks.shape[2:]) >= 2**31:
        raise launch.KernelError("the masks of one window have 2^31 elements or more; use smaller windows")
    geometry = tuple(tuple(x) for x in (tops, lefts, window, canvas, shape))
    return _run(launch.contiguous(masks), launch.contiguous(classes), geometry)


def _fake(masks, classes, tops, lefts, window, canvas, shape):
    reference_queries.check_queries(masks, classes, tops, lefts)
    return masks.new_empty(masks.shape[0], *shape, dtype=reference.label_dtype(classes.shape[3] - 1))


def _flops(masks: tuple[int, ...], classes: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """Of the products on the canvas, which each of its pixels needs once; a pixel that two windows cover, twice."""
    window = args[2]
    return 2 * masks[0] * masks[1] * masks[2] * (classes[3] - 1) * window[0] * window[1]


_queries_argmax = define(
    "queries_argmax(Tensor masks, Tensor classes, int[] tops, int[] lefts, int[] window, int[] canvas, int[] shape)"
    " -> Tensor",
    kernel=_queries_argmax_kernel_call,
    reference=reference_queries.queries_argmax,
    fake=_fake,
    flops=_flops,
    autocast=lambda dtype, args: args,
)


def queries_argmax(
    masks: torch.Tensor,
    classes: torch.Tensor,
    tops: Sequence[int],
    lefts: Sequence[int],
    window: Sequence[int],
    canvas: Sequence[int],
    shape: Sequence[int],
) -> torch.Tensor:
    """Labels of images from masks and classes of queries, such as EoMT's, in overlapping windows; not differentiable.

    Args:
        masks: (B, len(tops) * len(lefts), Q, gh, gw) logits, windows row by row; bfloat16, float16 or float32.
        classes: (B, windows, Q, C + 1) logits, the last of "no object"; of these types.
        tops, lefts: first row of each row of windows, first column of each column, ascending, in pixels of the canvas.
        window: (h, w) that masks are upsampled to; what hangs over the canvas's end does not count.
        canvas: (H', W') that windows are averaged on. shape: (H, W) of the images, to which that is resized.
    Returns:
        labels (B, H, W), uint8 up to 256 classes, else int16.
    Raises:
        KernelError: another type or device, too many classes. ValueError: sizes that do not fit.
    """
    launch.check_device(masks, classes)
    forbid_forward_mode()
    return _queries_argmax(masks, classes, *(list(x) for x in (tops, lefts, window, canvas, shape)))
