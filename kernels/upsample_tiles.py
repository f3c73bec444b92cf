"""How an upsampled image is cut into tiles in which every pixel lies between the same four mask cells.

Bilinear upsampling of one window (align_corners=False) makes a pixel a convex combination of four mask cells. Along an
axis the two cells change at known pixels; where windows overlap, so do the windows that cover a pixel. An `Axis` cuts
one axis at all these places. A tile is an interval of the rows times one of the columns: inside it every pixel
combines the same cells of the same windows, only with other weights. That is what lets the label of a tile be found
without looking at classes that cannot win (`segmenter.kernels.upsample_argmax`, and `segmenter.inference.pruned_argmax`
without Triton).

Weights are those of F.interpolate to the last bit: float32, source = n_in / n_out * (i + 0.5) - 0.5, cut off at 0.
`rounds_product` tells whether the product is rounded.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

ROUNDING = 2.0**-16  # relative: more than six roundings for each of 64 windows can amount to
SUBNORMAL = 1e-37  # absolute: products below it lose digits
MAX_INTERVAL = 32  # pixels; longer ones are cut, so that bounds stay tight and tiles small


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of `length` pixels, cut into I intervals; at most S windows cover a pixel.

    Attributes:
        starts: (I + 1,) first pixel of each interval, and the length. first, count: (I,) the first window that covers
            it, and how many do: they are consecutive. low, high: (S, I) the two mask cells in the s-th of them, equal
            where the border repeats the outermost. weight: (S, length) float32, the weight of `high` at each pixel.
    """

    starts: np.ndarray
    first: np.ndarray
    count: np.ndarray
    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray

    @property
    def length(self) -> int:
        return int(self.starts[-1])

    @property
    def n_slots(self) -> int:
        return len(self.low)

    @property
    def longest(self) -> int:
        """Pixels of the longest interval."""
        return int(np.diff(self.starts).max())

    def table(self) -> tuple[torch.Tensor, torch.Tensor]:
        """For the kernel: int32 (I, 4 + 2 S) of start, stop, first, count, low of each slot, high of each; weights."""
        header = np.stack([self.starts[:-1], self.starts[1:], self.first, self.count], 1)
        rows = np.concatenate([header, self.low.T, self.high.T], 1).astype(np.int32)
        return torch.from_numpy(rows), torch.from_numpy(np.ascontiguousarray(self.weight))


@functools.cache
def rounds_product(device: str) -> bool:
    """Whether F.interpolate rounds n_in / n_out * (i + 0.5) before it subtracts 0.5, on this type of device.

    CUDA's fuses multiplication and subtraction. The CPU's does in some versions of PyTorch: 2.14, not 2.6 nor 2.15.
    """
    if device != "cpu":
        return False
    # pixel 32 of 130 lies on the first of two cells; 2 / 130 is rounded up, so it is beyond, if by no more than that
    cells = torch.tensor([0.0, 1.0], dtype=torch.float32, device=device).view(1, 1, 2, 1)
    return bool(F.interpolate(cells, (130, 1), mode="bilinear")[0, 0, 32, 0] == 0)


def source_cells(n_in: int, n_out: int, rounded: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of n_out pixels: the two cells of n_in, and the float32 weight of the second, as F.interpolate has.

    rounded: as `rounds_product` says.
    """
    # float64 holds the product of two float32 numbers exactly
    product = np.float64(np.float32(n_in) / np.float32(n_out)) * (np.arange(n_out) + 0.5)
    source = ((product.astype(np.float32) if rounded else product) - 0.5).astype(np.float32)
    low = np.clip(source.astype(np.int64), 0, n_in - 1)
    high = np.where(source <= 0, low, np.minimum(low + 1, n_in - 1))  # at weight 0 any cell will do
    weight = np.clip(source - low.astype(np.float32), 0, 1).astype(np.float32)
    return low, high, weight


@functools.lru_cache(256)
def axis(anchors: tuple[int, ...], window: int, n_in: int, n_out: int, length: int, rounded: bool) -> Axis:
    """Cuts an axis of `length` pixels.

    Args:
        anchors: first pixel of each window, ascending. window: pixels of a window that count; the n_out pixels that
            its n_in cells are upsampled to may be more, the rest is padding. rounded: as for `source_cells`.
    Raises:
        ValueError: a window hangs over the end, the windows leave a pixel out, or sizes below 1.
    """
    if min(window, n_in, n_out, length) < 1 or window > n_out:
        raise ValueError(f"sizes do not fit: {n_in} cells to {n_out} pixels, of which {window} count, of {length}")
    starts = np.asarray(anchors, np.int64)
    if len(starts) == 0 or starts[0] != 0 or starts[-1] + window != length or (np.diff(starts) <= 0).any():
        raise ValueError(f"windows of {window} at {list(anchors)} do not go from 0 to {length} in order")
    if (np.diff(starts) > window).any():
        raise ValueError(f"windows of {window} at {list(anchors)} leave pixels out")
    low, high, weight = (x[:window] for x in source_cells(n_in, n_out, rounded))

    changes = np.flatnonzero((np.diff(low) != 0) | (np.diff(high) != 0)) + 1
    inside = (starts[:, None] + np.concatenate([[0], changes, [window]])).ravel()
    cuts = np.unique(inside)
    cuts = np.unique(np.concatenate([np.arange(a, b, MAX_INTERVAL) for a, b in zip(cuts, cuts[1:], strict=False)]))
    first = np.searchsorted(starts + window, cuts, side="right")  # windows that end at or before the interval's start
    count = np.searchsorted(starts, cuts, side="right") - first

    n_slots, pixels = int(count.max()), np.arange(length)
    interval = np.searchsorted(cuts, pixels, side="right") - 1
    slots = np.arange(n_slots)[:, None]
    used = slots < count
    at = np.where(used, cuts - starts[np.minimum(first + slots, len(starts) - 1)], 0)  # (S, I) within the window
    place = np.where(used[:, interval], pixels - starts[np.minimum(first + slots, len(starts) - 1)][:, interval], 0)
    return Axis(np.append(cuts, length), first, count, low[at], high[at], np.where(used[:, interval], weight[place], 0))


MAX_CLASSES = 1024  # of the kernel: what a program holds of one mask cell
MAX_SLOTS = 64  # of the kernel: windows over one pixel, which its allowance for rounding covers


def windows_fit(
    n_cls: int,
    tops: tuple[int, ...],
    lefts: tuple[int, ...],
    size: tuple[int, int],
    window: tuple[int, int],
    shape: tuple[int, int],
) -> bool:
    """Whether `segmenter.kernels.upsample_argmax` takes so many classes and windows."""
    slots = [
        axis(anchors, n, 1, n, length, False).n_slots
        for anchors, n, length in zip((tops, lefts), window, shape, strict=True)
    ]
    return n_cls <= MAX_CLASSES and slots[0] * slots[1] <= MAX_SLOTS
