"""From low-resolution masks to labels in plain PyTorch, without full-resolution logits: what CPUs run.

The idea is that of the kernel (`segmenter.kernels.upsample_argmax`): inside a tile (`kernels.upsample_tiles`) only
classes that are somewhere above the mean of the classes that win at its corners can win, so only these are upsampled,
with the arithmetic of F.interpolate. Most tiles need not even that: one class wins at all corners, and so everywhere.
Where a strip of the image has too many candidates for that to pay, or many windows cover a pixel, all classes are
upsampled, a few rows of pixels at a time. Either way labels are those of `reference.windows_argmax` to the last tie, if
the CPU has fused multiply-add and masks are float32 or narrower.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from segmenter.inference.merge import View, fill_labels
from segmenter.inference.windows import Windows
from segmenter.kernels import reference, upsample_tiles
from segmenter.ops import Operators

STRIP_BYTES = 8 << 20  # of the corners of the tiles that are looked at together
DENSE_BYTES = 4 << 20  # of the scores that are computed together where all classes are
CHUNK_VALUES = 1 << 16  # of several small windows that are upsampled together then
CHUNK_PIXELS = 1 << 16  # that are upsampled together: a few float32 arrays of them stay in a CPU core's cache
MAX_WINDOWS = 8  # over one pixel: looking for candidates costs the square of their number, upsampling all classes not
MIN_TILE = 32  # pixels, where windows overlap: to look at the corners of smaller tiles costs as much as upsampling them
DENSE_ABOVE = 0.25  # share of the classes that are candidates: to pick one costs that much more than one of all


def operator(ops: Operators) -> Callable:
    """The `windows_argmax` of these operators; the one below in place of its equal, the reference."""
    return windows_argmax if ops.windows_argmax is reference.windows_argmax else ops.windows_argmax


def windows_argmax(
    masks: torch.Tensor,
    tops: Sequence[int],
    lefts: Sequence[int],
    size: tuple[int, int],
    window: tuple[int, int],
    shape: tuple[int, int],
) -> torch.Tensor:
    """Labels of images from the masks of overlapping windows; arguments and result as `reference.windows_argmax`.

    Memory beyond masks and labels: a few times STRIP_BYTES or what one row of tiles takes, (4, W / P, n_cls) float32,
    and a few rows of scores, (W, n_cls), and two or three more for each window over a pixel. A GPU takes
    `merge.fill_labels`: looking at candidates would wait for the device at every step.
    """
    labels = torch.empty(len(masks), *shape, dtype=reference.label_dtype(masks.shape[-1]), device=masks.device)
    windows = Windows(tuple(tops), tuple(lefts), tuple(size), tuple(window), tuple(shape))
    rows, cols = _axes(windows, masks.shape[2:4])
    for of_image, target in zip(masks, labels, strict=True):
        view = View(of_image.float().contiguous(), windows)
        if masks.device.type != "cpu":
            fill_labels(target, [view])
        elif _pruning_pays(rows, cols):
            _pruned(view, rows, cols, target)
        else:
            _dense(view, target, 0, shape[0])
    return labels


# ---------------------------------------------------------------------------------------------------------------------
# Only the classes that can win


def _axes(windows: Windows, grid: tuple[int, int]) -> tuple[upsample_tiles.Axis, upsample_tiles.Axis]:
    """The tiles' rows and columns; `grid`: mask cells of a window."""
    rounded = upsample_tiles.rounds_product("cpu")
    return tuple(
        upsample_tiles.axis(anchors, windows.window[i], grid[i], windows.size[i], windows.shape[i], rounded)
        for i, anchors in enumerate((windows.tops, windows.lefts))
    )


def _pruning_pays(rows: upsample_tiles.Axis, cols: upsample_tiles.Axis) -> bool:
    """Whether windows overlap so little that it is worth looking for the classes that can win."""
    windows, tiles = rows.n_slots * cols.n_slots, len(rows.first) * len(cols.first)
    return windows == 1 or (windows <= MAX_WINDOWS and rows.length * cols.length >= MIN_TILE * tiles)


