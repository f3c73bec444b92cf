"""Scores a few rows at a time, from the low-resolution masks of windows.

The published code upsamples every window to full resolution, averages the windows into one (n_cls, H, W) map, resizes
it to the original size and applies a softmax. Each of those steps works on rows, so the same numbers can be had a few
rows at a time. `View.rows` is that computation; `bands` goes through a picture with it.
Scores are kept class-last here: on a CPU, upsampling and argmax are then several times faster.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

# Rows per band are chosen so that a band of scores has about this many bytes: small enough for a CPU's last cache,
# large enough to keep a GPU busy.
BAND_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}


@dataclass
class View:
    """Low-resolution masks of all windows of one image at one scale.

    Attributes:
        masks: (rows * columns of windows, gh, gw, n_cls) float32 logits, class last.
        tops, lefts: window starts in pixels; windows are ordered row by row.
        size: (h, w) in pixels that the masks of a window are upsampled to.
        window: (h, w) of a window; what `size` has more is padding.
        shape: (H, W) of the resized image that the windows cut. flip: the image was mirrored left to right.
    """

    masks: torch.Tensor
    tops: Sequence[int]
    lefts: Sequence[int]
    size: tuple[int, int]
    window: tuple[int, int]
    shape: tuple[int, int]
    flip: bool = False
    _buffers: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def rows(self, top: int, bottom: int, ori_shape: tuple[int, int]) -> torch.Tensor:
        """Logits of rows top..bottom of the image at `ori_shape` (H0, W0), mirrored back: (bottom - top, W0, n_cls).

        The result may lie in a buffer that the next call overwrites.
        """
        H, W = self.shape
        if ori_shape[0] == H:
            logits = self._merged_rows(top, bottom)
        else:
            low, high, weight = _source_rows(top, bottom, H, ori_shape[0], self.masks.device)
            # a row more than needed at either end, where the host may round otherwise; asking the device would wait
            first = max(0, int(H / ori_shape[0] * (top + 0.5) - 0.5) - 1)
            merged = self._merged_rows(first, min(H, int(H / ori_shape[0] * (bottom - 0.5) - 0.5) + 3))
            logits = _lerp(merged, low - first, high - first, weight)
        if ori_shape[1] != W:
            logits = self._resize_width(logits, ori_shape[1], "resized")
        return logits.flip(1) if self.flip else logits

    def _merged_rows(self, top: int, bottom: int) -> torch.Tensor:
        """Rows top..bottom of the average of all windows at the resized size: (bottom - top, W, n_cls)."""
        (height, width), W = self.window, self.shape[1]
        if len(self.masks) == 1:
            return self._window_rows(0, top, bottom)
        merged = self._buffer("merged", bottom - top, W).zero_()
        count = self.masks.new_zeros(bottom - top, W, 1)
        for i, window_top in enumerate(self.tops):
            start, stop = max(top, window_top), min(bottom, window_top + height)
            if start >= stop:
                continue
            here = slice(start - top, stop - top)
            for j, left in enumerate(self.lefts):
                window = i * len(self.lefts) + j
                merged[here, left : left + width] += self._window_rows(window, start - window_top, stop - window_top)
                count[here, left : left + width] += 1
        return merged.div_(count)

    def _window_rows(self, window: int, top: int, bottom: int) -> torch.Tensor:
        """Rows top..bottom of one upsampled window: (bottom - top, window's width, n_cls)."""
        masks = self.masks[window]
        rows = _lerp(masks, *_source_rows(top, bottom, len(masks), self.size[0], masks.device))
        return self._resize_width(rows, self.size[1], "window")[:, : self.window[1]]

    def _resize_width(self, x: torch.Tensor, width: int, buffer: str) -> torch.Tensor:
        """Bilinear resize of the middle axis of (rows, W, n_cls), in class-last memory: the fast path on a CPU."""
        out = self._buffer(buffer, x.shape[0], width)
        # unsqueezed first, so that the strides are those that torch takes for channels_last: else it copies in and out
        source, target = x[None].permute(0, 3, 1, 2), out[None].permute(0, 3, 1, 2)
        torch.ops.aten.upsample_bilinear2d.out(source, target.shape[2:], False, None, None, out=target)
        return out

    def _buffer(self, name: str, rows: int, width: int) -> torch.Tensor:
        """Uninitialised (rows, width, n_cls), reused: on a CPU fresh pages cost more than what is written to them."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape[0] < rows or buffer.shape[1] != width:
            with torch.inference_mode(False):  # a tensor of inference mode could not be written to outside it
                buffer = self._buffers[name] = torch.empty(rows, width, self.masks.shape[-1], device=self.masks.device)
        return buffer[:rows]


def bands(
    views: Sequence[View], ori_shape: tuple[int, int], probabilities: bool, top: int = 0, bottom: int | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """Scores of the views' rows top..bottom, a few at a time: yields (first row, scores (rows, W0, n_cls)).

    Scores are the mean softmax over views if `probabilities` or if there are several views; else the logits. Each band
    may overwrite the one before.
    """
    masks = views[0].masks
    # an enlarged picture needs several rows of a view for each row of the result
    pixels_per_row = max(max(1, v.shape[0] / ori_shape[0]) * max(v.shape[1], ori_shape[1]) for v in views)
    bytes_per_row = math.ceil(pixels_per_row) * masks.shape[-1] * 4
    n_rows = max(1, BAND_BYTES.get(masks.device.type, BAND_BYTES["cuda"]) // bytes_per_row)
    end = ori_shape[0] if bottom is None else bottom
    for first in range(top, end, n_rows):
        last = min(first + n_rows, end)
        if len(views) == 1 and not probabilities:
            yield first, views[0].rows(first, last, ori_shape)
            continue
        scores = views[0].rows(first, last, ori_shape).softmax(-1)
        for view in views[1:]:
            scores += view.rows(first, last, ori_shape).softmax(-1)
        yield first, scores.div_(len(views))


def _source_rows(
    top: int, bottom: int, n_in: int, n_out: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For output rows top..bottom of a bilinear resize n_in -> n_out: the two source rows and the second's weight.

    The arithmetic of F.interpolate(align_corners=False), in float32 as there.
    """
    # full, not tensor: a copy from the host could not be captured in a CUDA graph
    scale = torch.full((), n_in / n_out, dtype=torch.float32, device=device)
    source = scale * (torch.arange(top, bottom, device=device, dtype=torch.float32) + 0.5) - 0.5
    source = source.clamp_(min=0)
    low = source.long()
    high = (low + 1).clamp_(max=n_in - 1)
    return low, high, source - low


def _lerp(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows low * (1 - weight) + high * weight of x (rows, W, n_cls)."""
    weight = weight[:, None, None]
    return x[low] * (1 - weight) + x[high] * weight
