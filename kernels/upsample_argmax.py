"""From low-resolution masks to labels: bilinear upsampling, the average of overlapping windows and argmax in one pass.

    masks (B, windows, gh, gw, K)  ->  labels (B, H, W), uint8 up to 256 classes, else int16

The (B, K, H, W) logits never exist: 157 MB an image at 512x512 and 150 classes in float32, written and read again by
eager PyTorch, against 0.6 MB of masks in bfloat16 and 0.26 MB of labels.

One program takes one tile (`segmenter.kernels.upsample_tiles`), inside which every pixel is a convex combination of the
same four cells of each window that covers it. At every pixel the best class is at least the mean of the four classes
that win at the four cells. So a class that is below this mean at every cell is below it everywhere and cannot win:
where one class wins all four, none is left but this one, at a border between two those two. Only what is left is
upsampled. Where all classes are left, in noise, the work is that of the dense way.

Exact: the comparison is widened by more than rounding can amount to, so no class is dropped that could win or tie. And
what is computed is, to the last bit, what F.interpolate of contiguous (B, K, h, w) float32 computes, on CUDA (read from
the machine code of torch 2.14 for sm_90) and on CPUs with fused multiply-add for results of more than 128 rows and
columns together (and not of exactly three classes, which PyTorch takes for colours): with weights w of the right and
h of the lower cells,

    fma(1 - h, fma(1 - w, v00, w v01), h fma(1 - w, v10, w v11)).

Masks in half types are widened first. Windows are added in order and divided by their number, as the published code
does. Equals go to the lowest class. Masks must be finite: else labels are some class, as it happens.

Limits: 1,024 classes; 64 windows over one pixel. Reference: `reference.windows_argmax`. Test:
tests/kernels/test_upsample_argmax.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from segmenter.kernels import configs, launch, reference, upsample_tiles
from segmenter.kernels.device_tables import kept
from segmenter.kernels.operators import define, forbid_forward_mode
from segmenter.kernels.upsample_tiles import MAX_CLASSES, MAX_SLOTS, Axis

_ROUNDING = tl.constexpr(upsample_tiles.ROUNDING)
_SUBNORMAL = tl.constexpr(upsample_tiles.SUBNORMAL)
_LEAST = tl.constexpr(-3.0e38)  # of what is no class
_HEADER = tl.constexpr(4)  # start, stop, first window, number of windows; then `low` and `high` of each slot


class _Tile(NamedTuple):
    """Where a tile is, and the windows that cover it; what `_corners` and `_class_logits` read it from."""

    masks: tl.tensor  # pointers, as the kernel's; rows and cols to the tile's own entries
    rows: tl.tensor
    cols: tl.tensor
    row_weights: tl.tensor
    col_weights: tl.tensor
    image: tl.tensor
    first_y: tl.tensor  # the first window that covers it, along each axis
    first_x: tl.tensor
    n_x: tl.tensor  # windows that cover it along x, and in all
    n_slots: tl.tensor
    windows_x: tl.tensor  # of the image: windows in a row, and in all; cells of one window; pixels
    n_windows: tl.tensor
    grid_h: tl.tensor
    grid_w: tl.tensor
    height: tl.tensor
    width: tl.tensor


@triton.jit
def _corners(t, s, K: tl.constexpr, SLOTS_Y: tl.constexpr, SLOTS_X: tl.constexpr):
    """Pointers to class 0 of the four cells that tile t lies between, in the s-th window that covers it."""
    s_y = s // t.n_x
    s_x = s % t.n_x
    window = (t.image * t.n_windows + (t.first_y + s_y) * t.windows_x + t.first_x + s_x).to(tl.int64)
    cells = t.masks + window * (t.grid_h * t.grid_w * K)
    top = cells + tl.load(t.rows + _HEADER + s_y) * t.grid_w * K
    bottom = cells + tl.load(t.rows + _HEADER + SLOTS_Y + s_y) * t.grid_w * K
    left = tl.load(t.cols + _HEADER + s_x) * K
    right = tl.load(t.cols + _HEADER + SLOTS_X + s_x) * K
    return top + left, top + right, bottom + left, bottom + right


@triton.jit
def _above(P, best, v):
    """How far every class is, at most, above the mean of four classes in one cell."""
    v_0 = tl.load(P + best[0]).to(tl.float32)
    v_1 = tl.load(P + best[1]).to(tl.float32)
    v_2 = tl.load(P + best[2]).to(tl.float32)
    v_3 = tl.load(P + best[3]).to(tl.float32)
    size = tl.abs(v_0) + tl.abs(v_1) + tl.abs(v_2) + tl.abs(v_3)
    return v + tl.abs(v) * _ROUNDING - (v_0 + v_1 + v_2 + v_3 - size * _ROUNDING) * 0.25 + _SUBNORMAL


@triton.jit
def _excess(corners, c, best, K: tl.constexpr):
    """How far every class is, at most, above the mean of four classes in the cells of a window; and these classes.

    They are `best`, or if that is None (of the first window) those that win in its cells. (NaN could make them any
    padding, hence the cut.)
    """
    v00 = tl.load(corners[0] + c, mask=c < K, other=_LEAST).to(tl.float32)
    v01 = tl.load(corners[1] + c, mask=c < K, other=_LEAST).to(tl.float32)
    v10 = tl.load(corners[2] + c, mask=c < K, other=_LEAST).to(tl.float32)
    v11 = tl.load(corners[3] + c, mask=c < K, other=_LEAST).to(tl.float32)
    if best is None:
        k_0 = tl.minimum(tl.argmax(v00, 0), K - 1)
        k_1 = tl.minimum(tl.argmax(v01, 0), K - 1)
        k_2 = tl.minimum(tl.argmax(v10, 0), K - 1)
        k_3 = tl.minimum(tl.argmax(v11, 0), K - 1)
        best = (k_0, k_1, k_2, k_3)
    upper = tl.maximum(_above(corners[0], best, v00), _above(corners[1], best, v01))
    lower = tl.maximum(_above(corners[2], best, v10), _above(corners[3], best, v11))
    return tl.maximum(upper, lower), best


@triton.jit
def _upsampled(corners, k, h, w):
    """Class k at the pixels with weights h (rows, 1) and w (1, columns)."""
    v00 = tl.load(corners[0] + k).to(tl.float32)
    v01 = tl.load(corners[1] + k).to(tl.float32)
    v10 = tl.load(corners[2] + k).to(tl.float32)
    v11 = tl.load(corners[3] + k).to(tl.float32)
    top = tl.fma(1.0 - w, v00, w * v01)  # (1, columns)
    bottom = tl.fma(1.0 - w, v10, w * v11)
    return tl.fma(1.0 - h, top, h * bottom)  # (rows, columns)


@triton.jit
def _class_logits(k, t, corners, h, w, y, x, in_y, in_x, K: tl.constexpr, SLOTS_Y: tl.constexpr,
                  SLOTS_X: tl.constexpr):  # fmt: skip
    """Class k at rows y and columns x of tile t: the average over the windows that cover it.

    corners, h, w: of the first window.
    """
    v = _upsampled(corners, k, h, w)
    if SLOTS_Y * SLOTS_X > 1:
        for s in range(1, t.n_slots):
            h_s = tl.load(t.row_weights + (s // t.n_x) * t.height + y, mask=in_y, other=0.0)[:, None]
            w_s = tl.load(t.col_weights + (s % t.n_x) * t.width + x, mask=in_x, other=0.0)[None, :]
            v += _upsampled(_corners(t, s, K, SLOTS_Y, SLOTS_X), k, h_s, w_s)
        v = tl.div_rn(v, t.n_slots.to(tl.float32))
    return v


@triton.jit
def _upsample_argmax_kernel(
    Masks, Labels,  # (B, windows, gh, gw, K), (B, H, W)
    RowTiles, ColTiles, RowWeights, ColWeights,  # int32 (intervals, _HEADER + 2 slots) twice, float32 (slots, H or W)
    n_row_tiles, n_col_tiles, windows_x, n_windows, grid_h, grid_w, height, width,
    K: tl.constexpr, K_PAD: tl.constexpr,
    SLOTS_Y: tl.constexpr, SLOTS_X: tl.constexpr,  # the most windows over one pixel, along each axis
    BLOCK_Y: tl.constexpr,  # rows at a time
    BLOCK_X: tl.constexpr,  # at least the columns of any tile
):  # fmt: skip
    pid = tl.program_id(0)
    image = pid // (n_row_tiles * n_col_tiles)
    Rows = RowTiles + (pid // n_col_tiles % n_row_tiles) * (_HEADER + 2 * SLOTS_Y)
    Cols = ColTiles + (pid % n_col_tiles) * (_HEADER + 2 * SLOTS_X)
    y_0 = tl.load(Rows)
    y_end = tl.load(Rows + 1)
    first_y = tl.load(Rows + 2)
    x_0 = tl.load(Cols)
    x_end = tl.load(Cols + 1)
    first_x = tl.load(Cols + 2)
    n_x = tl.load(Cols + 3) if SLOTS_X > 1 else 1
    n_slots = tl.load(Rows + 3) * n_x if SLOTS_Y * SLOTS_X > 1 else 1

    t = _Tile(Masks, Rows, Cols, RowWeights, ColWeights, image, first_y, first_x, n_x, n_slots, windows_x, n_windows,
              grid_h, grid_w, height, width)  # fmt: skip
    corners = _corners(t, 0, K, SLOTS_Y, SLOTS_X)
    c = tl.arange(0, K_PAD)
    excess, best_of_cells = _excess(corners, c, None, K)
    for s in range(1, n_slots):
        excess += _excess(_corners(t, s, K, SLOTS_Y, SLOTS_X), c, best_of_cells, K)[0]
    candidate = (c < K) & ~(excess < 0.0)  # with NaN, or beyond the largest number, all are left

    x = x_0 + tl.arange(0, BLOCK_X)
    in_x = x < x_end
    w = tl.load(ColWeights + x, mask=in_x, other=0.0)[None, :]
    for y_start in range(y_0, y_end, BLOCK_Y):
        y = y_start + tl.arange(0, BLOCK_Y)
        in_y = y < y_end
        h = tl.load(RowWeights + y, mask=in_y, other=0.0)[:, None]
        best = tl.full([BLOCK_Y, BLOCK_X], float("-inf"), tl.float32)
        label = tl.zeros([BLOCK_Y, BLOCK_X], tl.int32)
        k = tl.min(tl.where(candidate, c, K_PAD), 0)
        while k < K_PAD:
            v = _class_logits(k, t, corners, h, w, y, x, in_y, in_x, K, SLOTS_Y, SLOTS_X)
            better = v > best
            label = tl.where(better, k, label)
            best = tl.where(better, v, best)
            k = tl.min(tl.where(candidate & (c > k), c, K_PAD), 0)

        inside = in_y[:, None] & in_x[None, :]
        pixels = image.to(tl.int64) * height * width + y[:, None] * width + x[None, :]
        tl.store(Labels + pixels, label.to(Labels.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------------------------------------------------------
# Launching


def _axes(
    tops: tuple[int, ...],
    lefts: tuple[int, ...],
    grid: tuple[int, int],
    size: tuple[int, int],
    window: tuple[int, int],
    shape: tuple[int, int],
    rounded: bool,
) -> tuple[Axis, Axis]:
    pairs = enumerate((tops, lefts))
    return tuple(upsample_tiles.axis(anchors, window[i], grid[i], size[i], shape[i], rounded) for i, anchors in pairs)


def _tables(axes: tuple[Axis, Axis], device: torch.device) -> tuple[torch.Tensor, ...]:
    """(row tiles, column tiles, row weights, column weights) on the device."""
    (rows, row_weights), (cols, col_weights) = (axis.table() for axis in axes)
    return tuple(x.to(device) for x in (rows, cols, row_weights, col_weights))


def _run(
    masks: torch.Tensor,
    tops: tuple[int, ...],
    lefts: tuple[int, ...],
    size: tuple[int, int],
    window: tuple[int, int],
    shape: tuple[int, int],
    config: configs.UpsampleArgmaxConfig | None = None,
) -> torch.Tensor:
    B, n_windows, grid_h, grid_w, K = masks.shape
    labels = launch.empty((B, *shape), reference.label_dtype(K), masks.device)
    if B == 0:
        return labels
    geometry = (tops, lefts, (grid_h, grid_w), size, window, shape)
    axes = _axes(*geometry, upsample_tiles.rounds_product(masks.device.type))
    slots = (axes[0].n_slots, axes[1].n_slots)
    if slots[0] * slots[1] > MAX_SLOTS:
        raise launch.KernelError(
            f"{slots[0] * slots[1]} windows over one pixel, more than {MAX_SLOTS}; use a larger window_stride"
        )
    key = ("upsample_argmax", geometry, masks.device)
    tables = launch.call(kept, key, _tables, axes, masks.device)
    k_pad, block_x = triton.next_power_of_2(K), triton.next_power_of_2(axes[1].longest)
    c = config or configs.upsample_argmax(launch.architecture(masks), block_x, k_pad)
    n_tiles = [len(axis.starts) - 1 for axis in axes]
    scalars = (
        *n_tiles, len(lefts), n_windows, grid_h, grid_w, *shape,
        K, k_pad, *slots, min(c.block_y, triton.next_power_of_2(axes[0].longest)), block_x,
    )  # fmt: skip
    options = {"num_warps": c.num_warps, "num_stages": 1}
    plan = launch.Plan(_upsample_argmax_kernel, B * n_tiles[0] * n_tiles[1], (None,) * 6, scalars, options)
    plan.run(masks, labels, *tables)
    return labels


# ---------------------------------------------------------------------------------------------------------------------
# Operator


def _check(masks: torch.Tensor, tops: Sequence[int], lefts: Sequence[int]) -> None:
    if masks.ndim != 5 or masks.shape[1] != len(tops) * len(lefts):
        n = len(tops) * len(lefts)
        raise ValueError(f"masks must be (B, {n}, gh, gw, K), one for each window, got {tuple(masks.shape)}")
    if masks.shape[-1] == 0:
        raise ValueError(f"there are no classes: masks is {tuple(masks.shape)}")


def _windows_argmax_kernel(masks, tops, lefts, size, window, shape):
    launch.check_device(masks)
    launch.check_floats("masks", masks)
    _check(masks, tops, lefts)
    if masks.shape[2] * masks.shape[3] * masks.shape[4] >= 2**31:
        raise launch.KernelError("the masks of one window have 2^31 elements or more; use smaller windows")
    if masks.shape[-1] > MAX_CLASSES:
        raise launch.KernelError(f'{masks.shape[-1]} classes are more than {MAX_CLASSES}; use impl="eager"')
    geometry = (tuple(x) for x in (tops, lefts, size, window, shape))
    return _run(launch.contiguous(masks), *geometry)


def _windows_argmax_fake(masks, tops, lefts, size, window, shape):
    _check(masks, tops, lefts)
    return masks.new_empty(masks.shape[0], *shape, dtype=reference.label_dtype(masks.shape[-1]))


def _windows_argmax_reference(masks, tops, lefts, size, window, shape):
    _check(masks, tops, lefts)
    return reference.windows_argmax(masks, tops, lefts, size, window, shape)


_windows_argmax = define(
    "windows_argmax(Tensor masks, int[] tops, int[] lefts, int[] size, int[] window, int[] shape) -> Tensor",
    kernel=_windows_argmax_kernel,
    reference=_windows_argmax_reference,
    fake=_windows_argmax_fake,
    flops=lambda *args, **kwargs: 0,  # depends on the values; see bench.shapes.masks_to_labels
    autocast=lambda dtype, args: args,
)


def windows_argmax(
    masks: torch.Tensor,
    tops: Sequence[int],
    lefts: Sequence[int],
    size: tuple[int, int],
    window: tuple[int, int],
    shape: tuple[int, int],
) -> torch.Tensor:
    """Labels of images from the masks of overlapping windows; not differentiable.

    Args:
        masks: (B, len(tops) * len(lefts), gh, gw, K), class last, windows row by row; bfloat16, float16 or float32.
        tops, lefts: first row of each row of windows, first column of each column, ascending, from 0 on; the last
            window ends where the image ends.
        size: (h, w) that a window's masks are upsampled to (bilinear, align_corners=False).
        window: (h, w) of a window; what `size` has more is padding. shape: (H, W) of the images.
    Returns:
        labels (B, H, W), uint8 up to 256 classes, else int16.
    Raises:
        KernelError: another type or device, too many classes or windows. ValueError: sizes that do not fit.
    """
    launch.check_device(masks)
    forbid_forward_mode()
    return _windows_argmax(masks, list(tops), list(lefts), list(size), list(window), list(shape))


def upsample_argmax(masks: torch.Tensor, size: tuple[int, int], crop: tuple[int, int] | None = None) -> torch.Tensor:
    """Labels of upsampled masks, as F.interpolate(masks, size, mode="bilinear")[..., :H0, :W0].argmax; exact.

    Args:
        masks: (B, h, w, K), class last; bfloat16, float16 or float32. size: (H, W) to upsample to, any.
        crop: (H0, W0) to cut the result to, or None.
    Returns:
        labels (B, H0, W0), uint8 up to 256 classes, else int16.
    Raises:
        KernelError: another type or device, too many classes. ValueError: sizes that do not fit.
    """
    if masks.ndim != 4:
        raise ValueError(f"masks must be (B, h, w, K), got {tuple(masks.shape)}")
    crop = tuple(crop or size)
    return windows_argmax(masks.unsqueeze(1), (0,), (0,), tuple(size), crop, crop)