def _pruned(view: View, rows: upsample_tiles.Axis, cols: upsample_tiles.Axis, labels: torch.Tensor) -> None:
    """Fills `labels` (H, W) of one image."""
    n_cls, n_cols = view.masks.shape[-1], len(cols.first)
    best = view.masks.topk(min(2, n_cls), dim=-1)
    winners = best.indices[..., 0].flatten()  # of each mask cell
    clear = torch.ones_like(winners, dtype=torch.bool)
    if n_cls > 1:  # whether the winner is above the second by more than rounding can hide
        first, second = best.values.flatten(0, -2).unbind(-1)
        clear = first - second > (first.abs() + second.abs()) * upsample_tiles.ROUNDING + upsample_tiles.SUBNORMAL
    slots = 4 * rows.n_slots * cols.n_slots
    step = max(1, STRIP_BYTES // (n_cols * n_cls * slots * 4))
    for begin in range(0, len(rows.first), step):
        stop = min(begin + step, len(rows.first))
        strip = _Strip(view, rows, cols, begin, stop, winners, clear)
        top, bottom = int(rows.starts[begin]), int(rows.starts[stop])
        if strip.n_candidates > DENSE_ABOVE * n_cls * (stop - begin) * n_cols:
            _dense(view, labels, top, bottom)
        else:
            labels[top:bottom] = strip.labels(labels.dtype)


def _dense(view: View, labels: torch.Tensor, top: int, bottom: int) -> None:
    """Fills rows top..bottom of `labels` (H, W) with all classes upsampled, a few rows at a time.

    The published way, and the work of it: every window is upsampled once.
    """
    windows, (grid_h, grid_w, n_cls) = view.windows, view.masks.shape[1:]
    (height, width), (H, W) = windows.window, windows.shape
    masks = view.masks.unflatten(0, (len(windows.tops), len(windows.lefts)))
    rounded = upsample_tiles.rounds_product("cpu")
    low, high, h = (x[:height] for x in upsample_tiles.source_cells(grid_h, windows.size[0], rounded))
    left, right, w = (
        torch.from_numpy(x)[:width] for x in upsample_tiles.source_cells(grid_w, windows.size[1], rounded)
    )
    cuts = np.flatnonzero((np.diff(low) != 0) | (np.diff(high) != 0)) + 1  # rows of pixels at which mask rows change
    h, w = torch.from_numpy(h)[:, None, None], w[:, None]
    rest_h, rest_w = 1 - h, 1 - w
    count = _covering(windows.tops, height, H)[:, None] * _covering(windows.lefts, width, W)
    most = max(1, min(DENSE_BYTES // (W * n_cls * 4), windows.size[0] // grid_h))
    together = max(1, CHUNK_VALUES // (most * width * n_cls))  # windows: small ones cost calls more than arithmetic
    scratch = torch.empty(min(together, len(windows.lefts)), most, width, n_cls)
    total = torch.empty(most, W, n_cls)
    upsampled: dict[int, tuple[int, torch.Tensor]] = {}  # row of windows -> first mask row, (n_x, rows, width, n_cls)

    def mask_rows(i: int, first: int, last: int) -> torch.Tensor:
        """Mask rows first..last of the i-th row of windows, as wide as these; earlier ones are forgotten."""
        begin, rows = upsampled.get(i, (first, masks.new_empty(len(windows.lefts), 0, width, n_cls)))
        if begin + rows.shape[1] < last:
            cells = masks[i, :, max(begin + rows.shape[1], first) : last]
            more = torch.addcmul(w * cells[:, :, right], rest_w, cells[:, :, left])
            begin, rows = first, torch.cat([rows[:, first - begin :], more], 1)
            upsampled[i] = begin, rows
        return rows[:, first - begin :]

    for begin in range(top, bottom, most):
        stop = min(begin + most, bottom)
        best = total[: stop - begin].zero_()
        for i, anchor in enumerate(windows.tops):
            y, end = max(begin - anchor, 0), min(stop - anchor, height)
            if y >= end:
                upsampled.pop(i, None)
                continue
            rows = mask_rows(i, low[y], high[end - 1] + 1)
            edges = [y, *cuts[(cuts > y) & (cuts < end)], end]
            for a, b in itertools.pairwise(edges):
                here = best[a + anchor - begin : b + anchor - begin]
                above, below = (rows[:, cells[a] - low[y], None] for cells in (low, high))
                for j in range(0, len(rows), together):
                    values = scratch[: min(together, len(rows) - j), : b - a]
                    torch.mul(below[j : j + together], h[a:b], out=values)
                    torch.addcmul(values, above[j : j + together], rest_h[a:b], out=values)
                    for window, x in zip(values, windows.lefts[j:], strict=False):
                        here[:, x : x + width] += window
        if len(view.masks) > 1:
            best.div_(count[begin:stop, :, None])
        labels[begin:stop] = best.argmax(-1)


def _covering(anchors: Sequence[int], window: int, length: int) -> torch.Tensor:
    """How many windows cover each pixel of an axis: float32 (length,)."""
    starts = torch.tensor(anchors)
    changes = torch.zeros(length + 1)
    changes[starts] += 1
    changes[starts + window] -= 1
    return changes[:-1].cumsum(0)


class _Strip:
    """The tiles of tile rows begin..stop, and which classes can win in each.

    Args:
        winners, clear: (mask cells,) the best class of each, and whether no other is about as good.
    """

    def __init__(
        self,
        view: View,
        rows: upsample_tiles.Axis,
        cols: upsample_tiles.Axis,
        begin: int,
        stop: int,
        winners: torch.Tensor,
        clear: torch.Tensor,
    ):
        self.view, self.rows, self.cols, self.begin, self.stop = view, rows, cols, begin, stop
        self.shape = (stop - begin, len(cols.first))
        self.constant = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.long)  # labels of tiles with one class
        self.parts = []  # (tiles, their candidates (T, n_cls), how they combine windows) of the others
        for tiles, corners in self._kinds():
            at = winners[corners.cells]  # (4 windows, T)
            self.constant[tiles] = at[0]
            mixed = torch.nonzero(~((at == at[0]) & clear[corners.cells]).all(0))[:, 0]
            if len(mixed):
                corners = corners.of(mixed)
                self.parts.append((tiles[mixed], corners.candidates(at[:, mixed]), corners))
        self.n_candidates = sum(int(candidates.sum()) for _, candidates, _ in self.parts)

    def _kinds(self) -> Iterator[tuple[torch.Tensor, "_Corners"]]:
        """The tiles, by how many windows cover them: (flat indices, corners)."""
        counts_y, counts_x = self.rows.count[self.begin : self.stop], self.cols.count
        for n_y in np.unique(counts_y):
            for n_x in np.unique(counts_x):
                y, x = np.flatnonzero(counts_y == n_y), np.flatnonzero(counts_x == n_x)
                tiles = (y[:, None] * self.shape[1] + x).ravel()
                at = (self.begin + np.repeat(y, len(x)), np.tile(x, len(y)))
                yield torch.from_numpy(tiles), _Corners(self.view, self.rows, self.cols, *at)

    def labels(self, dtype: torch.dtype) -> torch.Tensor:
        """Labels of the pixels of the strip."""
        (n_rows, n_cols), height, width = self.shape, self.rows.longest, self.cols.longest
        pixels = self.constant.to(dtype).repeat(height, width, 1)
        for tiles, candidates, corners in self.parts:
            counts = candidates.sum(-1)
            order = counts.argsort(descending=True)  # so that those with a further candidate come first
            for chunk in order.split(max(1, CHUNK_PIXELS // (height * width))):
                pixels[..., tiles[chunk]] = _best(corners.of(chunk), candidates[chunk], dtype)
        pixels = pixels.view(height, width, n_rows, n_cols).permute(2, 0, 3, 1).reshape(n_rows * height, -1)
        return pixels[_places(self.rows, self.begin, self.stop)][:, _places(self.cols, 0, n_cols)]


def _best(corners: "_Corners", candidates: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The best of the candidates (T, n_cls) at every pixel of T tiles, most candidates first: (height, width, T)."""
    counts = candidates.sum(-1)
    classes = candidates.nonzero()[:, 1]  # tile after tile, ascending
    offsets = counts.cumsum(0) - counts
    best = corners.logits(classes[offsets])
    label = classes[offsets].to(dtype).repeat(*best.shape[:2], 1)
    for rank in range(1, int(counts[0])):
        n = int((counts > rank).sum())
        here = classes[offsets[:n] + rank]
        values = corners.logits(here)
        label[..., :n] = torch.where(values > best[..., :n], here.to(dtype), label[..., :n])  # equals: the lowest wins
        torch.maximum(best[..., :n], values, out=best[..., :n])
    return label


def _places(axis: upsample_tiles.Axis, begin: int, stop: int) -> torch.Tensor:
    """Where the pixels of intervals begin..stop are when every interval is given the length of the longest."""
    lengths = np.diff(axis.starts[begin : stop + 1])
    offsets = np.repeat(np.arange(stop - begin) * axis.longest, lengths)
    within = np.arange(lengths.sum()) - np.repeat(axis.starts[begin:stop] - axis.starts[begin], lengths)
    return torch.from_numpy(offsets + within)


class _Corners:
    """The mask cells around T tiles that equally many windows cover, and the weights of the tiles' pixels.

    Attributes:
        cells: (4 windows, T) mask cells; of each window upper left, upper right, lower left, lower right.
        weights: of each window (height, T) of the lower and (width, T) of the right cells.
    """

    def __init__(self, view: View, rows: upsample_tiles.Axis, cols: upsample_tiles.Axis, y: np.ndarray, x: np.ndarray):
        self.masks = view.masks
        _, grid_h, grid_w, _ = view.masks.shape
        cells, self.weights = [], []
        for slot_y in range(rows.count[y[0]]):
            for slot_x in range(cols.count[x[0]]):
                window = (rows.first[y] + slot_y) * len(view.windows.lefts) + cols.first[x] + slot_x
                cells += [
                    (window * grid_h + cell_y[slot_y, y]) * grid_w + cell_x[slot_x, x]
                    for cell_y in (rows.low, rows.high)
                    for cell_x in (cols.low, cols.high)
                ]
                self.weights.append((_weights(rows, slot_y, y), _weights(cols, slot_x, x)))
        self.cells = torch.from_numpy(np.stack(cells))

    def of(self, tiles: torch.Tensor) -> "_Corners":
        """Those of some of the tiles."""
        other = object.__new__(_Corners)
        other.masks, other.cells = self.masks, self.cells[:, tiles]
        other.weights = [(h[:, tiles], w[:, tiles]) for h, w in self.weights]
        return other

    def candidates(self, winners: torch.Tensor) -> torch.Tensor:
        """Classes that can win somewhere in each tile, given some classes (n, T): bool (T, n_cls).

        At every pixel the best class is at least the mean of the given ones. A class that is below it at every corner
        of every window is below it everywhere.
        """
        masks = self.masks.flatten(0, 2)
        excess: torch.Tensor | float = 0.0
        for window in self.cells.split(4):
            most = None
            for cells in window:
                values = masks[cells]  # (T, n_cls)
                given = values.gather(1, winners.T)
                bar = given.mean(1) - given.abs().mean(1) * upsample_tiles.ROUNDING - upsample_tiles.SUBNORMAL
                above = values + values.abs().mul_(upsample_tiles.ROUNDING) - bar[:, None]
                most = above if most is None else torch.maximum(most, above, out=most)
            excess = most + excess
        return ~(excess < 0)  # with NaN all classes are left, so that there is one

    def logits(self, classes: torch.Tensor) -> torch.Tensor:
        """Class `classes[t]` at the pixels of tile t, for the first len(classes) tiles: (height, width, T)."""
        n, total = len(classes), None
        masks, n_cls = self.masks.view(-1), self.masks.shape[-1]
        for window, (h, w) in zip(self.cells.split(4), self.weights, strict=True):
            v00, v01, v10, v11 = masks[window[:, :n] * n_cls + classes]
            h, w = h[:, None, :n], w[:, :n]
            # addcmul rounds once, as the fused multiply-add of F.interpolate
            top = torch.addcmul(w * v01, 1 - w, v00)
            bottom = torch.addcmul(w * v11, 1 - w, v10)
            values = torch.addcmul(h * bottom, 1 - h, top)
            total = values if total is None else total.add_(values)
        return total if len(self.weights) == 1 else total.div_(len(self.weights))


def _weights(axis: upsample_tiles.Axis, slot: int, intervals: np.ndarray) -> torch.Tensor:
    """(longest, T) weights of the pixels of T intervals; beyond an interval's end those of some other pixel."""
    pixels = np.minimum(axis.starts[intervals] + np.arange(axis.longest)[:, None], axis.length - 1)
    return torch.from_numpy(axis.weight[slot][pixels])
