"""From mask cells to labels along one axis: masks to windows, windows to a canvas, the canvas to the image.

Networks that give masks for queries are often run on windows of an image that was resized first. Their masks are
upsampled to the window; windows are averaged on the canvas, which is the resized image; and scores of the canvas are
resized to the image. Both interpolations are bilinear (align_corners=False), and both are separable, as is the number
of windows over a pixel where windows lie in rows and columns. So all that they do is in two of the tables below.

Windows may hang over the canvas's end: what they have there is padding. They may leave a pixel of it out: some
published preprocessing rounds the place of the last window down, and such a pixel then has a score of 0.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch

from segmenter.kernels.upsample_tiles import source_cells


@dataclass(frozen=True, eq=False)
class CanvasAxis:
    """One axis.

    Attributes:
        anchors: (n,) first canvas pixel of each window, ascending. window: pixels of one.
        cell_low, cell_high, cell_weight: (window,) the two mask cells of each of them, and the weight of the second.
        low, high, weight: (length,) the two canvas pixels of each image pixel, and the weight of the second: low and
            high are the same where that is 0. covering: (canvas,) windows over each canvas pixel, at least 1.
    """

    anchors: np.ndarray
    window: int
    cell_low: np.ndarray
    cell_high: np.ndarray
    cell_weight: np.ndarray
    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray
    covering: np.ndarray

    @property
    def resized(self) -> bool:
        """Whether the image has another size than the canvas."""
        return len(self.covering) != len(self.low)

    def table(self, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For the kernel, with tiles of `block` pixels.

        Returns:
            int32: low, high (length each), cell_low, cell_high (window each), anchors (n), and of each tile its first
            window and the one after its last (2 each). float32: the weights of low and of high, divided by the number
            of windows (length each), and cell_weight (window).
        """
        tiles = np.arange(0, len(self.low), block)
        last = np.minimum(tiles + block, len(self.low)) - 1
        first = np.searchsorted(self.anchors + self.window, self.low[tiles], side="right")
        stop = np.searchsorted(self.anchors, self.high[last], side="right")
        bounds = np.stack([first, np.maximum(first, stop)], 1).ravel()
        whole = [self.low, self.high, self.cell_low, self.cell_high, self.anchors, bounds]
        parts = [(1 - self.weight) / self.covering[self.low], self.weight / self.covering[self.high], self.cell_weight]
        return tuple(
            torch.from_numpy(np.concatenate(x).astype(kind)) for x, kind in ((whole, np.int32), (parts, np.float32))
        )


@functools.lru_cache(256)
def canvas_axis(
    anchors: tuple[int, ...], window: int, n_in: int, canvas: int, length: int, rounded: bool
) -> CanvasAxis:
    """An axis of `length` image pixels, of a canvas of `canvas`, with windows of `window` pixels and `n_in` mask cells.

    rounded: as for `upsample_tiles.source_cells`.

    Raises:
        ValueError: windows that do not ascend or begin outside the canvas, or sizes below 1.
    """
    if min(window, n_in, canvas, length) < 1:
        raise ValueError(f"sizes must be at least 1: {n_in} cells to {window} pixels, of {canvas}, for {length}")
    starts = np.asarray(anchors, np.int64)
    if len(starts) == 0 or starts[0] < 0 or starts[-1] >= canvas or (np.diff(starts) <= 0).any():
        raise ValueError(f"windows at {list(anchors)} do not ascend within a canvas of {canvas} pixels")
    low, high, weight = source_cells(canvas, length, rounded)
    pixels = np.arange(canvas)
    covering = ((pixels >= starts[:, None]) & (pixels < starts[:, None] + window)).sum(0)
    cells = source_cells(n_in, window, rounded)
    return CanvasAxis(starts, window, *cells, low, np.where(weight > 0, high, low), weight, np.maximum(covering, 1))
