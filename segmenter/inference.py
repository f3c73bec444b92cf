"""From a normalised image to scores: the published resize rule, sliding windows and merging, computed in bands.

The published code upsamples every window to full resolution, averages the windows into one (n_cls, H, W) map, resizes
it to the original size and applies a softmax. Each of those steps works on rows, so the same numbers can be had a few
rows at a time from the low-resolution masks. `View.rows` is that computation; `inference` puts the bands together
into the full map, and `segmenter.segment` takes the labels of each band and never holds the map.
Scores are kept class-last here: on a CPU, upsampling and argmax are then several times faster.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

MAX_RESIZED_PIXELS = 100_000_000
# Rows per band are chosen so that a band of scores has about this many bytes: small enough for a CPU's last cache,
# large enough to keep a GPU busy.
BAND_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}


def resized_shape(h: int, w: int, window_size: int) -> tuple[int, int]:
    """Size to run an image at: the short side is brought up to `window_size`, never down. The long side truncates."""
    if min(h, w) >= window_size:
        return h, w
    return (window_size, int(w / h * window_size)) if h < w else (int(h / w * window_size), window_size)


def resize(im: torch.Tensor, window_size: int) -> torch.Tensor:
    """Applies `resized_shape` to (B, C, h, w) with bilinear interpolation.

    Raises:
        ValueError: the result would have more than MAX_RESIZED_PIXELS, which only very long thin pictures reach.
    """
    h, w = im.shape[-2:]
    shape = resized_shape(h, w, window_size)
    return resize_to(im, shape, f"to fill a window of {window_size}; pad or cut it, or use a smaller window_size")


def resize_to(im: torch.Tensor, shape: tuple[int, int], why: str) -> torch.Tensor:
    """Bilinear resize of (B, C, h, w) to `shape`, larger or smaller; `im` itself if it has that shape.

    Raises:
        ValueError: it would grow beyond MAX_RESIZED_PIXELS; the message ends with `why`.
    """
    h, w = im.shape[-2:]
    if shape == (h, w):
        return im
    if shape[0] * shape[1] > max(MAX_RESIZED_PIXELS, h * w):
        raise ValueError(f"a picture of {w}x{h} would be enlarged to {shape[1]}x{shape[0]} {why}")
    return F.interpolate(im, shape, mode="bilinear", align_corners=False)


def window_anchors(length: int, window_size: int, window_stride: int) -> list[int]:
    """Starts of the windows along one axis: multiples of the stride, and one window flush with the end."""
    if length < window_size:
        raise ValueError(f"length {length} is smaller than the window {window_size}")
    if window_stride < 1:
        raise ValueError(f"window_stride must be at least 1, got {window_stride}")
    if window_stride > window_size:
        raise ValueError(f"window_stride {window_stride} beyond window_size {window_size} would leave pixels out")
    return [*range(0, length - window_size, window_stride), length - window_size]


@dataclass
class View:
    """Low-resolution masks of all windows of one image at one scale.

    Attributes:
        masks: (rows * columns of windows, g, g, n_cls) float32 logits, class last.
        tops, lefts: window starts in pixels; windows are ordered row by row.
        shape: (H, W) of the resized image that the windows cut.
        window_size: pixels; may be smaller than g * patch_size, whose rest is padding.
        patch_size: pixels a mask cell. flip: the image was mirrored left to right.
    """

    masks: torch.Tensor
    tops: list[int]
    lefts: list[int]
    shape: tuple[int, int]
    window_size: int
    patch_size: int
    flip: bool
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
            first = int(low[0])
            merged = self._merged_rows(first, int(high[-1]) + 1)
            logits = _lerp(merged, low - first, high - first, weight)
        if ori_shape[1] != W:
            logits = self._resize_width(logits, ori_shape[1], "resized")
        return logits.flip(1) if self.flip else logits

    def _merged_rows(self, top: int, bottom: int) -> torch.Tensor:
        """Rows top..bottom of the average of all windows at the resized size: (bottom - top, W, n_cls)."""
        size, W = self.window_size, self.shape[1]
        if len(self.masks) == 1:
            return self._window_rows(0, top, bottom)
        merged = self._buffer("merged", bottom - top, W).zero_()
        count = self.masks.new_zeros(bottom - top, W, 1)
        for i, window_top in enumerate(self.tops):
            start, stop = max(top, window_top), min(bottom, window_top + size)
            if start >= stop:
                continue
            here = slice(start - top, stop - top)
            for j, left in enumerate(self.lefts):
                window = i * len(self.lefts) + j
                merged[here, left : left + size] += self._window_rows(window, start - window_top, stop - window_top)
                count[here, left : left + size] += 1
        return merged.div_(count)

    def _window_rows(self, window: int, top: int, bottom: int) -> torch.Tensor:
        """Rows top..bottom of one upsampled window: (bottom - top, window_size, n_cls)."""
        masks = self.masks[window]
        grid_h, grid_w, _ = masks.shape
        rows = _lerp(masks, *_source_rows(top, bottom, grid_h, grid_h * self.patch_size, masks.device))
        return self._resize_width(rows, grid_w * self.patch_size, "window")[:, : self.window_size]

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


def predict_view(
    model: torch.nn.Module, im: torch.Tensor, flip: bool, window_size: int, window_stride: int, batch_size: int
) -> View:
    """Runs the model over the windows of one image.

    Args:
        model: has `masks(im)`, `patch_size`. im: (1, 3, h, w), normalised, on the model's device.
        flip: im is mirrored left to right. window_size, window_stride: pixels. batch_size: windows a forward call.
    Raises:
        ValueError: sizes that make no sense, or scores that are not finite (float16 overflows with large weights).
    """
    if im.ndim != 4 or im.shape[0] != 1:
        raise ValueError(f"expected one image (1, 3, h, w), got {tuple(im.shape)}")
    if window_size < 1 or batch_size < 1:
        raise ValueError(f"window_size and batch_size must be at least 1, got {window_size} and {batch_size}")
    im = resize(im, window_size).to(next(model.parameters()).dtype)
    H, W = im.shape[-2:]
    tops = window_anchors(H, window_size, window_stride)
    lefts = window_anchors(W, window_size, window_stride)
    anchors = [(top, left) for top in tops for left in lefts]
    masks = []
    with torch.inference_mode():
        for i in range(0, len(anchors), batch_size):
            crops = [
                im[0, :, top : top + window_size, left : left + window_size]
                for top, left in anchors[i : i + batch_size]
            ]
            masks.append(model.masks(torch.stack(crops)).float().permute(0, 2, 3, 1))
        all_masks = torch.cat(masks).contiguous()
    if not torch.isfinite(all_masks).all():
        raise ValueError(
            "the network gave NaN or infinite scores; in float16 try bfloat16 or float32, else the weights"
        )
    return View(all_masks, tops, lefts, (H, W), window_size, model.patch_size, flip)


def bands(views: Sequence[View], ori_shape: tuple[int, int], probabilities: bool) -> Iterator[tuple[int, torch.Tensor]]:
    """Scores of the views, a few rows at a time: yields (first row, scores (rows, W0, n_cls)).

    Scores are the mean softmax over views if `probabilities` or if there are several views; else the logits. Each band
    may overwrite the one before.
    """
    masks = views[0].masks
    # an enlarged picture needs several rows of a view for each row of the result
    pixels_per_row = max(max(1, v.shape[0] / ori_shape[0]) * max(v.shape[1], ori_shape[1]) for v in views)
    bytes_per_row = math.ceil(pixels_per_row) * masks.shape[-1] * 4
    n_rows = max(1, BAND_BYTES.get(masks.device.type, BAND_BYTES["cuda"]) // bytes_per_row)
    for top in range(0, ori_shape[0], n_rows):
        bottom = min(top + n_rows, ori_shape[0])
        if len(views) == 1 and not probabilities:
            yield top, views[0].rows(top, bottom, ori_shape)
            continue
        scores = views[0].rows(top, bottom, ori_shape).softmax(-1)
        for view in views[1:]:
            scores += view.rows(top, bottom, ori_shape).softmax(-1)
        yield top, scores.div_(len(views))


def inference(
    model: torch.nn.Module,
    ims: Sequence[torch.Tensor],
    ims_metas: Sequence[dict[str, Any]],
    ori_shape: tuple[int, int],
    window_size: int,
    window_stride: int,
    batch_size: int,
) -> torch.Tensor:
    """Class probabilities of one picture given at one or more scales, as the published `inference`.

    Args:
        model: a `Segmenter`, in evaluation mode. ims: (1, 3, h, w) each, normalised.
        ims_metas: a dict with "flip" (bool: this image is mirrored left to right) for each image.
        ori_shape: (H0, W0) of the result. window_size, window_stride: pixels. batch_size: windows a forward call.
    Returns:
        (n_cls, H0, W0) float32: softmax per image, averaged over images.
    """
    if not ims or len(ims) != len(ims_metas):
        raise ValueError(
            f"need one ims_metas entry for each of at least one image, got {len(ims_metas)} and {len(ims)}"
        )
    ori_shape = (int(ori_shape[0]), int(ori_shape[1]))
    device = next(model.parameters()).device
    views = [
        predict_view(model, im.to(device), bool(meta["flip"]), window_size, window_stride, batch_size)
        for im, meta in zip(ims, ims_metas, strict=True)
    ]
    result = torch.empty(views[0].masks.shape[-1], *ori_shape, device=device)
    for top, scores in bands(views, ori_shape, probabilities=True):
        result[:, top : top + len(scores)] = scores.permute(2, 0, 1)
    return result


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
